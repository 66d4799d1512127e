"""The losses in someone else's training loop: transformers' model, scheduler and sampling, and a few lines between.

Letters: B sequences; every prompt of the task has PROMPT_LENGTH tokens and a response at most RESPONSE_LENGTH.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

import prefopt_fast as pf

from .demo_task import (
    BOS,
    END,
    OPERATIONS,
    PAD,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    TOKEN_IDS,
    VOCABULARY,
    Batch,
    Pair,
    Prompt,
    Response,
    decode,
    encode,
    encode_prompts,
    judge,
)
from .losses import wpo_pair_weight

Objective = Callable[[LlamaForCausalLM, slice], Tensor]  # of a model on some rows of the objective's data: losses (B,)
WEIGHT_STATS = ("log_sum_sq_probs", "max_logprob")  # what WPO's alignments need


def train(
    model: LlamaForCausalLM,
    objective: Objective,
    steps: int,
    batch: int,
    lr: float,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train in place on steps · batch rows: AdamW, 10 % warm-up, linear decay, gradient norm clipped to 1.

    Returns each step's mean loss.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    losses = []
    for step in range(steps):
        loss = objective(model, slice(step * batch, (step + 1) * batch)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after_step(step + 1)
    return losses


def response_stats(model: LlamaForCausalLM, data: Batch, stats: tuple[str, ...] = ()) -> pf.TokenStats:
    """Statistics (B, RESPONSE_LENGTH) of the response tokens; the head sees nothing else."""
    # Padding follows the response and attention is causal, so no mask is needed.
    hidden = model.model(data.input_ids[:, :-1], use_cache=False).last_hidden_state[:, PROMPT_LENGTH - 1 :]
    return pf.token_logprobs(hidden, pf.LMHead.from_model(model), data.targets, stats=stats)


def sft_objective(data: Batch) -> Objective:
    return lambda model, rows: -pf.sequence_logprobs(response_stats(model, data.rows(rows))).mean


class PairData:
    """Pairs as tensors, and the reference's log-prob of every response."""

    def __init__(self, pairs: Sequence[Pair], ref: LlamaForCausalLM):
        prompts, chosen, rejected = zip(*pairs, strict=True)
        self.chosen, self.rejected = encode(prompts, chosen), encode(prompts, rejected)
        self.ref_chosen = score(ref, self.chosen).sum(-1)
        self.ref_rejected = score(ref, self.rejected).sum(-1)

    def rows(self, rows: slice) -> tuple[Batch, Tensor, Tensor]:
        """Chosen responses followed by the rejected ones, (2B, …); the reference's sums of each, (B,)."""
        both = zip(self.chosen.rows(rows), self.rejected.rows(rows), strict=True)
        return Batch(*map(torch.cat, both)), self.ref_chosen[rows], self.ref_rejected[rows]


def dpo_objective(data: PairData, beta: float, nll: float = 0.0) -> Objective:
    """DPO, plus ``nll`` times the mean negative log-prob of the chosen response's tokens."""

    def objective(model: LlamaForCausalLM, rows: slice) -> Tensor:
        batch, ref_chosen, ref_rejected = data.rows(rows)
        chosen, rejected = pf.sequence_logprobs(response_stats(model, batch)).chunk(2)
        return pf.preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta) - nll * chosen.mean

    return objective


def wpo_objective(data: PairData, beta: float, alignment: str, weights: list[Tensor]) -> Objective:
    """WPO over DPO; each step's pair weights (B,) are appended to ``weights``."""

    def objective(model: LlamaForCausalLM, rows: slice) -> Tensor:
        batch, ref_chosen, ref_rejected = data.rows(rows)
        stats = response_stats(model, batch, WEIGHT_STATS)
        chosen, rejected = pf.sequence_logprobs(stats).chunk(2)
        chosen_weight, rejected_weight = pf.wpo_weights(stats, alignment).chunk(2)
        weights.append(wpo_pair_weight(chosen_weight, rejected_weight))
        return pf.wpo_loss(chosen, rejected, ref_chosen, ref_rejected, chosen_weight, rejected_weight, beta=beta)

    return objective


