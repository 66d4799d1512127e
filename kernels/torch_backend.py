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
tile then never leaves its core, and no operation on it waits for the other cores. What is done to an fp32 tile there is
C where there is a compiler (cpu_passes.py), and torch's operations otherwise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import accumulate, chain, islice, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import cpu_passes
from .autograd import once_differentiable
from .dispatch import GradReport, Options, Report
from .sparse_grad import (
    COHERENT_LIMIT,
    SKETCH,
    TINY,
    Errors,
    Estimate,
    Sample,
    Steering,
    alike,
    choose_epsilon,
    coefficients,
    coherent_variance,
    counted_tokens,
    failing_tokens,
    highest_epsilon,
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
SAMPLED_GROUP = 96  # tokens that share columns, about: fewer need fewer columns, more need fewer gathers
ALIKE_AXES = 16  # of the hidden states, in which tokens are compared
ALIKE_TOKENS = 1024  # that determine them
ALIGNED = 16  # tokens: a product with another number of them takes up to 1.4 times as long
SMALLEST_CHUNK = 64  # tokens: fewer are not shared out among workers
PROBS_BYTES = 512 << 20  # of exact probabilities kept for the backward; beyond it they are recomputed
SAMPLE_BYTES = 48 << 20  # kept of samples for the backward; beyond it their coefficients are recomputed
GATHER_ROWS = 512  # of the weight, gathered at a time and used while in the cache
TAILS = 32  # in one product with the weight
FEW_SHARE = 0.5  # of SAMPLE_BYTES: exact tokens whose probabilities fit go with the tails, not over the weight again
TAIL_ROWS = 1024  # of dweight, filled with the sampled chunks' tails at a time
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
    return dict(zip(("logprobs", *stats), outputs, strict=True)), None if report is None else Report(report)


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
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    # A thread of the pool may hold `work` for a moment after its result, and autograd copies a gradient that others
    # hold: nothing that `work` refers to outlives the call.
    held = [function]

    def work(item: Item) -> Result:
        torch.set_num_threads(max(1, threads // len(items)))
        with torch.inference_mode() if inference else torch.no_grad():  # each thread has modes of its own
            return held[0](item)

    running = [_pool(os.getpid()).submit(work, item) for item in items]
    try:
        return [future.result() for future in running]
    finally:
        wait(running)  # also after an error: what they write to may be gone with it
        torch.set_num_threads(threads)  # a thread starts with the number that any thread set last
        held.clear()


class _Workspace:
    """Named buffers that all chunks of a call share: the page faults of a fresh large one cost more than its use."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}
        self.kept = _Kept(like)

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

    def logits(self, hidden: Tensor, index: Tensor | slice, out: Tensor, gathered: Tensor | None = None) -> Tensor:
        """(S, C) logits of ``hidden`` (C, H) at rows ``index`` of the weight, into ``out``.

        ``gathered`` (S, H) is memory for the rows where ``index`` is a tensor.
        """
        if hidden.dtype == self.dtype:
            if gathered is not None and isinstance(index, Tensor):
                rows = self.gather(index, gathered)
            else:
                rows = self.rows(index)
            logits = torch.mm(rows, hidden.T, out=out)
        else:
            logits = torch.mm(self.weight[index], hidden.T, out_dtype=self.dtype, out=out)
        return self._transform(logits, index)

    def shift(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(C,) logits of each token's target, from a product of their own: not the last bit of those of logits().

        0 where a bias of −inf masks the target.
        """
        logits = torch.linalg.vecdot(self.rows(targets), hidden.to(self.dtype))
        logits = self._transform(logits[:, None], targets)[:, 0]
        return logits.masked_fill_(logits == -torch.inf, 0)

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
        self.sums = shift.new_zeros(3, len(shift))  # over v ≠ y: Σ e_v, Σ e_v², Σ (z_v − shift) e_v
        self.rest, self.squares, self.moment = self.sums
        self.gradient_rest = zeros(shift) if head.softcap else self.rest  # Σ_{v≠y} e_v · slope_v
        self.logit_sum = zeros(shift)
        self.compiled = head.softcap is None and cpu_passes.usable(shift)
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
        kinds = 3 if "entropy" in stats else 2 if "log_sum_sq_probs" in stats else 1
        for k, start in enumerate(starts):
            tile = slice(start, min(start + size, last))
            shape = (tile.stop - start, chunk)
            logits = head.logits(self.hidden, tile, self.workspace("tile", *shape) if probs is None else probs[tile])
            if "mean_logit" in stats:
                self.logit_sum += logits.sum(0)
            slope = None if head.softcap is None else head.slope(logits)
            at_target, flat = in_tile[bounds[k] : bounds[k + 1]], logits.view(-1)
            target_logits.append(flat[at_target])
            flat.index_fill_(0, at_target, lowest)
            if "max_logprob" in stats or "is_top1" in stats:
                torch.maximum(self.largest, logits.amax(0).sub_(self.shift), out=self.largest)
            if self.compiled:
                cpu_passes.exp_sums(logits, self.shift, self.sums[:kinds])
            else:
                self._exp_sums(logits)
            if slope is not None:
                self.gradient_rest += logits.mul_(slope).sum(0)
            yield tile, logits
        self.target_logit[tokens[bounds[0] : bounds[-1]]] = torch.cat(target_logits)

    def _exp_sums(self, logits: Tensor) -> None:
        """cpu_passes.exp_sums of the kinds needed, in torch."""
        logits -= self.shift
        if "entropy" in self.stats:
            exp = torch.exp(logits, out=self.workspace("scratch", *logits.shape))
            self.moment += logits.mul_(exp).masked_fill_(exp == 0, 0).sum(0)  # −inf · 0 of a masked entry
            logits.copy_(exp)
        else:
            logits.exp_()
        self.rest += logits.sum(0)
        if "log_sum_sq_probs" in self.stats:
            self.squares += torch.mul(logits, logits, out=self.workspace("scratch", *logits.shape)).sum(0)

    @property
    def target(self) -> Tensor:
        """(C,) e_y; infinite or 0 where the shift was far off."""
        return (self.target_logit - self.shift).exp()

    @property
    def total(self) -> Tensor:
        return self.rest + self.target

    def out_of_range(self) -> bool:
        """Whether a sum of squares may have left the dtype's range: downwards only where the target is masked."""
        largest = torch.finfo(self.shift.dtype).max ** 0.4
        return bool(((self.total > largest) | (self.total < 1 / largest)).any())

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
            "entropy": log_total - (self.moment + (target * shifted).masked_fill_(target == 0, 0)) / total,
            "mean_logit": self.logit_sum / self.head.weight.shape[0],
        }
        return {name: values[name] for name in ("logprobs", "logsumexp", *self.stats)}


class _Exact(NamedTuple):
    """A chunk whose gradient is computed on every column."""

    rows: Tensor  # (C,), indices of tokens
    probs: Tensor | None  # (V, C), where kept


class _Few(NamedTuple):
    """Tokens, few of many, whose gradient is computed on every column: beside the sampled chunks' tails."""

    rows: Tensor  # (C,), indices of tokens
    probs: Tensor  # (V, C)


class _Sampled(NamedTuple):
    """A chunk whose gradient is sampled; see sparse_grad.py."""

    rows: Tensor  # (C,), indices of tokens
    columns: Tensor  # (S,)
    keep: Tensor  # (S,)
    tail: Tensor  # (V,)
    dropped: Tensor  # (C,)
    remainder: Tensor  # (C,)
    coefficients: Tensor | None  # (S, C), where kept

    def of(self, some: Tensor) -> _Sampled:
        """With some of its tokens, (C,) bool, alone."""
        kept = None if self.coefficients is None else self.coefficients[:, some]
        return self._replace(
            rows=self.rows[some], dropped=self.dropped[some], remainder=self.remainder[some], coefficients=kept
        )

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
        self.few: list[_Few] = []
        self.sampled: list[_Sampled] = []
        self.probs_left, self.sample_left = PROBS_BYTES, SAMPLE_BYTES
        self.tolerances = options.grad_tolerance
        needed = [tolerance for tolerance, need in zip(options.grad_tolerance, needs, strict=True) if need]
        self.tolerance = min(needed, default=0.0)
        self.halves = min(self.tolerances) >= HALF_TOLERANCE
        self.workers = _workers(hidden.device)
        if head.softcap is None:
            cpu_passes.usable(self.at_target)  # compiles, where that is of use, before several workers ask for it
        self.workspaces = [_Workspace(self.at_target) for _ in range(self.workers)]
        self.generator = torch.Generator(hidden.device).manual_seed(int(options.seed))
        size = (hidden.shape[1], SKETCH)
        self.sketch = torch.randn(size, generator=self.generator, device=hidden.device, dtype=head.dtype) / SKETCH**0.5

    def run(self, rows: Tensor) -> GradReport | None:
        if self.tolerance == 0:
            self.exact_chunks(rows)
            return None
        waves = self.sampled_waves(rows)
        steering = Steering(self.tolerance, sum(len(chunk) for wave in waves for chunk in wave))
        dense = [rows[:0]]
        for wave in waves:
            tried = []
            for chunk in wave:
                if steering.wants_dense(len(chunk)):
                    dense += chunk
                else:
                    tried.append(chunk)
            dense += self.sampled_chunks(tried, steering)
        rest = torch.cat(dense)
        size = self.head.weight.shape[0] * len(rest) * self.head.dtype.itemsize
        if self.sampled and 0 < size <= FEW_SHARE * SAMPLE_BYTES:
            self.make_room(size)
            self.few.append(_Few(rest, self.at_target.new_empty(self.head.weight.shape[0], len(rest))))
            self.exact_chunk(self.few[0], self.workspaces[0], multiply=False)
        else:  # whose share of the exact gradient's memory is their share of the tokens
            self.probs_left = PROBS_BYTES * len(rest) // max(len(rows), 1)
            self.exact_chunks(rest)
        self.finish()
        return steering.report()

    def sampled_waves(self, rows: Tensor) -> list[list[list[Tensor]]]:
        """Even chunks of groups of similar tokens, as many in a wave as there are workers."""
        if not len(rows):
            return []
        chunks = -(-len(rows) // SAMPLED_CHUNK)
        chunks = min(-(-chunks // self.workers) * self.workers, max(1, len(rows) // SMALLEST_CHUNK))
        each = max(1, round(len(rows) / chunks / SAMPLED_GROUP))
        sizes = [size for chunk in _even_sizes(len(rows), chunks) for size in _even_sizes(chunk, each)]
        groups = self.alike(rows, sizes)
        in_chunks = [groups[k : k + each] for k in range(0, len(groups), each)]
        return [in_chunks[k : k + self.workers] for k in range(0, chunks, self.workers)]

    def alike(self, rows: Tensor, sizes: list[int]) -> list[Tensor]:
        """``rows`` in groups of these sizes, of tokens that have similar hidden states."""
        few = self.hidden[rows[:: -(-len(rows) // ALIKE_TOKENS)]].to(self.head.dtype)
        few -= few.mean(0)
        axes = self.sketch[:, :ALIKE_AXES]
        for _ in range(2):  # towards the largest principal components
            axes = torch.linalg.qr(few.T @ (few @ axes)).Q
        features = torch.cat([self.hidden[chunk].to(self.head.dtype) @ axes for chunk in rows.split(EXACT_CHUNK)])
        return [rows[tokens.to(rows.device)] for tokens in alike(features, sizes)]

    def finish(self) -> None:
        """Subtract from unscaled what is a product with the whole weight: μ = qᵀW of the sampled chunks, so many in one
        product, and with the first of them Σ_v p_v W_v of the few exact tokens."""
        if self.unscaled is None:
            return
        for start in range(0, len(self.sampled), TAILS):
            tails = self.sampled[start : start + TAILS]
            few = self.few if start == 0 else []
            rows = [*chain.from_iterable(part.probs.T for part in few), *(part.tail for part in tails)]
            left = self.at_target.new_empty(len(rows), self.head.weight.shape[0])
            for row, values in zip(left, rows, strict=True):
                row.copy_(values)
            product = _times_weight(left, self.head)
            for part in few:
                expected, product = product.split([len(part.rows), len(tails)])
                self.unscaled.index_add_(0, part.rows, expected, alpha=-1)
            for tail, mean in zip(tails, product, strict=True):
                self.unscaled.index_add_(0, tail.rows, tail.remainder[:, None] * -mean)

    def waves(self, rows: Tensor) -> Iterator[Sequence[Tensor]]:
        """Even chunks of at most EXACT_CHUNK tokens, as many at a time as there are workers; a few stay together."""
        odd = len(rows) % ALIGNED if len(rows) > 2 * SMALLEST_CHUNK else 0
        fewest = -(-len(rows) // EXACT_CHUNK)
        parts = max(fewest, min(-(-fewest // self.workers) * self.workers, len(rows) // SMALLEST_CHUNK), 1)
        chunks = [] if not len(rows) else list(rows[odd:].split(_even_sizes(len(rows) - odd, parts)))
        if odd:
            chunks.append(rows[:odd])
        for start in range(0, len(chunks), self.workers):
            yield chunks[start : start + self.workers]

    def emit(self, rows: Tensor, done: _Pass) -> None:
        for name, value in done.values().items():
            self.outputs[name][rows] = value
        self.at_target[rows] = done.target_coefficient()
        self.others[rows] = done.gradient_rest / done.total

    def exact_chunks(self, rows: Tensor) -> None:
        for wave in self.waves(rows):
            chunks = []
            for chunk, workspace in zip(wave, self.workspaces, strict=False):
                shape = (self.head.weight.shape[0], len(chunk))
                size = math.prod(shape) * self.head.dtype.itemsize
                kept = self.need_weight and size <= self.probs_left
                self.probs_left -= size if kept else 0
                chunks.append((_Exact(chunk, self.at_target.new_empty(shape) if kept else None), workspace))
            _side_by_side(lambda chunk: self.exact_chunk(*chunk), chunks)
            if self.need_weight:
                self.exact += [part for part, _ in chunks]

    def exact_chunk(self, chunk: _Exact | _Few, workspace: _Workspace, multiply: bool = True) -> None:
        """Σ_v p_v W_v is left to the caller where ``multiply`` is false."""
        rows, probs = chunk
        head, targets = self.head, self.targets[rows]
        hidden = head.product_input(self.hidden[rows])
        shift = head.shift(hidden, targets)
        for _ in range(2):
            expected = None  # Σ_{v≠y} e_v W_v
            if self.need_hidden and multiply:
                expected = hidden.new_zeros(hidden.shape, dtype=head.dtype)
            walk = _Pass(head, hidden, targets, self.stats, shift, workspace)
            for tile, exp in walk.tiles(probs):
                if expected is not None:
                    expected.addmm_(exp.T, head.rows(tile))
            if not walk.out_of_range():
                break
            # Logits farther from the target's, or from the 0 in its place, than exp can hold: from their true maximum
            # instead, unless all are masked.
            maximum = _Pass(head, hidden, targets, ("is_top1",), shift, workspace)
            for _tile in maximum.tiles():
                pass
            masked = walk.target_logit == -torch.inf
            any_left = maximum.largest > torch.finfo(head.dtype).min  # which stands in the targets' places
            shift = shift + maximum.largest.where(masked & any_left, maximum.largest.clamp(min=0))
        self.emit(rows, walk)
        total = walk.total
        if self.unscaled is not None:
            unscaled = head.rows(targets).mul_(self.at_target[rows, None])
            self.unscaled[rows] = unscaled if expected is None else unscaled.sub_(expected.div_(total[:, None]))
        if probs is not None:
            probs /= total

    def sampled_chunks(self, wave: Sequence[list[Tensor]], steering: Steering) -> list[Tensor]:
        """Sample the gradient of each chunk, groups of tokens; returns the tokens for which that does not do."""
        if not wave:
            return []
        dense: list[Tensor] = []
        groups: list[_Group] = []
        chunks = []
        seen = self.others[self.others > 0]
        typical = float(seen.square().mean().sqrt()) if len(seen) else math.inf
        for tokens, workspace in zip(wave, self.workspaces, strict=False):
            shape = (len(tokens), self.head.weight.shape[0])
            uniform = torch.rand(shape, generator=self.generator, device=tokens[0].device, dtype=self.head.dtype)
            lowest, budget = steering.lowest_epsilon(max(map(len, tokens))), steering.budget()
            chunks.append(_Chunk(tokens, uniform, workspace, lowest, budget, typical))
        for chunk, found in zip(chunks, _side_by_side(self.sampled_chunk, chunks), strict=True):
            if found is None:
                steering.record_dense(len(chunk.groups), in_vain=True)
                dense += chunk.groups
            groups += found or ()
        # Those that are least wrong first: the others then know what room is left.
        for group in sorted(groups, key=lambda group: group.estimate.ratio() if group.estimate else 0.0):
            if group.sampled is None or group.estimate is None:
                steering.record_dense(1)
            else:
                part, exact = group.sampled, steering.record(group.estimate)
                if exact.any():
                    dense.append(part.rows[exact])
                    part = part.of(~exact)
                self.sampled.append(part)
                self.make_room(sum(field.nbytes for field in part if field is not None))
            dense.append(group.failing)
        steering.adapt()
        return dense

    def make_room(self, size: int) -> None:
        """For so many bytes that the backward needs, let go of coefficients, which it can compute once more."""
        self.sample_left -= size
        for k, part in enumerate(self.sampled):
            if self.sample_left >= 0:
                break
            if part.coefficients is not None:
                self.sample_left += part.coefficients.nbytes
                self.sampled[k] = part._replace(coefficients=None)

    def sampled_chunk(self, chunk: _Chunk) -> list[_Group] | None:
        """None where too many columns are needed.

        One walk serves several groups of tokens, each with columns of its own: a wide product is the faster one, and
        few tokens need fewer columns.
        """
        groups, uniform, workspace, lowest, budget, typical = chunk
        head, rows = self.head, torch.cat(groups)
        targets = self.targets[rows]
        hidden = head.product_input(self.hidden[rows])
        walk = _Pass(head, hidden, targets, self.stats, head.shift(hidden, targets), workspace)
        bounds = [0, *accumulate(map(len, groups))]
        found = _candidates(walk, bounds, lowest, typical, uniform)
        if found is None:
            return None
        if walk.out_of_range():
            return [_Group(group, None, None) for group in groups]
        self.emit(rows, walk)
        candidates, squares = found
        parts = [slice(*pair) for pair in pairwise(bounds)]
        counted = sum(counted_tokens(walk.rest[part], walk.target[part], typical) for part in parts)
        epsilon, error = choose_epsilon(squares, lowest, highest_epsilon(self.tolerance), budget * counted)
        expected = error / max(self.tolerance**2 * counted, TINY)
        return [
            self.sampled_group(group, walk, part, columns, typical, epsilon, expected)
            for group, part, columns in zip(groups, parts, candidates, strict=True)
        ]

    def draw(
        self,
        found: _Candidates,
        score: Tensor,  # (S,), of the candidates
        epsilon: float,
        total: Tensor,  # (C,), Σ_v e_v
        others: Tensor,  # (C,), Σ_{v≠y} p_v · slope_v
        workspace: _Workspace,
    ) -> _Drawn | None:
        """None where too many columns are needed.

        After a higher ε a lower one adds columns to those drawn, and the column_mass that was overwritten does as well.
        """
        chosen, keep = select_columns(score, epsilon, found.uniform[found.columns])
        if len(chosen) > MAX_KEPT * len(found.column_mass):
            return None
        wrapped = -int(torch.searchsorted(chosen, found.wrap))
        chosen, keep = chosen.roll(wrapped), keep.roll(wrapped)  # the vocabulary's order
        shape = len(chosen), len(total)
        probs = torch.index_select(found.exp, 0, chosen, out=workspace("probs", *shape)).div_(total)
        sample = make_sample(found.columns[chosen], keep, probs, found.column_mass, others)
        coefs, remainder = coefficients(sample, probs, others)
        return _Drawn(sample, coefs, remainder, torch.mul(coefs, coefs, out=workspace("squares", *shape)))

    def sampled_group(
        self,
        rows: Tensor,
        walk: _Pass,
        group: slice,
        found: _Candidates,
        typical: float,
        epsilon: float,
        expected: float,
    ) -> _Group:
        head, targets, workspace = self.head, walk.targets[group], walk.workspace
        hidden, rest, target = walk.hidden[group], walk.rest[group], walk.target[group]
        total = rest + target
        if not total.isfinite().all():
            return _Group(rows, None, None)  # else one token's NaN would be that of all
        others, at_target = walk.gradient_rest[group] / total, self.at_target[rows]
        squares = torch.mul(found.exp, found.exp, out=workspace("squares", *found.exp.shape))
        score = squares.mv(token_weights(rest, target, typical).square_()).sqrt_()
        level = epsilon / len(rows) ** 0.5
        coherent = 0.0
        if self.need_weight:
            states = hidden.to(head.dtype)
            length, projected = states.square().sum(1), states @ self.sketch
        for _ in range(2):
            drawn = self.draw(found, score, epsilon, total, others, workspace)
            if drawn is None:
                return _Group(rows, None, None)
            (columns, keep, tail, dropped), coefs, remainder, squares = drawn
            if not self.need_weight:
                break
            error, size = length * ((1 - keep) @ squares), length * (at_target.square() + keep @ squares)
            coherent, limit = coherent_variance(keep, coefs, projected), COHERENT_LIMIT * self.tolerances[1] ** 2
            if not coherent > limit * float(size.sum()):
                break  # else what adds up over the group is cheaper met by more columns than by exact tokens
            epsilon = max(found.lowest, epsilon * (limit * float(size.sum()) / coherent) ** 0.7)

        failing = torch.zeros_like(targets, dtype=torch.bool)
        errors = []
        if self.need_weight:
            failing |= failing_tokens(error, size, self.tolerances[1])
            errors.append(Errors(self.tolerances[1], float(size.sum()), error))
        if self.unscaled is not None:
            unscaled = head.rows(targets).mul_(at_target[:, None])
            share = tail[columns] / keep
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
            errors.append(Errors(self.tolerances[0], float(size.sum()), error))
        some = ~failing if failing.any() else slice(None)
        coefs = coefs[:, some]
        errors = [of._replace(error=of.error[some]) for of in errors]
        if self.need_weight:
            coherent = coherent_variance(keep, coefs, projected[some]) if failing.any() else coherent
            errors[0] = errors[0]._replace(coherent=coherent)
        estimate = Estimate(errors, len(rows), len(columns) / len(tail), float(dropped.max()), level, expected)
        kept = None
        if self.need_weight and self.sample_left > 0:
            kept = coefs.to(torch.float16 if self.halves else coefs.dtype, copy=True)
        tail = tail.to(torch.bfloat16) if self.halves else tail
        sampled = _Sampled(rows[some], columns, keep, tail, dropped[some], remainder[some], kept)
        return _Group(rows[failing], sampled, estimate)


class _Chunk(NamedTuple):
    """What one worker needs of one chunk of tokens to sample its gradient."""

    groups: list[Tensor]  # (C,) each, indices of tokens
    uniform: Tensor  # (groups, V), the draws
    workspace: _Workspace
    lowest: float  # ε
    budget: float  # of a token's squared error
    typical: float  # 1 − p_y of the tokens before


class _Drawn(NamedTuple):
    """A draw of columns for one group of tokens."""

    sample: Sample
    coefficients: Tensor  # (S, C)
    remainder: Tensor  # (C,)
    squares: Tensor  # (S, C), of the coefficients


class _Group(NamedTuple):
    """What a worker found for one group of tokens; no sample where that needs too many columns."""

    failing: Tensor  # indices of the tokens that need an exact gradient
    sampled: _Sampled | None
    estimate: Estimate | None


class _Kept:
    """Columns that groups of a chunk's tokens may need; the memory of one object serves many chunks.

    bounds: (groups + 1,) int64, of the tokens. counts: (groups,) int64, of what is kept; both on the CPU.
    columns: (groups, capacity) int64. exp: (groups, capacity, width), e · slope of the group's tokens there.
    """

    def __init__(self, like: Tensor) -> None:
        self.all_columns, self.all_exp = like.new_empty(0, dtype=torch.int64), like.new_empty(0)

    def start(self, bounds: list[int], rows: int) -> None:
        """Empty, for groups of tokens between ``bounds``, with room for about so many rows of each."""
        self.bounds = torch.tensor(bounds, device="cpu")
        self.counts = torch.zeros(len(bounds) - 1, dtype=torch.int64, device="cpu")
        self.width = int(self.bounds.diff().max())
        self._shape(min(len(self.all_columns), len(self.all_exp) // self.width) // len(self.counts))
        self.reserve(rows)

    def _shape(self, capacity: int) -> None:
        groups = len(self.counts)
        self.columns = self.all_columns[: groups * capacity].view(groups, capacity)
        self.exp = self.all_exp[: groups * capacity * self.width].view(groups, capacity, self.width)

    def reserve(self, rows: int) -> None:
        """Make room for so many more rows of each group."""
        needed = int(self.counts.max()) + rows
        if needed > self.columns.shape[1]:
            columns, exp = self.columns, self.exp
            capacity = needed + needed // 4
            self.all_columns = columns.new_empty(len(columns) * capacity)
            self.all_exp = exp.new_empty(len(exp) * capacity * self.width)
            self._shape(capacity)
            for k, count in enumerate(self.counts.tolist()):
                self.columns[k, :count], self.exp[k, :count] = columns[k, :count], exp[k, :count]

    def keep(
        self,
        exp: Tensor,
        first: int,
        average: Tensor,
        weights: Tensor,
        threshold: Tensor,
        mass: Tensor,
        square: Tensor,
    ) -> None:
        """cpu_passes.keep_columns in torch."""
        bounds = self.bounds.tolist()
        for k, (start, stop) in enumerate(pairwise(bounds)):
            part = exp[:, start:stop]
            torch.mv(part, average[start:stop], out=mass[k])
            torch.mv(part.square(), weights[start:stop], out=square[k])
            columns = (threshold[k] < square[k]).nonzero().squeeze(-1)
            self.reserve(len(columns))
            count = int(self.counts[k])
            self.columns[k, count : count + len(columns)] = columns + first
            self.exp[k, count : count + len(columns), : stop - start] = part.index_select(0, columns)
            self.counts[k] += len(columns)


class _Candidates(NamedTuple):
    """Of one group of tokens: columns that select_columns may choose, and what it needs to know of them."""

    columns: Tensor  # (S,), ascending but for the first of the vocabulary, which come last
    exp: Tensor  # (S, C), e · slope
    wrap: int  # where those first ones begin
    lowest: float  # ε for which they are enough
    column_mass: Tensor  # (V,), Σ_t p_tv
    uniform: Tensor  # (V,), the draw


def _candidates(
    walk: _Pass, bounds: list[int], epsilon: float, typical: float, uniform: Tensor
) -> tuple[list[_Candidates], Tensor] | None:
    """Walk over the vocabulary and keep the columns that each group may need, with the squared scores of all (groups,
    V); None where those are too many.

    A tile is gone before the sums over all tiles are known. Sums still incomplete give weights that choose too many
    columns, and a p that is too large; both matter little once the tokenizer's first entries, the frequent ones, are
    counted, and those are held until the end.
    """
    (n_groups, vocab), workspace, kept = uniform.shape, walk.workspace, walk.workspace.kept
    groups = [slice(*pair) for pair in pairwise(bounds)]
    mass, square = torch.empty_like(uniform), torch.empty_like(uniform)
    threshold = (uniform * epsilon).square_()
    held: list[tuple[slice, Tensor]] = []
    kept.start(bounds, vocab // 16)
    refresh = 0

    def examine(tile: slice, exp: Tensor) -> None:
        arguments = exp, tile.start, average, weights, threshold[:, tile], mass[:, tile], square[:, tile]
        if walk.compiled:
            kept.reserve(len(exp))
            cpu_passes.keep_columns(*arguments, kept.bounds, kept.counts, kept.columns, kept.exp)
        else:
            kept.keep(*arguments)

    def group_weights() -> Tensor:
        rest, target = walk.rest, walk.target
        return torch.cat([token_weights(rest[group], target[group], typical) for group in groups]).square_()

    for tile, exp in walk.tiles():
        if tile.start < HELD_SHARE * vocab:
            held.append((tile, workspace(f"held {len(held)}", *exp.shape).copy_(exp)))
            continue
        if tile.start >= refresh:
            refresh = tile.start + vocab // 16
            average, weights = 1 / walk.total, group_weights()
        examine(tile, exp)
        count, seen = int(kept.counts.sum()), tile.stop - held[-1][0].stop
        if count > MAX_KEPT * vocab * n_groups or (tile.stop > vocab // 4 and count > 0.9 * seen * n_groups):
            return None
    average, weights = 1 / walk.total, group_weights()
    wraps = kept.counts.tolist()
    for tile, exp in held:
        examine(tile, exp)
    candidates = [
        _Candidates(
            kept.columns[k, :count],
            kept.exp[k, :count, : group.stop - group.start],
            wrap,
            epsilon,
            mass[k],
            uniform[k],
        )
        for k, (group, count, wrap) in enumerate(zip(groups, kept.counts.tolist(), wraps, strict=True))
    ]
    return candidates, square


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
        few = call.few if any(need_rest) else []
        ctx.exact, ctx.few, ctx.sampled = len(call.exact), len(few), len(call.sampled)
        ctx.save_for_backward(
            hidden, weight, bias, targets, call.outputs["logsumexp"], call.at_target, call.others, call.unscaled,
            *chain.from_iterable((*call.exact, *few, *call.sampled)),
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
        exact, few, sampled = _unflatten(parts, (_Exact, ctx.exact), (_Few, ctx.few), (_Sampled, ctx.sampled))
        rows = (targets != ctx.ignore_index).nonzero().squeeze(-1)
        # Where nothing is computed nothing depends on the log-prob, even if what the caller did with it is NaN there.
        upstream = grad.masked_fill(targets == ctx.ignore_index, 0).to(head.dtype) * head.scale

        with torch.autocast(hidden.device.type, enabled=False):
            dhidden = _times_upstream(unscaled, upstream).to(hidden.dtype) if need_hidden else None
            dweight = weight.new_empty(weight.shape, dtype=head.dtype) if need_weight else None
            dbias = bias.new_zeros(bias.shape, dtype=head.dtype) if need_bias else None
            if need_weight and sampled:
                sums = torch.cat(
                    [
                        *((part.remainder @ _scale(hidden, -upstream, part.rows))[None] for part in sampled),
                        *(_scale(hidden, -upstream, part.rows) for part in few),
                    ]
                )

            def fill(span: slice) -> None:
                """Rows ``span`` of dweight and dbias: no two threads add to the same row."""
                workspace = _Workspace(upstream)
                inside = rows[(targets[rows] >= span.start) & (targets[rows] < span.stop)]
                if dweight is not None:
                    if not sampled:
                        dweight[span].zero_()
                    # The rank-1 tails of all sampled chunks and the few exact tokens in one product, then what stands
                    # on single columns.
                    for block in _blocks(span, TAIL_ROWS) if sampled else ():
                        left = workspace("left", block.stop - block.start, len(sums))
                        for k, part in enumerate(sampled):
                            left[:, k] = part.tail[block]
                        for part in few:
                            left[:, len(sampled) :] = part.probs[block]
                        torch.mm(left, sums, out=dweight[block])
                    for chunk in inside.split(EXACT_CHUNK):
                        dweight.index_add_(0, targets[chunk], _scale(hidden, upstream * at_target, chunk))
                if dbias is not None:
                    for part in sampled:
                        dbias[span].sub_(part.tail[span], alpha=float(part.remainder @ upstream[part.rows]))
                    for part in few:
                        dbias[span] -= part.probs[span] @ upstream[part.rows]
                    dbias.index_add_(0, targets[inside], (upstream * at_target)[inside])
                for part in sampled:
                    part = part.within(span)
                    if not len(part.columns):
                        continue
                    coefs = _sampled_coefficients(part, head, hidden, targets, logsumexp, others, workspace)
                    if dweight is not None:
                        scaled = _scale(hidden, -upstream, part.rows)
                        for block in _blocks(slice(0, len(coefs)), GATHER_ROWS):
                            product = workspace("rows", len(coefs[block]), hidden.shape[1])
                            dweight.index_add_(0, part.columns[block], torch.mm(coefs[block], scaled, out=product))
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


def _even_sizes(length: int, parts: int) -> list[int]:
    """``length`` in so many parts, all but the first multiples of ALIGNED unless they are too small for it."""
    unit = ALIGNED if length >= 2 * ALIGNED * parts else 1
    bounds = [0, *(length - length * k // parts // unit * unit for k in range(parts - 1, 0, -1)), length]
    return [stop - start for start, stop in pairwise(bounds)]


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
    return [slice(start, stop) for start, stop in pairwise(bounds) if start < stop]


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
    logits = workspace("coefficients", len(part.columns), len(part.rows))
    inputs = head.product_input(hidden[part.rows])
    for block in _blocks(slice(0, len(logits)), GATHER_ROWS):
        columns = part.columns[block]
        head.logits(inputs, columns, logits[block], workspace("rows", len(columns), hidden.shape[1]))
    slope = 1 if head.softcap is None else head.slope(logits)
    probs = logits.sub_(logsumexp[part.rows]).exp_().mul_(slope)
    probs.masked_fill_(part.columns[:, None] == targets[part.rows], 0)
    sample = Sample(part.columns, part.keep, part.tail.to(head.dtype), part.dropped)
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


def _unflatten(fields: Iterable[Any], *kinds: tuple[type[NamedTuple], int]) -> list[list[Any]]:
    """So many of each kind, one after the other, from their fields."""
    remaining = iter(fields)
    return [[kind(*islice(remaining, len(kind._fields))) for _ in range(number)] for kind, number in kinds]


def _times_weight(left: Tensor, head: _Head) -> Tensor:
    """(n, H) = left (n, V) @ weight, upcasting a tile of a 16-bit weight at a time."""
    vocab, hidden_size = head.weight.shape
    size = vocab if head.weight.dtype == head.dtype else UPCAST_ROWS

    def part(span: slice) -> Tensor:
        out = left.new_zeros(len(left), hidden_size)
        for tile in _blocks(span, size):
            out.addmm_(left[:, tile], head.rows(tile))
        return out

    parts = _side_by_side(part, _even_spans(vocab, [], _workers(left.device)))
    return torch.stack(parts).sum(0)
