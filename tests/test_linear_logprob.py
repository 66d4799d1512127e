"""The Triton kernels against the reference, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from conftest import DEVICE, assert_as_good_as_plain, make_problem, make_text_like, plain_stats, relative_error
from prefopt_fast.kernels import configs, linear_logprob, sampled_grad, tiles
from prefopt_fast.kernels.dispatch import Options
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import prefopt_fast as pf

FLOATS = tuple(name for name in ("logprobs", *pf.STATS) if name != "is_top1")


def gradients(
    function, hidden: Tensor, head: pf.LMHead, targets: Tensor, upstream: Tensor, **options
) -> dict[str, Tensor]:
    """∂(upstream · logprobs) for whichever of hidden, weight and bias require gradients."""
    leaves = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    logprobs = function(hidden, head, targets, **options).logprobs
    return dict(zip(leaves, torch.autograd.grad(logprobs, list(leaves.values()), upstream.to(logprobs)), strict=True))


@pytest.fixture
def always_sample(monkeypatch) -> None:
    monkeypatch.setattr(linear_logprob, "MIN_SAMPLED_WORK", 0)
    monkeypatch.setattr(sampled_grad, "MAX_SHARE", 1.0)


def triton_gradients(*operands, tolerance: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    return gradients(pf.token_logprobs, *operands, backend="triton", grad_tolerance=tolerance, seed=seed)


# Tiles are 16 × 32 × 32 in the interpreter and 128 × 256 × 64 on Hopper.
SHAPES = {
    "no multiple of any tile": (37, 133, 40),
    "one token": (1, 64, 16),
    "one column more than a tile": (16, 257, 64),
    "fewer columns than a tile": (20, 5, 32),
    "rows of no whole 16 bytes, so pointers in TMA's place": (20, 70, 21),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_statistics_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    if dtype != torch.float32 and shape[0] == 20:
        pytest.skip("the dtype matters to the product alone, which the other shapes cover")
    hidden, weight, targets = make_problem(*shape, dtype, device)
    targets[3::5] = -100
    hidden.requires_grad_()
    head = pf.LMHead(weight.requires_grad_(), torch.randn(shape[1], device=device, dtype=dtype).requires_grad_())
    upstream = torch.randn(shape[0], device=device)

    result = pf.token_logprobs(hidden, head, targets, stats=pf.STATS, backend="triton")
    truth = pf.reference.token_logprobs(hidden, head, targets, stats=pf.STATS)
    plain = plain_stats(hidden, head, targets)
    for name in FLOATS:
        assert_as_good_as_plain(getattr(result, name), plain[name], getattr(truth, name), factor=4, name=name)
    assert (result.logprobs <= 0).all()
    assert (result.logprobs[3::5] == 0).all()
    # Where the two largest logits differ by less than a rounding, either answer is right.
    decided = (truth.max_logprob - truth.logprobs).abs().double() > 1e-3
    assert (result.is_top1 == truth.is_top1)[decided | truth.is_top1].all()

    found = triton_gradients(hidden, head, targets, upstream)
    expected = gradients(pf.reference.token_logprobs, hidden, head, targets, upstream)
    autograd = gradients(
        lambda *a: pf.TokenStats(plain_stats(*a)["logprobs"], targets != -100), hidden, head, targets, upstream
    )
    for name in found:
        assert_as_good_as_plain(found[name], autograd[name], expected[name], factor=4, name=name)


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("tolerance", [0.0, 1e-9], ids=["exact", "sampled"])
def test_each_gradient_alone_with_softcap(needed: str, tolerance: float, device: str, always_sample: None) -> None:
    hidden, weight, targets = make_problem(20, 70, 32, device=device)
    bias = torch.randn(70, device=device)
    {"hidden": hidden, "weight": weight, "bias": bias}[needed].requires_grad_()
    head = pf.LMHead(weight, bias, softcap=3.0, logit_scale=0.7, temperature=1.3)
    operands = (hidden, head, targets, torch.randn(20, device=device))
    found, expected = (
        triton_gradients(*operands, tolerance=tolerance),
        gradients(pf.reference.token_logprobs, *operands),
    )
    assert found.keys() == {needed}
    assert relative_error(found[needed], expected[needed]) < 1e-6


@pytest.mark.parametrize("gap", [10.0, 20.0, 90.0, 1e4])
def test_certain_targets(gap: float, device: str) -> None:
    """p(y) → 1: every rival is ``gap`` below the target; 1 − p = (V − 1) e^−gap keeps its digits while it can."""
    weight = torch.eye(40, device=device).requires_grad_()
    targets = torch.arange(16, device=device)
    hidden = (gap * torch.eye(40, device=device)[:16]).requires_grad_()
    operands = (hidden, pf.LMHead(weight), targets)
    result = pf.token_logprobs(*operands, stats=pf.STATS, backend="triton")
    assert (result.logprobs <= 0).all() and result.is_top1.all()
    assert all(getattr(result, name).isfinite().all() for name in FLOATS)
    found = triton_gradients(*operands, torch.ones(16, device=device))
    expected = gradients(pf.reference.token_logprobs, *operands, torch.ones(16, device=device))
    for name in found:
        # In fp32 log p is 0 or at least its unit roundoff away, so 1 − p is known to 6e-8 of 1.
        assert (found[name].double() - expected[name]).abs().max() < 2e-7 * gap
        assert gap > 10 or relative_error(found[name], expected[name]) < 1e-4


@pytest.mark.parametrize("scale", [1e-4, 1e4], ids=["tiny logits", "huge logits"])
def test_extreme_logits(scale: float, device: str) -> None:
    hidden, weight, targets = make_problem(20, 70, 32, device=device, scale=scale)
    head = pf.LMHead(weight)
    result = pf.token_logprobs(hidden, head, targets, stats=pf.STATS, backend="triton")
    truth = pf.reference.token_logprobs(hidden, head, targets, stats=pf.STATS)
    plain = plain_stats(hidden, head, targets)
    for name in FLOATS:
        ours, theirs = ((x - getattr(truth, name)).abs().max() for x in (getattr(result, name), plain[name]))
        # Absolutely, since entropy and log-probs near 0 are differences of numbers of the logits' size.
        assert ours <= 4 * theirs + 1e-6 * max(1.0, scale), name


def test_all_ignored(device: str, always_sample: None) -> None:
    hidden, weight, targets = make_problem(6, 40, 16, device=device)
    head = pf.LMHead(weight.requires_grad_())
    operands = (hidden.requires_grad_(), head, torch.full_like(targets, -100))
    assert (pf.token_logprobs(*operands, stats=("entropy",), backend="triton").entropy == 0).all()
    for tolerance in (0.0, 0.1):
        found = triton_gradients(*operands, torch.ones(6, device=device), tolerance=tolerance)
        assert all((g == 0).all() for g in found.values())


def test_ranges_of_the_vocabulary(device: str, monkeypatch) -> None:
    """The exact backward in several ranges, the last one narrower."""
    monkeypatch.setattr(linear_logprob, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(linear_logprob, "LEAST_RANGE", 256)
    hidden, weight, targets = make_problem(20, 600, 32, device=device)
    operands = (hidden.requires_grad_(), pf.LMHead(weight.requires_grad_()), targets, torch.randn(20, device=device))
    found, expected = triton_gradients(*operands), gradients(pf.reference.token_logprobs, *operands)
    for name in found:
        assert relative_error(found[name], expected[name]) < 1e-6


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_upstream_gradient_that_is_not_finite_spoils_no_other(bad: float, device: str, always_sample: None) -> None:
    """Nor the budget of the columns that the others' gradients are sampled from."""
    hidden, weight, targets = (x.to(device) for x in make_text_like(200, 400, 32))
    upstream, others = torch.ones(200, device=device), torch.arange(200, device=device) != 3
    upstream[3] = bad
    operands = (hidden.requires_grad_(), pf.LMHead(weight), targets, upstream)
    found, exact = (triton_gradients(*operands, tolerance=tolerance)["hidden"] for tolerance in (2.0**-4, 0.0))
    assert (~found.isfinite()).any(1).nonzero().flatten().tolist() == [3]
    assert 1e-3 < relative_error(found[others], exact[others]) < 2.0**-4


