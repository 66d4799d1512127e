"""Correctness on the device at hand, against float64: what ``make gpu-bench`` does before it times anything.

An error may be up to four times that of the same mathematics in plain torch at the same dtype (full logits, autograd),
or that many roundings of the result's own dtype.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import inputs
import torch
from torch import Tensor

import prefopt_fast as pf
from prefopt_fast.log_ratio import token_log_ratio

FACTOR = 4


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

    @property
    def name(self) -> str:
        options = [f"soft-cap {self.softcap:g}"] if self.softcap is not None else []
        options += ["bias"] if self.bias else []
        options += [f"temperature {self.temperature:g}"] if self.temperature != 1.0 else []
        dtype = str(self.dtype).removeprefix("torch.")
        return ", ".join([f"{dtype} N {self.tokens} V {self.vocab} H {self.hidden}", *options])


CASES = [
    Case(509, 128_256, 4096, torch.bfloat16),
    Case(512, 256_000, 2304, torch.bfloat16, softcap=30.0),
    Case(300, 151_936, 896, torch.float16, temperature=0.7),
    Case(257, 32_003, 576, torch.float32, bias=True),
    Case(1, 49_152, 200, torch.bfloat16, bias=True, softcap=20.0),
]
QUICK_CASES = [
    Case(37, 211, 48, torch.float32, bias=True, softcap=20.0, temperature=0.7),
    Case(24, 256, 32, torch.bfloat16),
]


def run_checks(device: str, backend: str, quick: bool) -> Iterator[Check]:
    """One check after the other; what raises is yielded as a check that failed."""
    for case in QUICK_CASES if quick else CASES:
        yield from _guarded(case.name, _exact_checks(case, device, backend))
    for case in QUICK_CASES[1:] if quick else CASES[:3]:
        with _sampling(backend):
            yield from _guarded(f"{case.name}: fast gradient", _fast_checks(case, device, backend, quick))
    yield from _guarded("log-ratio of two heads", _log_ratio_checks(device, backend, quick))
    if backend == "triton":  # the torch path is no operator, and breaks the graph
        with _sampling(backend):
            yield from _guarded("torch.compile", _compile_checks(device, backend))
            yield from _guarded("opcheck", _opchecks(device))
    if not quick:
        yield from _guarded("beyond 2^31 elements", _size_checks(device, backend))


@contextlib.contextmanager
def _sampling(backend: str) -> Iterator[None]:
    """Here gradients are sampled although the problem is small, and however many columns that takes."""
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            from prefopt_fast.kernels import linear_logprob, sampled_grad

            stack.enter_context(mock.patch.object(linear_logprob, "MIN_SAMPLED_WORK", 0))
            stack.enter_context(mock.patch.object(sampled_grad, "MAX_SHARE", 1.0))
        yield


def _guarded(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    try:
        yield from checks
    except Exception as error:  # the others are still worth running
        message = str(error).strip().splitlines() or [""]
        yield Check(f"{name}: {type(error).__name__}: {message[0][:300]}", math.nan, 0.0)


def _exact_checks(case: Case, device: str, backend: str) -> Iterator[Check]:
    """Every statistic and every exact gradient."""
    hidden, weight, bias, targets, upstream = _problem(case, device)
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
        else:
            limit = FACTOR * max(relative_error(plain, truth), torch.finfo(ours.dtype).eps)
            yield Check(f"{case.name}: {name}", relative_error(ours, truth), limit)


def _fast_checks(case: Case, device: str, backend: str, quick: bool) -> Iterator[Check]:
    """Gradients of concentrated inputs at a tolerance: the error in units of the tolerance, which must be under 1, and
    the share of the columns that was drawn, which shows that they are no exact ones."""
    problem = inputs.synthetic(case.tokens, case.vocab, case.hidden, dtype=case.dtype, device=device)
    operands = (problem.hidden, problem.weight, None, problem.targets, problem.upstream)
    truth = _run(case, problem.hidden.double(), problem.weight.double(), *operands[2:], "reference")
    exact = _run(case, *operands, backend)
    for tolerance in ("auto", 2.0**-6):
        allowed = torch.finfo(case.dtype).eps / 2 if tolerance == "auto" else tolerance
        fast = _run(case, *operands, backend, tolerance)
        kept = 1.0 if fast["report"] is None else fast["report"].columns_kept
        # As few tokens and columns as the quick mode has need all of them.
        yield Check(f"{case.name}: columns at {tolerance}", kept, 1.0 if quick else 0.25)
        for name in ("dhidden", "dweight"):
            # The result's own rounding, which the exact gradient has as well, comes on top of the tolerance.
            limit = 1 + relative_error(exact[name], truth[name]) / allowed
            error = relative_error(fast[name], truth[name]) / allowed
            yield Check(f"{case.name}: fast {name} at {tolerance}, error / tolerance", error, limit)


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
    """A WPO loss under torch.compile(fullgraph=True) against the same in eager mode."""
    case = Case(64, 512, 64, torch.bfloat16 if device == "cuda" else torch.float32)
    hidden, weight, _, targets, _ = _problem(case, device)

    def loss(hidden: Tensor, weight: Tensor, tolerance: float) -> Tensor:
        head, wanted = pf.LMHead(weight), ("log_sum_sq_probs",)
        stats = pf.token_logprobs(hidden.view(4, 16, -1), head, targets.view(4, 16), wanted, tolerance, backend)
        sums, weights = pf.sequence_logprobs(stats).sum, pf.wpo_weights(stats)
        reference = torch.zeros_like(sums[:2])
        return pf.wpo_loss(sums[:2], sums[2:], reference, reference, weights[:2], weights[2:]).mean()

    for tolerance in (0.0, 2.0**-6):
        gradients = []
        for function in (loss, torch.compile(loss, fullgraph=True)):
            leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
            function(*leaves, tolerance).backward()
            gradients.append([leaf.grad for leaf in leaves])
        for name, eager, compiled in zip(("dhidden", "dweight"), *gradients, strict=True):
            error, limit = relative_error(compiled, eager), 16 * torch.finfo(eager.dtype).eps
            yield Check(f"torch.compile(fullgraph=True), tolerance {tolerance:g}: {name}", error, limit)


def _opchecks(device: str) -> Iterator[Check]:
    """torch.library.opcheck of the forward operator, through whose autograd registration the backward is reached."""
    case = Case(24, 96, 32, torch.float32 if device == "cpu" else torch.bfloat16)
    hidden, weight, _, targets, _ = _problem(case, device)
    for tolerance in (0.0, 2.0**-6):
        operands = (hidden.requires_grad_(), weight.requires_grad_(), None, targets, 1.0, None, "log_sum_sq_probs")
        torch.library.opcheck(torch.ops.prefopt_fast.linear_logprob.default, (*operands, -100, tolerance, 0))
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
    """hidden (N, H), weight (V, H), bias (V,), targets (N,), upstream (N,); logits of standard deviation 3."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden = (normal(case.tokens, case.hidden) * (3 / case.hidden**0.5)).to(case.dtype)
    weight = normal(case.vocab, case.hidden).to(case.dtype)
    bias = normal(case.vocab).to(case.dtype) if case.bias else None
    targets = torch.randint(case.vocab, (case.tokens,), generator=generator, device=device)
    targets[1::10] = -100
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
