"""The torch path against float64: dtypes, chunk borders, extreme logits, memory, and life inside autograd."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import assert_as_good_as_plain, make_problem, make_text_like, plain_stats, relative_error
from prefopt_fast.kernels import cpu_passes, torch_backend
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import prefopt_fast as pf


def logprobs(hidden, head, targets, grad_tolerance=0.0, **options):
    return pf.token_logprobs(hidden, head, targets, grad_tolerance=grad_tolerance, backend="torch", **options)


@pytest.fixture(params=["compiled", "torch"])
def small_chunks(request, monkeypatch):
    """Chunk and tile borders at the sizes of a test, with the passes in C and without."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_passes, "MAX_THREADS", 0)
    elif cpu_passes.library() is None:
        pytest.skip("no C compiler")
    for name in ("EXACT_CHUNK", "SAMPLED_CHUNK", "SAMPLED_GROUP", "SMALLEST_CHUNK"):
        monkeypatch.setattr(torch_backend, name, 16)
    monkeypatch.setitem(torch_backend.TILE_ELEMENTS, "cpu", 1024)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("vocab", [64, 65, 300])
def test_chunk_and_tile_borders(n, vocab, small_chunks):
    hidden, weight, targets = make_problem(n, vocab, 12)
    targets[0] = vocab - 1
    hidden.requires_grad_(), weight.requires_grad_()
    ours, plain, truth = (
        (lambda stats: [stats["logprobs"], *torch.autograd.grad(stats["logprobs"].sum(), (hidden, weight))])(stats)
        for stats in (
            vars(logprobs(hidden, pf.LMHead(weight), targets)),
            plain_stats(hidden, pf.LMHead(weight), targets),
            vars(pf.reference.token_logprobs(hidden, pf.LMHead(weight), targets)),
        )
    )
    for values in zip(ours, plain, truth, strict=True):
        assert_as_good_as_plain(*values, factor=3.0)


@pytest.mark.parametrize("probs_bytes", [0, 15_000, 1 << 30], ids=["recomputed", "both", "kept"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_exact_gradients(dtype, softcap, probs_bytes, small_chunks, monkeypatch):
    monkeypatch.setattr(torch_backend, "PROBS_BYTES", probs_bytes)
    hidden, weight, targets = make_problem(45, 200, 24, dtype)
    bias = torch.randn(200, dtype=dtype)
    targets[::4] = -100
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    head = pf.LMHead(weight, bias=bias, softcap=softcap, logit_scale=0.5)
    upstream = torch.randn(45)
    ours, plain, truth = (
        torch.autograd.grad((values * upstream).sum(), leaves)
        for values in (
            logprobs(hidden, head, targets).logprobs,
            plain_stats(hidden, head, targets)["logprobs"],
            pf.reference.token_logprobs(hidden, head, targets).logprobs,
        )
    )
    for name, *grads in zip(("hidden", "weight", "bias"), ours, plain, truth, strict=True):
        if dtype == torch.float64:  # plain torch is the truth itself there
            assert relative_error(grads[0], grads[2]) < 1e-14, name
        else:
            assert_as_good_as_plain(*grads, name=name)


@pytest.mark.parametrize("tolerance", [0.0, 2.0**-6])
def test_gradcheck(tolerance):
    """In float64 against finite differences; a vocabulary this small is computed exactly at any tolerance."""
    hidden, weight, targets = make_problem(5, 11, 4, torch.float64, scale=1.0)
    bias = torch.randn(11, dtype=torch.float64)
    targets[2] = -100
    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias))

    def function(hidden, weight, bias):
        head = pf.LMHead(weight, bias=bias, softcap=5.0, logit_scale=0.7)
        return logprobs(hidden, head, targets, grad_tolerance=tolerance).logprobs

    torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("tolerance", [0.0, 2.0**-6])
def test_nothing_to_score(tolerance):
    for n in (0, 5):
        hidden, weight, _ = make_problem(n, 40, 8)
        stats = logprobs(hidden.requires_grad_(), pf.LMHead(weight.requires_grad_()), torch.full((n,), -100), tolerance)
        stats.logprobs.sum().backward()
        assert not stats.logprobs.any() and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("scale", [1e-6, 1e3, 1e5])
