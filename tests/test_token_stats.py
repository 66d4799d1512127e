"""The public function: the contract that holds on every backend, and its errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import assert_as_good_as_plain, make_problem, plain_stats, relative_error

import prefopt_fast as pf


def test_reference_agrees_with_the_textbook():
    """Against statistics written out token by token, so that the truth itself is tested against something."""
    hidden, weight, targets = make_problem(5, 7, 3, torch.float64)
    stats = pf.reference.token_logprobs(hidden, pf.LMHead(weight), targets, stats=pf.STATS)
    for t in range(5):
        logits = [float(hidden[t] @ weight[v]) for v in range(7)]
        exps = [torch.tensor(z, dtype=torch.float64).exp() for z in logits]
        probs = torch.stack(exps) / sum(exps)
        truth = {
            "logprobs": probs[targets[t]].log(),
            "log_sum_sq_probs": probs.square().sum().log(),
            "max_logprob": probs.max().log(),
            "entropy": -(probs * probs.log()).sum(),
            "mean_logit": torch.tensor(logits, dtype=torch.float64).mean(),
            "is_top1": torch.tensor(logits[targets[t]] == max(logits)),
            "logsumexp": sum(exps).log(),
        }
        for name, value in truth.items():
            assert torch.allclose(getattr(stats, name)[t].double(), value.double(), rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 4.0},
        {"logit_scale": 0.25, "temperature": 0.7},
        {"bias": True, "softcap": 9.0, "temperature": 2.0},
    ],
    ids=["plain", "softcap", "scaled", "all"],
)
def test_statistics_and_gradients(dtype, options):
    hidden, weight, targets = make_problem(33, 101, 16, dtype)
    bias = torch.randn(101, dtype=torch.float64).to(dtype) if options.get("bias") else None
    targets[::5] = -100
    upstream = torch.randn(33)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    head = pf.LMHead(weight, **(options | {"bias": bias}))

    ours = pf.token_logprobs(hidden, head, targets, stats=pf.STATS, grad_tolerance=0.0)
    truth = pf.reference.token_logprobs(hidden, head, targets, stats=pf.STATS)
    plain = plain_stats(hidden, head, targets)
    for name in plain:
        factor = 4.0 if dtype == torch.float64 else 2.0  # plain torch is the truth itself in float64
        assert_as_good_as_plain(getattr(ours, name), plain[name], getattr(truth, name), factor, name=name)
    assert torch.equal(ours.mask, targets != -100)
    assert ours.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (ours.logprobs[~ours.mask] == 0).all() and (ours.logprobs <= 0).all()

    ours_grads, true_grads, plain_grads = (
        torch.autograd.grad((logprobs * upstream).sum(), leaves)
        for logprobs in (ours.logprobs, truth.logprobs, plain["logprobs"])
    )
    for name, *grads in zip(("hidden", "weight", "bias"), ours_grads, plain_grads, true_grads, strict=False):
        assert_as_good_as_plain(*grads, name=name)


def test_shapes_follow_the_targets():
    hidden, weight, targets = make_problem(24, 50, 8)
    flat = pf.token_logprobs(hidden, pf.LMHead(weight), targets)
    for shape in ((4, 6), (2, 3, 4), (24, 1)):
        stats = pf.token_logprobs(hidden.view(*shape, 8), pf.LMHead(weight), targets.view(shape), stats=("entropy",))
        assert stats.logprobs.shape == stats.entropy.shape == stats.mask.shape == shape
        assert torch.equal(stats.logprobs.flatten(), flat.logprobs)
        assert stats.max_logprob is None


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_targets_of_narrow_types(backend):
    """Which hold neither the vocabulary's size nor ignore_index: 156 is −100 in 8 bits."""
    hidden, weight, targets = make_problem(3, 256, 8)
    targets[0] = 156
    wide, narrow = (
        pf.token_logprobs(hidden, pf.LMHead(weight), ids, backend=backend) for ids in (targets, targets.byte())
    )
    assert torch.equal(wide.logprobs, narrow.logprobs) and narrow.mask.all()
    pair = (hidden, pf.LMHead(weight), hidden, pf.LMHead(weight.flip(0)))
    ratios = [pf.token_log_ratio(*pair, ids, backend=backend).ratio for ids in (targets, targets.byte())]
    assert torch.equal(*ratios) and ratios[0].all()


def test_statistics_are_detached_and_logprobs_are_not():
    hidden, weight, targets = make_problem(4, 9, 3)
    stats = pf.token_logprobs(hidden.requires_grad_(), pf.LMHead(weight), targets, stats=pf.STATS)
    assert stats.logprobs.requires_grad
    assert not any(getattr(stats, name).requires_grad for name in pf.STATS)


def test_autocast_casts_as_the_models_own_head_would():
    hidden, weight, targets = make_problem(12, 40, 8)
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = pf.token_logprobs(hidden, pf.LMHead(weight), targets, grad_tolerance=0.0).logprobs
    by_hand = pf.token_logprobs(hidden.bfloat16(), pf.LMHead(weight.bfloat16()), targets, grad_tolerance=0.0).logprobs
    assert torch.equal(ours, by_hand)
    grad = torch.autograd.grad(ours.sum(), hidden)[0]
    assert grad.dtype == torch.float32


def test_auto_tolerance_is_that_of_the_product():
    """Under autocast hidden states in float32 meet the head in bfloat16, which decides."""
    hidden, weight, targets = make_problem(40, 3000, 8)
    hidden.requires_grad_()

    def gradient(tolerance):
        stats = pf.token_logprobs(hidden, pf.LMHead(weight), targets, grad_tolerance=tolerance)
        return torch.autograd.grad(stats.logprobs.sum(), hidden)[0], stats.grad_report

    state = torch.get_rng_state()
    assert gradient("auto")[1] is None and torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, report = gradient("auto")
        torch.set_rng_state(state)
        expected, _ = gradient(2.0**-8)
    assert report is not None and torch.equal(ours, expected)


