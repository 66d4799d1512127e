"""Correctness on the device at hand, against float64: what ``make gpu-bench`` does before it times anything.

An error may be up to four times that of the same mathematics in plain torch at the same dtype (full logits, autograd),
or that many roundings of the result's own dtype.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import inputs
import torch
from torch import Tensor

import prefopt_fast as pf
from prefopt_fast.log_ratio import token_log_ratio

FACTOR = 4
# Of statistics of 16-bit operands, whose products have fp32 accumulators; a mean logit cancels. An H100 had at most
# 6.4e-6, and 1.04e-4 for a mean logit.
LARGEST_ERROR, LARGEST_OF_MEAN = 5e-5, 5e-4
TF32_ERROR = 2.0**-5  # a kernel's operands may be truncated where plain torch's are rounded; e^z multiplies the error
DBIAS_ERROR = 8  # tolerances: the kernels steer the errors of dhidden and dweight alone
REPETITIONS = 20


class Check(NamedTuple):
    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass(frozen=True)
class Case:
    """One problem, with everything in it that a kernel could get wrong; a tenth of its tokens is ignored."""

    tokens: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    bias: bool = False
    softcap: float | None = None
    temperature: float = 1.0
    tf32: bool = False

    @property
    def name(self) -> str:
        options = [f"soft-cap {self.softcap:g}"] if self.softcap is not None else []
        options += ["bias"] if self.bias else []
        options += [f"temperature {self.temperature:g}"] if self.temperature != 1.0 else []
        options += ["TF32"] if self.tf32 else []
        dtype = str(self.dtype).removeprefix("torch.")
        return ", ".join([f"{dtype} N {self.tokens} V {self.vocab} H {self.hidden}", *options])


CASES = [
    Case(509, 128_256, 4096, torch.bfloat16),
    Case(512, 256_000, 2304, torch.bfloat16, softcap=30.0),
    Case(300, 151_936, 896, torch.float16, temperature=0.7),
    Case(257, 32_003, 576, torch.float32, bias=True),
    Case(1, 49_152, 200, torch.bfloat16, bias=True, softcap=20.0),
    Case(257, 32_003, 576, torch.float32, bias=True, tf32=True),
]
FAST_CASES = [CASES[0], *(replace(case, bias=True) for case in (*CASES[1:4], CASES[5]))]
REPEATED_CASE = replace(CASES[0], tokens=2048)  # which are eight chunks
QUICK_CASES = [
    Case(37, 211, 48, torch.float32, bias=True, softcap=20.0, temperature=0.7),
    Case(24, 256, 32, torch.bfloat16),
]
QUICK_REPEATED_CASE = replace(QUICK_CASES[1], tokens=80)  # three chunks in the interpreter


def run_checks(device: str, backend: str, quick: bool, after_tuning: bool = False) -> Iterator[Check]:
    """One check after the other; what raises is yielded as a check that failed.

    ``after_tuning`` those alone that tell whether other launch configurations compute the same.

    Raises:
        Exception: what a check raised after which the device no longer works.
    """
    cases = QUICK_CASES if quick else CASES
    with _filled_memory():
        for case in cases[:1] if after_tuning else cases:
            yield from _guarded(case.name, _exact_checks(case, device, backend), device)
        for case in QUICK_CASES if quick else FAST_CASES:
            with _sampling(backend):
                yield from _guarded(f"{case.name}: fast gradient", _fast_checks(case, device, backend, quick), device)
        if not after_tuning:
            yield from _guarded("log-ratio of two heads", _log_ratio_checks(device, backend, quick), device)
    if backend == "triton":
        with _sampling(backend):
            case = QUICK_REPEATED_CASE if quick else REPEATED_CASE
            yield from _guarded("repeated gradient", _repeat_checks(case, device, 2 if quick else REPETITIONS), device)
            if not after_tuning:  # the torch path is no operator, and breaks the graph
                yield from _guarded("torch.compile", _compile_checks(device, backend), device)
                yield from _guarded("opcheck", _opchecks(device), device)
    if not quick and not after_tuning:
        yield from _guarded("beyond 2^31 elements", _size_checks(device, backend), device)


def works(device: str) -> bool:
    """Whether anything still runs on the device: after an illegal access, for one, nothing does."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


