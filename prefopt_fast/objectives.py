"""From a batch's token statistics and frozen log-probs to one loss per pair, and what is worth watching beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import RESPONSES
from .config import TrainConfig
from .losses import pairwise_loss, preference_loss, wpo_loss, wpo_pair_weight, wspo_loss
from .policy import unpack
from .sequence_stats import SequenceLogprobs, alignment_stat, segment_sum, sequence_logprobs, wpo_weights
from .token_stats import TokenStats

# Packed statistics (N,), cu_seqlens (sequences + 1,) and each frozen model's log-probs (N,) → loss (B,), metrics (B,).
LossFunction = Callable[[TokenStats, Tensor, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


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
    objective = _assemble(options)
    # One token per sequence through the loss: what it has to say against its hyperparameters comes before any work.
    tokens = torch.full((len(objective.responses),), -1.0)
    stats = TokenStats(tokens, tokens < 0, log_sum_sq_probs=tokens, max_logprob=tokens)
    objective.function(stats, torch.arange(len(tokens) + 1), dict.fromkeys(objective.frozen, tokens))
    return objective


def _assemble(options: TrainConfig) -> Objective:
    shared: dict[str, Any] = {"sft_weight": options.sft_weight}
    if options.objective == "wspo":
        shared |= {"gamma": 0.1 if options.gamma is None else options.gamma, "level": options.level}
        return Objective(partial(wspo, **shared), ("chosen",), (), ("ref", "weak_aligned", "weak_ref"))
    loss_type = options.pairwise_loss_type
    frozen = () if pairwise_loss(loss_type).reference_free else ("ref",)
    shared |= {"loss_type": loss_type, "beta": options.beta, "hyperparameters": options.hyperparameters}
    if options.objective == "wpo":
        statistic = alignment_stat(options.alignment)
        shared |= {"alignment": options.alignment, "clamp": options.clamp}
        return Objective(partial(wpo, **shared), RESPONSES, () if statistic is None else (statistic,), frozen)
    return Objective(partial(pairwise, **shared), RESPONSES, (), frozen)


def pairwise(
    stats: TokenStats,  # (N,)
    cu_seqlens: Tensor,  # (2B + 1,): the chosen sequences, then the rejected ones
    frozen: Mapping[str, Tensor],  # (N,) each
    loss_type: str,
    beta: float,
    hyperparameters: Mapping[str, float],
    sft_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Any member of the DPO family."""
    chosen, rejected = _halves(stats, cu_seqlens, frozen)
    loss = preference_loss(chosen.policy, rejected.policy, chosen.ref, rejected.ref, loss_type, beta, **hyperparameters)
    return _add_sft(loss, chosen.policy, sft_weight), _reward_metrics(chosen, rejected, beta)


def wpo(
    stats: TokenStats,  # (N,)
    cu_seqlens: Tensor,  # (2B + 1,): the chosen sequences, then the rejected ones
    frozen: Mapping[str, Tensor],  # (N,) each
    alignment: str,
    clamp: bool,
    loss_type: str,
    beta: float,
    hyperparameters: Mapping[str, float],
    sft_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """WPO over any member of the DPO family."""
    chosen, rejected = _halves(stats, cu_seqlens, frozen)
    chosen_weight, rejected_weight = wpo_weights(stats, alignment, cu_seqlens).chunk(2)
    loss = wpo_loss(
        chosen.policy,
        rejected.policy,
        chosen.ref,
        rejected.ref,
        chosen_weight,
        rejected_weight,
        loss_type,
        beta,
        clamp,
        **hyperparameters,
    )
    weight = wpo_pair_weight(chosen_weight, rejected_weight, clamp)
    metrics = {"wpo/weight": weight, "wpo/squared_weight": weight.square()}
    return _add_sft(loss, chosen.policy, sft_weight), _reward_metrics(chosen, rejected, beta) | metrics


def wspo(
    stats: TokenStats,  # (N,)
    cu_seqlens: Tensor,  # (B + 1,): the chosen sequences
    frozen: Mapping[str, Tensor],  # (N,) each
    gamma: float,
    level: str,
    sft_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """WSPO on chosen responses.

    At sequence level the weak models' log-probs enter through their mean alone, so that a weak model of another
    tokenizer takes part with that mean, spread over the policy's tokens.
    """
    chosen = sequence_logprobs(stats, cu_seqlens)
    policy, mask = unpack(stats.logprobs, cu_seqlens)
    ref, aligned, weak = (unpack(frozen[name], cu_seqlens)[0] for name in ("ref", "weak_aligned", "weak_ref"))
    loss = wspo_loss(policy, ref, aligned, weak, mask, gamma, level)
    ratio = stats.logprobs.detach() - frozen["ref"]
    target = frozen["weak_aligned"] - frozen["weak_ref"]
    metrics = {
        "wspo/residual": loss.detach().sqrt(),
        "wspo/log_ratio": gamma * segment_sum(ratio, cu_seqlens) / chosen.length,
        "wspo/target": segment_sum(target, cu_seqlens) / chosen.length,
        "logps/chosen": chosen.sum.detach(),
    }
    return _add_sft(loss, chosen, sft_weight), metrics


class _Response(NamedTuple):
    policy: SequenceLogprobs
    ref: Tensor | None  # (B,) sums; None for reference-free losses

    def reward(self, beta: float) -> Tensor:
        """DPO's implicit reward β(log π − log π_ref); without a reference β · mean log-prob, as SimPO has it."""
        return beta * (self.policy.mean if self.ref is None else self.policy.sum - self.ref).detach()


def _halves(stats: TokenStats, cu_seqlens: Tensor, frozen: Mapping[str, Tensor]) -> tuple[_Response, _Response]:
    """Chosen and rejected."""
    policy = sequence_logprobs(stats, cu_seqlens)
    ref = segment_sum(frozen["ref"], cu_seqlens) if "ref" in frozen else None
    half = len(policy.sum) // 2
    chosen, rejected = (
        _Response(SequenceLogprobs(*(field[part] for field in policy)), None if ref is None else ref[part])
        for part in (slice(half), slice(half, None))
    )
    return chosen, rejected


def _add_sft(loss: Tensor, chosen: SequenceLogprobs, sft_weight: float) -> Tensor:
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
