"""Time, memory and error of every peer on a problem: a pytest-benchmark suite, and what report.py measures with.

As a suite (``pytest benchmarks/bench_linear_logprob.py``) each peer is one benchmark, on real inputs where
PREFOPT_FAST_MODEL and PREFOPT_FAST_DATA are set and otherwise on synthetic ones; PREFOPT_FAST_TOKENS, _VOCAB and
_HIDDEN set the size. :func:`compare` interleaves the peers instead, which a machine with other work needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import inputs
import peers
import pytest
import torch
from inputs import Problem
from peers import Peer
from prefopt_fast.kernels import cpu_passes
from torch import Tensor

import prefopt_fast as pf

PRODUCTS, COMPILED, OUTSIDE = "products", "passes in C", "outside of these"
# What torch's operators do, by their names; those that are not here are elementwise arithmetic.
_KINDS = {
    PRODUCTS: "mm addmm bmm baddbmm",
    "exponentials": "exp logsumexp _log_softmax _softmax _log_softmax_backward_data",
    "sums": "sum mv addmv dot amax max cumsum linalg_vector_norm",
    "gathers, scatters": "index index_select index_add index_fill gather scatter scatter_add nonzero cat stack sort "
    "argsort searchsorted index_put _index_put_impl bincount",
    "copies, zeros": "copy zero fill to _to_copy empty clone zeros uniform",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


@dataclass
class Row:
    """One peer on one problem: seconds of each round, and what else was measured (None where it was not).

    forward, backward: wall time. process: processor time of both, all threads. extra_bytes: peak above inputs and
    gradients, of the torch allocator on a GPU, of the process's resident set on a Linux CPU. profile: seconds by what
    torch's operators do, under the profiler, which follows one thread: torch has no other then. errors: relative
    (Frobenius), against float64. absent: why there is no measurement.
    """

    name: str
    note: str = ""
    absent: str | None = None
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    profile: dict[str, float] | None = None
    errors: dict[str, float] | None = None
    grad_report: dict[str, float] | None = None

    @property
    def total(self) -> list[float]:
        return [sum(pair) for pair in zip(self.forward, self.backward, strict=True)]

    @property
    def seconds(self) -> float:
        """Median wall time of forward and backward."""
        return statistics.median(self.total)

    @property
    def spread(self) -> float:
        """Half the range of the rounds, relative to the median."""
        return (max(self.total) - min(self.total)) / 2 / self.seconds


def compare(
    problem: Problem,
    candidates: Iterable[Peer],
    rounds: int,
    train_head: bool = True,
    memory: bool = True,
    split: Collection[str] = (),
    truth_tokens: int = 0,
) -> dict[str, Row]:
    """Rows of every candidate, in their order, the absent ones with the reason.

    Args:
        rounds: interleaved timings of each, after one untimed call that compiles and shows who is absent.
        train_head: whether the weight takes a gradient.
        memory: whether to measure peak memory, in one call of each.
        split: names of those whose time is also followed to where it goes, in one call of each.
        truth_tokens: where positive, also errors against float64 on that many first tokens.
    """
    torch.compiler.reset()  # shapes of earlier problems would count against torch.compile's limit of variants
    problem = problem.leaves(train_head)
    rows, present = {}, []
    for peer in candidates:
        rows[peer.name] = row = Row(peer.name, peer.note, absent=probe(peer, problem))
        if row.absent is None:
            present.append(peer)
    for i in range(rounds):
        for peer in present[i % len(present) :] + present[: i % len(present)]:
            row, (forward, backward, process) = rows[peer.name], time_once(peer, problem)
            row.forward.append(forward)
            row.backward.append(backward)
            row.process.append(process)
    extra = peak_memories([peer.name for peer in present], problem, train_head) if memory else {}
    truth = float64_truth(problem.first(truth_tokens), train_head) if truth_tokens else None
    for peer in present:
        row = rows[peer.name]
        row.extra_bytes = extra.get(peer.name)
        if peer.name in split:
            row.profile = profile(peer, problem)
        if truth is not None:
            row.errors = errors(peer, problem.first(truth_tokens), truth, train_head)
    return rows


def probe(peer: Peer, problem: Problem) -> str | None:
    """Run the peer once, which compiles what is compiled; returns why it cannot run, or None."""
    try:
        time_once(peer, problem)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return lines[0] if isinstance(error, peers.Absent) else f"{type(error).__name__}: {lines[0]}"[:300]
    finally:
        _clean(problem)
    return None


def time_once(peer: Peer, problem: Problem) -> tuple[float, float, float]:
    """Seconds of the forward and of the backward, and processor seconds of both; gradients are left cleared."""
    _clean(problem)
    processor, start = time.process_time(), time.perf_counter()
    output = peer.forward(problem)
    _synchronize(problem)
    middle = time.perf_counter()
    peers.backward(output, problem)
    _synchronize(problem)
    end, processor = time.perf_counter(), time.process_time() - processor
    del output
    _clean(problem)
    return middle - start, end - middle, processor


def peak_memories(names: list[str], problem: Problem, train_head: bool = True) -> dict[str, int | None]:
    """:func:`peak_memory` of the peers of these names in peers.py, each after one step that is not measured.

    On a CPU in a process of their own, whose malloc keeps nothing back: what earlier work had freed without returning
    it to the system would hide some of what they need, or seem to be theirs.
    """
    if problem.device.type == "cuda":
        return _measure_peaks(names, problem)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.pt"
        torch.save(problem.detached(), file)
        try:
            return _other_process().submit(_peaks_of_file, names, file, train_head, torch.get_num_threads()).result()
        except BrokenProcessPool:  # killed for its memory, maybe
            _other_process.cache_clear()
            raise


@functools.cache
def _other_process() -> ProcessPoolExecutor:
    """One for all: importing the peers takes longer than measuring small problems."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def _peaks_of_file(names: list[str], file: Path, train_head: bool, threads: int) -> dict[str, int | None]:
    return_freed_memory()
    torch.set_flush_denormal(True)  # as in report.py
    torch.set_num_threads(threads)
    return _measure_peaks(names, torch.load(file, weights_only=False).leaves(train_head))