def describe(error: Exception) -> str:
    """Its type and first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


@contextlib.contextmanager
def _filled_memory() -> Iterator[None]:
    """Floating-point memory that nobody has written yet is NaN here, and integers are the largest there are."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _precision(case: Case) -> Iterator[None]:
    """TF32 where the case asks for it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.tf32 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _sampling(backend: str) -> Iterator[None]:
    """Here gradients are sampled although the problem is small, and however many columns that takes."""
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            from prefopt_fast.kernels import linear_logprob, sampled_grad

            stack.enter_context(mock.patch.object(linear_logprob, "MIN_SAMPLED_WORK", 0))
            stack.enter_context(mock.patch.object(sampled_grad, "MAX_SHARE", 1.0))
        yield


def _guarded(name: str, checks: Iterator[Check], device: str) -> Iterator[Check]:
    try:
        yield from checks
    except Exception as error:  # the others are still worth running
        yield Check(f"{name}: {describe(error)}", math.nan, 0.0)
        if not works(device):
            raise


def _exact_checks(case: Case, device: str, backend: str) -> Iterator[Check]:
    """Every statistic and every exact gradient."""
    hidden, weight, bias, targets, upstream = _problem(case, device)
    with _precision(case):
        results = {
            "truth": _run(case, hidden.double(), weight.double(), bias, targets, upstream, "reference"),
            "plain": _plain(case, hidden, weight, bias, targets, upstream),
            "ours": _run(case, hidden, weight, bias, targets, upstream, backend),
        }
    for name, plain in results["plain"].items():
        ours, truth = results["ours"][name], results["truth"][name]
        if name == "is_top1":
            # Two logits closer than a rounding can change places.
            yield Check(f"{case.name}: is_top1", float((ours != truth).float().mean()), 0.01)
            continue
        limit = FACTOR * max(relative_error(plain, truth), torch.finfo(ours.dtype).eps)
        if case.dtype.itemsize == 2 and not name.startswith("d"):
            limit = min(limit, LARGEST_OF_MEAN if name == "mean_logit" else LARGEST_ERROR)
        if case.tf32:
            limit = max(limit, TF32_ERROR)
        yield Check(f"{case.name}: {name}", relative_error(ours, truth), limit)


def _fast_checks(case: Case, device: str, backend: str, quick: bool) -> Iterator[Check]:
    """Gradients of concentrated inputs at a tolerance: the error in units of the tolerance, which must be under 1, and
    the share of the columns that was drawn, which shows that they are no exact ones."""
    bias = None
    if case.bias:
        generator = torch.Generator(device).manual_seed(1)
        bias = torch.randn(case.vocab, generator=generator, device=device) / 2 - (case.softcap or 0.0)
        bias = bias.to(case.dtype)
    problem = inputs.synthetic(
        case.tokens, case.vocab, case.hidden, dtype=case.dtype, device=device, bias=bias, softcap=case.softcap
    )
    problem.targets[1::10] = -100
    operands = (problem.hidden, problem.weight, bias, problem.targets, problem.upstream)
    with _precision(case):
        truth = _run(case, problem.hidden.double(), problem.weight.double(), *operands[2:], "reference")
        exact = _run(case, *operands, backend)
        for tolerance in ("auto" if case.dtype.itemsize == 2 else 2.0**-8, 2.0**-6):
            allowed = torch.finfo(case.dtype).eps / 2 if tolerance == "auto" else tolerance
            fast = _run(case, *operands, backend, tolerance)
            kept = 1.0 if fast["report"] is None else fast["report"].columns_kept
            # As few tokens and columns as the quick mode has need all of them.
            yield Check(f"{case.name}: columns at {tolerance}", kept, 1.0 if quick else 0.25)
            for name in ("dhidden", "dweight", *(["dbias"] if case.bias else [])):
                # The result's own rounding, which the exact gradient has as well, comes on top of the tolerance.
                limit = DBIAS_ERROR if name == "dbias" else 1
                limit += relative_error(exact[name], truth[name]) / allowed
                error = relative_error(fast[name], truth[name]) / allowed
                yield Check(f"{case.name}: fast {name} at {tolerance}, error / tolerance", error, limit)


def _repeat_checks(case: Case, device: str, repetitions: int) -> Iterator[Check]:
    """A sampled gradient has the same bits each time, as no race between its gathers and its products would leave it
    (triton issue 9610), and but for roundings where chunks come one at a time and accumulate."""
    from prefopt_fast.kernels import sampled_grad

    problem = inputs.synthetic(case.tokens, case.vocab, case.hidden, dtype=case.dtype, device=device).leaves()
    bias = problem.weight.new_zeros(case.vocab).requires_grad_()
    leaves = (problem.hidden, problem.weight, bias)
    stats = pf.token_logprobs(
        problem.hidden, pf.LMHead(problem.weight, bias), problem.targets, grad_tolerance=2.0**-8, backend="triton"
    )

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(stats.logprobs, leaves, problem.upstream, retain_graph=True)

    first = gradients()
    differ = sum(not all(map(torch.equal, gradients(), first)) for _ in range(repetitions))
    yield Check(f"{case.name}: of {repetitions} fast gradients repeated, those of other bits", differ, 0.0)
    one_by_one = partial(sampled_grad.chunk_groups, limit=0)
    groups = mock.patch.object(sampled_grad, "chunk_groups", lambda bounds, _: one_by_one(bounds))
    with groups, mock.patch.object(sampled_grad, "FIRST_BYTES", 0):
        for name, found, expected in zip(("dhidden", "dweight", "dbias"), gradients(), first, strict=True):
            error, limit = relative_error(found, expected), FACTOR * torch.finfo(case.dtype).eps
            yield Check(f"{case.name}: fast {name}, one chunk at a time", error, limit)


def _log_ratio_checks(device: str, backend: str, quick: bool) -> Iterator[Check]:
    """WSPO's target of two heads that differ in hidden size, soft-cap and bias."""
    shapes = ((40, 211, 48), (40, 223, 32)) if quick else ((509, 151_936, 3584), (509, 152_064, 896))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    cases = Case(*shapes[0], dtype, softcap=30.0), Case(*shapes[1], dtype, bias=True)
    (hidden, weight, _, targets, _), (ref_hidden, ref_weight, ref_bias, _, _) = (_problem(c, device) for c in cases)
    heads = pf.LMHead(weight, softcap=cases[0].softcap), pf.LMHead(ref_weight, ref_bias)
    found = token_log_ratio(hidden, heads[0], ref_hidden, heads[1], targets, backend=backend).ratio
    pairs = ((hidden, heads[0]), (ref_hidden, heads[1]))
    truth, ref_truth = (pf.reference.token_logprobs(states, head, targets).logprobs for states, head in pairs)
    yield Check("log-ratio of two heads", relative_error(found, truth - ref_truth), 2e-5)