def test_draws_differ_by_call():
    """Without a seed: else what one draw gets wrong all would, and no average over steps would end it."""
    hidden, weight, targets = make_problem(40, 3000, 8)
    hidden.requires_grad_()

    def gradient(seed=None):
        stats = pf.token_logprobs(hidden, pf.LMHead(weight), targets, grad_tolerance=2.0**-4, seed=seed)
        assert stats.grad_report.dense_chunks == 0
        return torch.autograd.grad(stats.logprobs.sum(), hidden)[0]

    torch.manual_seed(0)
    first, second = gradient(), gradient()
    torch.manual_seed(0)
    assert torch.equal(gradient(), first) and not torch.equal(first, second)
    assert torch.equal(gradient(seed=3), gradient(seed=3))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float32), ("torch", torch.float64), ("triton", torch.float32)],
    ids=["torch", "torch in float64", "triton"],
)
def test_masked_vocabulary_entries(backend, dtype, device):
    """A bias of −inf leaves what there would be without those rows, also where it fills whole tiles."""
    hidden, weight, targets = make_problem(20, 300, 32, dtype, device)
    kept = torch.ones(300, dtype=torch.bool, device=device)
    kept[[5, 77]] = kept[150:] = False
    targets = kept.nonzero().squeeze(-1)[targets % int(kept.sum())]
    bias = torch.zeros(300, dtype=dtype, device=device).masked_fill(~kept, -torch.inf)
    stats = ("log_sum_sq_probs", "max_logprob", "entropy", "logsumexp")
    hidden.requires_grad_()
    found = pf.token_logprobs(hidden, pf.LMHead(weight, bias), targets, stats, backend=backend)
    truth = pf.reference.token_logprobs(hidden, pf.LMHead(weight[kept]), kept.cumsum(0)[targets] - 1, stats)
    for name in ("logprobs", *stats):
        assert relative_error(getattr(found, name), getattr(truth, name)) < 1e-5, name
    grads = (torch.autograd.grad(values.logprobs.sum(), hidden)[0] for values in (found, truth))
    assert relative_error(*grads) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": torch.zeros(3, 5)},
            r"hidden \(3, 5\).*targets' shape \(4,\).*hidden size 3 of head.weight \(9, 3\)",
        ),
        ({"hidden": torch.zeros(4, 3, dtype=torch.long)}, "hidden must be floating point, found torch.int64"),
        ({"hidden": torch.zeros(4, 3, dtype=torch.float16)}, "one dtype, found torch.float16 and torch.float32"),
        ({"targets": torch.zeros(4)}, r"targets must be integer token ids .*found torch.float32"),
        ({"targets": torch.tensor([0, 9, -1, 12])}, r"targets must be in \[0, 9\).*3 are not, from -1 to 12"),
        ({"stats": ("entropy", "perplexity")}, r"stats must be a tuple of log_sum_sq_probs, .*found \['perplexity'\]"),
        ({"targets": torch.zeros(4, dtype=torch.uint16)}, "targets must be integer token ids .*found torch.uint16"),
        (
            {"head": pf.LMHead(torch.zeros(9, 3), torch.zeros(9, device="meta"))},
            "must be on one device, found .*head.bias on meta",
        ),
        ({"stats": "entropy"}, "stats must be a tuple"),
        ({"backend": "cuda"}, "backend must be one of auto, torch, triton, reference; found 'cuda'"),
        ({"grad_tolerance": "fast"}, "grad_tolerance must be"),
        ({"grad_tolerance": (0.1, -1.0)}, "grad_tolerance must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change, message):
    hidden, weight, targets = make_problem(4, 9, 3)
    arguments = {"hidden": hidden, "head": pf.LMHead(weight), "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        pf.token_logprobs(**arguments)


def test_non_finite_hidden_states_are_found_where_asked():
    hidden, weight, targets = make_problem(4, 9, 3)
    hidden[2, 1] = float("nan")
    assert pf.token_logprobs(hidden, pf.LMHead(weight), targets).logprobs[2].isnan()
    with pf.check_inputs(), pytest.raises(ValueError, match="hidden has NaN or Inf at 1 of 4 positions"):
        pf.token_logprobs(hidden, pf.LMHead(weight), targets)


def test_import_needs_torch_alone():
    code = (
        "import sys, prefopt_fast; "
        "print([m for m in ('triton', 'transformers', 'accelerate', 'trl', 'datasets', 'peft') if m in sys.modules])"
    )
    ours = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    torch_alone = subprocess.run(
        [sys.executable, "-c", code.replace("prefopt_fast", "torch")], capture_output=True, text=True, check=True
    ).stdout
    assert ours == torch_alone


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_second_derivatives_are_refused(backend):
    """Also where the upstream gradient is constant, as that of a sum: they would lack this function's part."""
    hidden, weight, targets = make_problem(4, 9, 3)
    hidden.requires_grad_()
    weight.requires_grad_()
    nll = -pf.token_logprobs(hidden, pf.LMHead(weight), targets, backend=backend).logprobs.sum()
    (grad,) = torch.autograd.grad(nll, hidden, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.autograd.grad(nll + grad.square().sum(), weight)

    def loss(hidden):
        return -pf.token_logprobs(hidden, pf.LMHead(weight), targets, backend=backend).logprobs.sum()

    checkpointed = torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=False)
    (again,) = torch.autograd.grad(checkpointed, hidden, create_graph=True)
    assert torch.equal(again, grad)