def _measure_peaks(names: list[str], problem: Problem) -> dict[str, int | None]:
    known = {peer.name: peer for peer in peers.all_peers(problem.device)}
    found = {}
    for name in names:
        if name in known and probe(known[name], problem) is None:
            found[name] = peak_memory(known[name], problem)
    return found


def peak_memory(peer: Peer, problem: Problem) -> int | None:
    """Bytes above the inputs and the gradients that are left; None on a CPU whose kernel does not tell."""
    gc.collect()
    _clean(problem)
    if problem.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(peer, problem)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = _resident_peak(lambda: _step(peer, problem))
    extra = None if peak is None else max(0, peak - _gradient_bytes(problem))
    _clean(problem)
    return extra


def profile(peer: Peer, problem: Problem) -> dict[str, float]:
    """Seconds on one thread by what torch's operators and our compiled passes do, and outside of them.

    A Triton kernel that multiplies counts as outside: what is fused cannot be split.
    """
    _clean(problem)
    activities = [torch.profiler.ProfilerActivity.CPU]
    attribute = "self_cpu_time_total"
    if problem.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        attribute = "self_device_time_total"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _step(peer, problem)  # what is compiled is compiled again for another number of threads
        _clean(problem)
        with contextlib.ExitStack() as stack:
            for name in ("exp_sums", "keep_columns"):
                labelled = torch.profiler.record_function(COMPILED)(getattr(cpu_passes, name))
                stack.enter_context(mock.patch.object(cpu_passes, name, labelled))
            profiler = stack.enter_context(torch.profiler.profile(activities=activities))
            start = time.perf_counter()
            _step(peer, problem)
            _synchronize(problem)
            wall = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    _clean(problem)
    found = dict.fromkeys((*_KINDS, COMPILED, "elementwise", OUTSIDE), 0.0)
    for average in profiler.key_averages():
        if average.key == COMPILED:
            found[COMPILED] += getattr(average, attribute) * 1e-6
        elif average.key.startswith("aten::"):
            kind = _KIND_OF.get(average.key.removeprefix("aten::").rstrip("_"), "elementwise")
            found[kind] += getattr(average, attribute) * 1e-6
    found[OUTSIDE] = max(0.0, wall - sum(found.values()))
    return found


