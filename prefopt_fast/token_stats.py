"""Per-token statistics under a language-model head, from hidden states: the public function and what it returns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import parallel
from .head import LMHead
from .kernels import dispatch
from .kernels.dispatch import GradReport

STATS = dispatch.STATS

_check_inputs: ContextVar[bool] = ContextVar("prefopt_fast_check_inputs", default=False)


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Statistics of each target token; every tensor has the shape of ``targets`` and is 0 (False) where ignored.

    logprobs: log π(y_t), fp32 (float64 for float64 hidden states), differentiable in hidden, weight and bias.
    mask: bool, True where the target is not ignored.
    log_sum_sq_probs: log Σ_v π(v)² (WPO's sampled alignment, arXiv 2406.11827).
    max_logprob: max_v log π(v).
    entropy: −Σ_v π(v) log π(v), in nats.
    mean_logit: 1/V Σ_v z_v.
    is_top1: bool, True where no logit exceeds the target's.
    logsumexp: log Σ_v exp z_v.
    The statistics are detached, and None unless asked for.
    report: what grad_report reads.
    backend: what was asked for, which sums over sequences keep to.
    """

    logprobs: Tensor
    mask: Tensor
    log_sum_sq_probs: Tensor | None = None
    max_logprob: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    logsumexp: Tensor | None = None
    report: dispatch.Report | None = field(default=None, repr=False)
    backend: str = field(default="auto", repr=False)

    @property
    def grad_report(self) -> GradReport | None:
        """None for exact gradients, without gradients, and under torch.compile.

        The Triton kernels choose their columns in the backward: there it is None before.
        """
        return None if self.report is None else self.report.values


@contextlib.contextmanager
def check_inputs(enabled: bool = True) -> Iterator[None]:
    """Within this context, token_logprobs also looks for NaN and Inf in hidden states, and for out-of-range targets on
    accelerators, where the look costs a synchronization (on the CPU targets are always checked)."""
    token = _check_inputs.set(enabled)
    try:
        yield
    finally:
        _check_inputs.reset(token)