def test_modes_and_transforms_see_the_operators(device: str) -> None:
    """Selective checkpointing, for one, keeps results by operator."""
    seen = []

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    hidden, weight, targets = make_problem(20, 60, 32, device=device)
    operands = (hidden.requires_grad_(), pf.LMHead(weight.requires_grad_()), targets, torch.randn(20, device=device))
    expected = triton_gradients(*operands)
    with Looks():
        found = triton_gradients(*operands)
    assert {"prefopt_fast.linear_logprob.default", "prefopt_fast.linear_logprob_backward.default"} <= {*seen}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("ignored", [False, True])
def test_some_tokens_at_a_time_under_a_frozen_head(ignored: bool, device: str, monkeypatch) -> None:
    monkeypatch.setattr(linear_logprob, "ACCUMULATOR_BYTES", 4 * 32 * 8)
    sizes, exact = [], linear_logprob._grad_logits
    monkeypatch.setattr(linear_logprob, "_grad_logits", lambda x, *rest: (sizes.append(len(x.hidden)), exact(x, *rest)))
    hidden, weight, targets = make_problem(20, 60, 32, device=device)
    if ignored:
        targets[2::5] = -100
    operands = (hidden.requires_grad_(), pf.LMHead(weight), targets, torch.randn(20, device=device))
    found, expected = triton_gradients(*operands), gradients(pf.reference.token_logprobs, *operands)
    assert sizes == ([8, 8] if ignored else [7, 7, 6])
    assert relative_error(found["hidden"], expected["hidden"]) < 1e-6


