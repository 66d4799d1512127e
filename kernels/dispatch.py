"""Which implementation computes a call. The choice is explicit: what cannot run raises and says why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

STATS = ("log_sum_sq_probs", "max_logprob", "entropy", "mean_logit", "is_top1", "logsumexp")
BACKENDS = ("auto", "torch", "triton", "reference")
TRITON_DEVICES = ("cuda", "xpu")
HAS_TRITON = find_spec("triton") is not None


class Options(NamedTuple):
    """What steers a computation without being an operand."""

    grad_tolerance: tuple[float, float] = (0.0, 0.0)  # of dhidden, of dweight; 0 is exact
    ignore_index: int = -100
    seed: int | Tensor = 0  # a Tensor, () on the CPU, where it was drawn: compiled functions draw anew in each call


@dataclass(frozen=True)
class GradReport:
    """What a gradient with ``grad_tolerance > 0`` did (Python numbers, over one call's scored tokens).

    columns_kept: share of the vocabulary's columns whose gradient was computed, mean over chunks (1 for a dense one);
        a chunk is a group of tokens that share columns.
    max_dropped_mass: largest probability mass that one token has on columns that are sampled rather than always kept;
        None from the Triton kernels, which do not form it.
    estimated_error: relative error (Frobenius) that the samples themselves let expect, of dhidden or of dweight,
        whichever is larger; from the Triton kernels, what was expected of them before they were drawn.
    dense_chunks, chunks: chunks that were computed exactly because sampling would not have paid, and all chunks.
    """

    columns_kept: float
    max_dropped_mass: float | None
    estimated_error: float
    dense_chunks: int
    chunks: int


@dataclass
class Report:
    """What an inexact gradient has to say; nothing before the backward where that chooses the columns."""

    values: GradReport | None = None


def linear_logprob(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    transform: tuple[float, float | None],
    stats: tuple[str, ...],
    options: Options,
    backend: str = "auto",
) -> tuple[dict[str, Tensor], Report | None]:
    """Validated operands in; "logprobs" and the asked statistics, each (N,), out.

    ``transform`` is (scale, softcap): logits z = softcap · tanh(scale · x / softcap), or scale · x without a cap, for
    x = hidden @ weightᵀ + bias.
    """
    name = resolve_backend(backend, hidden.device)
    # Statements, not a table with importlib: torch.compile traces the one and not the other.
    if name == "triton":
        from .linear_logprob import linear_logprob as implementation
    elif name == "torch":
        from .torch_backend import linear_logprob as implementation
    else:
        from ..reference.token_stats import linear_logprob as implementation
    return implementation(hidden, weight, bias, targets, transform, stats, options)


def resolve_backend(backend: str, device: torch.device) -> str:
    """Name of the backend that runs on ``device``; raises ValueError or RuntimeError where ``backend`` cannot."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; found {backend!r}")
    if backend == "auto":
        return "triton" if device.type in TRITON_DEVICES and HAS_TRITON else "torch"
    if backend == "triton" and not HAS_TRITON:
        raise RuntimeError('backend="triton" needs the triton package, which is not installed')
    if backend == "triton" and device.type not in TRITON_DEVICES and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f'backend="triton" runs on CUDA, ROCm and XPU devices, found tensors on {device}; '
            "set TRITON_INTERPRET=1 before the start to run the kernels in Triton's interpreter"
        )
    return backend
