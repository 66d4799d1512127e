"""From a batch's token statistics and frozen log-probs to one loss per pair, and what is worth watching beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import FROZEN_MODELS, RESPONSES, TrainConfig
from .losses import loss_mixture, preference_loss, reference_free, require_in, wpo_pair_weight, wspo_loss
from .sequence_stats import SequenceLogprobs, alignment_stat, segment_sum, sequence_logprobs, wpo_weights
from .token_stats import TokenStats

# Statistics, cu_seqlens and each frozen model's log-probs → loss (B,), metrics (B,). Tokens are packed (N,) with
# cu_seqlens (sequences + 1,), or padded (sequences, T) with None, and 0 where nothing is scored.
LossFunction = Callable[[TokenStats, Tensor | None, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


class Objective(NamedTuple):
    """A loss function with what it needs: responses of a pair, token statistics, frozen models by name."""

    function: LossFunction
    responses: tuple[str, ...]
    stats: tuple[str, ...]
    frozen: tuple[str, ...]


def make_objective(options: TrainConfig) -> Objective:
    """The objective that ``options`` describe.

    Raises:
        ValueError: a hyperparameter that its loss refuses.
    """
    if options.objective == "wspo":
        return wspo_objective(0.1 if options.gamma is None else options.gamma, options.level, options.sft_weight)
    weighting = (options.alignment, options.clamp) if options.objective == "wpo" else None
    return pair_objective(
        options.loss_mixture, options.beta, options.hyperparameters, options.sft_weight, weighting=weighting
    )


def pair_objective(
    loss_type: str | Mapping[str, float],
    beta: float,
    hyperparameters: Mapping[str, float],
    sft_weight: float = 0.0,
    weighting: tuple[str, bool] | None = None,
) -> Objective:
    """A member of the DPO family or a mixture, under WPO's ``weighting`` (alignment, clamp) where that is given.

    Raises:
        ValueError: as :func:`prefopt_fast.preference_loss`.
    """
    frozen = () if reference_free(loss_mixture(loss_type)) else ("ref",)
    statistic = None if weighting is None else alignment_stat(weighting[0])
    function = partial(
        pairwise,
        loss_type=loss_type,
        beta=beta,
        hyperparameters=hyperparameters,
        sft_weight=sft_weight,
        weighting=weighting,
    )
    return _checked(Objective(function, RESPONSES, () if statistic is None else (statistic,), frozen))


def wspo_objective(gamma: float, level: str, sft_weight: float = 0.0) -> Objective:
    """WSPO on chosen responses.

    Raises:
        ValueError: as :func:`prefopt_fast.wspo_loss`.
    """
    function = partial(wspo, gamma=gamma, level=level, sft_weight=sft_weight)
    return _checked(Objective(function, RESPONSES[:1], (), FROZEN_MODELS))


def _checked(objective: Objective) -> Objective:
    """One token per sequence through the loss: what it has to say against its hyperparameters comes before any work."""
    tokens = torch.full((len(objective.responses),), -1.0, device="cpu")
    stats = TokenStats(tokens, tokens < 0, log_sum_sq_probs=tokens, max_logprob=tokens)
    frozen = dict.fromkeys(objective.frozen, tokens) | {"segments": torch.zeros_like(tokens, dtype=torch.long)}
    objective.function(stats, torch.arange(len(tokens) + 1, device="cpu"), frozen)
    return objective


def pairwise(
    stats: TokenStats,  # (N,) or (2B, T): the chosen sequences, then the rejected ones
    cu_seqlens: Tensor | None,  # (2B + 1,)
    frozen: Mapping[str, Tensor],  # as stats, or (2B,) sums
    loss_type: str | Mapping[str, float],
    beta: float,
    hyperparameters: Mapping[str, float],
    sft_weight: float,
    weighting: tuple[str, bool] | None,  # alignment, clamp
) -> tuple[Tensor, dict[str, Tensor]]:
    """Any member of the DPO family, or a mixture; WPO over it with ``weighting``."""
    chosen, rejected = _halves(stats, cu_seqlens, frozen)
    loss = preference_loss(chosen.policy, rejected.policy, chosen.ref, rejected.ref, loss_type, beta, **hyperparameters)
    metrics = _reward_metrics(chosen, rejected, beta)
    if weighting is not None:
        alignment, clamp = weighting
        chosen_weight, rejected_weight = wpo_weights(stats, alignment, cu_seqlens).chunk(2)
        weight = wpo_pair_weight(chosen_weight, rejected_weight, clamp)
        loss = weight * loss
        metrics |= {"wpo/weight": weight, "wpo/squared_weight": weight.square()}
    return _add_sft(loss, chosen.policy, sft_weight), metrics


def wspo(
    stats: TokenStats,  # (N,) or (B, T): the chosen sequences
    cu_seqlens: Tensor | None,  # (B + 1,)
    frozen: Mapping[str, Tensor],  # as stats
    gamma: float,
    level: str,
    sft_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """WSPO on chosen responses.

    At sequence level the weak models' log-probs enter through their mean alone, so that a weak model of another
    tokenizer takes part with that mean, spread over the policy's tokens. At segment level ``frozen["segments"]``
    has the segment of each token.
    """
    lengths = None if cu_seqlens is None else cu_seqlens.diff().tolist()  # once: on an accelerator it synchronizes

    def padded(values: Tensor) -> Tensor:
        return values if lengths is None else nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True)

    segments = frozen.get("segments") if level == "segment" else None
    chosen = sequence_logprobs(stats, cu_seqlens)
    policy, mask = padded(stats.logprobs), padded(stats.mask)
    ref, aligned, weak = (padded(frozen[name]) for name in FROZEN_MODELS)
    loss = wspo_loss(policy, ref, aligned, weak, mask, gamma, level, None if segments is None else padded(segments))
    ratio = stats.logprobs.detach() - frozen["ref"]
    target = frozen["weak_aligned"] - frozen["weak_ref"]
    length = chosen.length
    if segments is not None:
        ratio, length = torch.where(segments >= 0, ratio, 0.0), segment_sum(segments >= 0, cu_seqlens)
    metrics = {
        "wspo/residual": loss.detach().sqrt(),
        "wspo/log_ratio": gamma * segment_sum(ratio, cu_seqlens) / length,
        "wspo/target": segment_sum(target, cu_seqlens) / length,
        "logps/chosen": chosen.sum.detach(),
    }
    return _add_sft(loss, chosen, sft_weight), metrics


class _Response(NamedTuple):
    policy: SequenceLogprobs
    ref: Tensor | None  # (B,) sums; None for reference-free losses

    def reward(self, beta: float) -> Tensor:
        """DPO's implicit reward β(log π − log π_ref); without a reference β · mean log-prob, as SimPO has it."""
        return beta * (self.policy.mean if self.ref is None else self.policy.sum - self.ref).detach()


