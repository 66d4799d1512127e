"""The gradients of linear_logprob from few columns of the vocabulary, sampled so that they are unbiased.

Letters: N tokens (n of them scored), H hidden size, V vocabulary, C tokens in a chunk, S slots: the columns kept for
each chunk, one chunk after the other, each padded to whole tiles.

A chunk keeps column v with probability π_v and weighs it by 1/π_v, so that the expectation over draws is the exact
gradient. With p_tv the probabilities, g_t the upstream gradient and independent draws, the squared error of dhidden has
the expectation Σ_v (1/π_v − 1) ‖W_v‖² Σ_t g_t² p_tv². At a given number of columns it is least for
π_v = min(1, s_v / ε), s_v² = Σ_t g_t² p_tv² (Neyman's allocation), which makes it Σ_v max(0, s_v (ε − s_v)) ‖W_v‖².
ε is the largest that keeps this under τ² Σ_t ‖g_t u_t‖², u_t = W[y_t] − E_p[W]. For rows of W of similar norm ‖W‖ and
little correlation ‖u_t‖² = ‖W‖² ((1 − p_y)² + Σ_{v≠y} p_v²), at least ‖W‖² (1 − p_y)²: the norm cancels, and what is
left is known from the forward.

What the rows of W have in common, a mean row c, cancels in the exact gradient (Σ_v ∂loss/∂x_v = 0) but not in a sample:
it is taken out of dhidden again, which removes its part of the error and changes no expectation.

dweight's error is Σ_v (1/π_v − 1) ‖Σ_t g_t p_tv h_t‖², whose cross terms the scores s_v do not know. Where the head is
trained, a trial draw tells what it is to be expected to be, and the budget of the draw that counts is cut by as much.
"""

# Arguments of kernels have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from . import configs
from .tiles import (
    SMALL,
    VARYING_SIZES,
    Specialization,
    cdiv,
    dot_precision,
    grad_of_product,
    has_tma,
    in_groups,
    load_tile,
    next_power_of_2,
    operand,
    operand_type,
    specialize,
    tma_available,
)

# Of the forward's token blocks, under a frozen head and a trained one: wider chunks need more columns, narrower ones
# more visits to each row of dweight.
BLOCKS_PER_CHUNK = (1, 2)
SEGMENT = 2048  # of the vocabulary, for which one program draws the columns
WORKSPACE_BYTES = 256 << 20  # of ∂loss/∂logits on the kept columns; more where that saves an fp32 copy of dweight
MAX_SHARE = 0.25  # of the vocabulary, on average: over it the exact gradient is as fast
# What is launched before the host knows how many columns were drawn has room for so many bytes of ∂loss/∂logits, and on
# average for so large a share of the vocabulary; of 8,192 tokens a twenty-fifth is drawn from Llama 3's. Where there is
# room for less than the least share, it would mostly be in vain.
FIRST_BYTES = 160 << 20
LEAST_FIRST_SHARE, MOST_FIRST_SHARE = 1 / 16, 1 / 8
SEED_SHARE = 32  # one in so many columns, the most frequent targets, gives the first bound of the log-sum-exp
# ε is looked for among 2 √(budget / V), which never is too large since a summand of the error is at most ε²/4, and its
# products with powers of √2: with text and synthetic inputs it is 3 to 6 times as large.
CANDIDATES = 16
PARTS_OF_CHUNKS = ["first_slots", "ranks"]  # whose alignment depends on the draw where chunks come in groups
SKETCH = 128  # dimensions in which the norms of dweight's rows are estimated


class Operands(NamedTuple):
    """What ∂loss/∂logits is recomputed from."""

    hidden: Tensor  # (n, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    token_factors: Tensor  # (3, n)
    transform: tuple[float, float | None]
    targets: Tensor  # (n,)
    # Of sampled gradients alone:
    blocks: int = 0  # of the forward's, in a chunk
    chunk: int = 0  # C
    tile: int = 0  # of slots: sampled_grad_logits' block_v

    def of(self, tokens: slice) -> Operands:
        return self._replace(
            hidden=self.hidden[tokens],
            token_factors=self.token_factors[:, tokens].contiguous(),
            targets=self.targets[tokens],
        )


class Slots(NamedTuple):
    """The columns that the chunks drew, one chunk after the other, each padded to whole tiles."""

    columns: Tensor  # (S,), int32; V in padding
    weights: Tensor  # (S,), fp32, 1/π; 0 in padding
    ranks: Tensor | None  # (chunks, V), int32: a column's place among its chunk's, or −1; None where not needed
    first_slots: Tensor  # (chunks + 1,), int32: where the chunks' slots begin
    first: int  # the first of them: the slot that columns and weights begin with
    most_tiles: int  # that a chunk has, or more


class Gradients(NamedTuple):
    """Where the gradients go, None where not needed, and what goes into them beside the operands."""

    dhidden: Tensor | None  # (N, H)
    dweight: Tensor | None  # (V, H)
    dbias: Tensor | None  # (V,)
    rows: Tensor | None  # (n,): the tokens' rows of dhidden; None for all in order
    center: Tensor | None  # (H,), fp32: what is taken out of dhidden's sample
    unit: Tensor | None  # (), fp32: what all of them are to be multiplied with

    @property
    def train_head(self) -> bool:
        return self.dweight is not None or self.dbias is not None

    def of(self, tokens: slice) -> Gradients:
        """With dhidden of these tokens alone."""
        if self.rows is not None:
            return self._replace(rows=self.rows[tokens])
        return self if self.dhidden is None else self._replace(dhidden=self.dhidden[tokens])


