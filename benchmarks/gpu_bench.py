"""Everything a GPU can tell, in one command of at most ten minutes: correct, tuned, timed, compared, plotted.

``make gpu-bench`` checks the kernels against float64, tunes their configurations where asked (``ARGS=--tune``),
measures what the project's goals are about, profiles, and times ours beside every peer that can be imported: the most
important cases first, as many as the time allows, and what was left out is named. Results are written after every case,
so that a run cut off keeps what it measured; a part that fails is named, and the others go on. Parts that are not run
keep their results from earlier.
``--device cpu --quick`` takes the same way through tiny problems, to test this script.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
import os
import platform
import random
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import gpu_checks
import gpu_tables
import gpu_tune
import inputs
import peers
import torch
from inputs import Problem
from peers import Peer
from prefopt_fast.kernels import configs
from torch.autograd import DeviceType

import prefopt_fast as pf

ROOT = Path(__file__).parents[1]
TOKENS = (8192, 2048, 32_768, 4096, 16_384, 65_536)  # by falling importance
QUICK_SHAPES = {"tiny": (256, 32), "wide": (512, 16)}
QUICK_TOKENS = (64, 32)
MODES = ("trainable", "frozen", "forward", "forward_wpo")  # forward and backward; forward alone; with log Σ p² as well
PARTS: dict[str, dict[str, Any]] = {  # in the order in which they run: what they write, and what it is before
    "check": {"checks": []},
    "tune": {"tuned": None, "tuned_checks": []},
    "goals": {"goals": None},
    "profile": {"profiles": []},
    "measure": {"products": [], "cases": [], "left_out": []},
}
GOAL_ROUNDS = 60
PRODUCT_TOKENS = 8192  # of one bare product
FLUSH_BYTES = 256 << 20  # several times any L2 cache
PRODUCT = Peer("bare product", lambda problem: torch.mm(problem.hidden, problem.weight.T))
TRL = next(peer for peer in peers.OTHERS if peer.name.startswith("TRL"))


class Case(NamedTuple):
    shape: str
    tokens: int
    mode: str
    peer: Peer


class Bench:
    """The results, the time left, and the device everything runs on."""

    def __init__(self, device: str, out: Path, minutes: float, quick: bool) -> None:
        self.device, self.out, self.quick = device, out, quick
        self.started = time.monotonic()
        self.seconds = 60 * minutes
        # The torch path stands in for the kernels on a CPU, unless Triton interprets them.
        self.backend = "triton" if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "torch"
        self.shapes = QUICK_SHAPES if quick else inputs.GPU_MODELS
        self.tokens = QUICK_TOKENS if quick else TOKENS
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.flush = torch.empty(FLUSH_BYTES if device == "cuda" else 1, dtype=torch.int8, device=device)
        self.problems: dict[str, Problem] = {}
        self.results: dict[str, Any] = {"parts": {}}
        for empty in PARTS.values():
            self.results |= copy.deepcopy(empty)
        if (path := out / "gpu_bench.json").exists() and "parts" in (earlier := json.loads(path.read_text())):
            self.results |= earlier  # older ones do not say what made them
        self.results["environment"] = environment(device, self.backend)
        self.results["dtype"] = str(self.dtype).removeprefix("torch.")

    @property
    def left(self) -> float:
        """Seconds until the time is up."""
        return self.seconds - (time.monotonic() - self.started)

    def log(self, message: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f} s] {message}", flush=True)

    def save(self) -> str:
        """Write the results, and the report, which is returned."""
        partial = self.out / "gpu_bench.partial"
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        partial.replace(self.out / "gpu_bench.json")
        return gpu_tables.write(self.results, self.out)

    def run_part(self, name: str, work: Callable[[], None]) -> bool:
        """Run a part and note what became of it; whether the device still works."""
        self.results |= copy.deepcopy(PARTS[name])
        record: dict[str, Any] = {"environment": environment(self.device, self.backend)}
        record |= {"seconds": None, "error": "cut off"}  # what stays of a run that is killed
        self.results["parts"][name] = record
        self.save()
        started = time.monotonic()
        try:
            work()
            record["error"] = None
        except Exception as error:  # the other parts are still worth running
            traceback.print_exc()
            record["error"] = gpu_checks.describe(error)
        works = gpu_checks.works(self.device)
        if works:
            self.free()
        else:
            record["error"] = f"the device no longer works; {record['error']}"
        record["seconds"] = time.monotonic() - started
        self.log(f"{name}: {record['seconds']:.1f} s" + (f", {record['error']}" if record["error"] else ""))
        self.save()
        return works

    def problem(self, shape: str, tokens: int) -> Problem:
        if shape not in self.problems:
            vocab, hidden_size = self.shapes[shape]
            self.problems[shape] = inputs.synthetic(
                max(self.tokens), vocab, hidden_size, dtype=self.dtype, device=self.device, name=shape
            )
            self.log(f"made {shape}: {max(self.tokens)} tokens, V {vocab}, H {hidden_size}")
        return self.problems[shape].first(tokens)

    def check(self, after_tuning: bool = False) -> None:
        for check in gpu_checks.run_checks(self.device, self.backend, self.quick, after_tuning):
            self.log(
                f"{'ok    ' if check.passed else 'FAILED'} {check.name}: {check.error:.3g}, limit {check.limit:.3g}"
            )
            kept = self.results["tuned_checks" if after_tuning else "checks"]
            kept.append({**check._asdict(), "passed": check.passed})
            self.save()

    def tune(self, names: list[str], seconds: float) -> None:
        def milliseconds(step: Callable[[], Any]) -> float:
            return statistics.median(self.time(step, seconds=0.1))

        table = gpu_tune.tune(self.device, self.backend, seconds, names, self.quick, milliseconds, self.log)
        text = gpu_tune.to_json(table)
        (self.out / "configs.json").write_text(text)
        if not self.quick:
            (ROOT / "kernels" / "configs.json").write_text(text)
        self.results["tuned"] = table[configs.architecture(torch.device(self.device))]
        self.save()
        self.free()
        self.check(after_tuning=True)

    def goals(self) -> None:
        """What the goals compare, round after round, each in an order of its own: what ran just before acts on the
        clocks, and so on all of them alike."""
        shape, tokens = next(iter(self.shapes)), self.tokens[0]
        (fast, _, exact), _ = methods(self.backend)
        compared = {
            "product": ("forward", PRODUCT),
            "forward": ("forward", exact),
            "frozen": ("frozen", fast),
            "trainable": ("trainable", fast),
            "TRL": ("trainable", TRL),
        }
        found = self.results["goals"] = {"shape": shape, "tokens": tokens, "absent": {}, "extra_mib": {}, "ms": {}}
        steps = {}
        for name, (mode, peer) in compared.items():
            case = Case(shape, tokens, mode, peer)
            outcome = self.attempt(partial(self.first_call, case))
            if "absent" in outcome:
                found["absent"][name] = outcome["absent"]
            else:
                steps[name] = outcome["timed"]
                found["extra_mib"][name], found["ms"][name] = outcome["extra_mib"], []
        order = random.Random(0)
        for _ in range(2 if self.quick else GOAL_ROUNDS):
            for name in order.sample(list(steps), len(steps)):
                found["ms"][name].append(self.time_once(*steps[name]))
            self.save()

    def first_call(self, case: Case) -> dict[str, Any]:
        """What time_once takes, compiled, and the memory it takes."""
        problem, step = self.prepare(case)
        step()
        clear = partial(peers.clear_gradients, problem)
        return {"timed": (step, clear), "extra_mib": self.extra_bytes(step, problem) / 2**20}

    def profile(self) -> None:
        """Where the time of our steps at 2⁻⁸ goes, kernel by kernel: of operators on a CPU."""
        device = self.device == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * device
        shape, tokens = next(iter(self.shapes)), self.tokens[0]
        for mode in MODES[:2]:
            problem = self.problem(shape, tokens).leaves(train_head=mode == "trainable")
            step = partial(fast_step, problem, self.backend)
            report = step()  # compiles
            milliseconds = statistics.median(self.time(step, partial(peers.clear_gradients, problem)))
            peers.clear_gradients(problem)
            with torch.profiler.profile(activities=activities) as profiler:
                step()
                if device:
                    torch.cuda.synchronize()
            kernels: dict[str, list[float]] = {}
            for event in profiler.events():
                # A user's ranges would count their kernels twice.
                if (event.device_type == DeviceType.CUDA) == device and not event.is_user_annotation:
                    own = event.self_device_time_total if device else event.self_cpu_time_total
                    launches, spent = kernels.get(event.name, (0, 0.0))
                    kernels[event.name] = [launches + 1, spent + own / 1000]
            self.results["profiles"].append(
                {
                    "shape": shape,
                    "tokens": tokens,
                    "mode": mode,
                    "ms": milliseconds,
                    "columns_kept": None if report is None else report.columns_kept,
                    "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1][1])),
                }
            )
            self.log(f"profiled {shape}, N {tokens}, {mode}: {milliseconds:.3f} ms")
            self.save()

    def measure(self) -> None:
        """Every case in the order of its importance, until the time is up."""
        slow: dict[tuple[str, str, str], float] = {}  # seconds per token of what was measured already
        for case in self.cases():
            key = (case.shape, case.mode, case.peer.name)
            name = f"{case.shape}, N {case.tokens}, {case.mode}, {case.peer.name}"
            # Six calls and what surrounds them; a first call compiles.
            needed = 2 + 6 * slow.get(key, 0.0) * case.tokens + 40 * (case.peer.compiled and not self.quick)
            if needed > self.left:
                self.results["left_out"].append(name)
                continue
            record = {"shape": case.shape, "tokens": case.tokens, "mode": case.mode, "method": case.peer.name}
            record |= {"note": case.peer.note, **self.attempt(partial(self.run, case))}
            self.results["cases"].append(record)
            if "ms" in record:
                slow[key] = record["ms"] / 1000 / case.tokens
                self.log(f"{name}: {record['ms']:.3f} ms, {record['extra_mib']:.0f} MiB extra")
            else:
                self.log(f"{name}: {record['absent']}")
            self.save()
            if not gpu_checks.works(self.device):
                raise RuntimeError(name)
        if self.results["left_out"]:
            self.log(f"left out for want of time: {len(self.results['left_out'])} cases")
        self.save()

    def cases(self) -> Iterator[Case]:
        """Ours and TRL's before what else needs no torch.compile, and that before the rest; the first shape and number
        of tokens before the others."""
        ours, theirs = methods(self.backend)
        ours.append(TRL)
        plain = [peer for peer in theirs if not peer.compiled and peer is not TRL]
        compiled = [] if self.quick else [peer for peer in theirs if peer.compiled]
        first, *rest = self.shapes
        once, others = self.tokens[:1], self.tokens[1:]
        for group, shapes, lengths, modes in (
            (ours, [first], once, MODES),
            (plain, [first], once, MODES),
            (ours, rest, once, MODES),
            (ours, [first], others, MODES[:3]),
            (compiled, [first], once, MODES),
            (plain, rest, once, MODES),
            (ours, rest, others, MODES[:3]),
            (plain, [first, *rest], others, MODES[:3]),
            (compiled, rest, once, MODES[:2]),
        ):
            for tokens in lengths:
                yield from self.grid(shapes, tokens, modes, group)

    def grid(self, shapes: list[str], tokens: int, modes: tuple[str, ...], methods: list[Peer]) -> Iterator[Case]:
        for shape in shapes:
            for mode in modes:
                for peer in methods:
                    if runs_in(peer, mode):
                        yield Case(shape, tokens, mode, peer)

    def product(self, case: Case) -> None:
        """The rate of the bare product of a shape, once for each number of tokens up to PRODUCT_TOKENS."""
        tokens = min(case.tokens, PRODUCT_TOKENS)
        if any((p["shape"], p["tokens"]) == (case.shape, tokens) for p in self.results["products"]):
            return
        problem = self.problem(case.shape, tokens)
        out = problem.hidden.new_empty(tokens, problem.vocab)
        ms = statistics.median(self.time(lambda: torch.mm(problem.hidden, problem.weight.T, out=out), seconds=0.5))
        tflops = problem.product_flops / ms * 1e-9
        self.log(f"{case.shape}, N {tokens}, bare product: {ms:.3f} ms, {tflops:.0f} TFLOP/s")
        self.results["products"].append({"shape": case.shape, "tokens": tokens, "ms": ms, "tflops": tflops})

    def prepare(self, case: Case) -> tuple[Problem, Callable[[], None]]:
        """The case's operands as leaves, and one call of it."""
        problem = self.problem(case.shape, case.tokens).leaves(train_head=case.mode == "trainable")
        if case.mode == "forward_wpo":
            problem = problem.with_stats("log_sum_sq_probs")

        def step() -> None:
            if case.mode.startswith("forward"):
                with torch.no_grad():
                    case.peer.forward(problem)
            else:
                peers.backward(case.peer.forward(problem), problem)

        return problem, step

    def attempt(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``work`` returns, or why there is nothing: {"absent": reason}."""
        try:
            return work()
        except (peers.Absent, ImportError) as reason:
            return {"absent": str(reason)}
        except torch.OutOfMemoryError:
            absent = "out of memory"
        except Exception as error:  # a peer's, or ours: the others are still worth their time
            absent = gpu_checks.describe(error)
        if gpu_checks.works(self.device):
            self.free()
        return {"absent": absent}

    def run(self, case: Case) -> dict[str, Any]:
        """Median and quartiles of the time, and the peak of memory."""
        self.product(case)
        problem, step = self.prepare(case)
        if case.peer.compiled:
            torch.compiler.reset()  # what earlier cases compiled would count against the limit of variants
        step()  # compiles
        extra = self.extra_bytes(step, problem)
        times = self.time(step, lambda: peers.clear_gradients(problem))
        quartiles = statistics.quantiles(times, n=4)
        ms = statistics.median(times)
        # Recomputed logits are not counted: one product forward, one for each gradient.
        products = {"trainable": 3, "frozen": 2}.get(case.mode, 1)
        return {
            "ms": ms,
            "quartiles_ms": [quartiles[0], quartiles[2]],
            "repetitions": len(times),
            "extra_mib": extra / 2**20,
            "tflops": products * problem.product_flops / ms * 1e-9,
        }

    def extra_bytes(self, step: Callable[[], Any], problem: Problem) -> int:
        """Peak memory above the inputs and the gradients that are left; 0 on a CPU, whose allocator does not count."""
        if self.device != "cuda":
            step()
            return 0
        peers.clear_gradients(problem)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        gradients = [g for g in (problem.hidden.grad, problem.weight.grad) if g is not None]
        return torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients)

    def time(
        self, step: Callable[[], Any], prepare: Callable[[], Any] = lambda: None, seconds: float = 0.4
    ) -> list[float]:
        """Milliseconds of each call, 3 to 20 of them in about ``seconds``, the L2 cache flushed before each."""
        times: list[float] = []
        self.time_once(step, prepare)
        while len(times) < 3 or (len(times) < 20 and sum(times) < 1000 * seconds):
            times.append(self.time_once(step, prepare))
        return times

    def time_once(self, step: Callable[[], Any], prepare: Callable[[], Any]) -> float:
        prepare()
        if self.device != "cuda":
            start = time.perf_counter()
            step()
            return 1000 * (time.perf_counter() - start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        before.record()
        step()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)

    def free(self) -> None:
        """Return what an exception's frames held, or what other cases cannot use."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def fast_step(problem: Problem, backend: str) -> pf.GradReport | None:
    """Forward and backward at 2⁻⁸ into the leaves of ``problem``."""
    stats = pf.token_logprobs(
        problem.hidden, pf.LMHead(problem.weight), problem.targets, grad_tolerance=2.0**-8, backend=backend
    )
    peers.backward(stats.logprobs, problem)
    return stats.grad_report


def methods(backend: str) -> tuple[list[Peer], list[Peer]]:
    """Ours at each tolerance, and everybody else's."""
    ours = [
        Peer("prefopt_fast, 2⁻⁸", peers.ours(2.0**-8, backend), 'grad_tolerance = 2⁻⁸: "auto" for bf16'),
        Peer("prefopt_fast, 2⁻⁶", peers.ours(2.0**-6, backend), "grad_tolerance = 2⁻⁶"),
        Peer("prefopt_fast, exact", peers.ours(0.0, backend), "grad_tolerance = 0"),
    ]
    return ours, list(peers.OTHERS)


def runs_in(peer: Peer, mode: str) -> bool:
    """Without a gradient all our tolerances are one, and Liger's loss computes its gradients in the forward."""
    if not mode.startswith("forward"):
        return True
    return peer.name == "prefopt_fast, exact" or not peer.name.startswith(("prefopt_fast", "Liger"))


def environment(device: str, backend: str) -> dict[str, Any]:
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": platform.processor() or platform.machine(),
        "backend": backend,
        "kernels": kernels_digest(),
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in packages},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["architecture"] = configs.architecture(torch.device("cuda", 0))
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["multiprocessors"] = properties.multi_processor_count
        found["cuda"] = torch.version.cuda or torch.version.hip
    return found


