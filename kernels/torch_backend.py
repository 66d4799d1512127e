"""Token statistics and their gradients in plain torch, tile by tile: CPUs and any other device.

Letters: N tokens, H hidden size, V vocabulary, C tokens in a chunk, T vocabulary entries in a tile, S columns drawn.
A chunk's logits exist one (T, C) tile at a time, small enough to stay in a core's cache while every pass over it runs.
Logits are formed, and gradients accumulated, in fp32 (fp64 for fp64 inputs) whatever the inputs' dtype: a bf16 logit of
20 is wrong by 0.06 before any statistic.

With e_v = exp(z_v − shift), the sum ρ = Σ_{v≠y} e_v leaves the target out. Then log p_y = −log1p(ρ / e_y) and
1 − p_y = ρ / (ρ + e_y) keep all their digits as p_y → 1, where 1 − exp(log p_y) has none, and log p_y ≤ 0 always.
The shift is the target's logit: a fixed one saves the pass for the maximum and all rescaling, and only has to be within
exp's range of the largest logit.

On a CPU, chunks of the forward and ranges of dweight's rows are computed side by side, each by a thread of its own: a
tile then never leaves its core, and no operation on it waits for the other cores.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import Options, Report
from .sparse_grad import (
    SKETCH,
    TINY,
    Estimate,
    Sample,
    Selection,
    Steering,
    coefficients,
    coherent_variance,
    failing_tokens,
    make_estimate,
    make_sample,
    sampling_variance,
    select_columns,
    token_weights,
)

TILE_ELEMENTS = {"cpu": 1 << 19}  # of one (T, C) tile: 2 MiB of fp32
OTHER_TILE_ELEMENTS = 1 << 24  # where a launch costs more than leaving the cache
MAX_WORKERS = 8  # chunks side by side; beyond it Python itself is the limit, and each gets several of torch's threads
EXACT_CHUNK = 512  # tokens
SAMPLED_CHUNK = 512  # tokens of one walk over the vocabulary, at most
SAMPLED_GROUP = 128  # tokens that share columns: fewer need fewer columns, more need fewer gathers
FIRST_CHUNK = 64  # tokens: what it teaches about ε should not cost much
PROBS_BYTES = 512 << 20  # of exact probabilities kept for the backward; beyond it they are recomputed
SAMPLE_BYTES = 24 << 20  # of sampled coefficients kept for the backward; beyond it they are recomputed
GATHER_ROWS = 2048  # of the weight, gathered at a time
TAILS = 16  # upcast at a time
TAIL_ROWS = 4096  # of dweight, filled with the sampled chunks' tails at a time
UPCAST_ROWS = 4096  # of a 16-bit weight at a time
HALF_TOLERANCE = 2.0**-9  # from here on what is kept for the backward has 16 bits: of rounding that averages out
HELD_SHARE = 1 / 16  # of the vocabulary whose selection waits for the whole sums
MAX_KEPT = 0.6  # share of the columns from which on a chunk is computed exactly

Item = TypeVar("Item")
Result = TypeVar("Result")


def linear_logprob(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    transform: tuple[float, float | None],
    stats: tuple[str, ...],
    options: Options,
) -> tuple[dict[str, Tensor], Report | None]:
    """See kernels/dispatch.py for the contract."""
    *outputs, report = _linear_logprob(
        hidden, weight, bias, targets, transform, stats, options, torch.is_grad_enabled()
    )
    return dict(zip(("logprobs", *stats), outputs, strict=True)), report


@torch.compiler.disable
def _linear_logprob(*operands: Any) -> tuple[Any, ...]:
    return _LinearLogprob.apply(*operands)


def _workers(device: torch.device) -> int:
    """How many chunks are computed side by side."""
    if device.type != "cpu" or not torch.backends.openmp.is_available():
        return 1  # with another threading library a number of threads is not a thread's own
    return min(torch.get_num_threads(), MAX_WORKERS)


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """A forked process has none of its parent's threads, and needs a pool of its own."""
    return ThreadPoolExecutor(MAX_WORKERS, "prefopt_fast")


