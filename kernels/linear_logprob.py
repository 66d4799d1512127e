"""Token statistics under an LM head and their gradients as Triton kernels: no (N, V) tensor is ever formed.

Letters: N tokens (n of them scored), H hidden size, V vocabulary. Inside the kernels logits are in base 2, multiplied
by log₂e, since the hardware's exponential is 2^x.

Forward: a program owns a block of tokens and a range of the vocabulary ("split"). It walks its range in tiles and keeps
the running maximum m, Σ 2^(z−m) and what the asked statistics need, all from one product; the combine kernel merges the
splits of each token.
"""

# Arguments of kernels have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import configs
from .autograd import once_differentiable
from .dispatch import STATS, GradReport, Options, Report
from .sampled_grad import BLOCKS_PER_CHUNK, Gradients, Operands, frequent_columns, sampled_gradients
from .tiles import (
    LN2,
    SMALL,
    SYNCHRONIZES,
    VARYING_SIZES,
    Specialization,
    base2_logits,
    cdiv,
    dot_precision,
    grad_of_product,
    has_tma,
    in_groups,
    kernel_operands,
    load_tile,
    merge_splits,
    next_power_of_2,
    on_device,
    operand,
    operand_type,
    processors,
    specialize,
    tma_available,
)

MAX_SPLITS = 256
PARTIALS_BYTES = 16 << 20  # of what the splits know of the tokens: next to nothing to write and to merge
PROGRAM_START = 512  # of the hidden size: a program takes as long to start and end as these do of a tile

# N·V·H under which choosing columns costs more time than it saves, as measured on an H100.
MIN_SAMPLED_WORK = 4e11
FP16_LARGEST = 256.0  # of ∂loss/∂logits: ample room above for 1/π · ∂loss/∂logits, and the most below
LOWER_BOUND_BLOCKS = {"BLOCK_N": 8, "BLOCK_H": 256}
WORKSPACE_BYTES = 128 << 20  # of ∂loss/∂logits that the backward holds at a time, for a range of the vocabulary
LEAST_RANGE = 2048  # of the vocabulary: over 1,024 columns at a time dhidden's accumulation takes an H100 8 % longer
ACCUMULATOR_BYTES = 256 << 20  # of dhidden in fp32, under a frozen head


