"""Token statistics from full float64 logits, as plain as a textbook: what every kernel is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..head import LMHead
    from ..kernels.dispatch import Options
    from ..token_stats import TokenStats


def linear_logprob(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    transform: tuple[float, float | None],
    stats: tuple[str, ...],
    options: Options,
) -> tuple[dict[str, Tensor], None]:
    """The signature of the kernels (kernels/dispatch.py); gradients are autograd's own, whatever the tolerance."""
    scale, softcap = transform
    ignored = targets == options.ignore_index
    logits = hidden.double() @ weight.double().T  # (N, V)
    if bias is not None:
        logits = logits + bias.double()
    logits = scale * logits if softcap is None else softcap * torch.tanh(scale * logits / softcap)

    log_probs = torch.log_softmax(logits, dim=-1)
    probs = log_probs.exp()
    targets = targets.masked_fill(ignored, 0).long()
    target_logits = logits.gather(-1, targets[:, None]).squeeze(-1)
    outputs = {"logprobs": log_probs.gather(-1, targets[:, None]).squeeze(-1)}
    every = {
        "log_sum_sq_probs": torch.logsumexp(2 * log_probs, dim=-1),
        "max_logprob": log_probs.amax(-1),
        "entropy": torch.special.entr(probs).sum(-1),
        "mean_logit": logits.mean(-1),
        "is_top1": target_logits >= logits.amax(-1),
        "logsumexp": torch.logsumexp(logits, dim=-1),
    }
    outputs |= {name: every[name].detach() for name in stats}
    return {name: value.masked_fill(ignored, 0) for name, value in outputs.items()}, None


def token_logprobs(
    hidden: Tensor,  # (…, H)
    head: LMHead,
    targets: Tensor,  # (…)
    stats: tuple[str, ...] = (),
    grad_tolerance: float | str | tuple[float, float] = 0.0,
    backend: str = "reference",
    ignore_index: int = -100,
    seed: int | None = None,
) -> TokenStats:
    """:func:`prefopt_fast.token_logprobs` in float64 throughout (``grad_tolerance`` and ``seed`` change nothing)."""
    if backend not in ("auto", "reference"):
        raise ValueError(f'the reference has one backend, "reference"; found {backend!r}')
    from ..token_stats import token_logprobs as public

    return public(hidden, head, targets, stats, grad_tolerance, "reference", ignore_index, seed)
