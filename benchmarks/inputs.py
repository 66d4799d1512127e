"""What the benchmarks compute on: hidden states of a real model on real text, and synthetic ones as concentrated.

Random normal logits flatter some implementations and punish others in ways that mean nothing for training, so the
synthetic softmax is made to match one that was measured; see :func:`synthetic` for how, :func:`concentration` for how
well.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

CACHE = Path(__file__).parent.parent / ".cache" / "benchmarks"
REAL_TOKENS = 16_384  # response tokens kept of a real model and data set

# (V, H) of the heads that synthetic problems stand for; those for GPUs by falling importance.
MODELS = {"SmolLM2 135M": (49_152, 576), "TinyLlama 1.1B": (32_000, 2048)}
GPU_MODELS = {
    "Llama-3 8B": (128_256, 4096),
    "Qwen2.5 7B": (151_936, 3584),
    "Gemma-2 2B": (256_000, 2304),
    "Qwen2.5 0.5B": (151_936, 896),
}

# Measured on SmolLM2-135M-Instruct, 2,048 response tokens of English preference pairs: quantiles of the entropy (nats),
# and the standard deviation over the vocabulary of the part of the logits that all tokens have in common.
_QUANTILES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
_ENTROPY = (1e-3, 0.0125, 0.07, 0.43, 1.27, 2.44, 3.34, 3.87, 5.5)
_COMMON_STD = 4.0
_SEQUENCE_SHARE = 0.3  # of the variance of a token's own direction that it shares with its sequence
_CHUNK_BYTES = 128 << 20


@dataclass(frozen=True)
class Problem:
    """One call: hidden (N, H), weight (V, H), targets (N,), and upstream (N,) fp32, the gradient of each log-prob.

    The tokens are N / sequence_length sequences, the first half chosen, the second rejected; ``upstream`` is constant
    within a sequence, positive for the chosen and negative for the rejected, as a pairwise loss makes it. ``stats`` are
    statistics asked for beside the log-probs. ``source`` is "real" or "synthetic".
    """

    name: str
    source: str
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor
    sequence_length: int
    stats: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.hidden.shape[1]

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def product_flops(self) -> int:
        return 2 * self.tokens * self.vocab * self.hidden_size

    def leaves(self, train_head: bool = True) -> Problem:
        """The same operands as leaves that take gradients; a frozen head takes none."""
        hidden = self.hidden.detach().clone().requires_grad_()
        return replace(self, hidden=hidden, weight=self.weight.detach().requires_grad_(train_head))

    def detached(self) -> Problem:
        """The same operands without gradients."""
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach())

    def first(self, tokens: int) -> Problem:
        """The problem of the first ``tokens`` tokens."""
        if tokens > self.tokens:
            raise ValueError(f"the problem has {self.tokens} tokens, asked for {tokens}")
        return make_problem(self.name, self.source, self.hidden[:tokens], self.weight, self.targets[:tokens])

    def with_stats(self, *stats: str) -> Problem:
        return replace(self, stats=stats)


def make_problem(name: str, source: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Problem:
    """Sequences of at most 512 tokens, in whole pairs where the number of tokens allows, and upstream gradients."""
    tokens = len(hidden)
    sequence_length = min(512, max(1, tokens // 2))
    sequences = -(-tokens // sequence_length)
    generator = torch.Generator().manual_seed(0)
    magnitude = 0.5 + torch.rand(sequences, generator=generator)
    sign = torch.where(torch.arange(sequences) < sequences / 2, 1.0, -1.0)
    upstream = (sign * magnitude / tokens).repeat_interleave(sequence_length)[:tokens].to(hidden.device)
    return Problem(name, source, hidden, weight, targets, upstream, sequence_length)


@torch.no_grad()
def synthetic(
    tokens: int,
    vocab: int,
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    name: str | None = None,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
) -> Problem:
    """Random hidden states and weight whose softmax is as concentrated as a real model's.

    A logit is a + s_t·x: a ~ N(0, 4²) is common to all tokens (a word's frequency), x ~ N(0, 1) is the token's own,
    three tenths of its variance shared with its sequence of 256 tokens, and s_t is solved for by bisection so that the
    token's entropy is a draw from the measured distribution. Normal logits under such scales have the power-law tail
    of real ones, and the common part makes tokens of a chunk use the same columns. Targets are drawn from the softmax.
    Runs on the CPU and on GPUs, in chunks.

    The entropies hold under a head with this ``bias`` and ``softcap``. A soft-cap flattens what it caps: only with a
    bias of about −softcap, which leaves the few likely words near 0, can they be as small as a real model's.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    direction = normal(hidden_size)
    direction /= direction.norm()
    common = _COMMON_STD * normal(vocab)
    # Rows of norm about 1 plus the common part along one direction, whose factor 4 the hidden states carry.
    weight = normal(vocab, hidden_size).mul_(hidden_size**-0.5).addr_(common, direction, alpha=0.25).to(dtype)
    shared = normal(-(-tokens // 256), hidden_size).repeat_interleave(256, 0)[:tokens]
    own = normal(tokens, hidden_size).mul_((1 - _SEQUENCE_SHARE) ** 0.5).add_(shared, alpha=_SEQUENCE_SHARE**0.5)
    own -= (own @ direction)[:, None] * direction
    entropy = _draw_entropies(tokens, vocab, generator, device)

    hidden = torch.empty(tokens, hidden_size, dtype=dtype, device=device)
    targets = torch.empty(tokens, dtype=torch.int64, device=device)
    for rows in torch.arange(tokens, device=device).split(max(1, _CHUNK_BYTES // (4 * vocab))):
        constant = (4 * direction).to(dtype).expand(len(rows), -1)
        shared_logits = (constant[:1] @ weight.T).float() + (0.0 if bias is None else bias)
        scale = _solve_scale(shared_logits, (own[rows].to(dtype) @ weight.T).float(), entropy[rows], softcap)
        hidden[rows] = (constant + scale[:, None] * own[rows]).to(dtype)
        logits = (hidden[rows] @ weight.T).float() + (0.0 if bias is None else bias)
        probs = torch.softmax(_capped(logits, softcap), -1)
        targets[rows] = torch.multinomial(probs, 1, generator=generator).squeeze(1)
    label = name or f"V {vocab:,}, H {hidden_size}"
    return make_problem(label, "synthetic", hidden, weight, targets)


def _draw_entropies(tokens: int, vocab: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """(N,) nats, by inverting the measured quantiles; a vocabulary too small for them has at most 0.9 log V."""
    quantiles, values = torch.tensor(_QUANTILES, device=device), torch.tensor(_ENTROPY, device=device)
    uniform = torch.rand(tokens, generator=generator, device=device)
    right = torch.searchsorted(quantiles, uniform).clamp(1, len(quantiles) - 1)
    position = (uniform - quantiles[right - 1]) / (quantiles[right] - quantiles[right - 1])
    entropy = torch.lerp(values[right - 1], values[right], position)
    return entropy.clamp(max=0.9 * torch.tensor(float(vocab)).log().item())


def _solve_scale(
    common: Tensor,  # (1, V)
    own: Tensor,  # (C, V)
    entropy: Tensor,  # (C,)
    softcap: float | None,
    steps: int = 14,
) -> Tensor:
    """(C,) scales s for which softmax(cap(common + s·own)) has the given entropies, as far as any in [2⁻⁴, 2⁸] has.

    Under a soft-cap, of which large scales reach the flat part, any in [2⁻⁴, softcap / 4].
    """
    low = torch.full_like(entropy, -4.0)  # log2
    high = torch.full_like(entropy, 8.0 if softcap is None else math.log2(softcap / 4))
    logits = torch.empty_like(own)
    for _ in range(steps):
        middle = (low + high) / 2
        _capped(torch.addcmul(common, own, middle.exp2()[:, None], out=logits), softcap)
        logits -= logits.amax(-1, keepdim=True)
        probs = logits.exp()
        total = probs.sum(-1)
        found = total.log() - torch.linalg.vecdot(probs, logits) / total
        low, high = torch.where(found > entropy, middle, low), torch.where(found > entropy, high, middle)
    return ((low + high) / 2).exp2()


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(logits / softcap), in place."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def real(
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    model: str | None = None,
    data: str | None = None,
) -> Problem:
    """Hidden states of a causal LM at the response tokens of preference pairs, and its head.

    Args:
        tokens: at most REAL_TOKENS.
        model, data: folder or hub id, and preference file; by default the environment's PREFOPT_FAST_MODEL and
            PREFOPT_FAST_DATA. The states are computed once and kept in .cache/benchmarks.

    Raises:
        FileNotFoundError: neither the arguments nor the environment name a model and data.
    """
    model, data = model or os.environ.get("PREFOPT_FAST_MODEL"), data or os.environ.get("PREFOPT_FAST_DATA")
    if not model or not data:
        raise FileNotFoundError(
            "real inputs need a model and preference pairs: set PREFOPT_FAST_MODEL and PREFOPT_FAST_DATA, or pass "
            "--model and --data"
        )
    from safetensors.torch import load_file, save_file

    from prefopt_fast.scoring import model_digest

    content = f"{model_digest(model)} {hashlib.sha256(Path(data).read_bytes()).hexdigest()} {REAL_TOKENS}"
    path = CACHE / f"real-{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(_hidden_states(model, data), partial)
        partial.replace(path)
    tensors = load_file(path, device=str(device))
    name = f"{Path(model).name} on {Path(data).name}"
    problem = make_problem(
        name, "real", tensors["hidden"].to(dtype), tensors["weight"].to(dtype), tensors["targets"].long()
    )
    return problem.first(tokens)


@torch.no_grad()
def _hidden_states(model: str, data: str) -> dict[str, Tensor]:
    from prefopt_fast import LMHead
    from prefopt_fast.batch import collate, encode, load_preferences
    from prefopt_fast.policy import hidden_states, load_model, load_tokenizer, verify_packing

    lm, tokenizer = load_model(model, torch.float32).eval(), load_tokenizer(model)
    head, packs = LMHead.from_model(lm), verify_packing(lm)
    encoded, _ = encode(load_preferences(data), tokenizer, max_length=1024)
    hidden, targets = [], []
    for row in encoded:
        batch = collate([row], pad_token_id=tokenizer.pad_token_id)
        hidden.append(hidden_states(lm, batch.input_ids, batch.attention_mask, batch.positions, packs, pairs=1))
        targets.append(batch.scored)
        if sum(map(len, targets)) >= REAL_TOKENS:
            break
    return {
        "hidden": torch.cat(hidden)[:REAL_TOKENS].contiguous(),
        "targets": torch.cat(targets)[:REAL_TOKENS],
        "weight": head.weight.detach().clone(),
    }


@torch.no_grad()
def concentration(problem: Problem, tokens: int = 512) -> dict[str, float]:
    """How concentrated the softmax is, over the first ``tokens``: what :func:`synthetic` is made to match.

    Medians and means over tokens of the entropy (nats), the largest probability and the number of probabilities above
    2⁻¹²; and the share of the vocabulary that exceeds 2⁻¹² for some token of a chunk of 128, and of 512.
    """
    hidden = problem.hidden[:tokens]
    entropy, largest, count, columns = [], [], [], []
    for chunk in hidden.split(128):
        log_probs = torch.log_softmax((chunk @ problem.weight.T).float(), -1)
        probs = log_probs.exp()
        entropy.append(-torch.linalg.vecdot(probs, log_probs))
        largest.append(probs.amax(-1))
        count.append((probs > 2**-12).sum(-1).float())
        columns.append((probs > 2**-12).any(0))
    return {
        "entropy_median": float(torch.cat(entropy).median()),
        "entropy_mean": float(torch.cat(entropy).mean()),
        "top1_median": float(torch.cat(largest).median()),
        "top1_mean": float(torch.cat(largest).mean()),
        "above_2^-12_median": float(torch.cat(count).median()),
        "above_2^-12_mean": float(torch.cat(count).mean()),
        "columns_128": float(torch.stack(columns).float().mean()),
        "columns_512": float(torch.stack(columns).any(0).float().mean()),
    }