Write = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # first_slots and S to columns and weights


class Plan(NamedTuple):
    """A draw that is counted and not written yet."""

    write: Write
    first_slots: Tensor  # (chunks + 1,), int32
    ranks: Tensor | None  # (chunks, V), int32, for a trained head; to be written with the slots
    # What the host is to know, (3 + chunks + 1,), in fp32, in which whole tiles are exact: the columns drawn, how many
    # were expected, the squared error that is expected relative to the tolerance, and first_slots.
    totals: Tensor


class Expected(NamedTuple):
    """What a draw counts before it writes, (chunks,) each, fp32."""

    counts: Tensor  # columns kept
    shares: Tensor  # Σ π
    errors: Tensor  # Σ (1/π − 1) s²


@triton.jit
def _lacks_room(
    first_slots,  # (chunks + 1,)
    n_chunks,
    first_slot,
    room,
):
    """Whether the chunks have more slots than their buffers: then a kernel that was launched before that was known has
    nothing to do."""
    return tl.load(first_slots + n_chunks) - first_slot > room


@triton.jit
def _column_scores(
    column_sq,  # (blocks, V)
    block_weights,  # (blocks,)
    chunk,
    columns,
    n_blocks,
    vocab_size,
    BLOCKS: tl.constexpr,
):
    """s_v of a chunk's columns: 0 outside, infinite for a target or where a token is NaN, which keeps the column."""
    squares = tl.zeros(columns.shape, tl.float32)
    for k in tl.static_range(BLOCKS):
        block = chunk * BLOCKS + k
        inside = columns < tl.where(block < n_blocks, vocab_size, 0)
        block_squares = tl.load(column_sq + tl.cast(block, tl.int64) * vocab_size + columns, mask=inside, other=0.0)
        block_weight = tl.load(block_weights + block, mask=block < n_blocks, other=0.0)
        squares += tl.where(inside, block_squares.to(tl.float32) * block_weight, 0.0)
    # NaN also where a target's ∞ meets the weight 0 of a block without upstream gradients.
    return tl.where(squares >= 0.0, tl.sqrt(squares), float("inf"))