def _halves(stats: TokenStats, cu_seqlens: Tensor | None, frozen: Mapping[str, Tensor]) -> tuple[_Response, _Response]:
    """Chosen and rejected; the reference's log-probs may be the sequences' sums already."""
    policy = sequence_logprobs(stats, cu_seqlens)
    ref = frozen.get("ref")
    if ref is not None and ref.shape != policy.sum.shape:
        # Summed as the policy's are: equal tokens have reward 0.
        ref = sequence_logprobs(replace(stats, logprobs=ref), cu_seqlens).sum
    chosen, rejected = map(_Response, policy.chunk(2), (None, None) if ref is None else ref.chunk(2))
    return chosen, rejected


def _add_sft(loss: Tensor, chosen: SequenceLogprobs, sft_weight: float) -> Tensor:
    require_in("sft_weight", sft_weight, 0.0, math.inf, low_open=False)
    return loss - sft_weight * chosen.mean if sft_weight else loss


def _reward_metrics(chosen: _Response, rejected: _Response, beta: float) -> dict[str, Tensor]:
    margin = chosen.reward(beta) - rejected.reward(beta)
    return {
        "rewards/chosen": chosen.reward(beta),
        "rewards/rejected": rejected.reward(beta),
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).to(margin.dtype),
        "logps/chosen": chosen.policy.sum.detach(),
        "logps/rejected": rejected.policy.sum.detach(),
    }