@pytest.mark.parametrize("tolerance", [0.0, 2.0**-6])
def test_huge_and_tiny_logits(scale, tolerance):
    """exp is shifted by the target's logit, which huge logits exceed by more than it can hold."""
    hidden, weight, targets = make_problem(40, 500, 16, scale=scale)
    hidden.requires_grad_()
    ours = logprobs(hidden, pf.LMHead(weight), targets, tolerance, stats=pf.STATS)
    truth = pf.reference.token_logprobs(hidden, pf.LMHead(weight), targets, stats=pf.STATS)
    plain = plain_stats(hidden, pf.LMHead(weight), targets)
    for name in plain:
        value, exact = getattr(ours, name), getattr(truth, name)
        # Nearly all of the truth may be 0 to the last digit, as entropy is here: then absolute errors count.
        if not torch.allclose(value.double(), exact, rtol=0, atol=1e-5):
            assert_as_good_as_plain(value, plain[name], exact, factor=4.0, name=name)
    assert torch.equal(ours.is_top1, truth.is_top1)
    values = ours.logprobs, plain["logprobs"], truth.logprobs
    grads = [torch.autograd.grad(value.sum(), hidden)[0] for value in values]
    if tolerance:
        assert relative_error(grads[0], grads[2]) <= max(tolerance, 2 * relative_error(grads[1], grads[2]))
    else:
        assert_as_good_as_plain(*grads, factor=3.0)


def test_probability_of_the_target_near_one():
    """1 − p_y keeps its digits: 1e-11 is right to 1e-4, where 1 − exp(log p) is 0 or 6e-8."""
    vocab, size = 50, 8
    weight = torch.randn(vocab, size)
    weight[:, 0] = 0
    weight[7, 0] = 1
    hidden = torch.randn(6, size) * 0.1
    hidden[:, 0] = torch.tensor([5.0, 10.0, 15.0, 20.0, 25.0, 30.0])  # beyond, float64 itself fails
    targets = torch.full((6,), 7)
    hidden.requires_grad_()
    ours = logprobs(hidden, pf.LMHead(weight), targets).logprobs
    truth = pf.reference.token_logprobs(hidden, pf.LMHead(weight), targets).logprobs
    assert (ours <= 0).all()
    assert ((ours - truth).abs() <= 1e-4 * truth.abs()).all()
    ours, truth = (torch.autograd.grad(x.sum(), hidden)[0] for x in (ours, truth))
    assert ((ours - truth).norm(dim=1) <= 1e-4 * truth.norm(dim=1)).all()


def test_no_grad_does_no_gradient_work(monkeypatch):
    monkeypatch.setattr(torch_backend, "MAX_WORKERS", 1)  # which the profiler can follow
    hidden, weight, targets = make_problem(300, 16384, 32)
    hidden.requires_grad_()
    with torch.no_grad():
        stats, peak, _ = peak_bytes(lambda: logprobs(hidden, pf.LMHead(weight), targets, 2.0**-6))
    assert not stats.logprobs.requires_grad and stats.grad_report is None
    assert peak < 2 * 4 * torch_backend.TILE_ELEMENTS["cpu"]  # of the 19 MiB that the logits have
    assert torch.equal(stats.logprobs, logprobs(hidden.detach(), pf.LMHead(weight), targets).logprobs)


def test_autocast():
    hidden, weight, targets = make_problem(20, 90, 16)
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = logprobs(hidden, pf.LMHead(weight), targets).logprobs
    rounded = hidden.detach().bfloat16().float().requires_grad_()
    theirs = logprobs(rounded, pf.LMHead(weight.bfloat16().float()), targets).logprobs
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, atol=1e-5)
    ours, theirs = torch.autograd.grad(ours.sum(), hidden)[0], torch.autograd.grad(theirs.sum(), rounded)[0]
    assert relative_error(ours, theirs) < 2.0**-8


@pytest.mark.parametrize("tolerance", [0.0, 2.0**-5])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(tolerance, use_reentrant):
    """The forward that is run again draws the same columns: the gradients have the same bits."""
    hidden, weight, targets = make_text_like(200, 3000, 16)
    hidden.requires_grad_(), weight.requires_grad_()

    def loss(hidden):
        stats = logprobs(hidden * 1.1, pf.LMHead(weight), targets, grad_tolerance=tolerance)
        assert tolerance == 0 or not stats.logprobs.requires_grad or stats.grad_report.dense_chunks == 0
        return stats.logprobs.sum()

    torch.manual_seed(0)
    direct = torch.autograd.grad(loss(hidden), (hidden, weight))
    torch.manual_seed(0)
    checkpoint(loss, hidden, use_reentrant=use_reentrant).backward()
    assert torch.equal(hidden.grad, direct[0])
    assert torch.equal(weight.grad, direct[1])


