"""Sum, mean and length of each sequence's log-probs and its WPO weight, in one launch for packed or padded tokens.

Letters: N tokens, B sequences, T padded length. In torch operations the same takes some twenty launches.
"""

# Arguments of kernels have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import SMALL, Specialization, on_device, specialize

BLOCK = 1024


@triton.jit(do_not_specialize=["padded_length"])
def _sequence_kernel(
    logprobs,  # (N,), fp32
    alignment,  # (N,), fp32, or None: 0
    mask,  # (N,), bool
    cu_seqlens,  # (B + 1,) or None: sequence b has the tokens b·T … (b + 1)·T − 1
    sums,  # (B,), fp32
    means,  # (B,), fp32
    lengths,  # (B,), int64
    weights,  # (B,), fp32
    padded_length,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    first, last = sequence * padded_length, (sequence + 1) * padded_length
    if cu_seqlens is not None:
        first, last = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    aligned = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(first, last, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        scored = tl.load(mask + tokens, mask=tokens < last, other=0) != 0
        logprob = tl.load(logprobs + tokens, mask=scored, other=0.0)
        total += logprob
        count += scored.to(tl.int32)
        if alignment is not None:
            logprob -= tl.load(alignment + tokens, mask=scored, other=0.0)
        aligned += logprob
    length = tl.sum(count, 0)
    tl.store(sums + sequence, tl.sum(total, 0))
    tl.store(means + sequence, tl.sum(total, 0) / length)
    tl.store(lengths + sequence, length.to(tl.int64))
    tl.store(weights + sequence, tl.exp(tl.sum(aligned, 0) / length))


@torch.library.custom_op("prefopt_fast::sequence_statistics", mutates_args=())
@on_device
def sequence_statistics(
    logprobs: Tensor,  # (B, T), or (N,) with cu_seqlens
    mask: Tensor,  # of the same shape, bool
    alignment: Tensor | None,  # of the same shape
    cu_seqlens: Tensor | None,  # (B + 1,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum and mean of the scored tokens' log-probs, their number, and exp(mean(logprob − alignment)); each (B,).

    Differentiable in ``logprobs`` through sum and mean. A sequence without a scored token has a mean of NaN.
    """
    n_sequences = len(logprobs) if cu_seqlens is None else len(cu_seqlens) - 1
    sums = logprobs.new_empty(n_sequences, dtype=torch.float32)
    means, weights = torch.empty_like(sums), torch.empty_like(sums)
    lengths = torch.empty_like(sums, dtype=torch.int64)
    if n_sequences:
        _sequence_kernel[(n_sequences,)](
            logprobs.contiguous(),
            None if alignment is None else alignment.contiguous(),
            mask.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            sums,
            means,
            lengths,
            weights,
            0 if cu_seqlens is not None else logprobs.shape[1],
            BLOCK=BLOCK,
        )
    return sums, means, lengths, weights


@sequence_statistics.register_fake
def _(
    logprobs: Tensor, mask: Tensor, alignment: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = logprobs.new_empty(logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, dtype=torch.float32)
    return sums, torch.empty_like(sums), torch.empty_like(sums, dtype=torch.int64), torch.empty_like(sums)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, mask, _, cu_seqlens = inputs
    lengths, weights = output[2:]
    ctx.save_for_backward(mask, cu_seqlens, lengths)
    ctx.mark_non_differentiable(lengths, weights)


def _backward(ctx: Any, grad_sums: Tensor, grad_means: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    mask, cu_seqlens, lengths = ctx.saved_tensors
    # A sequence without scored tokens reaches none of them: its 0/0 must not either.
    grad = grad_sums + grad_means / lengths.clamp_min(1)
    if cu_seqlens is None:
        return grad[:, None] * mask, None, None, None
    positions = torch.arange(len(mask), device=mask.device)
    return grad[torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)] * mask, None, None, None


sequence_statistics.register_autograd(_backward, setup_context=_save_for_backward)


def aot_signatures(arch: str) -> Iterator[Specialization]:
    """The kernel for packed tokens with an alignment, as WPO asks for it; it has one configuration on all of them."""
    types = {
        **dict.fromkeys(("logprobs", "alignment", "sums", "means", "weights"), "*fp32"),
        **{"mask": "*i1", "cu_seqlens": "*i32", "lengths": "*i64"},
    }
    yield specialize("sequence_statistics", _sequence_kernel, SMALL, types, {"BLOCK": BLOCK})