def _compile_checks(device: str, backend: str) -> Iterator[Check]:
    """A WPO loss under torch.compile(fullgraph=True) against the same in eager mode: sampled, it must be nearer to
    that draw than a fourth of the way to the exact gradient."""
    problem = inputs.synthetic(64, 1024, 64, torch.bfloat16 if device == "cuda" else torch.float32, device)

    def loss(hidden: Tensor, weight: Tensor, tolerance: float) -> Tensor:
        head, wanted = pf.LMHead(weight), ("log_sum_sq_probs",)
        targets = problem.targets.view(4, 16)
        stats = pf.token_logprobs(hidden.view(4, 16, -1), head, targets, wanted, tolerance, backend, seed=0)
        sums, weights = pf.sequence_logprobs(stats).sum, pf.wpo_weights(stats)
        reference = torch.zeros_like(sums[:2])
        return pf.wpo_loss(sums[:2], sums[2:], reference, reference, weights[:2], weights[2:]).mean()

    def gradients(function: Callable[..., Tensor], tolerance: float) -> tuple[Tensor, Tensor]:
        leaves = problem.leaves()
        return torch.autograd.grad(function(leaves.hidden, leaves.weight, tolerance), (leaves.hidden, leaves.weight))

    exact = gradients(loss, 0.0)
    for tolerance in (0.0, 2.0**-6):
        found = (gradients(function, tolerance) for function in (loss, torch.compile(loss, fullgraph=True)))
        for name, eager, compiled, truth in zip(("dhidden", "dweight"), *found, exact, strict=True):
            error, limit = relative_error(compiled, eager), 16 * torch.finfo(eager.dtype).eps
            if tolerance:
                error, limit = error / (relative_error(eager, truth) or math.nan), 0.25
            yield Check(f"torch.compile(fullgraph=True), tolerance {tolerance:g}: {name}", error, limit)


def _opchecks(device: str) -> Iterator[Check]:
    """torch.library.opcheck of the forward operator, through whose autograd registration the backward is reached."""
    case = Case(24, 96, 32, torch.float32 if device == "cpu" else torch.bfloat16)
    hidden, weight, _, targets, _ = _problem(case, device)
    for tolerance in (0.0, 2.0**-6):
        operands = (hidden.requires_grad_(), weight.requires_grad_(), None, targets, 1.0, None, "log_sum_sq_probs")
        seed = torch.tensor(0, device="cpu")
        torch.library.opcheck(torch.ops.prefopt_fast.linear_logprob.default, (*operands, -100, tolerance, seed))
        yield Check(f"opcheck of prefopt_fast::linear_logprob at tolerance {tolerance}", 0.0, 0.0)


