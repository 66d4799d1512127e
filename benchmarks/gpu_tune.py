"""The offline tuner of kernels/configs.json, the table of launch configurations: ``make gpu-bench ARGS=--tune``.

A kernel is timed inside the call that launches it, on 16-bit operands of a large and a small hidden size, one candidate
after the other until the time is up. The fastest become the table's lines for this architecture.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gpu_checks
import inputs
import torch
from inputs import Problem
from prefopt_fast.kernels import configs, sampled_grad

import prefopt_fast as pf

SHAPES = {None: (128_256, 4096), 2048: (151_936, 896)}  # max_hidden of a line of the table: the (V, H) it is tuned on
TOKENS = 8192
QUICK_SHAPES = {None: (96, 32)}
QUICK_TOKENS = 32
SHARED_BYTES = 227 * 1024
SAMPLED = 2.0**-8  # the tolerance at which sampled gradients are tuned


class Kernel(NamedTuple):
    """How to tune a kernel: the sizes of its product by the fields of its configuration, and the call that runs it.

    ``train`` are the operands whose gradients the call computes; none for the forward. ``gathers`` where each step of
    the product loads the ids of the rows that it then loads: Triton's pipeline holds these rows for half its stages.
    """

    rows: str
    columns: str
    inner: str
    train: tuple[str, ...] = ()
    tolerance: float = 0.0
    gathers: bool = False


KERNELS = {
    "forward": Kernel("block_n", "block_v", "block_h"),
    "grad_logits": Kernel("block_n", "block_v", "block_h", ("hidden",)),
    "sampled_grad_logits": Kernel("block_n", "block_v", "block_h", ("hidden",), SAMPLED),
    "sampled_dhidden": Kernel("block_n", "block_h", "block_v", ("hidden",), SAMPLED, gathers=True),
    "sampled_dweight": Kernel("block_v", "block_h", "block_n", ("weight",), SAMPLED),
}


def candidates(kernel: Kernel, quick: bool) -> Iterator[configs.Config]:
    """By falling promise: 64 to 128 accumulators per thread, and stages that fit into shared memory."""
    tiles = [(16, 16)] if quick else [(128, 256), (128, 128), (256, 128), (64, 256)]
    inners = [16] if quick else [64, 128, 32]
    stages = (5, 3, 2) if kernel.gathers else (3, 4, 2)
    for (rows, columns), inner, num_stages in itertools.product(tiles, inners, stages):
        num_warps = 4 if rows * columns <= 64 * 256 else 8
        buffers = (num_stages + 1) // 2 if kernel.gathers else num_stages
        if 2 * inner * (rows + columns) * buffers < SHARED_BYTES:
            sizes = {kernel.rows: rows, kernel.columns: columns, kernel.inner: inner}
            yield configs.Config(**sizes, num_warps=num_warps, num_stages=num_stages)


def tune(
    device: str,
    backend: str,
    seconds: float,
    names: list[str],
    quick: bool,
    time_step: Callable[[Callable[[], Any]], float],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """The rewritten table, which the running process uses from here on; ``time_step`` gives a call's time in ms."""
    arch = configs.architecture(torch.device(device))
    table = configs._table()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    bits = str(8 * dtype.itemsize)
    shapes = QUICK_SHAPES if quick else SHAPES
    deadline = time.monotonic() + seconds
    todo = list(itertools.product(shapes.items(), names))
    best: dict[str, dict[int | None, configs.Config]] = {name: {} for name in names}
    problems: dict[int, Problem] = {}
    for done, ((max_hidden, (vocab, hidden_size)), name) in enumerate(todo):
        if hidden_size not in problems:
            tokens = QUICK_TOKENS if quick else TOKENS
            problems = {hidden_size: inputs.synthetic(tokens, vocab, hidden_size, dtype=dtype, device=device)}
        step = make_step(KERNELS[name], problems[hidden_size], backend)
        entry = table.setdefault(arch, {}).setdefault(name, copy.deepcopy(table["default"][name]))
        shipped = entry[bits]
        stop = time.monotonic() + (deadline - time.monotonic()) / (len(todo) - done)
        times: dict[configs.Config, float] = {}
        tried = dict.fromkeys([configs.lookup(name, arch, dtype, hidden_size), *candidates(KERNELS[name], quick)])
        for config in tried:
            if not fits(name, config, arch, dtype, hidden_size) or (times and time.monotonic() > stop):
                continue
            entry[bits] = [{"max_hidden": None, **config._asdict()}]
            try:
                times[config] = time_step(step)
                log(f"tuning {name}, H {hidden_size}: {tuple(config)}: {times[config]:.3f} ms")
            except Exception as error:  # does not compile, or not fit: no candidate
                if not gpu_checks.works(device):
                    raise
                log(f"tuning {name}, H {hidden_size}: {tuple(config)}: {type(error).__name__}")
        if not times:
            raise RuntimeError(f"no configuration of {name} runs")
        best[name][max_hidden] = min(times, key=times.__getitem__)
        log(f"tuning {name}, H {hidden_size}: best of {len(times)} is {tuple(best[name][max_hidden])}")
        # What the other kernels meet from here on; the lines of a shape not reached yet stay as they were.
        found = [{"max_hidden": limit, **config._asdict()} for limit, config in best[name].items()]
        kept = [line for line in shipped if line["max_hidden"] not in best[name]]
        entry[bits] = sorted([*found, *kept], key=lambda line: line["max_hidden"] or float("inf"))
    return table


def fits(name: str, config: configs.Config, arch: str, dtype: torch.dtype, hidden_size: int) -> bool:
    """Whether the kernels that share a layout still agree: see kernels/sampled_grad.py.

    Columns are kept in tiles of sampled_grad_logits' block_v, which sampled_dhidden reads in steps of its own, and
    tokens in chunks of so many of the forward's block_n, of which the other kernels' must be parts.
    """
    shared = ("forward", *(other for other in KERNELS if other.startswith("sampled")))
    found = {other: configs.lookup(other, arch, dtype, hidden_size) for other in shared} | {name: config}
    whole_tile = found["sampled_grad_logits"].block_v % found["sampled_dhidden"].block_v == 0
    chunk = min(sampled_grad.BLOCKS_PER_CHUNK) * found["forward"].block_n
    return whole_tile and all(chunk % found[other].block_n == 0 for other in shared)


def make_step(kernel: Kernel, problem: Problem, backend: str) -> Callable[[], Any]:
    """The forward alone, or one forward's backward alone."""
    if not kernel.train:
        head = pf.LMHead(problem.weight)
        stats = ("log_sum_sq_probs",)
        return torch.no_grad()(lambda: pf.token_logprobs(problem.hidden, head, problem.targets, stats, backend=backend))
    leaves = problem.leaves(train_head="weight" in kernel.train)
    leaves.hidden.requires_grad_("hidden" in kernel.train)
    logprobs = pf.token_logprobs(
        leaves.hidden, pf.LMHead(leaves.weight), leaves.targets, grad_tolerance=kernel.tolerance, backend=backend
    ).logprobs
    trained = [getattr(leaves, name) for name in kernel.train]
    return lambda: torch.autograd.grad(logprobs, trained, leaves.upstream, retain_graph=True)


def to_json(table: dict[str, Any]) -> str:
    """The table with one configuration on a line."""
    text = json.dumps(table, indent=2)
    return re.sub(r"\{\s+([^{}]+?)\s+\}", lambda match: "{" + re.sub(r"\s+", " ", match[1]) + "}", text) + "\n"