@triton.jit(do_not_specialize=VARYING_SIZES)
def _forward_kernel(
    hidden,  # (n, H): descriptor or pointer
    weight,  # (V, H): descriptor or pointer
    bias,  # (V,) or None
    targets,  # (n,)
    partials,  # (2 + SUM_SQ + ENTROPY + SUM, splits, n), fp32
    target_logits,  # (n,), fp32
    seed,  # (n,), fp32: a lower bound of the base-2 log-sum-exp, or None: no column sums are asked for
    # (⌈n / BLOCK_N⌉, V), bf16: Σ_t p_tv² over a block's tokens, from above but for bf16's rounding; infinite for the
    # target of any of them
    column_sq,
    n_tokens,
    vocab_size,
    hidden_size,
    n_splits,
    tiles_per_split,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    SUM_SQ: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token_block, split = in_groups(tl.program_id(0), tl.cdiv(n_tokens, BLOCK_N), n_splits)
    first_token = token_block * BLOCK_N
    tokens = first_token + tl.arange(0, BLOCK_N)
    wide_target = tl.load(targets + tokens, mask=tokens < n_tokens, other=-1)
    target = tl.where((wide_target >= 0) & (wide_target < vocab_size), wide_target, -1).to(tl.int32)
    if seed is not None:
        known = tl.load(seed + tokens, mask=tokens < n_tokens, other=float("inf"))

    maximum = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)  # Σ 2^(z−m)
    total_sq = tl.zeros((BLOCK_N,), tl.float32)  # Σ 4^(z−m)
    weighted = tl.zeros((BLOCK_N,), tl.float32)  # Σ 2^(z−m) (z−m)
    logit_sum = tl.zeros((BLOCK_N,), tl.float32)  # Σ z
    target_logit = tl.full((BLOCK_N,), float("-inf"), tl.float32)

    first_column = split * tiles_per_split * BLOCK_V
    last_column = min(first_column + tiles_per_split * BLOCK_V, vocab_size)
    for column in tl.range(first_column, last_column, BLOCK_V):
        product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in tl.range(0, hidden_size, BLOCK_H):
            h = load_tile(hidden, first_token, k, n_tokens, hidden_size, BLOCK_N, BLOCK_H, TMA)
            w = load_tile(weight, column, k, vocab_size, hidden_size, BLOCK_V, BLOCK_H, TMA)
            product = tl.dot(h, w.T, product, input_precision=PRECISION)

        columns = column + tl.arange(0, BLOCK_V)
        if bias is not None:
            product += tl.load(bias + columns, mask=columns < vocab_size, other=0.0).to(tl.float32)[None, :]
        logits = base2_logits(product, scale, softcap, HAS_SOFTCAP)
        if SUM:
            logit_sum += tl.sum(tl.where((columns < vocab_size)[None, :], logits, 0.0), 1)
        logits = tl.where((columns < vocab_size)[None, :], logits, float("-inf"))
        hit = columns[None, :] == target[:, None]
        target_logit = tl.maximum(target_logit, tl.max(tl.where(hit, logits, float("-inf")), 1))

        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        # A bias of −inf masks an entry; where all so far are, any finite number serves as the maximum.
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        rescale = tl.exp2(maximum - reference)
        shifted = logits - reference[:, None]
        exp = tl.exp2(shifted)
        if ENTROPY:
            # Σ e·(z − m') from Σ e·(z − m): every term gains (m − m')·e. A first tile has Σ e = 0 and m = −inf.
            moved = tl.where(maximum == float("-inf"), 0.0, maximum - reference)
            weighted = rescale * (weighted + moved * total)
            weighted += tl.sum(tl.where(exp > 0.0, exp * shifted, 0.0), 1)
        total = total * rescale + tl.sum(exp, 1)
        squares = exp * exp
        if SUM_SQ:
            total_sq = total_sq * rescale * rescale + tl.sum(squares, 1)
        maximum = new_maximum
        if seed is not None:
            # p = 2^(z − LSE) with the larger of two lower bounds in the LSE's place: never too small.
            factor = tl.where(total > 0.0, tl.minimum(tl.exp2(maximum - known), 1.0 / total), 0.0)
            sums = tl.sum(squares * (factor * factor)[:, None], 0)
            slot = column_sq + tl.cast(token_block, tl.int64) * vocab_size + columns
            tl.store(slot, sums.to(tl.bfloat16), mask=columns < vocab_size)

    stride = tl.cast(n_splits, tl.int64) * n_tokens
    slot = partials + tl.cast(split, tl.int64) * n_tokens + tokens
    scored = tokens < n_tokens
    tl.store(slot, maximum, mask=scored)
    tl.store(slot + stride, total, mask=scored)
    if SUM_SQ:
        tl.store(slot + 2 * stride, total_sq, mask=scored)
    if ENTROPY:
        tl.store(slot + (2 + SUM_SQ) * stride, weighted, mask=scored)
    if SUM:
        tl.store(slot + (2 + SUM_SQ + ENTROPY) * stride, logit_sum, mask=scored)
    # A target stands in one split: that program writes its logit, and the first one NaN for what is no target.
    here = (target >= first_column) & (target < last_column)
    nowhere = (target < 0) & (tokens < tl.where(split == 0, n_tokens, 0))
    tl.store(target_logits + tokens, tl.where(here, target_logit, float("nan")), mask=here | nowhere)
    if seed is not None:
        tl.debug_barrier()  # the loop's stores, which other threads made, come first
        slot = column_sq + tl.cast(token_block, tl.int64) * vocab_size + target
        tl.store(slot, float("inf"), mask=here)