@pytest.mark.parametrize("tolerance", [0.0, 2.0**-5])
def test_backward_twice(tolerance):
    """The last backward of a graph takes over what the ones before have to leave."""
    hidden, weight, targets = make_text_like(100, 2000, 16)
    hidden.requires_grad_(), weight.requires_grad_()
    stats = logprobs(hidden, pf.LMHead(weight), targets, grad_tolerance=tolerance)
    assert tolerance == 0 or stats.grad_report.dense_chunks == 0
    total = (stats.logprobs * torch.randn(100)).sum()
    first, second, last = (
        torch.autograd.grad(total, (hidden, weight), retain_graph=retain) for retain in (True, True, False)
    )
    for again in (second, last):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, hidden)


@pytest.mark.filterwarnings("ignore")
def test_inside_a_compiled_model():
    hidden, weight, targets = make_problem(30, 80, 8)
    layer = torch.nn.Linear(8, 8)

    def model(hidden):
        return logprobs(layer(hidden).tanh(), pf.LMHead(weight), targets, stats=("entropy",)).logprobs.sum() * 2

    plain = model(hidden)
    compiled = torch.compile(model, backend="aot_eager")(hidden)
    assert torch.allclose(plain, compiled)
    expected = torch.autograd.grad(plain, layer.weight)[0]
    assert torch.allclose(torch.autograd.grad(compiled, layer.weight)[0], expected, rtol=1e-5)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("tolerance", [0.0, 2.0**-6])
