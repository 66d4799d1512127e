"""Statistics under a head whose rows are shared out over ranks, which exchange a few numbers per token, never logits.

Letters as elsewhere (N tokens, H hidden size, V vocabulary), with P ranks of a vocabulary-parallel group, rank r having
V_r rows of the weight, and all of them the same hidden states and targets.

With lse_r = log Σ_v exp z_v over the rows of rank r and lse over all rows, all else follows from d_r = lse_r − lse ≤ 0:
what is p^(r)_v in rank r's own softmax is p_v = exp(d_r) · p^(r)_v in the whole one. So, for a target y on rank s,

    log p_y       = d_s + log p^(s)_y, where d_s = −log1p(Σ_{r≠s} exp(lse_r − lse_s)) keeps its digits as d_s → 0
    log Σ_v p_v²  = log Σ_r exp(2 d_r + log Σ_v (p^(r)_v)²)
    max_v log p_v = max_r (d_r + max_v log p^(r)_v)
    entropy       = Σ_r exp(d_r) · (entropy_r − d_r), all terms ≥ 0
    mean logit    = Σ_r V_r · mean_r / V

The gradient needs one call of the operator per rank, on the rank's rows and with a target of its own: a_r = y where y
lies there, else row 0. The operator differentiates log p^(r)_a, ∂log p^(r)_a / ∂z_v = [v = a] − p^(r)_v, so for v on r

    ∂log p_y / ∂z_v = [v = y] − p_v = exp(d_r) · ∂log p^(r)_a / ∂z_v + [v = a] · ([y on r] − exp(d_r)):

the operator's own gradient (of a sampled one the expectation stays exact) times exp(d_r), and one row per token. At a
target both parts have the same sign. At a row 0 that stands in they cancel, so the weight's gradient at row 0 is made
from its probabilities, not as the difference of two sums that were rounded to 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .kernels import dispatch
from .kernels.autograd import once_differentiable

_IGNORED = -1  # among a rank's own targets, which are row numbers


def linear_logprob(
    hidden: Tensor,  # (N, H), equal on all ranks
    weight: Tensor,  # (V_r, H)
    bias: Tensor | None,  # (V_r,)
    targets: Tensor,  # (N,), equal on all ranks
    transform: tuple[float, float | None],
    stats: tuple[str, ...],
    options: dispatch.Options,
    backend: str,
    group: dist.ProcessGroup,
    vocab_start: int,
) -> tuple[dict[str, Tensor], dispatch.Report | None]:
    """kernels/dispatch.py's contract over the vocabulary of all ranks; the report is of this rank's rows.

    Collective: an all-gather of a few numbers per token here, an all-reduce of hidden's gradient in the backward.
    """
    *outputs, report = _vocabulary_parallel(
        hidden, weight, bias, targets, transform, stats, options, backend, group, vocab_start, torch.is_grad_enabled()
    )
    return dict(zip(("logprobs", *stats), outputs, strict=True)), report


@torch.compiler.disable
def _vocabulary_parallel(*operands: Any) -> tuple[Any, ...]:
    return _VocabularyParallel.apply(*operands)


class _VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V_r, H)
        bias: Tensor | None,  # (V_r,)
        targets: Tensor,  # (N,)
        transform: tuple[float, float | None],
        stats: tuple[str, ...],
        options: dispatch.Options,
        backend: str,
        group: dist.ProcessGroup,
        vocab_start: int,
        grad_enabled: bool,
    ) -> tuple[Any, ...]:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        ignored = targets == options.ignore_index
        rows = targets - vocab_start
        here = (rows >= 0) & (rows < len(weight)) & ~ignored
        rows = rows.where(here, 0)
        # A rank whose rows a bias of −inf masks, all of them, has no softmax: its own operator ignores all tokens.
        masked = torch.zeros_like(ignored)
        if bias is not None and transform[1] is None:
            masked = ~ignored & torch.isneginf(bias).all()
        names = ["logsumexp", *stats, *(["max_logprob"] if "is_top1" in stats else [])]
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        operands = (hidden, weight, bias)
        hidden, weight = hidden.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1])
        bias = None if bias is None else bias.detach().requires_grad_(needs[2])
        with torch.set_grad_enabled(any(needs)):
            local, report = dispatch.linear_logprob(
                hidden,
                weight,
                bias,
                rows.masked_fill(ignored | masked, _IGNORED),
                transform,
                tuple(dict.fromkeys(names)),
                options._replace(ignore_index=_IGNORED, seed=options.seed * ranks + rank),
                backend,
            )
        graph = local["logprobs"]
        local |= {
            name: local[name].detach().masked_fill(masked, -torch.inf)
            for name in ("logprobs", "logsumexp", "mean_logit")
            if name in local
        }
        everyone = _exchange(local | {"here": here, "rows": torch.full_like(rows, len(weight))}, group)
        _check_targets(everyone["here"], targets, ignored)
        outputs, shifts = _combine(everyone)
        outputs["logprobs"] = outputs["logprobs"].where(everyone["here"].sum(0) == 1, torch.nan)
        shift = shifts[rank]
        share = shift.exp()
        ctx.transform, ctx.group = transform, group
        ctx.operands, ctx.local_logprobs = (hidden, weight, bias), graph
        ctx.save_for_backward(
            rows,
            here,
            ignored,
            share,
            torch.where(here, -torch.expm1(shift), -share),
            local["logprobs"],
            local["logsumexp"],
            outputs["logprobs"],
            outputs["logsumexp"],
            *operands,
        )
        result = [outputs[name].masked_fill(ignored, 0) for name in ("logprobs", *stats)]
        ctx.mark_non_differentiable(*result[1:])
        return *result, report

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        rows, here, ignored, share, rest, row_logprobs, row_lse, logprobs, logsumexp, *_ = ctx.saved_tensors
        hidden, weight, bias = ctx.operands
        scale, softcap = ctx.transform
        needed = [operand for operand in ctx.operands if operand is not None and operand.requires_grad]
        grad = grad.masked_fill(ignored, 0)
        gradients = iter(torch.autograd.grad(ctx.local_logprobs, needed, grad * share, retain_graph=True))
        dhidden, dweight, dbias = (
            next(gradients) if operand is not None and operand.requires_grad else None for operand in ctx.operands
        )

        def through_transform(grad_logits: Tensor, logits: Tensor) -> Tensor:
            return grad_logits * scale if softcap is None else grad_logits * scale * (1 - (logits / softcap) ** 2)

        with torch.autocast(hidden.device.type, enabled=False):
            factor = through_transform(grad * rest, row_logprobs + row_lse)
            if dhidden is not None:
                dhidden = torch.addcmul(dhidden.to(grad.dtype), factor[:, None], weight[rows].to(grad.dtype))
                dist.all_reduce(dhidden, group=ctx.group)
                dhidden = dhidden.to(hidden.dtype)
            if dweight is not None or dbias is not None:
                states = hidden.to(grad.dtype)
                first = states @ weight[0].to(grad.dtype) + (0 if bias is None else bias[0])
                first = scale * first if softcap is None else softcap * torch.tanh(scale * first / softcap)
                # Where row 0 stands in for the target, the operator's own product knows it best.
                probs = torch.where(here, (first - logsumexp).clamp(max=0).exp(), share * row_logprobs.exp())
                miss = torch.where(here & (rows == 0), -torch.expm1(logprobs), -probs)
                first_factor = through_transform(grad * miss, first)
                if dweight is not None:
                    _add_rows(dweight, rows, factor, first_factor, states)
                if dbias is not None:
                    _add_rows(dbias[:, None], rows, factor, first_factor, torch.ones_like(states[:, :1]))
        return dhidden, dweight, dbias, *[None] * 8


def _add_rows(
    gradient: Tensor,  # (V_r, H)
    rows: Tensor,  # (N,)
    factor: Tensor,  # (N,)
    first_factor: Tensor,  # (N,)
    states: Tensor,  # (N, H), in the dtype to sum in
) -> None:
    """Add Σ_t factor_t · states_t to each token's row, rounding each row once, and write row 0 from first_factor."""
    touched, slot = rows.unique(return_inverse=True)
    sums = gradient[touched].to(states.dtype).index_add_(0, slot, factor[:, None] * states)
    gradient[touched] = sums.to(gradient.dtype)
    gradient[0] = first_factor @ states


