"""Token statistics and their exact gradient in plain torch, a chunk of tokens at a time: CPUs and any other device.

Letters: N tokens, H hidden size, V vocabulary, C tokens in a chunk. Logits are formed, and gradients accumulated, in
fp32 (fp64 for fp64 inputs) whatever the inputs' dtype: a bf16 logit of 20 is wrong by 0.06 before any statistic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import Options, Report

CHUNK_BYTES = 64 << 20  # of one (C, V) buffer of logits; a call holds at most three of them
WEIGHT_TILE = 4096  # rows of a 16-bit weight that are upcast at a time


def linear_logprob(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    transform: tuple[float, float | None],
    stats: tuple[str, ...],
    options: Options,
) -> tuple[dict[str, Tensor], Report | None]:
    """See kernels/dispatch.py for the contract."""
    outputs = _linear_logprob(hidden, weight, bias, targets, transform, stats, options)
    return dict(zip(("logprobs", *stats), outputs, strict=True)), None


@torch.compiler.disable
def _linear_logprob(*operands: Any) -> tuple[Tensor, ...]:
    return _LinearLogprob.apply(*operands)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        transform: tuple[float, float | None],
        stats: tuple[str, ...],
        options: Options,
    ) -> tuple[Tensor, ...]:
        accumulate = _accumulate_dtype(hidden.dtype)
        rows = (targets != options.ignore_index).nonzero().squeeze(-1)
        outputs = {
            name: targets.new_zeros(targets.shape, dtype=torch.bool if name == "is_top1" else accumulate)
            for name in ("logprobs", *stats)
        }
        logsumexp = targets.new_zeros(targets.shape, dtype=accumulate)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk, logits in _logit_chunks(hidden, weight, bias, rows, transform):
                values = _chunk_stats(logits, targets[chunk], stats)
                logsumexp[chunk] = values["logsumexp"]
                for name, output in outputs.items():
                    output[chunk] = values[name]
        ctx.save_for_backward(hidden, weight, bias, targets, rows, logsumexp, outputs["logprobs"])
        ctx.transform = transform
        result = tuple(outputs.values())
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, rows, logsumexp, logprobs = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        scale, softcap = ctx.transform
        accumulate = logsumexp.dtype
        dhidden = torch.zeros_like(hidden) if need_hidden else None
        dweight = torch.zeros(weight.shape, dtype=accumulate, device=weight.device) if need_weight else None
        dbias = torch.zeros(weight.shape[0], dtype=accumulate, device=weight.device) if need_bias else None

        with torch.autocast(hidden.device.type, enabled=False):
            for chunk, logits in _logit_chunks(hidden, weight, bias, rows, ctx.transform):
                upstream = grad[chunk].to(accumulate) * scale
                # d cap·tanh(x/cap) / dx = 1 − (z/cap)², taken before the logits are overwritten.
                slope = None if softcap is None else (logits / softcap).square_().neg_().add_(1)
                # ∂logp/∂z_v = [v = y] − p_v, and the target's own 1 − p_y as −expm1(logp): as p_y → 1 the difference
                # of two rounded numbers has no digit left.
                grad_logits = logits.sub_(logsumexp[chunk, None]).exp_().mul_(-upstream[:, None])
                at_target = upstream * -torch.expm1(logprobs[chunk])
                grad_logits.scatter_(1, targets[chunk, None], at_target[:, None])
                if slope is not None:
                    grad_logits.mul_(slope)
                if dhidden is not None:
                    dhidden[chunk] = _times_weight(grad_logits, weight).to(hidden.dtype)
                if dweight is not None:
                    dweight.addmm_(grad_logits.T, hidden[chunk].to(accumulate))
                if dbias is not None:
                    dbias += grad_logits.sum(0)

        return (
            dhidden,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            *[None] * 4,
        )


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logit_chunks(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (scored,), int64
    transform: tuple[float, float | None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Row indices of a chunk and its logits (C, V), which the caller may overwrite: the next chunk reuses them."""
    scale, softcap = transform
    accumulate = _accumulate_dtype(hidden.dtype)
    size = max(16, CHUNK_BYTES // (weight.shape[0] * accumulate.itemsize))
    buffer = torch.empty(min(size, len(rows)), weight.shape[0], dtype=accumulate, device=hidden.device)
    for chunk in rows.split(size):
        logits = buffer[: len(chunk)]
        _times_weight_t(hidden[chunk].to(accumulate), weight, out=logits)
        if bias is not None:
            logits += bias.to(accumulate)
        if softcap is not None:
            logits.mul_(scale / softcap).tanh_().mul_(softcap)
        elif scale != 1.0:
            logits *= scale
        yield chunk, logits


def _times_weight_t(left: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (C, V) = left (C, H) @ weightᵀ in left's dtype, upcasting a tile of weight at a time."""
    if weight.dtype == left.dtype:
        torch.mm(left, weight.T, out=out)
        return
    for tile, columns in zip(weight.split(WEIGHT_TILE), out.split(WEIGHT_TILE, dim=1), strict=True):
        columns.copy_(left @ tile.to(left.dtype).T)


def _times_weight(left: Tensor, weight: Tensor) -> Tensor:
    """(C, H) = left (C, V) @ weight in left's dtype, upcasting a tile of weight at a time."""
    if weight.dtype == left.dtype:
        return left @ weight
    out = left.new_zeros(left.shape[0], weight.shape[1])
    for tile, columns in zip(weight.split(WEIGHT_TILE), left.split(WEIGHT_TILE, dim=1), strict=True):
        out.addmm_(columns, tile.to(left.dtype))
    return out


def _chunk_stats(
    logits: Tensor,  # (C, V), overwritten
    targets: Tensor,  # (C,)
    stats: tuple[str, ...],
) -> dict[str, Tensor]:
    """Every statistic asked for, with logprobs and logsumexp always, from logits shifted by their maximum."""
    values = {}
    target_logit = logits.gather(1, targets[:, None]).squeeze(1)
    if "mean_logit" in stats:
        values["mean_logit"] = logits.mean(-1)
    maximum = logits.amax(-1)
    shifted = logits.sub_(maximum[:, None])
    # Entropy needs Σ e^x·x beside Σ e^x, so only then is a second buffer held.
    exp = shifted.exp() if "entropy" in stats else shifted.exp_()
    total = exp.sum(-1)
    log_total = total.log()
    values["logsumexp"] = maximum + log_total
    # Through the shifted target, so that the log-prob is ≤ 0 and keeps its digits beside a large maximum.
    values["logprobs"] = (target_logit - maximum) - log_total
    if "entropy" in stats:
        values["entropy"] = log_total - torch.linalg.vecdot(exp, shifted) / total
    if "log_sum_sq_probs" in stats:
        values["log_sum_sq_probs"] = 2 * (torch.linalg.vector_norm(exp, dim=-1).log() - log_total)
    if "max_logprob" in stats:
        values["max_logprob"] = -log_total
    if "is_top1" in stats:
        values["is_top1"] = target_logit >= maximum
    return values
