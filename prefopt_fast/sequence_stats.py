"""From token statistics to sequences: sums, means, and WPO's weights."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.dispatch import resolve_backend
from .token_stats import TokenStats

ALIGNMENTS = {"sampled": "log_sum_sq_probs", "greedy": "max_logprob", "none": None}


class SequenceLogprobs(NamedTuple):
    """Each (B,): summed log-prob, its mean over scored tokens, and their number (int64)."""

    sum: Tensor
    mean: Tensor
    length: Tensor

    def chunk(self, chunks: int) -> tuple[SequenceLogprobs, ...]:
        """Every field's ``Tensor.chunk``: ``chosen, rejected = logprobs.chunk(2)``."""
        return tuple(map(SequenceLogprobs, *(field.chunk(chunks) for field in self)))


def sequence_logprobs(stats: TokenStats, cu_seqlens: Tensor | None = None) -> SequenceLogprobs:
    """Sum, mean and length of each sequence's log-probs.

    Args:
        stats: of padded targets (B, T), or of packed targets (N,) together with ``cu_seqlens``.
        cu_seqlens: (B + 1,) integer offsets into the packed tokens, from 0 to N.

    Raises:
        ValueError: a layout that does not fit, or (on the CPU) a sequence without a scored token. On accelerators,
            where looking would cost a synchronization, such a sequence's mean is NaN.
    """
    if (fused := _fused(stats, None, cu_seqlens)) is not None:
        return SequenceLogprobs(*fused[:3])
    length = segment_sum(stats.mask, cu_seqlens)
    require_tokens(length)
    total = segment_sum(torch.where(stats.mask, stats.logprobs, 0.0), cu_seqlens)
    return SequenceLogprobs(total, total / length, length)


def wpo_weights(stats: TokenStats, alignment: str = "sampled", cu_seqlens: Tensor | None = None) -> Tensor:
    """WPO's weight w(x, y) = exp(1/|y| Σ_t [log π(y_t) − a_t]) of each sequence, (B,), detached (arXiv 2406.11827).

    Args:
        stats: with ``log_sum_sq_probs`` for "sampled" and ``max_logprob`` for "greedy".
        alignment: a_t is log Σ_v π(v)² for "sampled" (the paper's default), max_v log π(v) for "greedy", and 0 for
            "none".
        cu_seqlens: as in :func:`sequence_logprobs`.

    Raises:
        ValueError: an unknown alignment, a statistic that ``stats`` lacks, or what sequence_logprobs raises.
    """
    name = alignment_stat(alignment)
    statistic = None if name is None else getattr(stats, name)
    if name is not None and statistic is None:
        raise ValueError(f'alignment "{alignment}" needs token_logprobs(..., stats=("{name}",))')
    stats = replace(stats, logprobs=stats.logprobs.detach())
    if (fused := _fused(stats, statistic, cu_seqlens)) is not None:
        return fused[3]
    if statistic is not None:
        stats = replace(stats, logprobs=stats.logprobs - statistic)
    return sequence_logprobs(stats, cu_seqlens).mean.exp()


def alignment_stat(alignment: str) -> str | None:
    """The token statistic that a WPO alignment needs beside the log-probs, or None."""
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}; found {alignment!r}")
    return ALIGNMENTS[alignment]


def _fused(
    stats: TokenStats,
    alignment: Tensor | None,  # of the log-probs' shape
    cu_seqlens: Tensor | None,  # (B + 1,)
) -> tuple[Tensor, ...] | None:
    """Sums, means, lengths and WPO weights in one launch; None where Triton does not compute them."""
    asked = stats.backend in ("auto", "triton") and stats.logprobs.dtype == torch.float32
    if not asked or resolve_backend("auto", stats.logprobs.device) != "triton":  # which they may have left since
        return None
    _check_layout(stats.logprobs, cu_seqlens)
    from .kernels.sequence_statistics import sequence_statistics

    found = sequence_statistics(stats.logprobs, stats.mask, alignment, cu_seqlens)
    require_tokens(found[2])
    return found


def segment_sum(
    values: Tensor,  # (B, T), or (N,) with cu_seqlens
    cu_seqlens: Tensor | None,  # (B + 1,)
) -> Tensor:
    """(B,) sums over each sequence's tokens, at least fp32; booleans are counted."""
    _check_layout(values, cu_seqlens)
    real = values.is_floating_point()
    dtype = torch.promote_types(values.dtype, torch.float32) if real else torch.int64
    if cu_seqlens is None:
        return values.sum(-1, dtype=dtype)
    # index_add sums one by one: of thousands of tokens fp32 would lose digits, and 16 bits everything.
    wide = torch.float64 if real and values.device.type in ("cpu", "cuda") else dtype
    positions = torch.arange(len(values), device=values.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
    sums = torch.zeros(len(cu_seqlens) - 1, dtype=wide, device=values.device)
    return sums.index_add(0, sequence, values.to(wide)).to(dtype)


def require_tokens(length: Tensor) -> None:
    """Raise ValueError, on the CPU, for sequences of length 0."""
    if length.device.type == "cpu" and not torch.compiler.is_compiling() and bool((length == 0).any()):
        empty = (length == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"every sequence needs at least one scored token; sequences {empty} of {len(length)} have none"
        )


def _check_layout(values: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        if values.dim() != 2:
            raise ValueError(
                f"statistics must have the padded shape (B, T), or be packed (N,) with cu_seqlens; "
                f"found {tuple(values.shape)} without cu_seqlens"
            )
        return
    if values.dim() != 1 or cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be (B + 1,) integers over packed statistics (N,); found cu_seqlens "
            f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype} and statistics {tuple(values.shape)}"
        )
    if cu_seqlens.device != values.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, expected {values.device} as the statistics")
    looked_at = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and (cu_seqlens[0] != 0 or cu_seqlens[-1] != len(values) or bool((cu_seqlens.diff() < 0).any())):
        raise ValueError(f"cu_seqlens must rise from 0 to the {len(values)} packed tokens, found {cu_seqlens.tolist()}")
