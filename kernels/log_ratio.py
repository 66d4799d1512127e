"""WSPO's target log π_aligned(y_t) − log π_ref(y_t) of two heads: the same walk over both, and one merge of the two.

Letters: N tokens (n of them scored), V vocabulary, H hidden size; the two models may differ in H and in padding of V.
Nothing but the splits' maxima and sums lies between the walks and the result: no log-prob of either head is written.
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

from .linear_logprob import forward_partials, scored_index, take_rows
from .tiles import (
    LN2,
    SMALL,
    SYNCHRONIZES,
    VARYING_SIZES,
    Specialization,
    cdiv,
    kernel_operands,
    merge_splits,
    next_power_of_2,
    on_device,
    specialize,
)

Transform = tuple[float, float | None]


@triton.jit
def _split_logprob(
    partials,  # (2, splits, n): each split's maximum m and Σ 2^(z−m)
    target_logits,  # (n,)
    tokens,  # (BLOCK_N,)
    n_tokens,
    n_splits,
    BLOCK_SPLITS: tl.constexpr,
):
    scored = tokens < n_tokens
    maximum, total = merge_splits(partials, tokens, n_tokens, n_splits, BLOCK_SPLITS)
    logit = tl.load(target_logits + tokens, mask=scored, other=0.0)
    return (logit - maximum) * LN2 - tl.log(tl.where(scored, total, 1.0))


@triton.jit(do_not_specialize=[*VARYING_SIZES, "ref_splits"])
def _log_ratio_kernel(
    partials,  # (2, splits, n), of the aligned head
    target_logits,  # (n,)
    ref_partials,  # (2, ref_splits, n)
    ref_target_logits,  # (n,)
    rows,  # (n,) where each token's result goes, or None: in order
    log_ratios,  # (N,), fp32
    n_tokens,
    n_splits,
    ref_splits,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scored = tokens < n_tokens
    aligned = _split_logprob(partials, target_logits, tokens, n_tokens, n_splits, BLOCK_SPLITS)
    ref = _split_logprob(ref_partials, ref_target_logits, tokens, n_tokens, ref_splits, BLOCK_SPLITS)
    out = tokens
    if rows is not None:
        out = tl.load(rows + tokens, mask=scored, other=0)
    tl.store(log_ratios + out, aligned - ref, mask=scored)


@torch.library.custom_op("prefopt_fast::log_ratio", mutates_args=(), tags=SYNCHRONIZES)
@on_device
def _log_ratio_op(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (N, ref H)
    ref_weight: Tensor,  # (ref V, ref H)
    ref_bias: Tensor | None,  # (ref V,)
    targets: Tensor,  # (N,)
    scale: float,
    softcap: float | None,
    ref_scale: float,
    ref_softcap: float | None,
    ignore_index: int,
) -> Tensor:
    log_ratios = hidden.new_zeros(targets.shape, dtype=torch.float32)
    scored, scored_targets, rows = take_rows(hidden, targets, scored_index(targets, ignore_index))
    n_tokens = len(scored)
    if not n_tokens:
        return log_ratios
    ref_scored = ref_hidden.contiguous() if rows is None else ref_hidden.index_select(0, rows)
    partials, target_logits, _ = forward_partials(scored, weight.contiguous(), bias, scored_targets, (scale, softcap))
    ref_partials, ref_target_logits, _ = forward_partials(
        ref_scored, ref_weight.contiguous(), ref_bias, scored_targets, (ref_scale, ref_softcap)
    )
    n_splits, ref_splits = partials.shape[1], ref_partials.shape[1]
    block_splits = next_power_of_2(max(n_splits, ref_splits))
    block_n = max(16, 2048 // block_splits)
    _log_ratio_kernel[(cdiv(n_tokens, block_n),)](
        partials,
        target_logits,
        ref_partials,
        ref_target_logits,
        rows,
        log_ratios,
        n_tokens,
        n_splits,
        ref_splits,
        BLOCK_N=block_n,
        BLOCK_SPLITS=block_splits,
    )
    return log_ratios


@_log_ratio_op.register_fake
def _(hidden: Tensor, *operands: Any) -> Tensor:
    targets = operands[5]
    return hidden.new_empty(targets.shape, dtype=torch.float32)


def log_ratio(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (N, ref H)
    ref_weight: Tensor,  # (ref V, ref H)
    ref_bias: Tensor | None,  # (ref V,)
    targets: Tensor,  # (N,)
    transforms: tuple[Transform, Transform],
    ignore_index: int,
) -> Tensor:
    """log π(y_t) − log π_ref(y_t), (N,), 0 where ignored; not differentiable.

    Raises:
        NotImplementedError: operands in float64, which the kernels do not take.
    """
    hidden, weight, ref_hidden, ref_weight = kernel_operands(hidden, weight, ref_hidden, ref_weight)
    (scale, softcap), (ref_scale, ref_softcap) = transforms
    return _log_ratio_op(
        hidden,
        weight,
        bias,
        ref_hidden,
        ref_weight,
        ref_bias,
        targets,
        scale,
        softcap,
        ref_scale,
        ref_softcap,
        ignore_index,
    )


def aot_signatures(arch: str) -> Iterator[Specialization]:
    """The merge for a subset of rows; the walks are linear_logprob's."""
    floats = ("partials", "target_logits", "ref_partials", "ref_target_logits", "log_ratios")
    types = {**dict.fromkeys(floats, "*fp32"), "rows": "*i64"}
    yield specialize("log_ratio", _log_ratio_kernel, SMALL, types, {"BLOCK_N": 32, "BLOCK_SPLITS": 64})
