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
"""

# Arguments of kernels have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
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
    dot_precision,
    grad_of_product,
    has_tma,
    load_tile,
    operand,
    operand_type,
    specialize,
    tma_available,
)

BLOCKS_PER_CHUNK = 4  # of the forward's token blocks: wider chunks need more columns, narrower ones more traffic
WORKSPACE_BYTES = 256 << 20  # of ∂loss/∂logits on the kept columns; more where that saves an fp32 copy of dweight
MAX_SHARE = 0.25  # of the vocabulary, on average: over it the exact gradient is as fast
SEED_SHARE = 32  # one in so many columns, the most frequent targets, gives the first bound of the log-sum-exp
EPSILON_STEPS = 12


class Slots(NamedTuple):
    """The columns each chunk keeps."""

    columns: Tensor  # (S,), int32; V in padding
    weights: Tensor  # (S,), fp32, 1/π; 0 in padding
    tile_chunks: Tensor  # (S / BLOCK_V,), int32: the chunk a tile of slots belongs to
    first_slots: Tensor  # (chunks + 1,), int32
    bounds: list[int]  # the same
    positions: Tensor  # (chunks, V), int32: the slot of a column, or −1
    targets: Tensor  # (n,), int32: the slot of each token's target, or −1 where that does not exist


@triton.jit(do_not_specialize=VARYING_SIZES)
def _epsilon_kernel(
    scores,  # (chunks, V), fp32: s_v
    budgets,  # (chunks,), fp32
    epsilons,  # (chunks,), fp32
    errors,  # (chunks,), fp32: the sum for that ε
    vocab_size,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest ε, within 2⁻¹² of its bracket's octaves, with Σ_v max(0, s_v (ε − s_v)) ≤ budget.

    Bracket: a summand is at most ε²/4, so 2 √(budget / V) is not too large; summing s_v (ε − s_v) without the maximum
    gives too little, so (budget + Σ s²) / Σ s is not too small.
    """
    chunk = tl.program_id(0)
    row = scores + tl.cast(chunk, tl.int64) * vocab_size
    budget = tl.load(budgets + chunk)
    sums = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        score = tl.load(row + columns, mask=columns < vocab_size, other=0.0)
        sums += score
        squares += score * score
    low = 2.0 * tl.sqrt(budget / vocab_size)
    high = tl.maximum(low, (budget + tl.sum(squares, 0)) / tl.maximum(tl.sum(sums, 0), 1e-30))
    error = budget
    for _ in range(STEPS):
        epsilon = tl.sqrt(low) * tl.sqrt(high)
        summands = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            score = tl.load(row + columns, mask=columns < vocab_size, other=0.0)
            summands += tl.maximum(score * (epsilon - score), 0.0)
        found = tl.sum(summands, 0)
        fits = found <= budget
        error = tl.where(fits, found, error)
        low = tl.where(fits, epsilon, low)
        high = tl.where(fits, high, epsilon)
    tl.store(epsilons + chunk, low)
    tl.store(errors + chunk, error)


