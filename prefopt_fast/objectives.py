"""From a batch's token statistics and frozen log-probs to one loss per pair, and what is worth watching beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

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
    if options.objective == "wspo":
        function = partial(
            wspo,
            gamma=0.1 if options.gamma is None else options.gamma,
            level=options.level,
            sft_weight=options.sft_weight,
        )
        return Objective(function, ("chosen",), (), ("ref", "weak_aligned", "weak_ref"))
    loss_type = options.pairwise_loss_type
    frozen = () if pairwise_loss(loss_type).reference_free else ("ref",)
    shared = {
        "loss_type": loss_type,
        "beta": options.beta,
        "hyperparameters": options.hyperparameters,
        "sft_weight": options.sft_weight,
    }
    if options.objective == "wpo":
        statistic = alignment_stat(options.alignment)
        function = partial(wpo, alignment=options.alignment, clamp=options.clamp, **shared)
        return Objective(function, ("chosen", "rejected"), () if statistic is None else (statistic,), frozen)
    return Objective(partial(pairwise, **shared), ("chosen", "rejected"), (), frozen)


def pairwise(
    stats: TokenStats,  # (N,)
    cu_seqlens: Tensor,  # (2B + 1,): the chosen sequences, then the rejected ones
    frozen: Mapping[str, Tensor],  # (N,) each
    loss_type: str,
    beta: float,
    hyperparameters: Mapping[str, float],
    sft_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Any member of the DPO family."""
    chosen, rejected, *ref = _chosen_rejected(stats, cu_seqlens, frozen)
    loss = preference_loss(chosen, rejected, *ref, loss_type=loss_type, beta=beta, **hyperparameters)
    return _add_sft(loss, chosen, sft_weight), _reward_metrics(chosen, rejected, ref, beta)


def wpo(
    stats: TokenStats,  # (N,)
    cu_seqlens: Tensor,  # (2B + 1,): the chosen sequences, then the rejected ones
    frozen: Mapping[str, Tensor],  # (N,) each
    alignment: str,
    clamp: bool,
    loss_type: str,
    beta: float,
    hyperparameters: Mapping[str, float],
    sft_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """WPO over any member of the DPO family."""
    chosen, rejected, *ref = _chosen_rejected(stats, cu_seqlens, frozen)
    weights = wpo_weights(stats, alignment, cu_seqlens).chunk(2)
    loss = wpo_loss(chosen, rejected, *ref, *weights, loss_type, beta, clamp, **hyperparameters)
    metrics = _reward_metrics(chosen, rejected, ref, beta)
    weight = wpo_pair_weight(*weights, clamp)
    metrics |= {"wpo/weight": weight, "wpo/squared_weight": weight.square()}
    return _add_sft(loss, chosen, sft_weight), metrics


def wspo(
    stats: TokenStats,  # (N,)
    cu_seqlens: Tensor,  # (B + 1,): the chosen sequences
    frozen: Mapping[str, Tensor],  # (N,) each
    gamma: float,
    level: str,
    sft_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """WSPO on chosen responses.

    At sequence level the weak models' log-probs enter through their mean alone, so that a weak model of another
    tokenizer takes part with that mean, spread over the policy's tokens.
    """
    chosen = sequence_logprobs(stats, cu_seqlens)
    names = ("ref", "weak_aligned", "weak_ref")
    mask, _ = unpack(stats.mask, cu_seqlens)
    padded = [unpack(values, cu_seqlens)[0] for values in (stats.logprobs, *(frozen[name] for name in names))]
    loss = wspo_loss(*padded, mask, gamma, level)
    transferred = frozen["weak_aligned"] - frozen["weak_ref"]
    metrics = {
        "wspo/residual": loss.detach().sqrt(),
        "wspo/log_ratio": gamma * segment_sum(stats.logprobs.detach() - frozen["ref"], cu_seqlens) / chosen.length,
        "wspo/target": segment_sum(transferred, cu_seqlens) / chosen.length,
        "logps/chosen": chosen.sum.detach(),
    }
    return _add_sft(loss, chosen, sft_weight), metrics


def _chosen_rejected(
    stats: TokenStats, cu_seqlens: Tensor, frozen: Mapping[str, Tensor]
) -> tuple[SequenceLogprobs, SequenceLogprobs, Tensor | None, Tensor | None]:
    """The policy's, then the reference's sums (None for reference-free losses), each (B,)."""
    policy = sequence_logprobs(stats, cu_seqlens)
    chosen, rejected = (SequenceLogprobs(*half) for half in zip(*(field.chunk(2) for field in policy), strict=True))
    if "ref" not in frozen:
        return chosen, rejected, None, None
    return chosen, rejected, *segment_sum(frozen["ref"], cu_seqlens).chunk(2)


def _add_sft(loss: Tensor, chosen: SequenceLogprobs, sft_weight: float) -> Tensor:
    return loss - sft_weight * chosen.mean if sft_weight else loss


def _reward_metrics(
    chosen: SequenceLogprobs, rejected: SequenceLogprobs, ref: list[Tensor | None], beta: float
) -> dict[str, Tensor]:
    """DPO's implicit rewards β(log π − log π_ref); for reference-free losses β · mean log-prob, as SimPO has it."""
    policy = (chosen, rejected)
    rewards = [
        beta * (response.mean if base is None else response.sum - base).detach()
        for response, base in zip(policy, ref, strict=True)
    ]
    return {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "rewards/accuracies": (rewards[0] > rewards[1]).to(rewards[0].dtype),
        "logps/chosen": chosen.sum.detach(),
        "logps/rejected": rejected.sum.detach(),
    }