@triton.jit(do_not_specialize=VARYING_SIZES)
def _errors_kernel(
    column_sq,  # (blocks, V), bf16
    block_weights,  # (blocks,), fp32
    budgets,  # (chunks,), fp32
    errors,  # (chunks, CANDIDATES, segments), fp32
    n_blocks,
    vocab_size,
    n_segments,
    BLOCKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """What a segment of the vocabulary adds to Σ_v max(0, s_v (ε − s_v)), for each candidate ε of a chunk."""
    chunk = tl.program_id(0) // n_segments
    segment = tl.program_id(0) % n_segments
    columns = segment * SEGMENT + tl.arange(0, SEGMENT)
    scores = _column_scores(column_sq, block_weights, chunk, columns, n_blocks, vocab_size, BLOCKS)
    epsilon = 2.0 * tl.sqrt(tl.load(budgets + chunk) / vocab_size)
    for k in tl.range(CANDIDATES):
        error = tl.sum(tl.maximum(scores * (epsilon - scores), 0.0), 0)
        tl.store(errors + (chunk * CANDIDATES + k) * n_segments + segment, error)
        epsilon *= 1.4142135


@triton.jit(do_not_specialize=[*VARYING_SIZES, "seed_low", "seed_high", "stream", "counted"])
def _select_kernel(
    column_sq,  # (blocks, V), bf16
    block_weights,  # (blocks,), fp32
    budgets,  # (chunks,), fp32
    errors,  # (chunks, CANDIDATES, segments), fp32
    sums,  # (3, chunks, segments), fp32: columns kept, Σ π, expected squared error
    first_slots,  # (chunks + 1,), int32
    kept,  # (S,), int32
    weights,  # (S,), fp32
    ranks,  # (chunks, V), int32, or None
    n_blocks,
    vocab_size,
    n_segments,
    seed_low,
    seed_high,
    stream,
    counted,
    room,  # S
    BLOCKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Draw a chunk's columns in a segment of the vocabulary: first ``sums`` alone, then, all ``counted``, the columns.

    One kernel does both, since another, compiled apart, might round otherwise and draw others than were counted.

    The sum is convex in ε: its chord between two candidates is not below it, so that where the chord meets the budget
    the sum keeps it, and falls short by little.
    """
    chunk = tl.program_id(0) // n_segments
    segment = tl.program_id(0) % n_segments
    n_chunks = tl.num_programs(0) // n_segments
    segments = tl.arange(0, SEGMENTS)
    exists = segments < n_segments
    candidates = tl.arange(0, CANDIDATES)
    budget = tl.load(budgets + chunk)
    parts = errors + (chunk * CANDIDATES + candidates[:, None]) * n_segments + segments[None, :]
    error = tl.sum(tl.load(parts, mask=exists[None, :], other=0.0), 1)
    # The first candidate fits but for roundings.
    last = tl.maximum(tl.sum((error <= budget).to(tl.int32), 0) - 1, 0)
    below = tl.sum(tl.where(candidates == last, error, 0.0), 0)
    above = tl.sum(tl.where(candidates == last + 1, error, 0.0), 0)
    step = tl.where(above > below, tl.maximum(budget - below, 0.0) / tl.maximum(above - below, 1e-30), 0.0)
    epsilon = 2.0 * tl.sqrt(budget / vocab_size) * tl.exp2(0.5 * last) * (1.0 + 0.4142135 * step)

    columns = segment * SEGMENT + tl.arange(0, SEGMENT)
    inside = columns < vocab_size
    scores = _column_scores(column_sq, block_weights, chunk, columns, n_blocks, vocab_size, BLOCKS)
    # A chunk whose upstream gradient is all zero has a budget, scores and ε of 0 and keeps its targets alone.
    keep = tl.minimum(scores / tl.maximum(epsilon, 1e-30), 1.0)
    # A column's random number depends on nothing but the seed, the stream, the chunk and the column.
    zeros = tl.zeros_like(columns)
    bits, _, _, _ = tl.philox(seed_low, columns, zeros + chunk, zeros + seed_high, zeros + stream)
    drawn = inside & (tl.uint_to_uniform_float(bits) < keep)
    stride = n_chunks * n_segments
    own = sums + chunk * n_segments
    if counted == 0:
        tl.store(own + segment, tl.sum(drawn.to(tl.float32), 0))
        tl.store(own + stride + segment, tl.sum(tl.where(inside, keep, 0.0), 0))
        tl.store(own + 2 * stride + segment, tl.sum(tl.maximum(scores * (epsilon - scores), 0.0), 0))
    else:
        end = tl.where(_lacks_room(first_slots, n_chunks, 0, room), 0, vocab_size)
        written = drawn & (columns < end)
        counts = tl.load(own + segments, mask=exists, other=0.0).to(tl.int32)
        rank = tl.sum(tl.where(segments < segment, counts, 0), 0) + tl.cumsum(drawn.to(tl.int32), 0) - 1
        first = tl.load(first_slots + chunk)
        tl.store(kept + first + rank, columns, mask=written)
        tl.store(weights + first + rank, 1.0 / tl.where(drawn, keep, 1.0), mask=written)
        if ranks is not None:
            tl.store(ranks + tl.cast(chunk, tl.int64) * vocab_size + columns, tl.where(drawn, rank, -1), mask=inside)
        count = tl.sum(counts, 0)
        padding = count + tl.arange(0, TILE)
        missing = padding < tl.where(segment * SEGMENT < min(end, 1), tl.cdiv(count, TILE) * TILE, 0)
        tl.store(kept + first + padding, tl.zeros_like(padding) + vocab_size, mask=missing)
        tl.store(weights + first + padding, tl.zeros(padding.shape, tl.float32), mask=missing)


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=PARTS_OF_CHUNKS)
def _sampled_grad_logits_kernel(
    hidden,  # (n, H): descriptor or pointer
    weight,  # (V, H)
    bias,  # (V,) or None
    columns,  # (S,)
    weights,  # (S,)
    first_slots,  # (chunks + 1,)
    targets,  # (n,)
    token_factors,  # (3, n), fp32
    grad_logits,  # (S, C): transposed, so that a column's gradients lie together
    tile_sums,  # (S / BLOCK_V, C), fp32: each token's sum over a tile's slots
    n_tokens,
    n_chunks,
    first_slot,  # that is the first of columns, weights and grad_logits
    most_tiles,  # of a chunk
    room,  # S
    vocab_size,
    hidden_size,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """∂loss/∂x on a tile of a chunk's slots, divided by π."""
    token_blocks = CHUNK // BLOCK_N
    # Chunks have many columns in common, about equally far along in each, as a chunk's ascend.
    block, tile = in_groups(tl.program_id(0), n_chunks * token_blocks, most_tiles)
    chunk, within = block // token_blocks, block % token_blocks * BLOCK_N
    chunk_slot = tl.load(first_slots + chunk)
    none_left = chunk_slot + tile * BLOCK_V >= tl.load(first_slots + chunk + 1)
    if none_left | _lacks_room(first_slots, n_chunks, first_slot, room):
        return
    first_token = chunk * CHUNK + within
    slot = chunk_slot - first_slot + tile * BLOCK_V
    slots = slot + tl.arange(0, BLOCK_V)
    column = tl.load(columns + slots)
    kept = column < vocab_size
    rows = weight + column.to(tl.int64)[:, None] * hidden_size

    product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for k in tl.range(0, hidden_size, BLOCK_H):
        h = load_tile(hidden, first_token, k, n_tokens, hidden_size, BLOCK_N, BLOCK_H, TMA)
        inner = k + tl.arange(0, BLOCK_H)
        w = tl.load(rows + inner[None, :], mask=kept[:, None] & (inner < hidden_size)[None, :], other=0.0)
        product = tl.dot(h, w.T, product, input_precision=PRECISION)

    tokens = first_token + tl.arange(0, BLOCK_N)
    if bias is not None:
        product += tl.load(bias + column, mask=kept, other=0.0).to(tl.float32)[None, :]
    grad = grad_of_product(product, tokens, column, targets, token_factors, n_tokens, scale, softcap, HAS_SOFTCAP)
    # In padding the logit is 0, whose exponential over a very negative log-sum-exp is infinite.
    grad = tl.where(kept[None, :], grad * tl.load(weights + slots)[None, :], 0.0)
    local = within + tl.arange(0, BLOCK_N)
    tl.store(tile_sums + tl.cast(slot // BLOCK_V, tl.int64) * CHUNK + local, tl.sum(grad, 1))
    out = grad_logits + slots.to(tl.int64)[None, :] * CHUNK + local[:, None]
    tl.store(out, grad.to(grad_logits.dtype.element_ty))


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=PARTS_OF_CHUNKS)
def _sampled_dhidden_kernel(
    grad_logits,  # (S, C)
    weight,  # (V, H)
    columns,  # (S,)
    first_slots,  # (chunks + 1,)
    tile_sums,  # (S / TILE, C), fp32
    center,  # (H,), fp32, or None
    rows,  # (n,) where each token's gradient goes, or None: in order
    dhidden,  # (N, H)
    unit,  # (), fp32, or None: what the gradient is to be multiplied with
    n_tokens,
    n_chunks,
    first_slot,  # that is the first of columns and grad_logits
    room,  # S
    vocab_size,
    hidden_size,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A tile of dhidden = Σ over the chunk's slots of grad_logitsᵀ · W."""
    if _lacks_room(first_slots, n_chunks, first_slot, room):
        return
    token_blocks = CHUNK // BLOCK_N
    hidden_blocks = tl.cdiv(hidden_size, BLOCK_H)
    program = tl.program_id(0)
    chunk = program // (token_blocks * hidden_blocks)
    within = program % token_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    features = program // token_blocks % hidden_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = features < hidden_size

    total = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    start = tl.load(first_slots + chunk) - first_slot
    end = tl.load(first_slots + chunk + 1) - first_slot
    for slot in tl.range(start, end, BLOCK_V):
        slots = slot + tl.arange(0, BLOCK_V)
        column = tl.load(columns + slots).to(tl.int64)
        g = tl.load(grad_logits + slots.to(tl.int64)[:, None] * CHUNK + within[None, :])
        w = tl.load(
            weight + column[:, None] * hidden_size + features[None, :],
            mask=(column < vocab_size)[:, None] & inside[None, :],
            other=0.0,
        )
        total = tl.dot(g.T, w, total, input_precision=PRECISION)

    if center is not None:
        row_sum = tl.zeros((BLOCK_N,), tl.float32)
        for tile in tl.range(start // TILE, end // TILE, 16):
            tiles = tile + tl.arange(0, 16)
            sums = tile_sums + tiles.to(tl.int64)[:, None] * CHUNK + within[None, :]
            row_sum += tl.sum(tl.load(sums, mask=(tiles < end // TILE)[:, None], other=0.0), 0)
        total -= row_sum[:, None] * tl.load(center + features, mask=inside, other=0.0)[None, :]
    if unit is not None:
        total *= tl.load(unit)
    tokens = chunk * CHUNK + within
    scored = tokens < n_tokens
    out = tokens
    if rows is not None:
        out = tl.load(rows + tokens, mask=scored, other=0)
    target = dhidden + out.to(tl.int64)[:, None] * hidden_size + features[None, :]
    tl.store(target, total.to(dhidden.dtype.element_ty), mask=scored[:, None] & inside[None, :])


@triton.jit(do_not_specialize=VARYING_SIZES, do_not_specialize_on_alignment=PARTS_OF_CHUNKS)
def _sampled_dweight_kernel(
    grad_logits,  # (S, C)
    hidden,  # (n, H)
    order,  # (V,), int32: vocabulary entries so sorted that neighbours are kept by the same chunks
    ranks,  # (chunks, V)
    first_slots,  # (chunks + 1,)
    tile_chunks,  # (⌈V / BLOCK_V⌉, chunks), int32: the chunks that keep any of a tile's columns, first
    tile_counts,  # (⌈V / BLOCK_V⌉,), int32: how many they are
    slot_sums,  # (S,), fp32: each slot's sum over its chunk's tokens; where dbias is not None
    dweight,  # (V, H) or None
    dbias,  # (V,) or None
    unit,  # (), fp32, or None
    n_tokens,
    n_chunks,
    first_slot,  # that is the first of grad_logits
    room,  # S
    vocab_size,
    hidden_size,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A tile of dweight = Σ over the chunks that keep its columns of grad_logits · hidden."""
    if _lacks_room(first_slots, n_chunks, first_slot, room):
        return
    hidden_blocks = tl.cdiv(hidden_size, BLOCK_H)
    tile = tl.program_id(0) // hidden_blocks
    entries = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    feature_block = tl.program_id(0) % hidden_blocks
    features = feature_block * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = features < hidden_size
    exists = entries < vocab_size
    ids = tl.load(order + entries, mask=exists, other=0)

    total = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    for active in range(0, tl.load(tile_counts + tile)):
        chunk = tl.load(tile_chunks + tile * n_chunks + active)
        rank = tl.load(ranks + tl.cast(chunk, tl.int64) * vocab_size + ids, mask=exists, other=-1)
        kept = rank >= 0
        slots = (tl.load(first_slots + chunk) - first_slot + rank).to(tl.int64)
        if dbias is not None:
            # Not from g: Triton 3.6 to 3.9 give rows that also go elsewhere one buffer too few for a product on Hopper,
            # and overwrite what it still reads.
            sums += tl.load(slot_sums + slots, mask=kept, other=0.0)
        for k in tl.range(0, CHUNK, BLOCK_N):
            within = k + tl.arange(0, BLOCK_N)
            tokens = chunk * CHUNK + within
            g = tl.load(grad_logits + slots[:, None] * CHUNK + within[None, :], mask=kept[:, None], other=0.0)
            h = tl.load(
                hidden + tokens.to(tl.int64)[:, None] * hidden_size + features[None, :],
                mask=(tokens < n_tokens)[:, None] & inside[None, :],
                other=0.0,
            )
            total = tl.dot(g, h, total, input_precision=PRECISION)

    if unit is not None:
        total *= tl.load(unit)
        sums *= tl.load(unit)
    if dweight is not None:
        target = dweight + ids.to(tl.int64)[:, None] * hidden_size + features[None, :]
        mask = exists[:, None] & inside[None, :]
        if ACCUMULATE:
            total += tl.load(target, mask=mask, other=0.0)
        tl.store(target, total.to(dweight.dtype.element_ty), mask=mask)
    if dbias is not None:
        first = entries < tl.where(feature_block == 0, vocab_size, 0)
        if ACCUMULATE:
            sums += tl.load(dbias + ids, mask=first, other=0.0)
        tl.store(dbias + ids, sums.to(dbias.dtype.element_ty), mask=first)


def frequent_columns(
    targets: Tensor,  # (N,)
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """The vocabulary entries, one in SEED_SHARE, that are targets most often, and how often each entry is, (V,).

    What is no entry counts as the first or the last.
    """
    counts = targets.new_zeros(vocab_size, dtype=torch.int32)
    counts.scatter_(0, targets.clamp(0, vocab_size - 1), 1, reduce="add")
    return counts.argsort(descending=True, stable=True)[: max(1, vocab_size // SEED_SHARE)], counts


def sampled_gradients(
    operands: Operands,
    column_sq: Tensor,  # (blocks, V): Σ_t p_tv² over a block's tokens, infinite for the target of any
    grad: Tensor,  # (n,)
    logprobs: Tensor,  # (n,)
    tolerance: float,
    seed: int,
    gradients: Gradients,
) -> tuple[float, float, int, int]:
    """Draw the columns of each chunk and write the gradients that they give.

    Returns columns_kept, estimated_error, dense_chunks and chunks (GradReport). Where so many columns are needed that
    the exact gradient is as fast, all chunks are dense, and the gradients are still to be computed.

    ∂loss/∂logits stands in memory for as many chunks as the workspace holds. How many these are, the host learns only
    when the draw is over, and the device would wait for it and for all that it has to launch then. So what mostly has
    room enough is launched before. Where it had not, what it may have written is written again, group by group.
    """
    tile, vocab_size = operands.tile, len(operands.weight)
    plan = _plan(operands, column_sq, grad, logprobs, tolerance, seed, gradients.train_head)
    n_chunks = len(plan.first_slots) - 1
    known = _copy_to_host(plan.totals)

    def slots(room: int, most_tiles: int) -> Slots:
        columns, weights = plan.write(plan.first_slots, room)
        return Slots(columns, weights, plan.ranks, plan.first_slots, first=0, most_tiles=most_tiles)

    slot_bytes = operands.chunk * operands.hidden.itemsize
    average_tiles = min(int(MOST_FIRST_SHARE * vocab_size), FIRST_BYTES // (slot_bytes * n_chunks)) // tile
    room = n_chunks * average_tiles * tile
    most_tiles = 2 * average_tiles  # of any chunk; programs without a tile return at once
    ahead = average_tiles > 0 and average_tiles * tile >= LEAST_FIRST_SHARE * vocab_size
    if ahead:
        _write_gradients(operands, slots(room, most_tiles), _workspace(operands, room), gradients)

    total, share, error_sq, *floats = known()
    # Whether to sample at all must not depend on the draw, which then would be one of those with few columns.
    if share > MAX_SHARE * n_chunks * vocab_size:
        return 1.0, 0.0, n_chunks, n_chunks
    bounds = [int(bound) for bound in floats]
    needed = _most_tiles(bounds, tile)
    if not ahead or bounds[-1] > room or needed > most_tiles:
        _write_in_groups(operands, slots(bounds[-1], needed), bounds, gradients)
    return total / (n_chunks * vocab_size), tolerance * error_sq**0.5, 0, n_chunks


def _copy_to_host(values: Tensor) -> Callable[[], list[float]]:
    """Queue the copy; what is returned waits for it, and for nothing that is queued later."""
    if values.device.type == "cpu":
        return values.tolist
    copy = values.to("cpu", non_blocking=True)  # pinned, where torch can
    copied = torch.get_device_module(values.device).Event()
    copied.record()

    def wait() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return wait


def _most_tiles(bounds: list[int], tile: int) -> int:
    return max(end - start for start, end in pairwise(bounds)) // tile


def _plan(
    operands: Operands,
    column_sq: Tensor,  # (blocks, V)
    grad: Tensor,  # (n,)
    logprobs: Tensor,  # (n,)
    tolerance: float,
    seed: int,
    train_head: bool,
) -> Plan:
    """Steer the draw and count it: see the top of this file."""
    (n_blocks, vocab_size), chunk, tile = column_sq.shape, operands.chunk, operands.tile
    n_chunks = cdiv(n_blocks, operands.blocks)

    # A token whose gradient is not finite keeps all columns of its chunk, and spoils no other's.
    grad = grad.where(grad.isfinite(), torch.nan)
    # Only ratios matter, so the largest gradient may be 1, which keeps its square in fp32's range.
    largest = grad.abs().nan_to_num(0.0).amax().clamp_min(1e-30)
    padding = (0, n_chunks * chunk - len(grad))
    grad_sq, miss_sq = (pad(x.square(), padding) for x in (grad / largest, torch.expm1(logprobs)))
    # Within a block the largest upstream gradient stands for all: tokens of one sequence share theirs.
    block_weights = grad_sq.view(n_chunks * operands.blocks, -1).amax(1)
    budgets = (grad_sq * miss_sq).view(n_chunks, chunk).nansum(1) * tolerance**2
    allowed, head_error = budgets.sum(), budgets.new_zeros(())
    if train_head:
        # A draw of its own, so that the other one's probabilities depend on no draw that they weigh.
        trial = _draw(column_sq, block_weights, budgets, seed, 1, tile, ranks=None)
        head_error = _head_error(operands, *trial, largest) / tolerance**2
        budgets = budgets / head_error.nan_to_num(1.0).clamp_min(1.0)
    ranks = torch.empty(n_chunks, vocab_size, dtype=torch.int32, device=grad.device) if train_head else None
    expected, write = _draw(column_sq, block_weights, budgets, seed, 0, tile, ranks)
    first_slots = pad((expected.counts / tile).ceil_().mul_(tile).int().cumsum(0, dtype=torch.int32), (1, 0))
    # More than is allowed by roundings alone, since where head_error was, the budgets were cut by it.
    drawn_error = expected.errors.nansum() / allowed.clamp_min(1e-30)
    error = torch.maximum(drawn_error, head_error.nan_to_num(0.0)).clamp_max(1.0)
    totals = torch.stack([expected.counts.sum(), expected.shares.sum(), error])
    return Plan(write, first_slots, ranks, torch.cat([totals, first_slots]))


def _draw(
    column_sq: Tensor,  # (blocks, V)
    block_weights: Tensor,  # (blocks in whole chunks,)
    budgets: Tensor,  # (chunks,)
    seed: int,
    stream: int,  # draws of one seed in different streams are independent
    tile: int,
    ranks: Tensor | None,  # (chunks, V), to be written with the columns
) -> tuple[Expected, Write]:
    """What the draw keeps, counted, and what writes it where it is told to."""
    (n_blocks, vocab_size), n_chunks = column_sq.shape, len(budgets)
    n_segments = cdiv(vocab_size, SEGMENT)
    sizes = {"BLOCKS": len(block_weights) // n_chunks, "CANDIDATES": CANDIDATES, "SEGMENT": SEGMENT}
    errors = budgets.new_empty(n_chunks, CANDIDATES, n_segments)
    scores = (column_sq, block_weights, budgets, errors)
    grid = (n_chunks * n_segments,)
    _errors_kernel[grid](*scores, n_blocks, vocab_size, n_segments, **sizes)
    sums = budgets.new_empty(3, n_chunks, n_segments)
    low, high = (word - (1 << 32) * (word >> 31) for word in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    sizes |= {"SEGMENTS": next_power_of_2(n_segments), "TILE": tile}

    def select(counted: int, first_slots: Tensor, columns: Tensor, weights: Tensor) -> None:
        _select_kernel[grid](
            *(*scores, sums, first_slots, columns, weights, ranks),
            *(n_blocks, vocab_size, n_segments, low, high, stream, counted, len(columns)),
            **sizes,
        )

    def write(first_slots: Tensor, n_slots: int) -> tuple[Tensor, Tensor]:
        columns = first_slots.new_empty(n_slots)
        weights = sums.new_empty(n_slots)
        select(1, first_slots, columns, weights)
        return columns, weights

    nowhere = torch.empty(n_chunks + 1, dtype=torch.int32, device=sums.device)
    select(0, nowhere, nowhere, sums)
    return Expected(*sums.sum(2)), write


def _head_error(
    operands: Operands,
    expected: Expected,
    write: Write,
    largest: Tensor,  # (), of the upstream gradients, so that squares stay in fp32's range
) -> Tensor:
    """The squared relative error of dweight that such a draw lets expect, (), by a tile of columns of each chunk.

    E‖error‖² = Σ_v (1/π_v − 1) ‖Σ_t G_tv h_t‖², of which Σ_{v kept} (1 − π_v) ‖Σ_t G_tv h_t / π_v‖² is an estimate. Its
    summands are alike for columns that are not certain, as π_v is about in proportion to the norm: some, evenly
    spaced, stand for all. Hidden states share directions, so that it can be many times what it would be if they shared
    none. The gradient itself is taken to have the size that it has if its tokens' parts are not correlated. dbias has
    no estimate.
    """
    hidden, chunk, tile, n_chunks = operands.hidden, operands.chunk, operands.tile, len(expected.counts)

    def spaced(step: int) -> Tensor:
        return torch.arange(0, (n_chunks + 1) * step, step, dtype=torch.int32, device=hidden.device)

    # How many columns were drawn is not known here without a synchronization: room for all.
    room = cdiv(len(operands.weight), tile) * tile
    drawn = [values.view(n_chunks, room) for values in write(spaced(room), n_chunks * room)]
    kept = expected.counts[:, None]
    picked = (kept * ((torch.arange(tile, dtype=torch.float32, device=hidden.device) + 0.5) / tile)).long()
    # Of a chunk that keeps none nothing was written.
    columns, weights = (
        values.gather(1, picked).where(kept > 0, none)
        for values, none in zip(drawn, (len(operands.weight), 1.0), strict=True)
    )
    del drawn
    slots = Slots(columns.flatten(), weights.flatten(), None, spaced(tile), first=0, most_tiles=1)
    grad_logits, tile_sums = hidden.new_empty(n_chunks * tile, chunk), weights.new_empty(n_chunks, chunk)
    _grad_logits(operands, slots, grad_logits, tile_sums)

    generator = torch.Generator(hidden.device).manual_seed(0)
    shape = (hidden.shape[1], SKETCH)
    sketch = torch.randn(shape, generator=generator, dtype=torch.float32, device=hidden.device) / SKETCH**0.5
    states = (hidden @ sketch.to(hidden.dtype)).float()
    rows = torch.bmm(
        grad_logits.view(n_chunks, tile, chunk).float() / largest,
        pad(states, (0, 0, 0, n_chunks * chunk - len(states))).view(n_chunks, chunk, SKETCH),
    )
    error = (rows.square().sum(2) * (1 - 1 / weights)).sum(1) @ (expected.counts / tile)
    size = (operands.token_factors[2] / largest * torch.linalg.vector_norm(states, dim=1)).square().nansum()
    return error / size.clamp_min(1e-30)


def _grad_logits(
    operands: Operands,
    slots: Slots,
    out: Tensor,  # (S, C)
    tile_sums: Tensor,  # (tiles, C), fp32
) -> None:
    """Write ∂loss/∂logits / π for the slots of all chunks."""
    hidden, n_chunks = operands.hidden, len(slots.first_slots) - 1
    n_tokens, hidden_size = hidden.shape
    scale, softcap = operands.transform
    config = configs.lookup("sampled_grad_logits", configs.architecture(hidden.device), hidden.dtype, hidden_size)
    tma = tma_available(hidden)
    _sampled_grad_logits_kernel[(n_chunks * slots.most_tiles * (operands.chunk // config.block_n),)](
        operand(hidden, [config.block_n, config.block_h], tma),
        operands.weight,
        operands.bias,
        slots.columns,
        slots.weights,
        slots.first_slots,
        operands.targets,
        operands.token_factors,
        out,
        tile_sums,
        n_tokens,
        n_chunks,
        slots.first,
        slots.most_tiles,
        len(out),
        len(operands.weight),
        hidden_size,
        scale,
        softcap or 0.0,
        HAS_SOFTCAP=softcap is not None,
        TMA=tma,
        PRECISION=dot_precision(),
        CHUNK=operands.chunk,
        **config.launch,
    )


def _workspace(operands: Operands, n_slots: int) -> tuple[Tensor, Tensor]:
    """Room for ∂loss/∂logits, (S, C), and for each token's sums over tiles, (tiles, C), fp32."""
    new_empty, chunk = operands.hidden.new_empty, operands.chunk
    return new_empty(n_slots, chunk), new_empty(n_slots // operands.tile, chunk, dtype=torch.float32)


def _write_in_groups(operands: Operands, slots: Slots, bounds: list[int], gradients: Gradients) -> None:
    """The gradients of as many chunks at a time as the workspace holds.

    Where that is not all of them, dweight and dbias accumulate in fp32 beside the results.
    """
    chunk, weight = operands.chunk, operands.weight
    results = gradients.dweight, gradients.dbias
    # Several groups would accumulate dweight in fp32: a workspace of that size costs no more and saves the passes.
    budget = WORKSPACE_BYTES if results[0] is None else max(WORKSPACE_BYTES, 4 * weight.numel())
    groups = chunk_groups(bounds, budget // (chunk * operands.hidden.itemsize))
    accumulate = len(groups) > 1
    if accumulate:
        dweight, dbias = (None if g is None else torch.zeros_like(g, dtype=torch.float32) for g in results)
        gradients = gradients._replace(dweight=dweight, dbias=dbias)
    workspace = _workspace(operands, max(bounds[chunks.stop] - bounds[chunks.start] for chunks in groups))
    for chunks in groups:
        tokens = slice(chunks.start * chunk, chunks.stop * chunk)
        own = bounds[chunks.start : chunks.stop + 1]
        _write_gradients(
            operands.of(tokens),
            Slots(
                columns=slots.columns[own[0] : own[-1]],
                weights=slots.weights[own[0] : own[-1]],
                ranks=None if slots.ranks is None else slots.ranks[chunks],
                first_slots=slots.first_slots[chunks.start : chunks.stop + 1],
                first=own[0],
                most_tiles=_most_tiles(own, operands.tile),
            ),
            workspace,
            gradients.of(tokens),
            accumulate,
        )
    if accumulate:
        for result, total in zip(results, (gradients.dweight, gradients.dbias), strict=True):
            if result is not None and total is not None:
                result.copy_(total)


def _write_gradients(
    operands: Operands,
    slots: Slots,
    workspace: tuple[Tensor, Tensor],
    gradients: Gradients,
    accumulate: bool = False,
) -> None:
    """Write dhidden of these chunks, and dweight and dbias, or add to them. Nothing where the workspace has no room."""
    hidden, weight, chunk = operands.hidden, operands.weight, operands.chunk
    (vocab_size, hidden_size), n_chunks = weight.shape, len(slots.first_slots) - 1
    grad_logits, tile_sums = workspace
    _grad_logits(operands, slots, grad_logits, tile_sums)
    arch = configs.architecture(hidden.device)
    sizes = (len(hidden), n_chunks, slots.first, len(grad_logits), vocab_size, hidden_size)
    constants = {"PRECISION": dot_precision(), "CHUNK": chunk}
    if gradients.dhidden is not None:
        config = configs.lookup("sampled_dhidden", arch, hidden.dtype, hidden_size)
        n_blocks = n_chunks * (chunk // config.block_n)
        _sampled_dhidden_kernel[(n_blocks * cdiv(hidden_size, config.block_h),)](
            grad_logits,
            weight,
            slots.columns,
            slots.first_slots,
            tile_sums,
            gradients.center,
            gradients.rows,
            gradients.dhidden,
            gradients.unit,
            *sizes,
            TILE=operands.tile,
            **constants,
            **config.launch,
        )
    if slots.ranks is not None:
        config = configs.lookup("sampled_dweight", arch, hidden.dtype, hidden_size)
        order, tile_chunks, tile_counts = order_by_chunks(slots.ranks, config.block_v)
        _sampled_dweight_kernel[(cdiv(vocab_size, config.block_v) * cdiv(hidden_size, config.block_h),)](
            grad_logits,
            hidden,
            order,
            slots.ranks,
            slots.first_slots,
            tile_chunks,
            tile_counts,
            None if gradients.dbias is None else grad_logits.sum(1, dtype=torch.float32),
            gradients.dweight,
            gradients.dbias,
            gradients.unit,
            *sizes,
            ACCUMULATE=accumulate,
            **constants,
            **config.launch,
        )


def chunk_groups(bounds: list[int], limit: int) -> list[slice]:
    """Chunks in order, as many at a time as have ``limit`` slots."""
    groups, start = [], 0
    for end in range(1, len(bounds)):
        if end == len(bounds) - 1 or bounds[end + 1] - bounds[start] > limit:
            groups.append(slice(start, end))
            start = end
    return groups


def order_by_chunks(
    ranks: Tensor,  # (chunks, V)
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Vocabulary entries sorted by the set of chunks that keep them (V,), and for each ``tile`` of them the chunks that
    keep any, first in (tiles, chunks), and their number (tiles,); all int32.

    A tile of dweight visits these chunks; sorted, most tiles of rare columns visit one.
    """
    n_chunks, vocab_size = ranks.shape
    kept = ranks >= 0
    keys = torch.zeros(vocab_size, dtype=torch.int64, device=ranks.device)
    for first, some in zip(range(0, n_chunks, 16), kept.split(16), strict=True):  # as int64 all would be large
        bits = torch.arange(first, first + len(some), device=ranks.device) % 62
        keys += some.long().bitwise_left_shift_(bits[:, None]).sum(0)
    order = keys.argsort(stable=True)
    sorted_kept = pad(kept[:, order], (0, -vocab_size % tile))
    active = sorted_kept.view(n_chunks, -1, tile).any(2).T.contiguous()
    tile_chunks = active.int().sort(dim=1, descending=True, stable=True).indices
    return order.int(), tile_chunks.int(), active.sum(1, dtype=torch.int32)


def aot_signatures(arch: str) -> Iterator[Specialization]:
    """Each kernel in each configuration that ``arch`` ("sm_90", "gfx942", …) runs."""
    tma = has_tma(arch)
    for bits, dtype in (("16", "bf16"), ("32", "fp32")):
        (_, forward_config), *_ = configs.entries("forward", arch, bits)
        matrices = dict.fromkeys(("weight", "hidden", "grad_logits", "dhidden", "dweight", "dbias"), f"*{dtype}")
        vectors = {
            **dict.fromkeys(("columns", "first_slots", "order", "ranks", "tile_chunks", "tile_counts"), "*i32"),
            **dict.fromkeys(("weights", "token_factors", "center", "tile_sums", "slot_sums"), "*fp32"),
            **dict.fromkeys(("targets", "rows"), "*i64"),
        }
        frozen, trained = ({"CHUNK": blocks * forward_config.block_n} for blocks in BLOCKS_PER_CHUNK)
        grad_logits = (_sampled_grad_logits_kernel, "sampled_grad_logits", {"HAS_SOFTCAP": False, "TMA": tma})
        tile = configs.entries("sampled_grad_logits", arch, bits)[0][1].block_v
        dhidden = (_sampled_dhidden_kernel, "sampled_dhidden", {"TILE": tile, "unit": None})
        dweight = (_sampled_dweight_kernel, "sampled_dweight", {"ACCUMULATE": False, "unit": None})
        for (kernel, name, constexprs), variant, constants in (
            (grad_logits, "", {**frozen, "bias": None}),
            (grad_logits, "_trained", {**trained, "bias": None}),
            (dhidden, "", frozen),
            (dhidden, "_trained", trained),
            (dweight, "", {**trained, "slot_sums": None, "dbias": None}),
            (dweight, "_bias", trained),
        ):
            for max_hidden, config in configs.entries(name, arch, bits):
                types = {**matrices, **vectors}
                if name == "sampled_grad_logits":
                    types["hidden"] = operand_type(dtype, config.block_n, config.block_h, tma)
                yield specialize(
                    f"{name}{variant}_{dtype}_h{max_hidden or 'any'}",
                    kernel,
                    config,
                    types,
                    {"PRECISION": "ieee", **constexprs, **constants},
                )
    floats = dict.fromkeys(("block_weights", "budgets", "errors", "sums", "weights"), "*fp32")
    types = {"column_sq": "*bf16", **floats, **dict.fromkeys(("first_slots", "kept", "ranks"), "*i32")}
    sizes = {"BLOCKS": BLOCKS_PER_CHUNK[1], "CANDIDATES": CANDIDATES, "SEGMENT": SEGMENT}
    yield specialize("sampling_errors", _errors_kernel, SMALL, types, sizes)
    sizes |= {"SEGMENTS": 64, "TILE": 256}
    yield specialize("select_columns", _select_kernel, SMALL, types, sizes)