@triton.jit(do_not_specialize=VARYING_SIZES)
def _sampled_grad_logits_kernel(
    hidden,  # (n, H): descriptor or pointer
    weight,  # (V, H)
    bias,  # (V,) or None
    columns,  # (S,)
    weights,  # (S,)
    tile_chunks,  # (S / BLOCK_V,)
    target_slots,  # (n,)
    token_factors,  # (3, n), fp32
    grad_logits,  # (S, C): transposed, so that a column's gradients lie together
    tile_sums,  # (S / BLOCK_V, C), fp32: each token's sum over a tile's slots
    n_tokens,
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
    tile = tl.program_id(0) // (CHUNK // BLOCK_N)
    within = tl.program_id(0) % (CHUNK // BLOCK_N) * BLOCK_N
    first_token = tl.load(tile_chunks + tile) * CHUNK + within
    slots = tile * BLOCK_V + tl.arange(0, BLOCK_V)
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
    grad = grad_of_product(product, tokens, slots, target_slots, token_factors, n_tokens, scale, softcap, HAS_SOFTCAP)
    # In padding the logit is 0, whose exponential over a very negative log-sum-exp is infinite.
    grad = tl.where(kept[None, :], grad * tl.load(weights + slots)[None, :], 0.0)
    local = within + tl.arange(0, BLOCK_N)
    tl.store(tile_sums + tl.cast(tile, tl.int64) * CHUNK + local, tl.sum(grad, 1))
    tl.store(grad_logits + slots.to(tl.int64)[None, :] * CHUNK + local[:, None], grad.to(grad_logits.dtype.element_ty))


@triton.jit(do_not_specialize=VARYING_SIZES)
def _sampled_dhidden_kernel(
    grad_logits,  # (S, C)
    weight,  # (V, H)
    columns,  # (S,)
    first_slots,  # (chunks + 1,)
    tile_sums,  # (S / TILE, C), fp32
    center,  # (H,), fp32, or None
    rows,  # (n,) where each token's gradient goes, or None: in order
    dhidden,  # (N, H)
    unit,  # (1,), fp32, or None: what the gradient is to be multiplied with
    n_tokens,
    vocab_size,
    hidden_size,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A tile of dhidden = Σ over the chunk's slots of grad_logitsᵀ · W."""
    token_blocks = CHUNK // BLOCK_N
    hidden_blocks = tl.cdiv(hidden_size, BLOCK_H)
    program = tl.program_id(0)
    chunk = program // (token_blocks * hidden_blocks)
    within = program % token_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    features = program // token_blocks % hidden_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = features < hidden_size

    total = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    first_slot = tl.load(first_slots + chunk)
    last_slot = tl.load(first_slots + chunk + 1)
    for slot in tl.range(first_slot, last_slot, BLOCK_S):
        slots = slot + tl.arange(0, BLOCK_S)
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
        for tile in tl.range(first_slot // TILE, last_slot // TILE):
            row_sum += tl.load(tile_sums + tl.cast(tile, tl.int64) * CHUNK + within)
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


@triton.jit(do_not_specialize=[*VARYING_SIZES, "n_chunks"])
def _sampled_dweight_kernel(
    grad_logits,  # (S, C)
    hidden,  # (n, H)
    order,  # (V,), int32: vocabulary entries so sorted that neighbours are kept by the same chunks
    positions,  # (chunks, V)
    tile_chunks,  # (⌈V / BLOCK_V⌉, chunks), int32: the chunks that keep any of a tile's columns, first
    tile_counts,  # (⌈V / BLOCK_V⌉,), int32: how many they are
    dweight,  # (V, H) or None
    dbias,  # (V,) or None
    unit,  # (1,), fp32, or None
    n_tokens,
    n_chunks,
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
        slots = tl.load(positions + tl.cast(chunk, tl.int64) * vocab_size + ids, mask=exists, other=-1).to(tl.int64)
        for k in tl.range(0, CHUNK, BLOCK_N):
            within = k + tl.arange(0, BLOCK_N)
            tokens = chunk * CHUNK + within
            g = tl.load(grad_logits + slots[:, None] * CHUNK + within[None, :], mask=(slots >= 0)[:, None], other=0.0)
            h = tl.load(
                hidden + tokens.to(tl.int64)[:, None] * hidden_size + features[None, :],
                mask=(tokens < n_tokens)[:, None] & inside[None, :],
                other=0.0,
            )
            total = tl.dot(g, h, total, input_precision=PRECISION)
            if dbias is not None:
                sums += tl.sum(g.to(tl.float32), 1)

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
    targets: Tensor,  # (n,)
    vocab_size: int,
) -> Tensor:
    """The vocabulary entries, one in SEED_SHARE, that are targets most often."""
    counts = targets.new_zeros(vocab_size, dtype=torch.int32)
    counts.scatter_add_(0, targets.long().clamp(0, vocab_size - 1), torch.ones_like(targets, dtype=torch.int32))
    return counts.argsort(descending=True, stable=True)[: max(1, vocab_size // SEED_SHARE)]


def draw_slots(
    column_sq: Tensor,  # (blocks, V): Σ_t p_tv² over a block's tokens
    targets: Tensor,  # (n,)
    grad: Tensor,  # (n,)
    logprobs: Tensor,  # (n,)
    tolerance: float,
    seed: int,
    tile: int,
    block_tokens: int,
) -> tuple[Slots | None, Tensor]:
    """Draw the columns of each chunk, none where so many are needed that the exact gradient is as fast.

    Beside them columns_kept, estimated_error, dense_chunks and chunks (GradReport), (4,) float64 on the CPU. ``tile``
    slots of a chunk make a tile; a block of ``column_sq`` holds ``block_tokens`` tokens. A target that does not exist,
    whose log-prob is NaN, spoils no other token's gradient.
    """
    n_blocks, vocab_size = column_sq.shape
    n_chunks = triton.cdiv(n_blocks, BLOCKS_PER_CHUNK)
    chunk = BLOCKS_PER_CHUNK * block_tokens
    device = column_sq.device
    exists = (targets >= 0) & (targets < vocab_size)
    targets = targets.where(exists, 0)

    def by_chunk(values: Tensor) -> Tensor:  # (n,) → (chunks, C)
        return pad(values, (0, n_chunks * chunk - len(values))).view(n_chunks, chunk)

    # Only ratios matter, so the largest gradient may be 1, which keeps its square in fp32's range.
    grad_sq = by_chunk((grad / grad.abs().amax().clamp_min(1e-30)).square())
    # Within a block the largest upstream gradient stands for all: tokens of one sequence share theirs.
    block_weights = grad_sq.view(-1, block_tokens).amax(1)[:n_blocks, None]
    weighted = pad(column_sq * block_weights, (0, 0, 0, n_chunks * BLOCKS_PER_CHUNK - n_blocks))
    scores = weighted.view(n_chunks, BLOCKS_PER_CHUNK, vocab_size).sum(1).sqrt_()
    budgets = tolerance**2 * (grad_sq * by_chunk(torch.expm1(logprobs)).square()).nansum(1)
    epsilons, errors = torch.empty_like(budgets), torch.empty_like(budgets)
    block = 8192 if device.type == "cuda" else 1024
    _epsilon_kernel[(n_chunks,)](scores, budgets, epsilons, errors, vocab_size, STEPS=EPSILON_STEPS, BLOCK=block)
    estimate = tolerance * (errors.sum() / budgets.sum().clamp_min(1e-30)).sqrt()

    chunk_of_token = torch.arange(len(targets), device=device) // chunk
    uniform = torch.rand(scores.shape, device=device, generator=torch.Generator(device).manual_seed(seed))
    # A chunk whose upstream gradient is all zero has scores and ε of 0 and keeps its targets alone.
    keep = (scores / epsilons.clamp_min(1e-30)[:, None]).clamp_(max=1.0).flatten()
    keep.index_fill_(0, chunk_of_token * vocab_size + targets, 1.0)
    drawn = uniform.flatten() < keep
    order = drawn.cumsum(0, dtype=torch.int32)  # of the drawn columns, from 1 on
    # Whether to sample at all must not depend on the draw, which then would be one of those with few columns.
    share = keep.mean()
    last = order.view(n_chunks, vocab_size)[:, -1]
    starts, counts = pad(last, (1, -1)), last.diff(prepend=last.new_zeros(1))
    first_slots = pad(((counts + tile - 1) // tile * tile).cumsum(0), (1, 0))
    # The one synchronization: the slots' bounds, which launches and buffers need, beside the bits of two numbers.
    floats = torch.stack([share, estimate]).view(torch.int32)
    numbers = torch.cat([floats, last[-1:], first_slots]).tolist()
    bits = torch.tensor(numbers[:2], dtype=torch.int32, device="cpu")
    expected_share, estimated_error = bits.view(torch.float32).tolist()
    total, *bounds = numbers[2:]
    if expected_share > MAX_SHARE:
        return None, torch.tensor([1, 0, n_chunks, n_chunks], dtype=torch.float64, device="cpu")
    report = torch.tensor([total / len(keep), estimated_error, 0, n_chunks], dtype=torch.float64, device="cpu")
    slots = torch.arange(bounds[-1], device=device)
    chunks = torch.searchsorted(first_slots[1:], slots, right=True)
    rank = slots - first_slots[chunks]
    taken = rank < counts[chunks]
    index = torch.searchsorted(order, (starts[chunks] + rank + 1).int()).where(taken, 0)
    positions = order.view(n_chunks, vocab_size) + (first_slots[:-1] - starts - 1).int()[:, None]
    positions.masked_fill_(~drawn.view(n_chunks, vocab_size), -1)
    return Slots(
        (index % vocab_size).where(taken, vocab_size).int(),
        (1 / keep[index]).where(taken, 0.0),
        chunks[::tile].int(),
        first_slots.int(),
        bounds,
        positions,
        positions[chunk_of_token, targets].where(exists, -1),
    ), report


def sampled_gradients(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    token_factors: Tensor,  # (3, n)
    transform: tuple[float, float | None],
    slots: Slots,
    chunk: int,
    center: Tensor | None,  # (H,)
    unit: Tensor | None,  # (1,)
    rows: Tensor | None,  # (n,)
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Write dhidden (N, H) at ``rows``, dweight (V, H) and dbias (V,), each where it is not None.

    ∂loss/∂logits stands in memory for as many chunks as the workspace holds. Where that is not all of them, dweight and
    dbias accumulate in fp32 beside the results.
    """
    device, dtype, vocab_size = hidden.device, hidden.dtype, weight.shape[0]
    hidden_size = hidden.shape[1]
    scale, softcap = transform
    dhidden, *results = gradients
    arch = configs.architecture(device)
    logits_config, dhidden_config, dweight_config = (
        configs.lookup(name, arch, dtype, hidden_size)
        for name in ("sampled_grad_logits", "sampled_dhidden", "sampled_dweight")
    )
    tma = tma_available(hidden)
    precision = dot_precision()
    # Several groups would accumulate dweight in fp32: a workspace of that size costs no more and saves the passes.
    budget = WORKSPACE_BYTES if results[0] is None else max(WORKSPACE_BYTES, 4 * weight.numel())
    groups = chunk_groups(slots, budget // (chunk * dtype.itemsize))
    accumulate = len(groups) > 1
    dweight, dbias = (torch.zeros_like(g, dtype=torch.float32) if accumulate and g is not None else g for g in results)
    n_most = max(last - first for _, _, first, last in groups)
    workspace = hidden.new_empty(n_most, chunk)
    tile_sums = hidden.new_empty(n_most // logits_config.block_v, chunk, dtype=torch.float32)
    for first_chunk, last_chunk, first_slot, last_slot in groups:
        tokens = slice(first_chunk * chunk, min(last_chunk * chunk, len(hidden)))
        h, n_tokens = hidden[tokens], tokens.stop - tokens.start
        columns = slots.columns[first_slot:last_slot]
        config = logits_config
        tiles = slice(first_slot // config.block_v, last_slot // config.block_v)
        _sampled_grad_logits_kernel[((tiles.stop - tiles.start) * (chunk // config.block_n),)](
            operand(h, [config.block_n, config.block_h], tma),
            weight,
            bias,
            columns,
            slots.weights[first_slot:last_slot],
            slots.tile_chunks[tiles] - first_chunk,
            slots.targets[tokens] - first_slot,
            token_factors[:, tokens].contiguous(),
            workspace,
            tile_sums,
            n_tokens,
            vocab_size,
            hidden_size,
            scale,
            softcap or 0.0,
            HAS_SOFTCAP=softcap is not None,
            TMA=tma,
            PRECISION=precision,
            CHUNK=chunk,
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            BLOCK_H=config.block_h,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if dhidden is not None:
            config = dhidden_config
            n_blocks = (last_chunk - first_chunk) * (chunk // config.block_n)
            _sampled_dhidden_kernel[(n_blocks * triton.cdiv(hidden_size, config.block_h),)](
                workspace,
                weight,
                columns,
                slots.first_slots[first_chunk : last_chunk + 1] - first_slot,
                tile_sums,
                center if softcap is None else None,
                None if rows is None else rows[tokens],
                dhidden if rows is not None else dhidden[tokens],
                unit,
                n_tokens,
                vocab_size,
                hidden_size,
                PRECISION=precision,
                CHUNK=chunk,
                TILE=logits_config.block_v,
                BLOCK_N=config.block_n,
                BLOCK_S=config.block_v,
                BLOCK_H=config.block_h,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
        if dweight is not None or dbias is not None:
            config = dweight_config
            positions = slots.positions[first_chunk:last_chunk] - first_slot
            order, tile_chunks, tile_counts = order_by_chunks(positions, config.block_v)
            _sampled_dweight_kernel[
                (triton.cdiv(vocab_size, config.block_v) * triton.cdiv(hidden_size, config.block_h),)
            ](
                workspace,
                h,
                order,
                positions,
                tile_chunks,
                tile_counts,
                dweight,
                dbias,
                unit,
                n_tokens,
                last_chunk - first_chunk,
                vocab_size,
                hidden_size,
                ACCUMULATE=accumulate,
                PRECISION=precision,
                CHUNK=chunk,
                BLOCK_V=config.block_v,
                BLOCK_N=config.block_n,
                BLOCK_H=config.block_h,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
    if accumulate:
        for result, total in zip(results, (dweight, dbias), strict=True):
            if result is not None and total is not None:
                result.copy_(total)


def chunk_groups(slots: Slots, limit: int) -> list[tuple[int, int, int, int]]:
    """(first chunk, last, first slot, last) of chunks in order, as many at a time as have ``limit`` slots."""
    bounds = slots.bounds
    groups, start = [], 0
    for end in range(1, len(bounds)):
        if end == len(bounds) - 1 or bounds[end + 1] - bounds[start] > limit:
            groups.append((start, end, bounds[start], bounds[end]))
            start = end
    return groups


def order_by_chunks(
    positions: Tensor,  # (chunks, V)
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Vocabulary entries sorted by the set of chunks that keep them (V,), and for each ``tile`` of them the chunks that
    keep any, first in (tiles, chunks), and their number (tiles,); all int32.

    A tile of dweight visits these chunks; sorted, most tiles of rare columns visit one.
    """
    n_chunks, vocab_size = positions.shape
    kept = positions >= 0
    bits = torch.arange(n_chunks, device=positions.device) % 62
    order = (kept.long() << bits[:, None]).sum(0).argsort(stable=True)
    sorted_kept = pad(kept[:, order], (0, -vocab_size % tile))
    active = sorted_kept.view(n_chunks, -1, tile).any(2).T.contiguous()
    tile_chunks = active.int().sort(dim=1, descending=True, stable=True).indices
    return order.int(), tile_chunks.int(), active.sum(1, dtype=torch.int32)


def aot_signatures(arch: str) -> Iterator[Specialization]:
    """Each kernel in each configuration that ``arch`` ("sm_90", "gfx942", …) runs."""
    tma = has_tma(arch)
    for bits, dtype in (("16", "bf16"), ("32", "fp32")):
        (_, forward_config), *_ = configs.entries("forward", arch, bits)
        shared = {"PRECISION": "ieee", "CHUNK": BLOCKS_PER_CHUNK * forward_config.block_n}
        matrices = dict.fromkeys(("weight", "hidden", "grad_logits", "dhidden", "dweight"), f"*{dtype}")
        vectors = {
            **dict.fromkeys(
                ("columns", "tile_chunks", "first_slots", "order", "positions", "target_slots", "tile_counts"), "*i32"
            ),
            **dict.fromkeys(("weights", "token_factors", "center", "tile_sums"), "*fp32"),
            "rows": "*i64",
        }
        absent = dict.fromkeys(("bias", "dbias", "unit"))
        for kernel, name, constexprs in (
            (_sampled_grad_logits_kernel, "sampled_grad_logits", {"HAS_SOFTCAP": False, "TMA": tma}),
            (_sampled_dhidden_kernel, "sampled_dhidden", {}),
            (_sampled_dweight_kernel, "sampled_dweight", {"ACCUMULATE": False}),
        ):
            for max_hidden, config in configs.entries(name, arch, bits):
                types = {**matrices, **vectors}
                constants = {**shared, **constexprs, **{a: None for a in absent if a in kernel.arg_names}}
                if name == "sampled_grad_logits":
                    types["hidden"] = operand_type(dtype, config.block_n, config.block_h, tma)
                if name == "sampled_dhidden":
                    constants |= {
                        "BLOCK_S": config.block_v,
                        "TILE": configs.entries("sampled_grad_logits", arch, bits)[0][1].block_v,
                    }
                yield specialize(f"{name}_{dtype}_h{max_hidden or 'any'}", kernel, config, types, constants)
    floats = dict.fromkeys(("scores", "budgets", "epsilons", "errors"), "*fp32")
    yield specialize("epsilon", _epsilon_kernel, SMALL, floats, {"STEPS": EPSILON_STEPS, "BLOCK": 8192})
