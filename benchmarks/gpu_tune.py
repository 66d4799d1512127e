"""The offline tuner of kernels/configs.json, the table of launch configurations: ``make gpu-bench ARGS=--tune``.

A kernel is timed inside the call that launches it, on 16-bit operands of a small and a large hidden size, one
candidate after the other until the time is up. The fastest become the table's lines for this architecture.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import inputs
import torch
from prefopt_fast.kernels import configs

import prefopt_fast as pf

SHAPES = {2048: (151_936, 896), None: (128_256, 4096)}  # max_hidden of a line of the table: the (V, H) it is tuned on
TOKENS = 8192
QUICK_SHAPES = {None: (96, 32)}
QUICK_TOKENS = 32
SHARED_BYTES = 227 * 1024


def candidates(quick: bool) -> Iterator[configs.Config]:
    """Tiles by falling promise, with at most 128 accumulators per thread and stages that fit into shared memory."""
    if quick:
        yield configs.Config(16, 16, 16, 4, 1)
        return
    tiles = ((128, 256), (256, 128), (128, 128), (64, 256))
    for (block_n, block_v), num_warps, block_h, num_stages in itertools.product(
        tiles, (8, 4), (64, 128, 32), (3, 4, 2)
    ):
        accumulators = block_n * block_v / (32 * num_warps)
        if 64 <= accumulators <= 128 and 2 * block_h * (block_n + block_v) * num_stages < SHARED_BYTES:
            yield configs.Config(block_n, block_v, block_h, num_warps, num_stages)


def tune(
    device: str,
    backend: str,
    seconds: float,
    quick: bool,
    time_step: Callable[[Callable[[], Any]], float],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """The rewritten table, which the running process uses from here on; ``time_step`` gives a call's time in ms."""
    arch = configs.architecture(torch.device(device))
    table = configs._table()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    bits = str(8 * dtype.itemsize)
    kernels = {"forward": _forward_step, "grad_logits": _backward_step}
    shapes = QUICK_SHAPES if quick else SHAPES
    share = seconds / (len(kernels) * len(shapes))
    for kernel, make_step in kernels.items():
        best = {}
        for max_hidden, (vocab, hidden_size) in shapes.items():
            problem = inputs.synthetic(
                QUICK_TOKENS if quick else TOKENS, vocab, hidden_size, dtype=dtype, device=device
            )
            step = make_step(problem, backend)
            started = time.monotonic()
            times: dict[configs.Config, float] = {}
            for config in dict.fromkeys([configs.lookup(kernel, arch, dtype, hidden_size), *candidates(quick)]):
                if times and time.monotonic() - started > share:
                    log(f"tuning {kernel}, H {hidden_size}: out of time after {len(times)} configurations")
                    break
                with _only(table, arch, kernel, bits, config):
                    try:
                        times[config] = time_step(step)
                    except Exception as error:  # does not compile, or does not fit: no candidate
                        log(f"tuning {kernel}, H {hidden_size}: {tuple(config)}: {type(error).__name__}")
                        continue
                log(f"tuning {kernel}, H {hidden_size}: {tuple(config)}: {times[config]:.3f} ms")
            if not times:
                raise RuntimeError(f"no configuration of {kernel} runs")
            best[max_hidden] = min(times, key=times.__getitem__)
            log(f"tuning {kernel}, H {hidden_size}: best {tuple(best[max_hidden])}")
        lines = [{"max_hidden": limit, **config._asdict()} for limit, config in best.items()]
        _own_entry(table, arch, kernel)[bits] = lines
    return table


def to_json(table: dict[str, Any]) -> str:
    """The table with one configuration on a line."""
    text = json.dumps(table, indent=2)
    return re.sub(r"\{\s+([^{}]+?)\s+\}", lambda match: "{" + re.sub(r"\s+", " ", match[1]) + "}", text) + "\n"


def _own_entry(table: dict[str, Any], arch: str, kernel: str) -> dict[str, Any]:
    """The table's entry for ``arch``, which starts as the default's."""
    default = copy.deepcopy(table["default"][kernel])
    return table.setdefault(arch, {}).setdefault(kernel, default)


class _only:
    """Within this context the table holds one configuration for a kernel and operand width."""

    def __init__(self, table: dict[str, Any], arch: str, kernel: str, bits: str, config: configs.Config) -> None:
        self.entry, self.bits = _own_entry(table, arch, kernel), bits
        self.line = {"max_hidden": None, **config._asdict()}

    def __enter__(self) -> None:
        self.saved, self.entry[self.bits] = self.entry[self.bits], [self.line]

    def __exit__(self, *_: object) -> None:
        self.entry[self.bits] = self.saved


def _forward_step(problem: Any, backend: str) -> Callable[[], Any]:
    head = pf.LMHead(problem.weight)

    def step() -> None:
        with torch.no_grad():
            pf.token_logprobs(problem.hidden, head, problem.targets, ("log_sum_sq_probs",), backend=backend)

    return step


def _backward_step(problem: Any, backend: str) -> Callable[[], Any]:
    """The exact backward alone, of one forward's graph: its launches of grad_logits and the products between them."""
    hidden = problem.hidden.detach().requires_grad_()
    stats = pf.token_logprobs(hidden, pf.LMHead(problem.weight), problem.targets, grad_tolerance=0.0, backend=backend)
    upstream = torch.ones_like(stats.logprobs)
    return lambda: torch.autograd.grad(stats.logprobs, hidden, upstream, retain_graph=True)