def token_logprobs(
    hidden: Tensor,  # (…, H)
    head: LMHead,
    targets: Tensor,  # (…)
    stats: tuple[str, ...] = (),
    grad_tolerance: float | str | tuple[float, float] = "auto",
    backend: str = "auto",
    ignore_index: int = -100,
    seed: int | None = None,
) -> TokenStats:
    """Log-probability of each target token, without ever holding the (tokens × vocabulary) logits.

    The target of position t is ``targets[t]`` itself: shift before the call.

    Args:
        hidden: (…, H) float32, float64, bfloat16 or float16, of the head's dtype (under autocast both are cast).
        head: the LM head; its weight and bias get gradients where they require them.
        targets: (…) integer token ids in [0, V), or ``ignore_index``.
        stats: extra statistics, any of ``prefopt_fast.STATS``.
        grad_tolerance: allowed relative error (Frobenius) of the gradients: 0.0 for exact ones; "auto" for the unit
            roundoff of the hidden states' dtype, under autocast of its (float32 and float64: exact); a number; or a
            pair (of dhidden, of dweight). The torch path draws in the forward, for upstream gradients that do not
            single out tokens: of those alone that the model is all but certain of, whose gradients are next to nothing,
            the error can be many times that.
        backend: "auto", "torch", "triton" or "reference". What cannot run raises.
        ignore_index: targets with this value are not computed.
        seed: of the column sampling behind an inexact gradient; equal inputs and seed give equal bits, on the torch
            path with an equal number of threads. None draws another for each call from torch's CPU generator, so that
            errors average out; over data-parallel processes too, where their generators differ.

    A sharded head makes the call collective: see :class:`LMHead`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, targets, names or a head that do not fit.
        RuntimeError, NotImplementedError: a backend that cannot run here.
    """
    validate_inputs(hidden, head, targets, stats, ignore_index)
    targets = targets.long()  # before any comparison: no narrow type holds −100, or a vocabulary's size
    hidden = hidden.to(product_dtype(hidden))
    tolerances = resolve_grad_tolerance(grad_tolerance, hidden.dtype)
    head = parallel.localize(head, hidden.dtype)
    weight = product_weight(hidden, head)
    operands = (hidden.reshape(-1, hidden.shape[-1]), weight, head.bias, targets.reshape(-1), head.transform)
    draws = seed is None and torch.is_grad_enabled() and any(tolerances)
    drawn = torch.randint(2**31, (), device="cpu") if draws else seed or 0
    how = (tuple(stats), dispatch.Options(tolerances, ignore_index, drawn), backend)
    if head.group is None:
        outputs, report = dispatch.linear_logprob(*operands, *how)
    else:
        from . import vocab_parallel  # which imports dynamo

        outputs, report = vocab_parallel.linear_logprob(*operands, *how, head.group, head.vocab_start)
    # No view where none is needed, such as FSDP warns of where a model returns it.
    shaped = {n: value if targets.dim() == 1 else value.reshape(targets.shape) for n, value in outputs.items()}
    return TokenStats(mask=targets != ignore_index, report=report, backend=backend, **shaped)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Of the product with the head: the hidden states', or autocast's."""
    device = hidden.device.type
    casts = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype(device) if casts else hidden.dtype


def product_weight(hidden: Tensor, head: LMHead) -> Tensor:
    """The weight in the dtype of ``hidden``, to which autocast casts it; raises ValueError where nothing does."""
    if torch.is_autocast_enabled(hidden.device.type):
        return head.weight.to(hidden.dtype)
    if hidden.dtype != head.weight.dtype:
        raise ValueError(
            f"hidden and head.weight must have one dtype, found {hidden.dtype} and {head.weight.dtype}: cast one of "
            "them, or run under torch.autocast"
        )
    return head.weight


def resolve_grad_tolerance(
    grad_tolerance: float | str | tuple[float, float], dtype: torch.dtype
) -> tuple[float, float]:
    """(of dhidden, of dweight) as numbers; see :func:`token_logprobs`."""
    if grad_tolerance == "auto":
        # Unit roundoff of a 16-bit format: approximation then costs no more than the rounding already there.
        unit = torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else 0.0
        return unit, unit
    pair = grad_tolerance if isinstance(grad_tolerance, tuple) else (grad_tolerance, grad_tolerance)
    if len(pair) != 2 or not all(isinstance(t, (int, float)) and 0.0 <= t < 1.0 for t in pair):
        raise ValueError(
            f'grad_tolerance must be "auto", a number in [0, 1) or a pair of them, found {grad_tolerance!r}'
        )
    return float(pair[0]), float(pair[1])


def validate_inputs(hidden: Tensor, head: LMHead, targets: Tensor, stats: tuple[str, ...], ignore_index: int) -> None:
    """Raise ValueError for anything :func:`token_logprobs` cannot compute, naming argument, finding and expectation;
    TypeError for a head that is none."""
    if not isinstance(head, LMHead):
        raise TypeError(f"head must be an LMHead, found {type(head).__name__}: LMHead(weight, bias) makes one")
    if isinstance(stats, str) or (unknown := [name for name in stats if name not in STATS]):
        raise ValueError(
            f"stats must be a tuple of {', '.join(STATS)}; found {stats if isinstance(stats, str) else unknown!r}"
        )
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, found {hidden.dtype}")
    if hasattr(hidden, "device_mesh"):
        raise ValueError("hidden must be a plain tensor, found a DTensor: call full_tensor() on it")
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != head.hidden_size:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must be targets' shape {tuple(targets.shape)} plus the hidden size "
            f"{head.hidden_size} of head.weight {tuple(head.weight.shape)}"
        )
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"targets must be integer token ids (int8 to int64, uint8), found {targets.dtype}")
    operands = {"hidden": hidden, "head.weight": head.weight, "head.bias": head.bias, "targets": targets}
    devices = {name: str(operand.device) for name, operand in operands.items() if operand is not None}
    if len({*devices.values()}) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"hidden, head and targets must be on one device, found {found}")
    compiling = torch.compiler.is_compiling()  # which traces neither the context variable nor a look at values
    thorough = not compiling and _check_inputs.get()
    # Shards of a vocabulary are compared with the targets together, in vocab_parallel.py.
    if (targets.device.type == "cpu" or thorough) and not compiling and head.group is None:
        targets = targets.long()
        bad = ((targets < 0) | (targets >= head.vocab_size)) & (targets != ignore_index)
        if count := int(bad.sum()):
            raise ValueError(
                f"targets must be in [0, {head.vocab_size}) or ignore_index {ignore_index}: {count} are not, "
                f"from {int(targets[bad].min())} to {int(targets[bad].max())}"
            )
    if thorough and not math.isfinite(float(hidden.detach().float().abs().max() if hidden.numel() else 0.0)):
        positions = (~hidden.detach().isfinite()).any(-1)
        raise ValueError(f"hidden has NaN or Inf at {int(positions.sum())} of {positions.numel()} positions")