def kernels_digest() -> str:
    """Of the sources that run, and of their configurations."""
    files = sorted(Path(configs.__file__).parent.glob("*.*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny problems, to test this script")
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.3,
        help="for all but imports, the case in progress at the end and plots, to which 10 minutes leave the rest",
    )
    parts = [part for part in PARTS if part != "tune"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument(
        "--tune",
        nargs="*",
        choices=gpu_tune.KERNELS,
        metavar="KERNEL",
        help="rewrite kernels/configs.json for this architecture: all kernels, or those named",
    )
    parser.add_argument("--tune-minutes", type=float, default=3.0)
    parser.add_argument("--out", type=Path, help="folder of the results; by default benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; --device cpu --quick tests this script without one")

    name = environment(options.device, "")["device"]
    out = options.out or ROOT / "benchmarks" / "results" / re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.device, out, options.minutes, options.quick)
    bench.log(json.dumps(bench.results["environment"]))
    work = {part: getattr(bench, part) for part in options.parts}
    if options.tune is not None:
        work["tune"] = partial(bench.tune, options.tune or list(gpu_tune.KERNELS), 60 * options.tune_minutes)
    failed = []
    for part in PARTS:
        if part in work:
            works = bench.run_part(part, work[part])
            if error := bench.results["parts"][part]["error"]:
                failed.append(f"{part}: {error}")
            checks = [check for key in PARTS[part] if key.endswith("checks") for check in bench.results[key]]
            failed += [check["name"] for check in checks if not check["passed"]]
            if not works:
                break
    print(bench.save(), flush=True)
    gpu_tables.plot(bench.results, out)
    for failure in failed:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