def float64_truth(problem: Problem, train_head: bool = True) -> dict[str, Tensor]:
    """Log-probs and gradients from full float64 logits."""
    hidden = problem.hidden.detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_(train_head)
    logprobs = pf.reference.token_logprobs(hidden, pf.LMHead(weight), problem.targets).logprobs
    logprobs.backward(problem.upstream.double())
    return _results(logprobs, hidden, weight)


def errors(peer: Peer, problem: Problem, truth: dict[str, Tensor], train_head: bool = True) -> dict[str, float] | None:
    """‖x − truth‖ / ‖truth‖ of the log-probs and gradients; None for a peer that returns a loss of its own."""
    problem = problem.leaves(train_head)
    output = peer.forward(problem)
    if output is None or not output.dim():
        return None
    peers.backward(output, problem)
    return relative_errors(_results(output, problem.hidden, problem.weight), truth)


def relative_errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """‖x − truth‖ / ‖truth‖ of each result in ``found``."""
    return {name: float((value.double() - truth[name]).norm() / truth[name].norm()) for name, value in found.items()}


def _results(logprobs: Tensor, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    values = {"logprobs": logprobs.detach(), "dhidden": hidden.grad, "dweight": weight.grad}
    return {name: value for name, value in values.items() if value is not None}


def _step(peer: Peer, problem: Problem) -> None:
    peers.backward(peer.forward(problem), problem)


def _clean(problem: Problem) -> None:
    peers.clear_gradients(problem)
    _synchronize(problem)


def _synchronize(problem: Problem) -> None:
    if problem.device.type == "cuda":
        torch.cuda.synchronize()


def _gradient_bytes(problem: Problem) -> int:
    gradients = (problem.hidden.grad, problem.weight.grad)
    return sum(gradient.numel() * gradient.element_size() for gradient in gradients if gradient is not None)


_M_MMAP_THRESHOLD = -3  # glibc's mallopt


def return_freed_memory() -> None:
    """From now on every sizable block comes from the kernel and goes back to it, where malloc is glibc's."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def _resident_peak(step: Callable[[], None]) -> int | None:
    """Bytes by which the resident set rises during ``step`` at most; None where the system does not tell."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(field_name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field_name}:"))


def _suite_problem() -> Problem:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = int(os.environ.get("PREFOPT_FAST_TOKENS", 1024))
    if os.environ.get("PREFOPT_FAST_MODEL") and os.environ.get("PREFOPT_FAST_DATA"):
        return inputs.real(tokens, device=device)
    vocab, hidden_size = (
        int(os.environ.get(f"PREFOPT_FAST_{name}", n)) for name, n in (("VOCAB", 32_000), ("HIDDEN", 576))
    )
    return inputs.synthetic(tokens, vocab, hidden_size, device=device)


@pytest.fixture(scope="module")
def problem() -> Iterator[Problem]:
    yield _suite_problem()


@pytest.mark.parametrize("train_head", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("peer", peers.all_peers("cuda" if torch.cuda.is_available() else "cpu"), ids=lambda p: p.name)
def test_forward_backward(benchmark: Any, problem: Problem, peer: Peer, train_head: bool) -> None:
    leaves = problem.leaves(train_head)
    if reason := probe(peer, leaves):
        pytest.skip(f"absent: {reason}")

    def setup() -> None:
        _clean(leaves)

    def step() -> None:
        _step(peer, leaves)
        _synchronize(leaves)

    benchmark.extra_info.update(inputs=problem.source, problem=problem.name, note=peer.note)
    benchmark.pedantic(step, setup=setup, rounds=3, warmup_rounds=0)