@triton.jit(do_not_specialize=VARYING_SIZES)
def _lower_bound_kernel(
    hidden,  # (n, H)
    weight,  # (V, H)
    bias,  # (V,) or None
    targets,  # (n,)
    frequent,  # (S,): the columns that the partials know
    counts,  # (V,), int32: by which these are the first, by falling count, equal ones by rising id
    partials,  # (2, splits, n), fp32
    bounds,  # (n,), fp32
    n_tokens,
    vocab_size,
    hidden_size,
    n_frequent,
    n_splits,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Base-2 log-sum-exp of the seed columns and the token's own target: no more than that of all columns."""
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scored = tokens < n_tokens
    target = tl.load(targets + tokens, mask=scored, other=0)
    exists = scored & (target >= 0) & (target < vocab_size)
    products = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for k in tl.range(0, hidden_size, BLOCK_H):
        inner = k + tl.arange(0, BLOCK_H)
        inside = exists[:, None] & (inner < hidden_size)[None, :]
        h = tl.load(hidden + tokens.to(tl.int64)[:, None] * hidden_size + inner[None, :], mask=inside, other=0.0)
        w = tl.load(weight + target.to(tl.int64)[:, None] * hidden_size + inner[None, :], mask=inside, other=0.0)
        products += h.to(tl.float32) * w.to(tl.float32)
    product = tl.sum(products, 1)
    if bias is not None:
        product += tl.load(bias + target, mask=exists, other=0.0).to(tl.float32)
    last = tl.load(frequent + n_frequent - 1)
    least = tl.load(counts + last)
    count = tl.load(counts + target, mask=exists, other=0)
    added = exists & tl.where(count == least, target > last, count < least)
    logit = tl.where(added, base2_logits(product, scale, softcap, HAS_SOFTCAP), float("-inf"))

    known, known_total = merge_splits(partials, tokens, n_tokens, n_splits, BLOCK_SPLITS)
    maximum = tl.maximum(known, logit)
    reference = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = known_total * tl.exp2(known - reference) + tl.exp2(logit - reference)
    tl.store(bounds + tokens, reference + tl.log2(total), mask=scored)


@triton.jit(do_not_specialize=VARYING_SIZES)
def _combine_kernel(
    partials,  # (2 + SUM_SQ + ENTROPY + SUM, splits, n), fp32
    target_logits,  # (n,), fp32
    rows,  # (n,) where each token's results go, or None: in order
    logprobs,  # (N,), fp32
    logsumexp,  # (N,), fp32
    values,  # (asked statistics, N), fp32
    n_tokens,
    n_rows,
    n_splits,
    vocab_size,
    LOG_SUM_SQ_PROBS: tl.constexpr,  # each statistic's row in values, or −1
    MAX_LOGPROB: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    IS_TOP1: tl.constexpr,
    LOGSUMEXP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Merge the splits of each token and finish its statistics, in nats."""
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    splits = tl.arange(0, BLOCK_SPLITS)
    scored = tokens < n_tokens
    inside = (splits < n_splits)[:, None] & scored[None, :]
    slots = partials + splits[:, None].to(tl.int64) * n_tokens + tokens[None, :]
    stride = tl.cast(n_splits, tl.int64) * n_tokens

    split_maximum = tl.load(slots, mask=inside, other=float("-inf"))
    maximum = tl.max(split_maximum, 0)
    maximum = tl.where(scored, maximum, 0.0)
    finite = split_maximum > float("-inf")  # not so outside, and in a split whose entries are all masked
    moved = tl.where(finite, split_maximum - maximum[None, :], 0.0)
    rescale = tl.where(finite, tl.exp2(moved), 0.0)
    split_total = tl.load(slots + stride, mask=inside, other=0.0)
    total = tl.sum(split_total * rescale, 0)
    total = tl.where(scored, total, 1.0)
    log_total = tl.log(total)
    # Through the shifted target: ≤ 0, and with all its digits beside a large maximum.
    logit = tl.load(target_logits + tokens, mask=scored, other=0.0)
    logprob = (logit - maximum) * LN2 - log_total
    lse = maximum * LN2 + log_total

    out = tokens
    if rows is not None:
        out = tl.load(rows + tokens, mask=scored, other=0)
    tl.store(logprobs + out, logprob, mask=scored)
    tl.store(logsumexp + out, lse, mask=scored)
    if LOG_SUM_SQ_PROBS >= 0:
        split_sq = tl.load(slots + 2 * stride, mask=inside, other=0.0)
        total_sq = tl.where(scored, tl.sum(split_sq * rescale * rescale, 0), 1.0)
        # Both sums are ≥ 1, so log Σp² = log Σe² − 2 log Σe cancels nothing.
        result = tl.log(total_sq) - 2.0 * log_total
        tl.store(values + LOG_SUM_SQ_PROBS * n_rows + out, result, mask=scored)
    if MAX_LOGPROB >= 0:
        tl.store(values + MAX_LOGPROB * n_rows + out, -log_total, mask=scored)
    if ENTROPY >= 0:
        split_weighted = tl.load(slots + (2 + (LOG_SUM_SQ_PROBS >= 0)) * stride, mask=inside, other=0.0)
        weighted = tl.sum(rescale * (split_weighted + moved * split_total), 0)
        tl.store(values + ENTROPY * n_rows + out, log_total - LN2 * weighted / total, mask=scored)
    if MEAN_LOGIT >= 0:
        slot = slots + (2 + (LOG_SUM_SQ_PROBS >= 0) + (ENTROPY >= 0)) * stride
        logit_sum = tl.sum(tl.load(slot, mask=inside, other=0.0), 0)
        tl.store(values + MEAN_LOGIT * n_rows + out, logit_sum * (LN2 / vocab_size), mask=scored)
    if IS_TOP1 >= 0:
        top1 = (logit >= maximum).to(tl.float32)
        tl.store(values + IS_TOP1 * n_rows + out, top1, mask=scored)
    if LOGSUMEXP >= 0:
        tl.store(values + LOGSUMEXP * n_rows + out, lse, mask=scored)


@triton.jit(do_not_specialize=VARYING_SIZES)
def _grad_logits_kernel(
    hidden,  # (n, H): descriptor or pointer
    weight,  # (columns, H), a range of the head's rows: descriptor or pointer
    bias,  # (V,) or None
    targets,  # (n,)
    token_factors,  # (3, n), fp32
    grad_logits,  # (n, columns), rows apart by grad_stride: descriptor or pointer
    n_tokens,
    n_columns,
    hidden_size,
    grad_stride,
    first_id,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """∂loss/∂x for a range of the vocabulary; as many programs as the device runs at once share the tiles."""
    token_blocks = tl.cdiv(n_tokens, BLOCK_N)
    column_blocks = tl.cdiv(n_columns, BLOCK_V)
    for tile in tl.range(tl.program_id(0), token_blocks * column_blocks, tl.num_programs(0)):
        token_block, column_block = in_groups(tile, token_blocks, column_blocks)
        first_token, column = token_block * BLOCK_N, column_block * BLOCK_V

        product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in tl.range(0, hidden_size, BLOCK_H):
            h = load_tile(hidden, first_token, k, n_tokens, hidden_size, BLOCK_N, BLOCK_H, TMA)
            w = load_tile(weight, column, k, n_columns, hidden_size, BLOCK_V, BLOCK_H, TMA)
            product = tl.dot(h, w.T, product, input_precision=PRECISION)

        tokens = first_token + tl.arange(0, BLOCK_N)
        columns = column + tl.arange(0, BLOCK_V)
        if bias is not None:
            product += tl.load(bias + first_id + columns, mask=columns < n_columns, other=0.0).to(tl.float32)[None, :]
        grad = grad_of_product(
            product, tokens, first_id + columns, targets, token_factors, n_tokens, scale, softcap, HAS_SOFTCAP
        )
        if TMA:
            grad_logits.store([first_token, column], grad.to(grad_logits.dtype))
        else:
            offsets = tokens[:, None].to(tl.int64) * grad_stride + columns[None, :]
            inside = (tokens < n_tokens)[:, None] & (columns < n_columns)[None, :]
            tl.store(grad_logits + offsets, grad.to(grad_logits.dtype.element_ty), mask=inside)


def _resident_programs(config: configs.Config, device: torch.device) -> int:
    """How many programs run at once: two to a multiprocessor where tiles are small enough for their registers."""
    return processors(device) * (2 if config.num_warps <= 4 else 1)


def _splits(
    sizes: tuple[int, int, int],  # n, H, V
    quantities: int,  # that a split knows of a token
    config: configs.Config,
    device: torch.device,
) -> tuple[int, int]:
    """(splits, tiles per split): programs run in waves, and of the last one a part is idle, the less the better."""
    n_tokens, hidden_size, vocab_size = sizes
    at_once = _resident_programs(config, device)
    tiles = cdiv(vocab_size, config.block_v)
    blocks = cdiv(n_tokens, config.block_n)
    most = max(1, min(MAX_SPLITS, PARTIALS_BYTES // (4 * quantities * n_tokens)))
    fewest_tiles = cdiv(tiles, most)

    def duration(tiles_per_split: int) -> float:
        waves = cdiv(blocks * cdiv(tiles, tiles_per_split), at_once)
        return waves * (tiles_per_split * hidden_size + PROGRAM_START)

    tiles_per_split = min(range(fewest_tiles, fewest_tiles + 32), key=duration)
    return cdiv(tiles, tiles_per_split), tiles_per_split


def forward_partials(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (n,)
    transform: tuple[float, float | None],
    stats: tuple[str, ...] = (),
    seed: Tensor | None = None,  # (n,)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What each split knows of each token, (quantities, splits, n), the targets' base-2 logits, (n,), and with a
    ``seed`` (a lower bound of each token's base-2 log-sum-exp) the column sums, (blocks, V)."""
    (n_tokens, hidden_size), vocab_size = hidden.shape, weight.shape[0]
    scale, softcap = transform
    config = configs.lookup("forward", configs.architecture(hidden.device), hidden.dtype, hidden_size)
    quantities = {
        "SUM_SQ": "log_sum_sq_probs" in stats,
        "ENTROPY": "entropy" in stats,
        "SUM": "mean_logit" in stats,
    }
    n_quantities = 2 + sum(quantities.values())
    n_splits, tiles_per_split = _splits((n_tokens, hidden_size, vocab_size), n_quantities, config, hidden.device)
    partials = hidden.new_empty(n_quantities, n_splits, n_tokens, dtype=torch.float32)
    target_logits = hidden.new_empty(n_tokens, dtype=torch.float32)
    n_blocks = cdiv(n_tokens, config.block_n)
    column_sq = None if seed is None else hidden.new_empty(n_blocks, vocab_size, dtype=torch.bfloat16)
    tma = tma_available(hidden, weight)
    _forward_kernel[(n_blocks * n_splits,)](
        operand(hidden, [config.block_n, config.block_h], tma),
        operand(weight, [config.block_v, config.block_h], tma),
        None if bias is None else bias.contiguous(),
        targets,
        partials,
        target_logits,
        seed,
        column_sq,
        n_tokens,
        vocab_size,
        hidden_size,
        n_splits,
        tiles_per_split,
        scale,
        softcap or 0.0,
        HAS_SOFTCAP=softcap is not None,
        **quantities,
        TMA=tma,
        PRECISION=dot_precision(),
        **config.launch,
    )
    return partials, target_logits, column_sq


def scored_index(
    targets: Tensor,  # (N,)
    ignore_index: int,
) -> Tensor:
    """Row numbers of the tokens that count, (n,), ascending.

    Costs one synchronization; without it the ignored tokens, often half of a batch of pairs, would be computed.
    """
    return (targets != ignore_index).nonzero().squeeze(-1)


def take_rows(
    hidden: Tensor,  # (N, H)
    targets: Tensor,  # (N,)
    rows: Tensor,  # (n,), ascending
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden and targets at ``rows``, and the rows themselves, or None where they are all."""
    if len(rows) == len(targets):
        return hidden.contiguous(), targets.contiguous(), None
    return hidden.index_select(0, rows), targets.index_select(0, rows), rows


def _seed(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (n,)
    transform: tuple[float, float | None],
    frequent: Tensor,  # (S,)
    counts: Tensor,  # (V,)
    rows: Tensor,  # (S, H), of weight
) -> Tensor:
    """Lower bounds of the base-2 log-sum-exps, (n,)."""
    n_tokens, hidden_size = hidden.shape
    scale, softcap = transform
    biases = None if bias is None else bias.index_select(0, frequent)
    # Target logits of these columns mean nothing, and nobody reads them.
    partials, _, _ = forward_partials(hidden, rows, biases, targets, transform)
    bounds = hidden.new_empty(n_tokens, dtype=torch.float32)
    _lower_bound_kernel[(cdiv(n_tokens, LOWER_BOUND_BLOCKS["BLOCK_N"]),)](
        hidden,
        weight,
        None if bias is None else bias.contiguous(),
        targets,
        frequent,
        counts,
        partials,
        bounds,
        n_tokens,
        len(weight),
        hidden_size,
        len(frequent),
        partials.shape[1],
        scale,
        softcap or 0.0,
        HAS_SOFTCAP=softcap is not None,
        **LOWER_BOUND_BLOCKS,
        BLOCK_SPLITS=next_power_of_2(partials.shape[1]),
    )
    return bounds


@on_device
def _forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    scale: float,
    softcap: float | None,
    stats: str,
    ignore_index: int,
    tolerance: float,
    seed: Tensor,  # (), on the CPU
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprobs (N,), logsumexp (N,) and the asked statistics (len(stats), N); stats are names joined by commas.

    At a ``tolerance`` over 0 also what a sampled gradient needs: the column sums (blocks of scored tokens, V), the mean
    of the most frequent targets' rows of weight (H,) and the rows of the scored tokens (n,); else these are empty.
    """
    names = tuple(stats.split(",")) if stats else ()
    n_rows = len(targets)
    weight = weight.contiguous()
    if tolerance > 0:
        # Before the synchronization, while the device may be busy: what is ignored counts as some entry, for no harm.
        frequent, counts = frequent_columns(targets, len(weight))
        frequent_rows = weight.index_select(0, frequent)
    index = scored_index(targets, ignore_index)
    scored, scored_targets, rows = take_rows(hidden, targets, index)
    n_tokens = len(scored)
    sums = None
    if n_tokens:
        lower_bound = None
        if tolerance > 0:
            known = (frequent, counts, frequent_rows)
            lower_bound = _seed(scored, weight, bias, scored_targets, (scale, softcap), *known)
        partials, target_logits, sums = forward_partials(
            scored, weight, bias, scored_targets, (scale, softcap), names, lower_bound
        )
    # From here on the device is busy. Where every token is scored, the combine kernel writes all of these.
    allocate = torch.zeros if rows is not None or not n_tokens else torch.empty
    logprobs, logsumexp, values = (
        allocate(*shape, n_rows, dtype=torch.float32, device=hidden.device) for shape in ((), (), (len(names),))
    )
    column_sq = weight.new_empty(0, len(weight), dtype=torch.bfloat16) if sums is None else sums
    center = frequent_rows.mean(0, dtype=torch.float32) if tolerance > 0 else logprobs.new_empty(0)
    if n_tokens:
        n_splits = partials.shape[1]
        block_splits = next_power_of_2(n_splits)
        block_n = max(16, 2048 // block_splits)
        _combine_kernel[(cdiv(n_tokens, block_n),)](
            partials,
            target_logits,
            rows,
            logprobs,
            logsumexp,
            values,
            n_tokens,
            n_rows,
            n_splits,
            weight.shape[0],
            **{name.upper(): names.index(name) if name in names else -1 for name in STATS},
            BLOCK_N=block_n,
            BLOCK_SPLITS=block_splits,
        )
    return logprobs, logsumexp, values, column_sq, center, index if tolerance > 0 else index.new_empty(0)


_forward_op = torch.library.custom_op("prefopt_fast::linear_logprob", _forward, mutates_args=(), tags=SYNCHRONIZES)


@_forward_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    stats: str,
    ignore_index: int,
    tolerance: float,
    seed: Tensor,  # (), on the CPU
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs = hidden.new_empty(targets.shape, dtype=torch.float32)
    n_stats = len(stats.split(",")) if stats else 0
    n_blocks, n_scored = (torch.library.get_ctx().new_dynamic_size() if tolerance > 0 else 0 for _ in range(2))
    return (
        logprobs,
        torch.empty_like(logprobs),
        logprobs.new_empty(n_stats, *targets.shape),
        weight.new_empty(n_blocks, weight.shape[0], dtype=torch.bfloat16),
        logprobs.new_empty(weight.shape[1] if tolerance > 0 else 0),
        targets.new_empty(n_scored, dtype=torch.int64),
    )


def _grad_logits(
    operands: Operands,
    columns: slice,
    out: Tensor,  # (n, columns), rows may lie apart
) -> None:
    """Write ∂loss/∂(hidden @ weightᵀ + bias) for a range of the vocabulary."""
    hidden = operands.hidden
    n_tokens, hidden_size = hidden.shape
    scale, softcap = operands.transform
    config = configs.lookup("grad_logits", configs.architecture(hidden.device), hidden.dtype, hidden_size)
    weight_part = operands.weight[columns]
    tma = tma_available(hidden, weight_part)
    n_tiles = cdiv(n_tokens, config.block_n) * cdiv(len(weight_part), config.block_v)
    _grad_logits_kernel[(min(n_tiles, _resident_programs(config, hidden.device)),)](
        operand(hidden, [config.block_n, config.block_h], tma),
        operand(weight_part, [config.block_v, config.block_h], tma),
        operands.bias,
        operands.targets,
        operands.token_factors,
        operand(out, [config.block_n, config.block_v], tma),
        n_tokens,
        len(weight_part),
        hidden_size,
        out.stride(0),
        columns.start,
        scale,
        softcap or 0.0,
        HAS_SOFTCAP=softcap is not None,
        TMA=tma,
        PRECISION=dot_precision(),
        **config.launch,
    )


@torch.library.custom_op("prefopt_fast::linear_logprob_backward", mutates_args=(), tags=SYNCHRONIZES)
@on_device
def _backward_op(
    grad: Tensor,  # (N,), fp32
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    logprobs: Tensor,  # (N,)
    logsumexp: Tensor,  # (N,)
    column_sq: Tensor,  # (blocks, V)
    center: Tensor,  # (H,)
    index: Tensor,  # (n,) at a tolerance over 0: the scored tokens' rows
    scale: float,
    softcap: float | None,
    ignore_index: int,
    tolerance: float,
    seed: Tensor,  # (), on the CPU
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias, each empty where not needed; exact at tolerance 0, else sampled where that pays.

    Last what sampled_gradients reports.
    """
    need_hidden, need_weight, need_bias = needed
    index = index if tolerance > 0 else scored_index(targets, ignore_index)
    scored, scored_targets, rows = take_rows(hidden, targets, index)
    # dweight and dbias are written in whole, and so is dhidden where no token is ignored.
    row_major = torch.contiguous_format  # as the kernels write, whatever the operands' strides
    allocate = torch.empty_like if rows is None else torch.zeros_like
    dhidden = allocate(hidden, memory_format=row_major) if need_hidden else None
    allocate = torch.empty_like if len(scored) else torch.zeros_like
    dweight = allocate(weight, memory_format=row_major) if need_weight else None
    dbias = allocate(bias) if need_bias and bias is not None else None
    gradients = (
        hidden.new_empty(0) if dhidden is None else dhidden,
        hidden.new_empty(0) if dweight is None else dweight,
        hidden.new_empty(0) if dbias is None else dbias,
    )
    if not len(scored):
        return *gradients, torch.zeros(4, dtype=torch.float64, device="cpu")

    if rows is not None:
        grad, logprobs, logsumexp = grad[rows], logprobs[rows], logsumexp[rows]
    # fp16 has no range for p · ∂loss/∂logp: there the largest of them is brought to FP16_LARGEST, and put back later.
    unit = None
    if hidden.dtype == torch.float16:
        largest = grad.abs().where(grad.isfinite(), 0.0).amax()
        unit = (largest * (abs(scale) / FP16_LARGEST)).clamp_min(torch.finfo(grad.dtype).tiny)
        grad = grad / unit
    token_factors = _token_factors(grad, logprobs, logsumexp, scale)
    bias = None if bias is None else bias.contiguous()
    operands = Operands(scored, weight.contiguous(), bias, token_factors, (scale, softcap), scored_targets)
    wanted = Gradients(dhidden, dweight, dbias, rows, center if softcap is None else None, unit)
    report = (0.0, 0.0, 0, 0)
    if tolerance > 0:
        arch = configs.architecture(hidden.device)
        block_n = configs.lookup("forward", arch, hidden.dtype, hidden.shape[1]).block_n
        tile = configs.lookup("sampled_grad_logits", arch, hidden.dtype, hidden.shape[1]).block_v
        blocks = BLOCKS_PER_CHUNK[wanted.train_head]
        sampled = operands._replace(blocks=blocks, chunk=blocks * block_n, tile=tile)
        report = sampled_gradients(sampled, column_sq, grad, logprobs, tolerance, int(seed), wanted)
    _, _, dense_chunks, chunks = report
    if dense_chunks == chunks:
        _exact_gradients(operands, wanted)
    return *gradients, torch.tensor(report, dtype=torch.float64, device="cpu")


def _exact_gradients(operands: Operands, gradients: Gradients) -> None:
    """Write dhidden (N, H) at ``rows``, dweight (V, H) and dbias (V,), each where it is not None.

    ∂loss/∂logits G is formed for all tokens and a range of the vocabulary at a time, in the operands' dtype, and meets
    weight and hidden in two library products, which reach the device's peak where a kernel that fuses either would
    have to recompute G for the other. A range holds all tokens, so its rows of dweight are complete after one product
    with an fp32 accumulator; dhidden accumulates over the ranges in fp32. No atomics: equal inputs give equal bits.

    Under a frozen head nothing needs all tokens at once. Some at a time, that is fewer and wider ranges, over which a
    smaller dhidden accumulates.
    """
    hidden, weight = operands.hidden, operands.weight
    dhidden, dweight, dbias, rows, _, unit = gradients
    n_tokens, vocab_size = len(hidden), len(weight)
    parts = cdiv(n_tokens, max(1, ACCUMULATOR_BYTES // (4 * hidden.shape[1])))
    if not gradients.train_head and parts > 1:
        some = cdiv(n_tokens, parts)
        for first in range(0, n_tokens, some):
            tokens = slice(first, first + some)
            _exact_gradients(operands.of(tokens), gradients.of(tokens))
        return
    width = max(LEAST_RANGE, WORKSPACE_BYTES // (n_tokens * hidden.element_size()) // 256 * 256)
    workspace = hidden.new_empty(n_tokens, min(width, cdiv(vocab_size, 256) * 256))
    total = None if dhidden is None else torch.zeros_like(hidden, dtype=torch.float32)
    for first in range(0, vocab_size, width):
        columns = slice(first, min(first + width, vocab_size))
        g = workspace[:, : columns.stop - first]
        _grad_logits(operands, columns, g)
        if total is not None:
            _accumulate_product(total, g, weight[columns])
        if dweight is not None:
            if unit is None:
                torch.mm(g.T, hidden, out=dweight[columns])
            else:
                dweight[columns] = _product(g.T, hidden) * unit
        if dbias is not None:
            column_sum = g.sum(0, dtype=torch.float32)
            dbias[columns] = column_sum if unit is None else column_sum * unit

    if dhidden is not None and total is not None:
        if unit is not None:
            total *= unit
        if rows is None:
            dhidden.copy_(total)
        else:
            dhidden[rows] = total.to(dhidden.dtype)


def _token_factors(grad: Tensor, logprobs: Tensor, logsumexp: Tensor, scale: float) -> Tensor:
    """(3, n): log₂ Σ 2^z, what multiplies p_v in ∂loss/∂x_v for v ≠ y, and ∂loss/∂x_y (before a soft-cap's slope)."""
    # The target's own 1 − p as −expm1(logp): as p → 1 the difference of two rounded numbers has no digit left.
    return torch.stack([logsumexp * math.log2(math.e), -scale * grad, -scale * grad * torch.expm1(logprobs)])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32, of operands in any dtype."""
    if left.dtype == torch.float32 or left.device.type == "cpu":
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def _accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right with total in fp32."""
    if left.dtype == torch.float32 or left.device.type == "cpu":
        total.addmm_(left.float(), right.float())
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


@_backward_op.register_fake
def _(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, (need_hidden, need_weight, need_bias) = rest
    return (
        hidden.new_empty(hidden.shape) if need_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
        torch.empty_like(bias) if need_bias and bias is not None else weight.new_empty(0),
        torch.empty(4, dtype=torch.float64, device="cpu"),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, ctx.scale, ctx.softcap, _, ctx.ignore_index, ctx.tolerance, seed = inputs
    logprobs, *detached = output
    logsumexp, _, *sampling = detached
    ctx.save_for_backward(hidden, weight, bias, targets, logprobs, logsumexp, *sampling, seed)
    ctx.report = None  # a Report, where linear_logprob has one filled in
    ctx.set_materialize_grads(False)  # zeros of column_sq would be a large tensor
    ctx.mark_non_differentiable(*detached)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    needed = list(ctx.needs_input_grad[:3])
    *operands, seed = ctx.saved_tensors
    steering = (ctx.scale, ctx.softcap, ctx.ignore_index, ctx.tolerance, seed)
    *gradients, report = _backward_op(grad.contiguous(), *operands, *steering, needed)
    if ctx.report is not None and type(report) is Tensor:  # what traces a backward has no values yet
        columns_kept, estimated_error, dense_chunks, chunks = report.tolist()
        ctx.report.values = GradReport(columns_kept, None, estimated_error, int(dense_chunks), int(chunks))
    return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), *[None] * 7)


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


class _Eager(torch.autograd.Function):
    """The operator where nobody looks for one: in the forward the ways of torch.library take 0.15 ms more of the host,
    in which a device that had to be waited for has nothing to do. (During the backward it mostly has.)"""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = _forward(*inputs)
        _save_for_backward(ctx, inputs, outputs)
        return outputs

    backward = staticmethod(once_differentiable(_backward))


def _is_looked_at(hidden: Tensor) -> bool:
    """Whether a tracer, a mode (selective checkpointing, FakeTensorMode, …) or a transform is to see an operator."""
    return (
        torch.compiler.is_compiling()
        or type(hidden) not in (Tensor, torch.nn.Parameter)
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    )


def linear_logprob(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    transform: tuple[float, float | None],
    stats: tuple[str, ...],
    options: Options,
) -> tuple[dict[str, Tensor], Report | None]:
    """See kernels/dispatch.py for the contract.

    Raises:
        NotImplementedError: operands in float64, which the kernels do not take.
    """
    hidden, weight = kernel_operands(hidden, weight)
    # One draw serves all gradients asked for, so the strictest tolerance rules; 0 for any of them means exact ones.
    tolerance = 0.0
    if torch.is_grad_enabled() and hidden.shape[0] * weight.numel() >= MIN_SAMPLED_WORK:
        trained = (hidden.requires_grad, weight.requires_grad or (bias is not None and bias.requires_grad))
        tolerances = [t for t, need in zip(options.grad_tolerance, trained, strict=True) if need]
        tolerance = min(tolerances) if tolerances else 0.0  # torch.compile knows no min(…, default=…)
    seed = torch.as_tensor(options.seed, device="cpu")
    operator = _forward_op if _is_looked_at(hidden) else _Eager.apply
    logprobs, _, values, *_ = operator(
        hidden, weight, bias, targets, *transform, ",".join(stats), options.ignore_index, tolerance, seed
    )
    outputs = dict(zip(stats, values.detach(), strict=True))
    if "is_top1" in outputs:
        outputs["is_top1"] = outputs["is_top1"].bool()
    report = None
    if tolerance > 0 and not torch.compiler.is_compiling() and (node := logprobs.grad_fn) is not None:
        report = node.report = Report()  # the node is the backward's ctx
    return {"logprobs": logprobs, **outputs}, report


def aot_signatures(arch: str) -> Iterator[Specialization]:
    """Each kernel in each configuration that ``arch`` ("sm_90", "gfx942", …) runs, with WPO's statistics asked for."""
    tma = has_tma(arch)
    shared = {"bias": None, "HAS_SOFTCAP": False, "TMA": tma, "PRECISION": "ieee"}
    stats = {"SUM_SQ": True, "ENTROPY": False, "SUM": False}
    for bits, dtype in (("16", "bf16"), ("32", "fp32")):
        for max_hidden, config in configs.entries("forward", arch, bits):
            name = f"{dtype}_h{max_hidden or 'any'}"
            types = {
                "hidden": operand_type(dtype, config.block_n, config.block_h, tma),
                "weight": operand_type(dtype, config.block_v, config.block_h, tma),
                "targets": "*i64",
                **dict.fromkeys(("partials", "target_logits", "seed"), "*fp32"),
                "column_sq": "*bf16",
            }
            plain = {**shared, **stats, "seed": None, "column_sq": None}
            yield specialize(f"forward_{name}", _forward_kernel, config, types, plain)
            yield specialize(f"forward_columns_{name}", _forward_kernel, config, types, {**shared, **stats})
        for max_hidden, config in configs.entries("grad_logits", arch, bits):
            types = {
                "hidden": operand_type(dtype, config.block_n, config.block_h, tma),
                "weight": operand_type(dtype, config.block_v, config.block_h, tma),
                "targets": "*i64",
                "token_factors": "*fp32",
                "grad_logits": operand_type(dtype, config.block_n, config.block_v, tma),
            }
            yield specialize(f"grad_logits_{dtype}_h{max_hidden or 'any'}", _grad_logits_kernel, config, types, shared)
    types = {
        **dict.fromkeys(("partials", "target_logits", "logprobs", "logsumexp", "values"), "*fp32"),
        "rows": "*i64",
    }
    slots = {name.upper(): slot for slot, name in enumerate(STATS)}
    for dtype in ("bf16", "fp32"):
        bound_types = {
            **dict.fromkeys(("hidden", "weight"), f"*{dtype}"),
            **dict.fromkeys(("partials", "bounds"), "*fp32"),
            **{"targets": "*i64", "frequent": "*i64", "counts": "*i32"},
        }
        constants = {"bias": None, "HAS_SOFTCAP": False, **LOWER_BOUND_BLOCKS, "BLOCK_SPLITS": 16}
        yield specialize(f"lower_bound_{dtype}", _lower_bound_kernel, SMALL, bound_types, constants)
    yield specialize("combine", _combine_kernel, SMALL, types, {**slots, "BLOCK_N": 32, "BLOCK_SPLITS": 64})