def _exchange(values: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Each value (N,) of every rank, (P, N), in the dtype of the log-probs."""
    mine = torch.stack([value.detach().to(values["logprobs"].dtype) for value in values.values()])
    everyone = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather([*everyone.unbind(0)], mine, group=group)
    return dict(zip(values, everyone.unbind(1), strict=True))


def _check_targets(here: Tensor, targets: Tensor, ignored: Tensor) -> None:
    wrong = (here.sum(0) != 1) & ~ignored
    if targets.device.type == "cpu" and (count := int(wrong.sum())):
        raise ValueError(
            f"targets must be ignored or in the rows of exactly one rank of head.group: {count} are not, from "
            f"{int(targets[wrong].min())} to {int(targets[wrong].max())}; every rank needs the same hidden states and "
            "targets, and vocab_start must be the rank's first row"
        )


def _combine(everyone: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics (N,) from all ranks' (P, N), and the ranks' d (P, N)."""
    here, lse = everyone["here"] > 0, everyone["logsumexp"]
    itself = torch.eye(len(lse), dtype=torch.bool, device=lse.device)[:, :, None]
    shift = F.logsigmoid(lse - lse.expand(len(lse), *lse.shape).masked_fill(itself, -torch.inf).logsumexp(1))

    def at_target(values: Tensor) -> Tensor:
        return values.where(here, 0).sum(0)

    target_lse, target_logprob = at_target(lse), at_target(everyone["logprobs"])
    outputs = {"logprobs": at_target(shift) + target_logprob, "logsumexp": lse.logsumexp(0)}
    if "log_sum_sq_probs" in everyone:
        outputs["log_sum_sq_probs"] = (2 * shift + everyone["log_sum_sq_probs"]).logsumexp(0)
    if "max_logprob" in everyone:
        outputs["max_logprob"] = (shift + everyone["max_logprob"]).amax(0)
    if "entropy" in everyone:
        # A masked rank has no share, and a shift of −inf.
        outputs["entropy"] = (shift.exp() * (everyone["entropy"] - shift)).where(shift > -torch.inf, 0.0).sum(0)
    if "mean_logit" in everyone:
        outputs["mean_logit"] = (everyone["rows"] * everyone["mean_logit"]).sum(0) / everyone["rows"].sum(0)
    if "is_top1" in everyone:
        elsewhere = (lse + everyone["max_logprob"]).masked_fill(here, -torch.inf).amax(0)
        outputs["is_top1"] = (at_target(everyone["is_top1"]) > 0) & (target_lse + target_logprob >= elsewhere)
    return outputs, shift