def many_chunks(
    device: str, dtype: torch.dtype = torch.float32, bias: Tensor | None = None
) -> tuple[Tensor, pf.LMHead, Tensor, Tensor]:
    """Three chunks of tokens, the last one partial, with concentrated probabilities and an upstream gradient."""
    chunk = (
        max(sampled_grad.BLOCKS_PER_CHUNK)
        * configs.lookup("forward", configs.architecture(torch.device(device)), torch.float32, 32).block_n
    )
    hidden, weight, targets = make_problem(5 * chunk // 2, 300, 32, dtype, device)
    targets[: len(targets) // 2] = (hidden @ weight.T).argmax(-1)[: len(targets) // 2]
    head = pf.LMHead(weight.requires_grad_(), bias)
    return hidden.requires_grad_(), head, targets, torch.rand(len(targets), device=device)


# When a sampled gradient is launched: see sampled_gradients.
LAUNCHES = {
    "before the host knows": {"LEAST_FIRST_SHARE": 0.0, "MOST_FIRST_SHARE": 1.0},
    "again, for want of room": {"LEAST_FIRST_SHARE": 0.0, "MOST_FIRST_SHARE": 0.15},
    "after the host knows": {"FIRST_BYTES": 0},
    "one by one": {"FIRST_BYTES": 0, "WORKSPACE_BYTES": 1},
}


@pytest.mark.parametrize("launched", ["before the host knows", "one by one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sampled_gradient(dtype: torch.dtype, launched: str, device: str, always_sample: None, monkeypatch) -> None:
    """Within its tolerance, another one for each seed, the same bits for the same seed, and right on average."""
    for name, value in LAUNCHES[launched].items():
        monkeypatch.setattr(sampled_grad, name, value)
    bias = torch.randn(300, device=device, dtype=dtype).requires_grad_() if dtype == torch.float16 else None
    operands = many_chunks(device, dtype, bias)
    expected = gradients(pf.reference.token_logprobs, *operands)
    draws = [triton_gradients(*operands, tolerance=0.1, seed=seed) for seed in (0, 1, 2, 0)]
    for name, truth in expected.items():
        errors = [relative_error(draw[name], truth) for draw in draws[:3]]
        assert max(errors) < 0.1 and min(errors) > 1e-4
        assert relative_error(sum(draw[name].double() for draw in draws[:3]) / 3, truth) < 0.8 * max(errors)
        assert torch.equal(draws[0][name], draws[3][name]) and not torch.equal(draws[0][name], draws[1][name])


def test_a_sampled_gradient_is_the_same_whenever_it_is_launched(device: str, always_sample: None, monkeypatch) -> None:
    """And with too little room at first nothing is written beyond it."""
    operands = many_chunks(device, bias=torch.randn(300, device=device).requires_grad_())
    operands[2][1::7] = -100
    in_groups, write = [], sampled_grad._write_in_groups
    monkeypatch.setattr(sampled_grad, "_write_in_groups", lambda *args: (in_groups.append(args), write(*args)))
    empty = torch.Tensor.new_empty

    def guarded(like: Tensor, *size: Any, **kwargs: Any) -> Tensor:
        """Followed by memory that must stay as it is."""
        if like.dtype == torch.bool:  # the interpreter's own
            return empty(like, *size, **kwargs)
        whole = empty(like, math.prod(size) + 64, **kwargs).fill_(77)
        guards.append(whole[-64:])
        return whole[:-64].view(size)

    found: dict[str, dict[str, Tensor]] = {}
    for launched, constants in LAUNCHES.items():
        guards: list[Tensor] = []
        with monkeypatch.context() as patches:
            for name, value in constants.items():
                patches.setattr(sampled_grad, name, value)
            patches.setattr(torch.Tensor, "new_empty", guarded)
            found[launched] = triton_gradients(*operands, tolerance=0.1)
        assert len(in_groups) == len(found) - 1
        assert guards and all((guard == 77).all() for guard in guards)
    first, *others = found.values()
    for other in others:
        assert torch.equal(other["hidden"], first["hidden"])
        assert all(relative_error(other[name], first[name]) < 1e-6 for name in first)


@pytest.mark.parametrize("size", [1.0, 1e-20])
def test_errors_of_dweight_that_add_up(size: float, device: str, always_sample: None) -> None:
    """Hidden states that share a direction, and upstream gradients of one sign, as a sequence has them."""
    hidden, weight, targets = (x.to(device) for x in make_text_like(256, 1000, 32))
    upstream = torch.full((256,), size, device=device)
    operands = (hidden.requires_grad_(), pf.LMHead(weight.requires_grad_()), targets, upstream)
    expected = gradients(pf.reference.token_logprobs, *operands)
    report, found = grad_report(*operands, tolerance=2.0**-4)
    for ours, truth in zip(found, expected.values(), strict=True):
        assert relative_error(ours, truth) < 2.0**-4
    assert report.columns_kept < 0.5 and report.estimated_error == pytest.approx(2.0**-4, rel=0.3)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has an order of its own")
@pytest.mark.parametrize("tolerance", [0.0, 0.1], ids=["exact", "sampled"])
def test_programs_in_any_order_on_memory_of_any_content(tolerance: float, always_sample: None, monkeypatch) -> None:
    """The interpreter runs a launch's programs one after the other, on memory that often is zero; a GPU does not."""
    hidden, head, targets, upstream = many_chunks("cpu")
    head = pf.LMHead(head.weight, torch.randn(300).requires_grad_())
    targets[3::5] = -100
    wanted = () if tolerance else pf.STATS

    def everything() -> list[Tensor]:
        stats = pf.token_logprobs(hidden, head, targets, wanted, tolerance, backend="triton", seed=0)
        values = [getattr(stats, name) for name in ("logprobs", *wanted)]
        return [*values, *torch.autograd.grad(stats.logprobs, (hidden, head.weight, head.bias), upstream)]

    def backwards(builder: Any, x: int, y: int, z: int) -> None:
        builder.grid_idx = (builder.grid_dim[0] - 1 - x, y, z)

    expected = everything()
    monkeypatch.setattr(triton.runtime.interpreter.InterpreterBuilder, "set_grid_idx", backwards)
    torch.use_deterministic_algorithms(True)  # which fills memory with NaN and the largest integers
    try:
        found = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(ours, same) for ours, same in zip(found, expected, strict=True))


@pytest.mark.parametrize("tolerance", [0.0, 0.1], ids=["exact", "sampled"])
def test_shifted_logits(tolerance: float, device: str, always_sample: None) -> None:
    """What all logits have in common changes nothing, also where e to its power is beyond fp32."""
    hidden, head, targets, upstream = many_chunks(device)
    shifted = pf.LMHead(head.weight, torch.full((300,), -200.0, device=device))
    found = triton_gradients(hidden, shifted, targets, upstream, tolerance=tolerance)
    expected = gradients(pf.reference.token_logprobs, hidden, head, targets, upstream)
    for name in expected:
        assert relative_error(found[name], expected[name]) < max(tolerance, 1e-4)


@pytest.mark.parametrize("tolerance", [0.0, 0.1], ids=["exact", "sampled"])
def test_a_backward_under_autocast_is_the_same(tolerance: float, device: str, always_sample: None) -> None:
    hidden, head, targets, upstream = many_chunks(device)
    leaves = (hidden, head.weight)
    logprobs = pf.token_logprobs(hidden, head, targets, backend="triton", grad_tolerance=tolerance).logprobs
    expected = torch.autograd.grad(logprobs, leaves, upstream, retain_graph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = torch.autograd.grad(logprobs, leaves, upstream)
    assert all(torch.equal(ours, same) for ours, same in zip(found, expected, strict=True))


@pytest.mark.parametrize("tolerance", [0.0, 0.05], ids=["exact", "sampled"])
def test_strided_operands(tolerance: float, device: str, always_sample: None) -> None:
    """The same bits as of contiguous ones."""
    hidden, weight, targets = make_problem(40, 70, 32, device=device)
    bias, upstream = torch.randn(70, device=device), torch.randn(40, device=device)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    def bits(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> dict[str, Tensor]:
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        return triton_gradients(leaves[0], pf.LMHead(*leaves[1:]), targets, upstream, tolerance=tolerance)

    expected = bits(hidden, weight, bias, targets)
    transposed = (x.detach().T.contiguous().T for x in (hidden, weight))
    found = bits(*transposed, strided(bias.detach()), strided(targets))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_small_upstream_gradients_in_fp16(device: str) -> None:
    """p · ∂loss/∂logp is below fp16's normal range for half of the tokens, whose gradients are as good all the same."""
    hidden, weight, targets = make_problem(40, 300, 32, device=device)
    hidden, weight = (hidden / 1000).half(), (weight * 1000).half()  # dhidden itself stays in the range
    operands = (hidden.requires_grad_(), pf.LMHead(weight), targets)
    upstream = torch.ones(40, device=device)
    upstream[::2] = 1e-6
    found = triton_gradients(*operands, upstream)["hidden"]
    expected = gradients(pf.reference.token_logprobs, *operands, upstream)["hidden"]
    small, large = (relative_error(found[half::2], expected[half::2]) for half in (0, 1))
    assert small < 4 * max(large, torch.finfo(torch.float16).eps)


def test_targets_that_do_not_exist(device: str) -> None:
    """Where looking would cost a synchronization the result says it: NaN."""
    hidden, weight, targets = make_problem(20, 70, 32, device=device)
    wrong = targets.clone()
    wrong[3], wrong[17], wrong[18] = -1, 70, 2**32 + 5
    found, expected = (
        linear_logprob.linear_logprob(hidden, weight, None, y, (1.0, None), (), Options())[0]["logprobs"]
        for y in (wrong, targets)
    )
    assert found[[3, 17, 18]].isnan().all()
    assert torch.equal(found[wrong == targets], expected[wrong == targets])


@pytest.mark.parametrize("tolerance", [0.0, 0.1], ids=["exact", "sampled"])
def test_gradients_beside_targets_that_do_not_exist(tolerance: float, device: str, always_sample: None) -> None:
    hidden, head, targets, upstream = many_chunks(device)
    ignored, wrong, upstream[[3, 17]] = targets.clone(), targets.clone(), 0.0
    ignored[[3, 17]], wrong[3], wrong[17] = -100, -1, 300
    options = Options((tolerance, tolerance))
    logprobs = linear_logprob.linear_logprob(hidden, head.weight, None, wrong, (1.0, None), (), options)[0]["logprobs"]
    found = torch.autograd.grad(logprobs, (hidden, head.weight), upstream)
    expected = gradients(pf.reference.token_logprobs, hidden, head, ignored, upstream)
    for ours, truth in zip(found, expected.values(), strict=True):
        assert relative_error(ours, truth) < max(tolerance, 1e-5)


@pytest.mark.parametrize("tolerance", [0.0, 2.0**-5])
def test_a_nan_upstream_stays_its_tokens_in_fp16(tolerance: float, device: str, monkeypatch) -> None:
    monkeypatch.setattr(linear_logprob, "MIN_SAMPLED_WORK", 0)
    hidden, weight, targets = (t.to(device) for t in make_text_like(40, 600, 32))
    hidden, weight = hidden.half(), weight.half()
    upstream = torch.ones(40, device=device)
    upstream[3], upstream[5] = float("nan"), float("inf")
    found = triton_gradients(hidden.requires_grad_(), pf.LMHead(weight), targets, upstream, tolerance=tolerance)
    assert (~found["hidden"].isfinite()).any(1).nonzero().flatten().tolist() == [3, 5]


def test_launches_are_on_the_device_of_the_operands(monkeypatch) -> None:
    current = []

    @contextmanager
    def device(which: torch.device):
        current.append(which)
        yield

    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(device=device))
    operand = torch.empty(2, device="meta")
    assert tiles.on_device(lambda x, factor: x.numel() * factor)(operand, 3) == 6
    assert current == [operand.device]


def test_flat_softmax_is_exact(device: str, monkeypatch) -> None:
    """Where nearly all columns would be needed the gradient is the exact one, to the bit."""
    monkeypatch.setattr(linear_logprob, "MIN_SAMPLED_WORK", 0)
    hidden, weight, targets = make_problem(20, 70, 32, device=device, scale=0.1)
    operands = (hidden.requires_grad_(), pf.LMHead(weight.requires_grad_()), targets, torch.ones(20, device=device))
    found, exact = triton_gradients(*operands, tolerance=1e-3), triton_gradients(*operands)
    assert all(torch.equal(found[name], exact[name]) for name in exact)
    assert grad_report(*operands, tolerance=1e-3)[0] == pf.GradReport(1.0, None, 0.0, 1, 1)


def grad_report(*operands, tolerance: float, seed: int = 0) -> tuple[pf.GradReport | None, tuple[Tensor, ...]]:
    hidden, head, targets, upstream = operands
    stats = pf.token_logprobs(hidden, head, targets, backend="triton", grad_tolerance=tolerance, seed=seed)
    assert stats.grad_report is None, "before the backward nothing is known"
    leaves = [leaf for leaf in (hidden, head.weight) if leaf.requires_grad]
    found = torch.autograd.grad(stats.logprobs, leaves, upstream)
    return stats.grad_report, found


def test_report(device: str, monkeypatch) -> None:
    """It counts the columns that were drawn, and expects the error that draws have."""
    vocab = 1000
    hidden, weight, _ = make_problem(32, vocab, 40, device=device, scale=1.0)
    hidden = torch.nn.functional.normalize(hidden, dim=1)  # of one length, as the estimate takes them to be
    weight[:, 0] -= 5 * torch.arange(2.0, vocab + 2, device=device).log()
    hidden[:, 0] = 0.3
    targets = torch.multinomial((hidden @ weight.T).softmax(-1), 1).squeeze(1)
    operands = (hidden, pf.LMHead(weight.requires_grad_()), targets, torch.ones(32, device=device))
    assert grad_report(*operands, tolerance=0.2)[0] is None, "too little work to sample is computed exactly"
    monkeypatch.setattr(linear_logprob, "MIN_SAMPLED_WORK", 0)
    monkeypatch.setattr(sampled_grad, "MAX_SHARE", 1.0)
    exact = triton_gradients(*operands)["weight"]
    errors = []
    for seed in range(10):
        report, (found,) = grad_report(*operands, tolerance=0.2, seed=seed)
        # All tokens are one chunk, so that a column that was not drawn has no gradient.
        assert report.columns_kept * vocab == pytest.approx(int((found != 0).any(1).sum()))
        assert report.columns_kept < 1 and (report.dense_chunks, report.chunks) == (0, 1)
        errors.append(relative_error(found, exact))
    expected = torch.tensor(errors).square().mean().sqrt()
    assert 0 < report.estimated_error <= 0.2
    assert 0.5 < expected / report.estimated_error < 1.4


def test_float64_is_refused(device: str) -> None:
    hidden, weight, targets = make_problem(4, 20, 16, torch.float64, device)
    with pytest.raises(NotImplementedError, match='float64: use backend="torch"'):
        pf.token_logprobs(hidden, pf.LMHead(weight), targets, backend="triton")


@pytest.mark.parametrize("tolerance", [0.0, 0.05], ids=["exact", "sampled"])
def test_operators(tolerance: float, device: str, always_sample: None) -> None:
    hidden, weight, targets = make_problem(20, 70, 32, device=device)
    targets[4] = -100
    leaves = (hidden.requires_grad_(), weight.requires_grad_(), torch.randn(70, device=device).requires_grad_())
    seed = torch.tensor(0)
    steering = (1.0, 5.0, -100, tolerance, seed)
    forward = (*leaves, targets, 1.0, 5.0, "entropy,is_top1", -100, tolerance, seed)
    torch.library.opcheck(torch.ops.prefopt_fast.linear_logprob.default, forward)
    saved = [t.detach() for t in torch.ops.prefopt_fast.linear_logprob(*forward)]
    del saved[2]  # the statistics
    backward = (torch.ones(20, device=device), *(leaf.detach() for leaf in leaves), targets, *saved, *steering)
    torch.library.opcheck(torch.ops.prefopt_fast.linear_logprob_backward.default, (*backward, [True, True, True]))


@pytest.mark.parametrize("tolerance", [0.0, 0.05], ids=["exact", "sampled"])
def test_compile_and_export(tolerance: float, device: str, always_sample: None) -> None:
    hidden, weight, targets = make_problem(20, 70, 32, device=device)
    hidden.requires_grad_()
    weight.requires_grad_()

    def loss(hidden: Tensor, weight: Tensor, seed: int | None = 1) -> Tensor:
        head, options = pf.LMHead(weight), {"backend": "triton", "seed": seed}
        result = pf.token_logprobs(hidden, head, targets, ("entropy",), tolerance, **options)
        assert not torch.compiler.is_compiling() or result.report is None
        return (result.logprobs * result.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        *(torch.autograd.grad(f(hidden, weight), (hidden, weight)) for f in (compiled, loss)), strict=True
    ):
        assert torch.equal(ours, eager)
    drawn = [torch.autograd.grad(compiled(hidden, weight, None), hidden)[0] for _ in range(2)]
    assert torch.equal(*drawn) == (tolerance == 0)

    class Module(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
            return loss(hidden, weight)

    operands = (hidden.detach(), weight.detach())
    exported = torch.export.export(Module(), operands).module()
    assert torch.equal(exported(*operands), loss(*operands))


@pytest.mark.parametrize("n_tokens", [1, 2048, 8192, 65_536])
@pytest.mark.parametrize(("vocab", "hidden_size"), [(128_256, 4096), (151_936, 896), (256_000, 2304)])
def test_splits_leave_little_of_a_device_idle(n_tokens: int, vocab: int, hidden_size: int, monkeypatch) -> None:
    monkeypatch.setattr(linear_logprob, "processors", lambda device: 132)
    config = configs.lookup("forward", "sm_90", torch.bfloat16, hidden_size)
    splits, each = linear_logprob._splits((n_tokens, hidden_size, vocab), 3, config, torch.device("cpu"))
    n_tiles, blocks = triton.cdiv(vocab, config.block_v), triton.cdiv(n_tokens, config.block_n)
    assert (splits - 1) * each < n_tiles <= splits * each
    assert splits <= linear_logprob.MAX_SPLITS and 12 * splits * n_tokens <= linear_logprob.PARTIALS_BYTES
    waves = triton.cdiv(blocks * splits, 132)
    assert n_tokens == 1 or blocks * n_tiles / 132 > 0.95 * waves * each


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 24 GiB")
def test_more_than_2_to_31_elements(device: str) -> None:
    """The last rows of a weight with 2³¹ elements and more are found."""
    weight = torch.zeros(2**31 // 4096 + 512, 4096, device=device, dtype=torch.bfloat16)
    weight[-1, 0] = 8.0
    hidden = torch.zeros(64, 4096, device=device, dtype=torch.bfloat16)
    hidden[:, 0] = 4.0
    targets = torch.full((64,), len(weight) - 1, device=device)
    result = pf.token_logprobs(hidden, pf.LMHead(weight), targets, backend="triton")
    expected = 32 - math.log(math.exp(32) + len(weight) - 1)
    assert (result.logprobs - expected).abs().max() < 1e-5