@pytest.mark.parametrize("probs_bytes", [0, 1 << 30], ids=["recomputed", "kept"])
def test_side_by_side(tolerance, probs_bytes, three_threads, small_chunks, monkeypatch):
    """Three workers agree with float64 as one does, to the same bits each time; torch's threads are as before."""
    monkeypatch.setattr(torch_backend, "PROBS_BYTES", probs_bytes)
    hidden, weight, targets = make_text_like(200, 3001, 12)
    bias = (0.1 * torch.randn(3001)).requires_grad_()
    hidden.requires_grad_(), weight.requires_grad_()
    upstream = torch.randn(200)

    def gradients(function, **options):
        stats = function(hidden, pf.LMHead(weight, bias), targets, **options)
        if options.get("grad_tolerance"):
            assert stats.grad_report.dense_chunks < stats.grad_report.chunks / 2
        found = stats.logprobs
        return [found.detach(), *torch.autograd.grad((found * upstream).sum(), (hidden, weight, bias))]

    ours, again = (gradients(logprobs, grad_tolerance=tolerance, seed=0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert torch.get_num_threads() == three_threads
    monkeypatch.setattr(torch_backend, "MAX_WORKERS", 1)
    alone = gradients(logprobs, grad_tolerance=tolerance, seed=0)
    for found, single, exact in zip(ours, alone, gradients(pf.reference.token_logprobs), strict=True):
        bound = 2 * relative_error(single, exact) + 1e-6
        assert relative_error(found, exact) <= (bound if tolerance == 0.0 else max(bound, tolerance))


def test_inference_mode(three_threads):
    """Its tensors may be written in inference mode alone, which each worker has to be in."""
    hidden, weight, targets = make_problem(300, 80, 8)
    with torch.inference_mode():
        found = logprobs(hidden, pf.LMHead(weight), targets).logprobs
    assert torch.equal(found, logprobs(hidden, pf.LMHead(weight), targets).logprobs)


@pytest.mark.parametrize("tolerance", [0.0, 2.0**-6])
def test_nan_upstream_where_ignored(tolerance):
    """A function of the 0 that stands for an ignored token's log-prob may have any slope."""
    hidden, weight, targets = make_text_like(40, 3000, 8)
    targets[::3] = -100
    hidden.requires_grad_(), weight.requires_grad_()
    stats = logprobs(hidden, pf.LMHead(weight), targets, tolerance)
    assert tolerance == 0 or stats.grad_report.dense_chunks == 0
    found = stats.logprobs
    clean = torch.rand(40).masked_fill(targets == -100, 0)
    expected = torch.autograd.grad(found, (hidden, weight), clean, retain_graph=True)
    for value in (torch.nan, torch.inf):
        ours = torch.autograd.grad(
            found, (hidden, weight), clean.masked_fill(targets == -100, value), retain_graph=True
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_an_error_in_a_worker_is_raised(three_threads):
    def fail(item):
        if item:
            raise ValueError(f"item {item}")
        return torch.is_grad_enabled(), torch.get_num_threads()

    assert torch_backend._side_by_side(fail, [0, 0]) == [(False, 1)] * 2
    with pytest.raises(ValueError, match="item 2"):
        torch_backend._side_by_side(fail, [0, 2])
    assert torch.get_num_threads() == three_threads

    done = []

    def fail_or_go_on(item):
        if item:
            raise ValueError
        time.sleep(0.2)
        done.append(item)

    with pytest.raises(ValueError):
        torch_backend._side_by_side(fail_or_go_on, [1, 0])
    assert done == [0], "nothing goes on behind a caller's back"


def peak_bytes(function):
    """Result, largest sum of bytes allocated during the call, and what is still allocated after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = function()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, peak, now


@pytest.mark.parametrize(("length", "parts"), [(1, 1), (17, 2), (2045, 5), (960, 10), (100, 7)])
def test_even_sizes(length, parts):
    sizes = torch_backend._even_sizes(length, parts)
    assert sum(sizes) == length and len(sizes) == parts and min(sizes) > 0
    assert max(sizes) - min(sizes) <= 2 * torch_backend.ALIGNED
    if length >= 2 * torch_backend.ALIGNED * parts:
        assert all(size % torch_backend.ALIGNED == 0 for size in sizes[1:])


def test_memory_is_flat(monkeypatch):
    """Above inputs and gradients, with one worker, which the profiler can follow: far below the logits, and beyond the
    budget a few hidden states' worth per token."""
    vocab, size = 16384, 32
    monkeypatch.setattr(torch_backend, "SAMPLE_BYTES", 1 << 20)
    monkeypatch.setattr(torch_backend, "MAX_WORKERS", 1)
    weight = torch.randn(vocab, size, requires_grad=True)
    weight.data[:, 0] = -1.3 * torch.arange(2.0, vocab + 2).log()
    used = {}
    for n in (1024, 3072):
        hidden = torch.randn(n, size) / size**0.5
        hidden[:, 0] = 1
        hidden.requires_grad_()
        targets = torch.multinomial((hidden @ weight.T).softmax(-1).detach(), 1).squeeze(1)
        stats, forward, held = peak_bytes(lambda: logprobs(hidden, pf.LMHead(weight), targets, 2.0**-6, seed=0))  # noqa: B023
        grads, backward, _ = peak_bytes(lambda: torch.autograd.grad(stats.logprobs.sum(), (hidden, weight)))  # noqa: B023
        used[n] = max(forward, held + backward - sum(grad.nbytes for grad in grads))
        assert stats.grad_report.dense_chunks == 0
    assert used[3072] < 0.15 * 3072 * vocab * 4, used
    assert used[3072] - used[1024] < 0.03 * 2048 * vocab * 4, used


def test_exact_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(torch_backend, "PROBS_BYTES", 1 << 20)
    monkeypatch.setattr(torch_backend, "MAX_WORKERS", 1)
    hidden, weight, targets = make_problem(2048, 8192, 16)
    hidden.requires_grad_(), weight.requires_grad_()
    _, peak, _ = peak_bytes(lambda: logprobs(hidden, pf.LMHead(weight), targets).logprobs.sum().backward())
    assert peak < 0.15 * 2048 * 8192 * 4


@pytest.mark.parametrize("others", [0.0, -60.0, -100.0])
@pytest.mark.parametrize("tolerance", [0.0, 2.0**-5])
def test_a_masked_target(tolerance, others):
    """Its log-prob is −inf, its other statistics are as ever, and it spoils no other token's gradient.

    Also where all logits are so low that e^z is 0, which stands in the place of the target's shift.
    """
    hidden, weight, targets = make_text_like(100, 2000, 16)
    bias = torch.full((2000,), others)
    bias[5], targets[::10] = -torch.inf, 5
    hidden.requires_grad_(), weight.requires_grad_()
    ours = logprobs(hidden, pf.LMHead(weight, bias), targets, tolerance, stats=pf.STATS)
    truth = pf.reference.token_logprobs(hidden, pf.LMHead(weight, bias), targets, stats=pf.STATS)
    assert (ours.logprobs[::10] == -torch.inf).all() and not ours.is_top1[::10].any()
    nothing = logprobs(
        hidden, pf.LMHead(weight, torch.full_like(bias, -torch.inf)), targets, tolerance, stats=("logsumexp",)
    )
    assert not nothing.logprobs.isfinite().any() and not nothing.logsumexp.isfinite().any()
    for name in pf.STATS:
        if name != "mean_logit":
            assert torch.allclose(getattr(ours, name).double(), getattr(truth, name).double(), atol=1e-4), name
    others = torch.ones(100)
    others[::10] = 0
    found = torch.autograd.grad(ours.logprobs, (hidden, weight), others)
    scored = pf.reference.token_logprobs(hidden, pf.LMHead(weight, bias), targets.masked_fill(others == 0, -100))
    for grad, exact in zip(found, torch.autograd.grad(scored.logprobs.sum(), (hidden, weight)), strict=True):
        assert relative_error(grad, exact) < max(tolerance, 1e-5)