def wspo_objective(
    data: Batch,  # chosen responses
    ref: LlamaForCausalLM,
    weak_aligned: LlamaForCausalLM,
    weak_ref: LlamaForCausalLM,
    gamma: float,
    level: str,
) -> Objective:
    ref_logprobs, aligned_logprobs, weak_logprobs = (score(model, data) for model in (ref, weak_aligned, weak_ref))

    def objective(model: LlamaForCausalLM, rows: slice) -> Tensor:
        stats = response_stats(model, data.rows(rows))
        return pf.wspo_loss(
            stats.logprobs, ref_logprobs[rows], aligned_logprobs[rows], weak_logprobs[rows], stats.mask, gamma, level
        )

    return objective


@torch.no_grad()
def score(model: LlamaForCausalLM, data: Batch) -> Tensor:
    """(B, RESPONSE_LENGTH) log-probs of a frozen model."""
    blocks = (slice(start, start + 1024) for start in range(0, len(data.targets), 1024))
    return torch.cat([response_stats(model, data.rows(rows)).logprobs for rows in blocks])


def make_model(hidden: int, layers: int, heads: int, mlp: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        max_position_embeddings=PROMPT_LENGTH + RESPONSE_LENGTH,
        pad_token_id=TOKEN_IDS[PAD],
        bos_token_id=TOKEN_IDS[BOS],
        eos_token_id=TOKEN_IDS[END],
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Sequence[Prompt]) -> list[Response]:
    """One response to each prompt at temperature 1, from torch's global generator."""
    responses: list[Response] = []
    for start in range(0, len(prompts), 4096):
        ids = encode_prompts(prompts[start : start + 4096])
        tokens = model.generate(  # type: ignore[misc]  # transformers types its self as a protocol
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=RESPONSE_LENGTH
        )
        responses += decode(tokens[:, PROMPT_LENGTH:])
    return responses


def evaluate(
    model: LlamaForCausalLM, ref: LlamaForCausalLM, prompts: Sequence[Prompt], seed: int
) -> tuple[dict[str, float], list[Response]]:
    """Means of the judge's scores over one sampled response to each prompt, and the responses.

    "kl" is the Monte-Carlo estimate of KL(model ‖ ref) in nats per response: the mean of log π − log π_ref over the
    sampled responses.
    """
    torch.manual_seed(seed)
    responses = sample(model, prompts)
    data = encode(prompts, responses)
    judged = [judge(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    scores = {
        "reward": fmean(j.reward for j in judged),
        "style": fmean(j.style for j in judged),
        "accuracy": fmean(j.correct for j in judged),
        "perfect": fmean(j.perfect for j in judged),
        "kl": float((score(model, data) - score(ref, data)).sum(-1).mean()),
    }
    for operation in OPERATIONS:
        scores[operation] = fmean(j.correct for p, j in zip(prompts, judged, strict=True) if p.operation == operation)
    return scores, responses


def initial_weights(model: LlamaForCausalLM, pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """Each alignment's pair weights under the model, in the order of the pairs."""
    batch, *_ = PairData(pairs, model).rows(slice(None))
    with torch.no_grad():
        stats = response_stats(model, batch, WEIGHT_STATS)
    weights = {}
    for alignment in pf.ALIGNMENTS:
        chosen, rejected = pf.wpo_weights(stats, alignment).chunk(2)
        weights[alignment] = wpo_pair_weight(chosen, rejected).tolist()
    return weights


def effective_share(weights: Tensor) -> Tensor:
    """Effective sample size (Σw)² / Σw² over the last dimension, as a share of its size."""
    return weights.sum(-1) ** 2 / (weights**2).sum(-1) / weights.shape[-1]