def _size_checks(device: str, backend: str) -> Iterator[Check]:
    """A weight of more than 2³¹ elements: offsets into it and into its gradient need 64 bits."""
    case = Case(64, 530_000, 4096, torch.bfloat16)
    hidden, weight, _, targets, upstream = _problem(case, device)
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    stats = pf.token_logprobs(leaves[0], pf.LMHead(leaves[1]), targets, grad_tolerance=0.0, backend=backend)
    dhidden, dweight = torch.autograd.grad(stats.logprobs, leaves, upstream)

    # The truth in blocks of the vocabulary; no (V, H) tensor in float64.
    blocks = range(0, case.vocab, 65_536)
    states = hidden.double()
    logits = torch.cat([states @ weight[first : first + 65_536].double().T for first in blocks], dim=1)
    truth = torch.log_softmax(logits, -1)
    scored = (targets != -100).double()
    index = targets.clamp_min(0)[:, None]
    factors = truth.exp().neg_().scatter_add_(1, index, torch.ones_like(index, dtype=truth.dtype))
    factors *= (upstream * scored)[:, None]
    logprobs = truth.gather(1, index).squeeze(1) * scored
    yield Check(f"{case.name}: logprobs", relative_error(stats.logprobs, logprobs), 2e-5)
    expected = sum(factors[:, first : first + 65_536] @ weight[first : first + 65_536].double() for first in blocks)
    yield Check(f"{case.name}: dhidden", relative_error(dhidden, expected), 2 * torch.finfo(hidden.dtype).eps)
    tail = slice(case.vocab - 4096, None)
    expected = factors[:, tail].T @ states
    yield Check(
        f"{case.name}: last rows of dweight", relative_error(dweight[tail], expected), 2 * torch.finfo(hidden.dtype).eps
    )


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in float64 (Frobenius)."""
    truth = truth.double()
    return float((value.double() - truth).norm() / truth.norm().clamp(min=torch.finfo(torch.float64).tiny))


def _problem(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """hidden (N, H), weight (V, H), bias (V,), targets (N,), upstream (N,); logits of standard deviation 3.

    A tenth of the targets is ignored, a tenth is the most likely token.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden = (normal(case.tokens, case.hidden) * (3 / case.hidden**0.5)).to(case.dtype)
    weight = normal(case.vocab, case.hidden).to(case.dtype)
    bias = normal(case.vocab).to(case.dtype) if case.bias else None
    targets = torch.randint(case.vocab, (case.tokens,), generator=generator, device=device)
    targets[1::10] = -100
    logits = hidden[2::10].float() @ weight.float().T
    targets[2::10] = (logits if bias is None else logits + bias).argmax(-1)
    return hidden, weight, bias, targets, normal(case.tokens)


def _run(
    case: Case,
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    upstream: Tensor,  # (N,)
    backend: str,
    grad_tolerance: float | str = 0.0,
) -> dict[str, Any]:
    """Every statistic and gradient of ``backend`` by name, and the gradient's "report"."""
    leaves = {"dhidden": hidden, "dweight": weight} | ({} if bias is None else {"dbias": bias.to(hidden.dtype)})
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    head = pf.LMHead(leaves["dweight"], leaves.get("dbias"), case.softcap, temperature=case.temperature)
    stats = pf.token_logprobs(leaves["dhidden"], head, targets, pf.STATS, grad_tolerance, backend)
    gradients = torch.autograd.grad(stats.logprobs, list(leaves.values()), upstream.to(stats.logprobs.dtype))
    return {
        "logprobs": stats.logprobs.detach(),
        **{name: getattr(stats, name) for name in pf.STATS},
        **dict(zip(leaves, gradients, strict=True)),
        "report": stats.grad_report,
    }


def _plain(
    case: Case,
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    upstream: Tensor,  # (N,)
) -> dict[str, Tensor]:
    """What a user would write: full logits at the operands' dtype, upcast to fp32 for the softmax."""
    leaves = {"dhidden": hidden, "dweight": weight} | ({} if bias is None else {"dbias": bias})
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    logits = leaves["dhidden"] @ leaves["dweight"].T
    if bias is not None:
        logits = logits + leaves["dbias"]
    logits = logits.float()
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    logits = logits / case.temperature
    log_probs = logits.log_softmax(-1)
    scored = targets != -100
    index = targets.masked_fill(~scored, 0)[:, None]
    logprobs = log_probs.gather(1, index).squeeze(1) * scored
    gradients = torch.autograd.grad(logprobs, list(leaves.values()), upstream)
    values = {
        "logprobs": logprobs,
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
        "max_logprob": log_probs.amax(-1),
        "entropy": torch.special.entr(log_probs.exp()).sum(-1),
        "mean_logit": logits.mean(-1),
        "is_top1": logits.gather(1, index).squeeze(1) >= logits.amax(-1),
        "logsumexp": logits.logsumexp(-1),
    }
    masked = {name: value.detach().masked_fill(~scored, 0) for name, value in values.items()}
    return masked | dict(zip(leaves, gradients, strict=True))