def _side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """[function(item) for item in items], of at most _workers() items, each in a thread of its own."""
    if len(items) == 1:
        return [function(items[0])]
    threads = torch.get_num_threads()
    # A thread of the pool may hold `work` for a moment after its result, and autograd copies a gradient that others
    # hold: nothing that `work` refers to outlives the call.
    held = [function]

    def work(item: Item) -> Result:
        torch.set_num_threads(max(1, threads // len(items)))
        with torch.no_grad():
            return held[0](item)

    try:
        return list(_pool(os.getpid()).map(work, items))
    finally:
        torch.set_num_threads(threads)  # a thread starts with the number that any thread set last
        held.clear()


class _Workspace:
    """Named buffers that all chunks of a call share: the page faults of a fresh large one cost more than its use."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers.pop(name, None)
            self.buffers[name] = self.like.new_empty(size + size // 8)
        return self.buffers[name][:size].view(shape)


class _Head(NamedTuple):
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None
    dtype: torch.dtype  # of logits and gradients

    def rows(self, index: Tensor | slice) -> Tensor:
        """(S, H) rows of the weight in the dtype of gradients."""
        rows = self.weight[index] if isinstance(index, slice) else self.weight.index_select(0, index)
        return rows.to(self.dtype)

    def gather(self, index: Tensor, out: Tensor) -> Tensor:
        """(S, H) rows of the weight in the dtype of gradients, into ``out``."""
        if self.weight.dtype == self.dtype:
            return torch.index_select(self.weight.detach(), 0, index, out=out)
        return out.copy_(self.weight.index_select(0, index))

    def logits(self, hidden: Tensor, index: Tensor | slice, out: Tensor | None = None) -> Tensor:
        """(S, C) logits of ``hidden`` (C, H) at rows ``index`` of the weight."""
        if hidden.dtype == self.dtype:
            logits = torch.mm(self.rows(index), hidden.T, out=out)
        else:
            logits = torch.mm(self.weight[index], hidden.T, out_dtype=self.dtype, out=out)
        return self._transform(logits, index)

    def target_logits(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(C,) logits of each token's target, from a product of their own: not the last bit of those of logits()."""
        return self._transform(torch.linalg.vecdot(self.rows(targets), hidden.to(self.dtype))[:, None], targets)[:, 0]

    def _transform(self, logits: Tensor, index: Tensor | slice) -> Tensor:
        if self.bias is not None:
            logits += self.bias[index].to(self.dtype)[:, None]
        if self.softcap is not None:
            return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return logits.mul_(self.scale) if self.scale != 1.0 else logits

    def slope(self, logits: Tensor) -> Tensor:
        """∂z / ∂(scale · x) of a soft cap: 1 − (z / cap)²."""
        assert self.softcap is not None
        return (logits / self.softcap).square_().neg_().add_(1)

    def product_input(self, hidden: Tensor) -> Tensor:
        """hidden as logits() wants it: CUDA multiplies 16-bit operands into fp32 sums, elsewhere they are upcast."""
        return hidden if hidden.is_cuda and hidden.dtype.itemsize == 2 else hidden.to(self.dtype)


class _Pass:
    """One walk over the vocabulary for a chunk of tokens; its sums are complete once all tiles have gone by."""

    def __init__(
        self,
        head: _Head,
        hidden: Tensor,  # (C, H), from head.product_input
        targets: Tensor,  # (C,)
        stats: tuple[str, ...],
        shift: Tensor,  # (C,)
        workspace: _Workspace,
    ) -> None:
        self.head, self.hidden, self.targets, self.stats, self.shift = head, hidden, targets, stats, shift
        self.workspace = workspace
        self.target_logit = shift.clone()
        zeros = torch.zeros_like
        self.rest = zeros(shift)  # Σ_{v≠y} e_v
        self.gradient_rest = zeros(shift) if head.softcap else self.rest  # Σ_{v≠y} e_v · slope_v
        self.squares, self.moment, self.logit_sum = zeros(shift), zeros(shift), zeros(shift)
        self.largest = torch.full_like(shift, -torch.inf)  # max_{v≠y} z_v − shift

    def tiles(self, probs: Tensor | None = None, span: slice | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Vocabulary range and e · slope (T, C) of each tile, 0 at targets; they fill ``probs`` (V, C) where given.

        ``span`` is the part of the vocabulary to walk over, all of it by default.
        """
        head, stats = self.head, self.stats
        first, last = (0, head.weight.shape[0]) if span is None else (span.start, span.stop)
        chunk = len(self.targets)
        device = self.shift.device
        size = max(64, TILE_ELEMENTS.get(device.type, OTHER_TILE_ELEMENTS) // chunk)
        starts = range(first, last, size)
        lowest = torch.finfo(head.dtype).min
        tokens = self.targets.argsort(stable=True)
        ordered = self.targets[tokens]
        bounds = torch.searchsorted(ordered, torch.tensor([*starts, last], device=device)).tolist()
        in_tile = (ordered - first) % size * chunk + tokens  # flat position of each target in its tile
        target_logits = []
        for k, start in enumerate(starts):
            tile = slice(start, min(start + size, last))
            shape = (tile.stop - start, chunk)
            logits = head.logits(self.hidden, tile, self.workspace("tile", *shape) if probs is None else probs[tile])
            if "mean_logit" in stats:
                self.logit_sum += logits.sum(0)
            slope = None if head.softcap is None else head.slope(logits)
            at_target, flat = in_tile[bounds[k] : bounds[k + 1]], logits.view(-1)
            target_logits.append(flat[at_target])
            logits -= self.shift
            flat.index_fill_(0, at_target, lowest)
            if "max_logprob" in stats or "is_top1" in stats:
                torch.maximum(self.largest, logits.amax(0), out=self.largest)
            if "entropy" in stats:
                exp = torch.exp(logits, out=self.workspace("scratch", *shape))
                self.moment += logits.mul_(exp).sum(0)
                logits.copy_(exp)
            else:
                logits.exp_()
            self.rest += logits.sum(0)
            if "log_sum_sq_probs" in stats:
                self.squares += torch.mul(logits, logits, out=self.workspace("scratch", *shape)).sum(0)
            if slope is not None:
                self.gradient_rest += logits.mul_(slope).sum(0)
            yield tile, logits
        self.target_logit[tokens[bounds[0] : bounds[-1]]] = torch.cat(target_logits)

    @property
    def target(self) -> Tensor:
        """(C,) e_y; infinite or 0 where the shift was far off."""
        return (self.target_logit - self.shift).exp()

    @property
    def total(self) -> Tensor:
        return self.rest + self.target

    def overflowed(self) -> bool:
        """Whether a sum of squares may have left the dtype's range."""
        return bool((self.total > torch.finfo(self.shift.dtype).max ** 0.4).any())

    def target_coefficient(self) -> Tensor:
        """(C,) (1 − p_y) · slope_y."""
        miss = self.rest / self.total
        return miss if self.head.softcap is None else miss * self.head.slope(self.target_logit)

    def values(self) -> dict[str, Tensor]:
        """Every statistic asked for, with logprobs and logsumexp always."""
        target, total = self.target, self.total
        shifted = self.target_logit - self.shift
        log_total = total.log()
        largest = torch.maximum(self.largest, shifted)
        values = {
            "logsumexp": self.shift + log_total,
            # Of a target that is not the most likely thing, the difference has all the digits that its logit has.
            "logprobs": torch.where(target > self.rest, -torch.log1p(self.rest / target), shifted - log_total),
            "log_sum_sq_probs": ((self.squares + target.square()) / total / total).log(),
            "max_logprob": -(total / largest.exp()).log().clamp_(min=0),
            "is_top1": shifted >= largest,
            "entropy": log_total - (self.moment + target * shifted) / total,
            "mean_logit": self.logit_sum / self.head.weight.shape[0],
        }
        return {name: values[name] for name in ("logprobs", "logsumexp", *self.stats)}


class _Exact(NamedTuple):
    """A chunk whose gradient is computed on every column."""

    rows: Tensor  # (C,), indices of tokens
    probs: Tensor | None  # (V, C), where kept


class _Sampled(NamedTuple):
    """A chunk whose gradient is sampled; see sparse_grad.py."""

    rows: Tensor  # (C,), indices of tokens
    columns: Tensor  # (S,)
    keep: Tensor  # (S,)
    tail: Tensor  # (V,)
    mass: Tensor  # (C,)
    remainder: Tensor  # (C,)
    coefficients: Tensor | None  # (S, C), where kept

    def within(self, span: slice) -> _Sampled:
        """Those of its columns that lie in a range of the vocabulary."""
        bounds = torch.searchsorted(self.columns, torch.tensor([span.start, span.stop], device=self.columns.device))
        inside = slice(*bounds.tolist())
        kept = None if self.coefficients is None else self.coefficients[inside]
        return self._replace(columns=self.columns[inside], keep=self.keep[inside], coefficients=kept)


class _Forward:
    """Fills the outputs of one call, chunk by chunk, with what its backward will need."""

    def __init__(
        self,
        head: _Head,
        hidden: Tensor,  # (N, H)
        targets: Tensor,  # (N,)
        stats: tuple[str, ...],
        options: Options,
        needs: tuple[bool, bool],  # gradient of hidden, of weight or bias
    ) -> None:
        self.head, self.hidden, self.targets, self.stats = head, hidden, targets, stats
        self.need_hidden, self.need_weight = needs
        tokens = targets.shape
        self.outputs = {
            name: targets.new_zeros(tokens, dtype=torch.bool if name == "is_top1" else head.dtype)
            for name in dict.fromkeys(("logprobs", "logsumexp", *stats))
        }
        self.at_target, self.others = (targets.new_zeros(tokens, dtype=head.dtype) for _ in range(2))
        self.unscaled = hidden.new_zeros(hidden.shape, dtype=head.dtype) if self.need_hidden else None
        self.exact: list[_Exact] = []
        self.sampled: list[_Sampled] = []
        self.probs_left, self.sample_left = PROBS_BYTES, SAMPLE_BYTES
        self.tolerances = options.grad_tolerance
        needed = [tolerance for tolerance, need in zip(options.grad_tolerance, needs, strict=True) if need]
        self.steering = Steering(min(needed)) if needed and min(needed) > 0 else None
        self.halves = min(self.tolerances) >= HALF_TOLERANCE
        self.workers = _workers(hidden.device)
        self.workspaces = [_Workspace(self.at_target) for _ in range(self.workers)]
        self.generator = torch.Generator(hidden.device).manual_seed(options.seed)
        size = (hidden.shape[1], SKETCH)
        self.sketch = torch.randn(size, generator=self.generator, device=hidden.device, dtype=head.dtype) / SKETCH**0.5

    def run(self, rows: Tensor) -> Report | None:
        steering = self.steering
        if steering is None:
            self.exact_chunks(rows)
            return None
        dense = [rows[:0]]
        first = FIRST_CHUNK * self.workers
        for wave in chain(self.waves(rows[:first], FIRST_CHUNK), self.waves(rows[first:], SAMPLED_CHUNK)):
            tried: list[Tensor] = []
            for chunk in wave:
                (dense if steering.wants_dense() else tried).append(chunk)
            dense += self.sampled_chunks(tried, steering)
        self.exact_chunks(torch.cat(dense))
        if self.unscaled is not None and self.sampled:
            for start in range(0, len(self.sampled), TAILS):  # so many μ = qᵀW in one product
                parts = self.sampled[start : start + TAILS]
                tails = torch.stack([part.tail for part in parts]).to(self.head.dtype)
                for part, mean in zip(parts, _times_weight(tails, self.head), strict=True):
                    self.unscaled.index_add_(0, part.rows, part.remainder[:, None] * -mean)
        return steering.report()

    def waves(self, rows: Tensor, largest: int) -> Iterator[Sequence[Tensor]]:
        """Even chunks of at most ``largest`` tokens, as many at a time as there are workers; a few stay together."""
        fewest = -(-len(rows) // largest)
        chunks = rows.tensor_split(
            max(fewest, min(-(-fewest // self.workers) * self.workers, len(rows) // FIRST_CHUNK), 1)
        )
        for start in range(0, len(chunks) if len(rows) else 0, self.workers):
            yield chunks[start : start + self.workers]

    def emit(self, rows: Tensor, done: _Pass) -> None:
        for name, value in done.values().items():
            self.outputs[name][rows] = value
        self.at_target[rows] = done.target_coefficient()
        self.others[rows] = done.gradient_rest / done.total

    def exact_chunks(self, rows: Tensor) -> None:
        for wave in self.waves(rows, EXACT_CHUNK):
            chunks = []
            for chunk, workspace in zip(wave, self.workspaces, strict=False):
                shape = (self.head.weight.shape[0], len(chunk))
                size = math.prod(shape) * self.head.dtype.itemsize
                kept = self.need_weight and size <= self.probs_left
                self.probs_left -= size if kept else 0
                chunks.append((_Exact(chunk, self.at_target.new_empty(shape) if kept else None), workspace))
            _side_by_side(self.exact_chunk, chunks)
            if self.need_weight:
                self.exact += [part for part, _ in chunks]

    def exact_chunk(self, chunk: tuple[_Exact, _Workspace]) -> None:
        (rows, probs), workspace = chunk
        head, targets = self.head, self.targets[rows]
        hidden = head.product_input(self.hidden[rows])
        shift = head.target_logits(hidden, targets)
        for _ in range(2):
            expected = hidden.new_zeros(hidden.shape, dtype=head.dtype) if self.need_hidden else None  # Σ_{v≠y} e_v W_v
            walk = _Pass(head, hidden, targets, self.stats, shift, workspace)
            for tile, exp in walk.tiles(probs):
                if expected is not None:
                    expected.addmm_(exp.T, head.rows(tile))
            if not walk.overflowed():
                break
            # Logits that exceed the target's by more than exp can hold: from their true maximum instead.
            maximum = _Pass(head, hidden, targets, ("is_top1",), shift, workspace)
            for _tile in maximum.tiles():
                pass
            shift = shift + maximum.largest.clamp(min=0)
        self.emit(rows, walk)
        total = walk.total
        if expected is not None and self.unscaled is not None:
            unscaled = head.rows(targets).mul_(self.at_target[rows, None])
            self.unscaled[rows] = unscaled.sub_(expected.div_(total[:, None]))
        if probs is not None:
            probs /= total

    def sampled_chunks(self, wave: Sequence[Tensor], steering: Steering) -> list[Tensor]:
        """Sample the gradient of each chunk of tokens; returns the tokens for which that does not do."""
        if not wave:
            return []
        dense, chunks = [], []
        for rows, workspace in zip(wave, self.workspaces, strict=False):
            groups = -(-len(rows) // SAMPLED_GROUP)
            shape = (groups, self.head.weight.shape[0])
            uniform = torch.rand(shape, generator=self.generator, device=rows.device, dtype=self.head.dtype)
            chunks.append(_Chunk(rows, uniform, workspace, steering.epsilon(-(-len(rows) // groups))))
        for chunk, found in zip(chunks, _side_by_side(self.sampled_chunk, chunks), strict=True):
            if found is None:
                steering.record_dense(len(chunk.uniform))
                dense.append(chunk.rows)
            for group in found or ():
                if group.sampled is None or group.estimate is None:
                    steering.record_dense(1)
                else:
                    steering.record(group.estimate)
                    self.sampled.append(group.sampled)
                    kept = group.sampled.coefficients
                    self.sample_left -= 0 if kept is None else kept.nbytes
                dense.append(group.failing)
        steering.adapt()
        return dense

    def sampled_chunk(self, chunk: _Chunk) -> list[_Group] | None:
        """None where too many columns are needed.

        One walk serves several groups of tokens, each with columns of its own: a wide product is the faster one, and
        few tokens need fewer columns.
        """
        rows, uniform, workspace, epsilon = chunk
        head, targets = self.head, self.targets[rows]
        hidden = head.product_input(self.hidden[rows])
        walk = _Pass(head, hidden, targets, self.stats, head.target_logits(hidden, targets), workspace)
        ends = [0, *(len(part) for part in rows.tensor_split(len(uniform)))]
        groups = [slice(*bounds) for bounds in pairwise(accumulate(ends))]
        candidates = _candidates(walk, groups, epsilon, uniform)
        if candidates is None or walk.overflowed():
            return None
        self.emit(rows, walk)
        return [
            self.sampled_group(rows[group], walk, group, found, epsilon)
            for group, found in zip(groups, candidates, strict=True)
        ]

    def sampled_group(self, rows: Tensor, walk: _Pass, group: slice, found: _Candidates, epsilon: float) -> _Group:
        head, targets, workspace = self.head, walk.targets[group], walk.workspace
        hidden = walk.hidden[group]
        rest, target, gradient_rest = walk.rest[group], walk.target[group], walk.gradient_rest[group]
        total = rest + target
        mass, uniform = found.mass, found.uniform
        columns, probs = torch.cat(found.columns), torch.cat(found.exp).div_(total)
        found.exp.clear()
        weights = token_weights(rest, target).mul_(total)
        squares = torch.mul(probs, probs, out=workspace("squares", *probs.shape))
        chosen, keep = select_columns(squares.mv(weights.square_()).sqrt_(), None, epsilon, uniform[columns])
        columns = columns[chosen]
        if len(columns) > MAX_KEPT * len(mass):
            return _Group(rows, None, None)
        probs = torch.index_select(probs, 0, chosen, out=workspace("probs", len(chosen), len(rows)))
        others, at_target = gradient_rest / total, self.at_target[rows]
        sample = make_sample(Selection(columns, keep), probs, mass, others)
        coefs, remainder = coefficients(sample, probs, others)
        squares = torch.mul(coefs, coefs, out=workspace("squares", *coefs.shape))

        failing = torch.zeros_like(targets, dtype=torch.bool)
        errors = []
        if self.need_weight:
            states = hidden.to(head.dtype)
            length = states.square().sum(1)
            error = length * ((1 - keep) @ squares)
            size = length * (at_target.square() + keep @ squares)
            failing |= failing_tokens(error, size, self.tolerances[1])
            coherent = coherent_variance(keep, coefs, states @ self.sketch)
            errors.append((error, size, self.tolerances[1], coherent))
        if self.unscaled is not None:
            unscaled = head.rows(targets).mul_(at_target[:, None])
            share = sample.tail[columns] / keep
            sums, error = share.new_zeros(hidden.shape[1]), torch.zeros_like(total)
            mean = sums  # of no columns at all, as NaN draws them
            for block in _blocks(slice(0, len(columns)), GATHER_ROWS):
                weight = head.gather(columns[block], workspace("rows", len(columns[block]), hidden.shape[1]))
                unscaled.addmm_(coefs[block].T, weight, alpha=-1)
                sums += share[block] @ weight
                mean = sums / share[: block.stop].sum().clamp(min=TINY)  # μ, estimated from the draw
                error += sampling_variance(keep[block], squares[block], weight, mean)
            size = torch.addr(unscaled, remainder, mean, alpha=-1).square_().sum(1)
            failing |= failing_tokens(error, size, self.tolerances[0])
            self.unscaled[rows] = unscaled
            errors.append((error, size, self.tolerances[0], 0.0))
        estimate = make_estimate(errors, failing, len(columns) / len(mass), float(sample.mass.max()))
        if failing.any():
            coefs, remainder = coefs[:, ~failing], remainder[~failing]
            sample = sample._replace(mass=sample.mass[~failing])
        kept = None
        if self.need_weight and self.sample_left > 0:
            kept = coefs.to(torch.float16 if self.halves else coefs.dtype, copy=True)
        tail = sample.tail.to(torch.bfloat16) if self.halves else sample.tail
        sampled = _Sampled(rows[~failing], columns, keep, tail, sample.mass, remainder, kept)
        return _Group(rows[failing], sampled, estimate)


class _Chunk(NamedTuple):
    """What one worker needs of one chunk of tokens to sample its gradient."""

    rows: Tensor  # (C,), indices of tokens
    uniform: Tensor  # (groups, V), the draws
    workspace: _Workspace
    epsilon: float


class _Group(NamedTuple):
    """What a worker found for one group of tokens; no sample where that needs too many columns."""

    failing: Tensor  # indices of the tokens that need an exact gradient
    sampled: _Sampled | None
    estimate: Estimate | None


class _Candidates(NamedTuple):
    """Of one group of tokens: columns that select_columns may choose, and what it needs to know of them."""

    columns: list[Tensor]  # (S,) in pieces
    exp: list[Tensor]  # (S, C) in pieces, e · slope
    mass: Tensor  # (V,), Σ_t p_tv of all columns
    uniform: Tensor  # (V,), the draw


def _candidates(walk: _Pass, groups: list[slice], epsilon: float, uniform: Tensor) -> list[_Candidates] | None:
    """Walk over the vocabulary and keep the columns that each group may need; None where those are too many.

    A tile is gone before the sums over all tiles are known. Sums still incomplete give weights that choose too many
    columns, and a p that is too large; both matter little once the tokenizer's first entries, the frequent ones, are
    counted, and those are held until the end.
    """
    vocab, workspace = uniform.shape[1], walk.workspace
    mass = torch.empty_like(uniform)
    threshold = (uniform * epsilon).square_()
    held: list[tuple[slice, Tensor]] = []
    found = [_Candidates([], [], *parts) for parts in zip(mass, uniform, strict=True)]
    count, refresh = 0, 0

    def examine(tile: slice, exp: Tensor) -> int:
        kept = 0
        for k, group in enumerate(groups):
            part = exp[:, group]
            torch.mv(part, average[group], out=mass[k, tile])
            squares = torch.mul(part, part, out=workspace("scratch", *part.shape))
            columns = (threshold[k, tile] < torch.mv(squares, weights[k])).nonzero().squeeze(-1)
            found[k].columns.append(columns + tile.start)
            found[k].exp.append(part.index_select(0, columns))
            kept += len(columns)
        return kept

    def group_weights() -> list[Tensor]:
        rest, target = walk.rest, walk.target
        return [token_weights(rest[group], target[group]).square_() for group in groups]

    for tile, exp in walk.tiles():
        if tile.start < HELD_SHARE * vocab:
            held.append((tile, workspace(f"held {tile.start}", *exp.shape).copy_(exp)))
            continue
        if tile.start >= refresh:
            refresh = tile.start + vocab // 16
            average, weights = 1 / walk.total, group_weights()
        count += examine(tile, exp)
        seen = tile.stop - held[-1][0].stop
        if count > MAX_KEPT * vocab * len(groups) or (tile.stop > vocab // 4 and count > 0.9 * seen * len(groups)):
            return None
    average, weights = 1 / walk.total, group_weights()
    later = [len(part.columns) for part in found]
    for tile, exp in held:
        examine(tile, exp)
    for part, count in zip(found, later, strict=True):
        for pieces in part.columns, part.exp:
            pieces[:] = pieces[count:] + pieces[:count]  # in the vocabulary's order
    return found


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        transform: tuple[float, float | None],
        stats: tuple[str, ...],
        options: Options,
        grad_enabled: bool,
    ) -> tuple[Any, ...]:
        need_hidden, *need_rest = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        head = _Head(weight, bias, *transform, torch.promote_types(hidden.dtype, torch.float32))
        call = _Forward(head, hidden, targets, stats, options, (need_hidden, any(need_rest)))
        with torch.autocast(hidden.device.type, enabled=False):
            report = call.run((targets != options.ignore_index).nonzero().squeeze(-1))
        ctx.transform, ctx.ignore_index = transform, options.ignore_index
        ctx.exact, ctx.sampled = len(call.exact), len(call.sampled)
        ctx.save_for_backward(
            hidden, weight, bias, targets, call.outputs["logsumexp"], call.at_target, call.others, call.unscaled,
            *chain.from_iterable((*call.exact, *call.sampled)),
        )  # fmt: skip
        result = [call.outputs[name] for name in ("logprobs", *stats)]
        ctx.mark_non_differentiable(*result[1:])
        return *result, report

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logsumexp, at_target, others, unscaled, *parts = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        head = _Head(weight, bias, ctx.transform[0], ctx.transform[1], logsumexp.dtype)
        split = ctx.exact * len(_Exact._fields)
        exact, sampled = _unflatten(_Exact, parts[:split]), _unflatten(_Sampled, parts[split:])
        rows = (targets != ctx.ignore_index).nonzero().squeeze(-1)
        upstream = grad.to(head.dtype) * head.scale

        with torch.autocast(hidden.device.type, enabled=False):
            dhidden = _times_upstream(unscaled, upstream).to(hidden.dtype) if need_hidden else None
            dweight = weight.new_empty(weight.shape, dtype=head.dtype) if need_weight else None
            dbias = bias.new_zeros(bias.shape, dtype=head.dtype) if need_bias else None
            if sampled and need_weight:
                sums = torch.stack([part.remainder @ _scale(hidden, -upstream, part.rows) for part in sampled])

            def fill(span: slice) -> None:
                """Rows ``span`` of dweight and dbias: no two threads add to the same row."""
                workspace = _Workspace(upstream)
                inside = rows[(targets[rows] >= span.start) & (targets[rows] < span.stop)]
                if dweight is not None:
                    if not sampled:
                        dweight[span].zero_()
                    # The rank-1 tails of all sampled chunks in one product, then what stands on single columns.
                    for block in _blocks(span, TAIL_ROWS) if sampled else ():
                        tails = torch.stack([part.tail[block] for part in sampled], 1).to(head.dtype)
                        torch.mm(tails, sums, out=dweight[block])
                    for chunk in inside.split(EXACT_CHUNK):
                        dweight.index_add_(0, targets[chunk], _scale(hidden, upstream * at_target, chunk))
                if dbias is not None:
                    for part in sampled:
                        dbias[span].sub_(part.tail[span], alpha=float(part.remainder @ upstream[part.rows]))
                    dbias.index_add_(0, targets[inside], (upstream * at_target)[inside])
                for part in sampled:
                    part = part.within(span)
                    if not len(part.columns):
                        continue
                    coefs = _sampled_coefficients(part, head, hidden, targets, logsumexp, others, workspace)
                    if dweight is not None:
                        product = workspace("product", len(part.columns), hidden.shape[1])
                        torch.mm(coefs, _scale(hidden, -upstream, part.rows), out=product)
                        dweight.index_add_(0, part.columns, product)
                    if dbias is not None:
                        dbias.index_add_(0, part.columns, coefs @ -upstream[part.rows])
                for part in exact:
                    scaled = _scale(hidden, -upstream, part.rows)
                    for columns, probs in _exact_probs(part, span, head, hidden, targets, logsumexp, workspace):
                        if dweight is not None:
                            dweight[columns].addmm_(probs, scaled)
                        if dbias is not None:
                            dbias[columns] -= probs @ upstream[part.rows]

            if need_weight or need_bias:
                _side_by_side(
                    fill, _even_spans(len(weight), [part.columns for part in sampled], _workers(weight.device))
                )

        return (
            dhidden,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            *[None] * 5,
        )


def _blocks(span: slice, size: int) -> Iterator[slice]:
    for start in range(span.start, span.stop, size):
        yield slice(start, min(start + size, span.stop))


def _even_spans(vocab: int, columns: list[Tensor], parts: int) -> list[slice]:
    """The vocabulary in ranges of about equal work: a row costs about half of what adding to it once does."""
    bounds = [vocab * k // parts for k in range(parts + 1)]
    if columns and parts > 1:
        cost = torch.bincount(torch.cat(columns), minlength=vocab).mul_(2).add_(1).cumsum(0)
        shares = cost[-1] * torch.arange(1, parts, device=cost.device) // parts
        bounds[1:-1] = torch.searchsorted(cost, shares).tolist()
    return [slice(*pair) for pair in pairwise(bounds)]


def _scale(hidden: Tensor, factor: Tensor, rows: Tensor) -> Tensor:
    """(C, H) hidden states of ``rows``, each times its factor, in the factor's dtype."""
    return hidden[rows].to(factor.dtype).mul_(factor[rows, None])


def _times_upstream(unscaled: Tensor, upstream: Tensor) -> Tensor:
    """(N, H) unscaled (N, H) · upstream (N,), in place where no later backward of this graph needs ``unscaled``."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return unscaled * upstream[:, None]
    return unscaled.mul_(upstream[:, None])


def _sampled_coefficients(
    part: _Sampled,
    head: _Head,
    hidden: Tensor,  # (N, H)
    targets: Tensor,  # (N,)
    logsumexp: Tensor,  # (N,)
    others: Tensor,  # (N,)
    workspace: _Workspace,
) -> Tensor:
    """(S, C), as kept or from a product with the drawn rows alone."""
    if part.coefficients is not None:
        return workspace("coefficients", *part.coefficients.shape).copy_(part.coefficients)
    logits = head.logits(head.product_input(hidden[part.rows]), part.columns)
    slope = 1 if head.softcap is None else head.slope(logits)
    probs = logits.sub_(logsumexp[part.rows]).exp_().mul_(slope)
    probs.masked_fill_(part.columns[:, None] == targets[part.rows], 0)
    sample = Sample(part.columns, part.keep, part.tail.to(head.dtype), part.mass)
    return coefficients(sample, probs, others[part.rows])[0]


def _exact_probs(
    part: _Exact,
    span: slice,
    head: _Head,
    hidden: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    workspace: _Workspace,
) -> Iterator[tuple[slice, Tensor]]:
    """Ranges within ``span`` with their (T, C) probabilities, 0 at targets: as kept, or tile by tile once more."""
    if part.probs is not None:
        yield span, part.probs[span]
    else:
        rows = part.rows
        inputs = head.product_input(hidden[rows])
        yield from _Pass(head, inputs, targets[rows], (), logsumexp[rows], workspace).tiles(span=span)


def _unflatten(kind: type[_Exact] | type[_Sampled], fields: list[Any]) -> list[Any]:
    width = len(kind._fields)
    return [kind(*fields[start : start + width]) for start in range(0, len(fields), width)]


def _times_weight(left: Tensor, head: _Head) -> Tensor:
    """(n, H) = left (n, V) @ weight, upcasting a tile of a 16-bit weight at a time."""
    if head.weight.dtype == head.dtype:
        return left @ head.weight
    out = left.new_zeros(left.shape[0], head.weight.shape[1])
    for tile in _blocks(slice(0, left.shape[1]), UPCAST_ROWS):
        out.addmm_(left[:, tile], head.rows(tile))
    return out
