"""``make bench``, ``prefopt-fast bench``: measure the LM-head peers, and write Markdown, JSON and plots.

The full mode takes about fifty minutes on two CPU cores and writes to benchmarks/results; ``--short`` takes seconds on
tiny shapes, to test it. ``--suites linear_logprob train_step drift`` also runs bench_train_step.py and the small model
of drift.py, ten minutes each; what they and the other parts of drift.py leave in the output folder becomes a section of
the report. ``--suites`` without a name writes the report again from the results that are there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import bench_linear_logprob as bench
import bench_train_step
import drift
import inputs
import peers
import plots
import rules
import torch
from bench_linear_logprob import Row
from inputs import Problem
from peers import Peer

import prefopt_fast as pf

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "peft", "accelerate")
SECTIONS = {"train_step": bench_train_step, "drift": drift}  # further results, by their file's stem
SWEEP = ("full logits", "F.linear_cross_entropy", "TRL ChunkedLogProb")  # beside ours and the floor


@dataclass(frozen=True)
class Plan:
    """What is measured: tokens N of each case, and interleaved rounds."""

    tokens: int
    rounds: int
    real_shape: tuple[int, int]  # (V, H) of the synthetic stand-in where there are no real inputs
    wide: tuple[str, int]  # of inputs.MODELS, and N
    sweep_tokens: tuple[int, ...]
    memory_tokens: int  # where the extra memory is compared with the logits
    long_tokens: tuple[int, int]  # ours alone, about where the memory budget is spent and beyond
    sweep_vocab: tuple[tuple[str, int], ...]  # V at the hidden size below
    sweep_vocab_shape: tuple[int, int]  # (N, H)
    sweep_rounds: int
    tolerances: tuple[float, ...]
    rule_tolerances: tuple[float, ...]
    truth_tokens: int
    compiled: bool


FULL = Plan(
    tokens=2048,
    rounds=5,
    real_shape=inputs.MODELS["SmolLM2 135M"],
    wide=("TinyLlama 1.1B", 2048),
    sweep_tokens=(256, 512, 1024, 2048, 4096),
    memory_tokens=4096,
    long_tokens=(8192, 16_384),
    sweep_vocab=(("32k", 32_000), ("49k", 49_152), ("128k", 128_256), ("152k", 151_936), ("256k", 256_000)),
    sweep_vocab_shape=(512, 576),
    sweep_rounds=2,
    tolerances=tuple(2.0**-k for k in (4, 5, 6, 7, 8, 9, 10, 12)),
    rule_tolerances=tuple(2.0**-k for k in (4, 6, 8, 10)),
    truth_tokens=1024,
    compiled=True,
)
SHORT = Plan(
    tokens=128,
    rounds=2,
    real_shape=(2048, 64),
    wide=("tiny", 64),
    sweep_tokens=(64, 128),
    memory_tokens=128,
    long_tokens=(192, 256),
    sweep_vocab=(("1k", 1024), ("2k", 2048)),
    sweep_vocab_shape=(64, 64),
    sweep_rounds=1,
    tolerances=(2.0**-4, 2.0**-8),
    rule_tolerances=(2.0**-4,),
    truth_tokens=64,
    compiled=False,
)
TINY = (1024, 256)  # (V, H) of the short mode's wide case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="tiny shapes, seconds: to test the benchmark itself")
    parser.add_argument("--output", type=Path, help="folder of the report (default: benchmarks/results)")
    parser.add_argument("--model", help="folder or hub id of the model for real inputs (default: PREFOPT_FAST_MODEL)")
    parser.add_argument("--data", help="preference pairs for real inputs (default: PREFOPT_FAST_DATA)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's own choice)")
    parser.add_argument("--suites", nargs="*", choices=("linear_logprob", *SECTIONS), default=["linear_logprob"])
    options = parser.parse_args()
    # Subnormal probabilities, of which synthetic inputs have more than real ones, cost full logits on some processors
    # ten times a product. Before threads start, which inherit it.
    torch.set_flush_denormal(True)
    if options.threads:
        torch.set_num_threads(options.threads)
    output = options.output or (inputs.CACHE / "short" if options.short else RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    if "linear_logprob" in options.suites:
        plan = SHORT if options.short else FULL
        measure(plan, options.device, options.model, options.data, output / "linear_logprob.json")
    given = [f"--{name}={value}" for name in ("model", "data") if (value := getattr(options, name))]
    for name, module in SECTIONS.items():
        if name in options.suites:
            part = ["small"] if name == "drift" else []
            command = [sys.executable, str(module.__file__), *part, f"--output={output}", *given]
            subprocess.run(command, check=True)
    text = write_report(output)
    print(text)
    print(f"report, JSON and plots in {output}")


def measure(plan: Plan, device: str, model: str | None, data: str | None, results_file: Path) -> dict[str, Any]:
    """Run every section; the JSON is written after each, so that a run that is cut off keeps what it measured."""
    started = time.monotonic()
    results: dict[str, Any] = {
        "environment": environment(device),
        "plan": asdict(plan),
        "peers": {},
        "inputs": {},
        "sections": {},
    }

    def save(name: str, problem: Problem, rows: Mapping[str, Row]) -> None:
        key = f"{problem.source}: {problem.name}"
        if key not in results["inputs"]:
            results["inputs"][key] = {
                "source": problem.source,
                "vocab": problem.vocab,
                "hidden": problem.hidden_size,
                "dtype": str(problem.hidden.dtype).removeprefix("torch."),
                **inputs.concentration(problem),
            }
        results["sections"].setdefault(name, []).append(
            {"inputs": key, "tokens": problem.tokens, "rows": [asdict(row) for row in rows.values()]}
        )
        write()
        print(f"[{time.monotonic() - started:6.0f} s] {name}: {key}, N {problem.tokens}", flush=True)

    def write() -> None:
        results["environment"]["minutes"] = round((time.monotonic() - started) / 60, 1)
        partial = results_file.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        partial.replace(results_file)

    ours, backend = peers.our_peers(device), "triton" if device != "cpu" else "torch"
    everybody = peers.all_peers(device)
    if not plan.compiled:
        everybody = [_left_out(peer) if peer.compiled else peer for peer in everybody]
    few = [*ours, *(peer for peer in peers.OTHERS if peer.name in SWEEP), peers.PRODUCT]
    results["peers"] = {peer.name: peer.note for peer in everybody}
    largest = max(plan.tokens, *plan.long_tokens, *plan.sweep_tokens)
    try:
        if plan is SHORT:
            raise FileNotFoundError("the short mode takes tiny synthetic inputs")
        whole = inputs.real(largest, device=device, model=model, data=data)
    except FileNotFoundError as error:
        results["environment"]["real_inputs"] = f"absent: {error}"
        whole = inputs.synthetic(largest, *plan.real_shape, device=device)

    problem = whole.first(plan.tokens)
    profiled = [peer.name for peer in everybody]
    rows = bench.compare(problem, everybody, plan.rounds, split=profiled, truth_tokens=plan.truth_tokens)
    rows[ours[0].name].grad_report = grad_report(problem, peers.FAST_TOLERANCE, backend)
    save("main", problem, rows)
    save("frozen", problem, bench.compare(problem, few, plan.rounds, train_head=False))
    with_squares = problem.with_stats("log_sum_sq_probs")
    save("wpo", problem, bench.compare(with_squares, everybody, plan.sweep_rounds, memory=False))

    name, tokens = plan.wide
    shape = inputs.MODELS.get(name, TINY)
    problem = inputs.synthetic(tokens, *shape, device=device, name=f"like {name}")
    profiled = [peer.name for peer in (*ours, *peers.FLOORS)]
    rows = bench.compare(problem, everybody, plan.rounds, split=profiled)
    rows[ours[0].name].grad_report = grad_report(problem, peers.FAST_TOLERANCE, backend)
    save("wide", problem, rows)

    for tokens in plan.sweep_tokens:
        problem = whole.first(tokens)
        save("tokens", problem, bench.compare(problem, few, plan.sweep_rounds))
    for tokens in plan.long_tokens:
        problem = whole.first(tokens)
        save("tokens", problem, bench.compare(problem, [*ours, peers.PRODUCT], plan.sweep_rounds))

    tokens, hidden_size = plan.sweep_vocab_shape
    for label, vocab in plan.sweep_vocab:
        problem = inputs.synthetic(tokens, vocab, hidden_size, device=device, name=f"V {label}, H {hidden_size}")
        save("vocab", problem, bench.compare(problem, few, plan.sweep_rounds, memory=False))

    problem = whole.first(plan.tokens)
    candidates = [
        Peer(peers.format_tolerance(tolerance), peers.ours(tolerance, backend)) for tolerance in plan.tolerances
    ]
    rows = bench.compare(
        problem, [*candidates, peers.PRODUCT], plan.sweep_rounds + 1, memory=False, truth_tokens=plan.truth_tokens
    )
    for tolerance in plan.tolerances:
        row = rows[peers.format_tolerance(tolerance)]
        if row.absent is None:
            row.grad_report = grad_report(problem, tolerance, backend)
    save("tolerance", problem, rows)
    if device == "cpu":
        results["rules"] = rules.compare_rules(whole.first(plan.truth_tokens), plan.rule_tolerances)
        write()
    return results


def _left_out(peer: Peer) -> Peer:
    def forward(problem: Problem) -> None:
        raise peers.Absent("left out of the short mode: compiling takes longer than all else")

    return peer._replace(forward=forward)


def grad_report(problem: Problem, tolerance: float, backend: str) -> dict[str, float] | None:
    """What the fast gradient says it did."""
    problem = problem.leaves()
    head = pf.LMHead(problem.weight)
    stats = pf.token_logprobs(problem.hidden, head, problem.targets, grad_tolerance=tolerance, backend=backend)
    peers.backward(stats.logprobs, problem)
    return None if stats.grad_report is None else asdict(stats.grad_report)


def environment(device: str) -> dict[str, Any]:
    """Device, versions, date: what a figure means nothing without."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "prefopt_fast": f"{pf.__version__} {_commit()}".strip(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# From results to figures. A section is a list of {"inputs", "tokens", "rows"}, a row what asdict made of a Row.


def rows_of(results: Mapping[str, Any], section: str, tokens: int | None = None) -> dict[str, Row]:
    """The present rows of a section's first case, or of the one with that many tokens; {} where there is none."""
    for case in results["sections"].get(section, ()):
        if tokens is None or case["tokens"] == tokens:
            return {row["name"]: Row(**row) for row in case["rows"] if row["absent"] is None}
    return {}


def ratio(rows: Mapping[str, Row], name: str, base: str) -> float | None:
    """Median over rounds of the time of ``name`` over that of ``base``, which ran in the same round."""
    if name not in rows or base not in rows:
        return None
    return statistics.median(a / b for a, b in zip(rows[name].total, rows[base].total, strict=True))


def inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value


def peer_figures(results: Mapping[str, Any], name: str) -> dict[str, float | None]:
    """The figures to reach, of one peer."""
    main, frozen = rows_of(results, "main"), rows_of(results, "frozen")
    plan, product = results["plan"], peers.PRODUCT.name
    memory = rows_of(results, "tokens", plan["memory_tokens"])
    case = results["sections"].get("tokens", [None])[0]
    logits = plan["memory_tokens"] * results["inputs"][case["inputs"]]["vocab"] * 4 if case else 0
    row = frozen.get(name)
    return {
        "over product": ratio(main, name, product),
        "over product, wide": ratio(rows_of(results, "wide"), name, product),
        "faster than full logits": inverse(ratio(main, name, "full logits")),
        "faster than TRL": inverse(ratio(main, name, "TRL ChunkedLogProb")),
        "memory over logits": memory[name].extra_bytes / logits if name in memory and logits else None,
        "backward over forward, frozen": (
            statistics.median(b / f for f, b in zip(row.forward, row.backward, strict=True)) if row else None
        ),
    }


class Goal(NamedTuple):
    figure: str
    bound: float
    at_least: bool
    value: float | None

    @property
    def reached(self) -> bool:
        return self.value is not None and (self.value >= self.bound if self.at_least else self.value <= self.bound)


def goals(results: Mapping[str, Any]) -> list[Goal]:
    fast, exact = list(results["peers"])[:2]
    ours, our_exact = peer_figures(results, fast), peer_figures(results, exact)
    cases = {key: results["sections"].get(key) for key in ("main", "wide")}
    hidden = {key: results["inputs"][case[0]["inputs"]]["hidden"] if case else "?" for key, case in cases.items()}
    memory, (spent, beyond) = (results["plan"][f"{key}_tokens"] for key in ("memory", "long"))
    before, after = (rows_of(results, "tokens", tokens).get(fast) for tokens in (spent, beyond))
    growth = after.extra_bytes / before.extra_bytes if before and after and before.extra_bytes else None
    trl = "times as fast as TRL's function"
    return [
        Goal(f"forward + backward over the bare product, H = {hidden['main']}", 1.35, False, ours["over product"]),
        Goal(f"the same at H = {hidden['wide']}, synthetic", 1.15, False, ours["over product, wide"]),
        Goal("times as fast as full logits with autograd", 2.5, True, ours["faster than full logits"]),
        Goal(trl, 5, True, ours["faster than TRL"]),
        Goal(f"extra memory over that of the logits, N = {memory:,}", 0.10, False, ours["memory over logits"]),
        Goal(f"extra memory at N = {beyond:,} over that at {spent:,}", 1.1, False, growth),
        Goal("frozen head: backward over forward", 0.15, False, ours["backward over forward, frozen"]),
        Goal(f"exact mode: {trl}", 2, True, our_exact["faster than TRL"]),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# From results to Markdown.


def write_report(output: Path) -> str:
    """report.md and the plots from the JSON files in ``output``; returns what a terminal shows of it."""
    results = json.loads((output / "linear_logprob.json").read_text())
    sections = [_heading(results), _goals_table(results), _peers_table(results)]
    detail = [
        _case_table(results, "main", "Trainable head"),
        _case_table(results, "wide", "Trainable head, larger hidden size"),
        _case_table(results, "frozen", "Frozen head"),
        _case_table(results, "wpo", "With WPO's statistic, log Σ p²"),
        _profile_table(results, "main", "Where the time goes"),
        _profile_table(results, "wide", "Where the time goes, larger hidden size"),
        _tolerance_table(results),
        _rules_table(results),
        _absent_list(results),
        _inputs_table(results),
    ]
    figures = plots.draw_all(results, output)
    pictures = "\n\n".join(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in figures)
    extra = []
    for name in SECTIONS:
        path = output / f"{name}.json"
        if path.exists():
            extra.append(SECTIONS[name].markdown(json.loads(path.read_text())))
    text = "\n\n".join([*sections, *extra, *filter(None, detail), pictures]) + "\n"
    (output / "report.md").write_text(text)
    return "\n\n".join([*sections, *extra])


def _heading(results: Mapping[str, Any]) -> str:
    env = results["environment"]
    versions = ", ".join(f"{name} {env[name]}" for name in PACKAGES)
    lines = [
        "# Log-probs and their gradients: measured",
        f"{env['device']}, {env['threads']} threads of {env['cores']} cores, load average {env['load_average']} at the "
        f"start; {env['date']}, {env.get('minutes', '?')} minutes; prefopt_fast {env['prefopt_fast']}, "
        f"Python {env['python']}, {versions}.",
        "Every peer computes the log-probs of the targets and the gradients of a weighted sum of them, from the same "
        "hidden states, weight and targets, in the same dtype. Times are medians of interleaved rounds; ratios are "
        "medians of the rounds' ratios; ± is half the range over the rounds.",
    ]
    if "real_inputs" in env:
        lines.append(f"**Real inputs {env['real_inputs']}; every table is on synthetic ones.**")
    return "\n\n".join(lines)


def _goals_table(results: Mapping[str, Any]) -> str:
    lines = ["## Figures to reach", "", "| figure | reach | measured | reached |", "| --- | --- | --- | --- |"]
    for goal in goals(results):
        verdict = "—" if goal.value is None else "yes" if goal.reached else "no"
        bound = f"{'≥' if goal.at_least else '≤'} {goal.bound:g}"
        lines.append(f"| {goal.figure} | {bound} | {_number(goal.value)} | {verdict} |")
    return "\n".join(lines)


def _peers_table(results: Mapping[str, Any]) -> str:
    """Every peer's figures, the absent ones with dashes."""
    figures = {name: peer_figures(results, name) for name in results["peers"]}
    names = next(iter(figures.values()))
    lines = [
        "## The same figures of every peer",
        "",
        _case_line(results, "main") + " Larger hidden size: " + _case_line(results, "wide"),
        "",
        f"| | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
    ]
    for name, values in figures.items():
        lines.append(f"| {name} | {' | '.join(map(_number, values.values()))} |")
    return "\n".join(lines)


def _case_line(results: Mapping[str, Any], section: str) -> str:
    if section not in results["sections"]:
        return "not measured."  # a run that was cut off
    case = results["sections"][section][0]
    found = results["inputs"][case["inputs"]]
    return (
        f"{found['source'].capitalize()} inputs ({case['inputs'].split(': ', 1)[1]}), N = {case['tokens']:,}, "
        f"V = {found['vocab']:,}, H = {found['hidden']:,}, {found['dtype']}."
    )


def _case_table(results: Mapping[str, Any], section: str, title: str) -> str:
    rows = rows_of(results, section)
    if not rows:
        return ""
    case = results["sections"][section][0]
    found = results["inputs"][case["inputs"]]
    flops = 2 * case["tokens"] * found["vocab"] * found["hidden"]
    lines = [
        f"## {title}",
        "",
        _case_line(results, section),
        "",
        "| | time | ± | forward | backward | processor | over product | GFLOP/s of the one product | extra memory | "
        "errors: log-prob, dhidden, dweight | |",
        "| --- |" + " --- |" * 10,
    ]
    for row in sorted(rows.values(), key=lambda row: row.seconds):
        error = ", ".join(f"{value:.1e}" for value in row.errors.values()) if row.errors else "—"
        cells = [
            row.name,
            _seconds(row.seconds),
            f"{row.spread:.0%}",
            _seconds(statistics.median(row.forward)),
            _seconds(statistics.median(row.backward)),
            _seconds(statistics.median(row.process)),
            _number(ratio(rows, row.name, peers.PRODUCT.name)),
            f"{flops / row.seconds / 1e9:,.0f}",
            _mebibytes(row.extra_bytes),
            error,
            row.note,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _profile_table(results: Mapping[str, Any], section: str, title: str) -> str:
    rows = {name: row.profile for name, row in rows_of(results, section).items() if row.profile}
    product = sum(rows.pop(peers.PRODUCT.name, {}).values())
    if not rows or not product:
        return ""
    kinds = list(next(iter(rows.values())))
    lines = [
        f"## {title}",
        "",
        _case_line(results, section) + f" One thread, under the profiler, over the bare product's {_seconds(product)} "
        "there.",
        "",
        f"| | all | {' | '.join(kinds)} |",
        "| --- | --- |" + " --- |" * len(kinds),
    ]
    for name, found in sorted(rows.items(), key=lambda item: sum(item[1].values())):
        cells = [_number(seconds / product) for seconds in (sum(found.values()), *found.values())]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    fast = next(iter(rows_of(results, section).values()))
    written = ratio(rows_of(results, section), peers.WRITTEN.name, peers.PRODUCT.name)
    if fast.grad_report and written:
        kept = fast.grad_report["columns_kept"]
        lines += [
            "",
            f"{fast.name} draws {kept:.1%} of the columns and multiplies them for dhidden and for dweight: "
            f"{1 + 2 * kept:.2f} products, with the gradients' memory written once {2 * kept + written:.2f} of the "
            "bare one, is its floor as far as small products run at the speed of large ones. The rest is, per logit, "
            "two passes: one exponentiates and sums, one averages for the control variate and scores the columns; then "
            "the rows of the weight and of its gradient that the drawn columns touch, and the rank-1 terms.",
        ]
    return "\n".join(lines)


def _tolerance_table(results: Mapping[str, Any]) -> str:
    rows = rows_of(results, "tolerance")
    present = [row for name, row in rows.items() if name != peers.PRODUCT.name]
    if not present:
        return ""
    lines = [
        "## Error against tolerance",
        "",
        _case_line(results, "tolerance") + " Errors of the first tokens, against float64.",
        "",
        "| tolerance | dhidden | dweight | time over product | columns kept | dense chunks |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in present:
        errors, report = row.errors or {}, row.grad_report or {}
        lines.append(
            f"| {row.name} | {_scientific(errors.get('dhidden'))} | {_scientific(errors.get('dweight'))} | "
            f"{_number(ratio(rows, row.name, peers.PRODUCT.name))} | "
            + (
                f"{report['columns_kept']:.1%} | {report['dense_chunks']} of {report['chunks']} |"
                if report
                else "— | — |"
            )
        )
    return "\n".join(lines)


def _rules_table(results: Mapping[str, Any]) -> str:
    if not results.get("rules"):
        return ""
    line = f"The first {results['plan']['truth_tokens']:,} tokens of: " + _case_line(results, "tolerance")
    return rules.markdown(results["rules"], line)


def _absent_list(results: Mapping[str, Any]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for section, cases in results["sections"].items():
        for case in cases:
            for row in case["rows"]:
                if row["absent"]:
                    where = reasons.setdefault((row["name"], row["absent"]), [])
                    where.append(section) if section not in where else None
    if not reasons:
        return ""
    lines = ["## Absent", ""]
    lines += [f"- {name} ({', '.join(where)}): {reason}" for (name, reason), where in reasons.items()]
    return "\n".join(lines)


def _inputs_table(results: Mapping[str, Any]) -> str:
    lines = [
        "## Inputs",
        "",
        "How concentrated the softmax is over the first 512 tokens; the synthetic inputs are made to match the real "
        "ones of a 135M-parameter model (benchmarks/inputs.py).",
        "",
        "| inputs | V | H | entropy, median and mean | largest probability | probabilities > 2⁻¹² | "
        "columns > 2⁻¹² in 128, in 512 tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, found in results["inputs"].items():
        lines.append(
            f"| {key} | {found['vocab']:,} | {found['hidden']:,} | "
            f"{found['entropy_median']:.2f}, {found['entropy_mean']:.2f} | "
            f"{found['top1_median']:.2f}, {found['top1_mean']:.2f} | "
            f"{found['above_2^-12_median']:.0f}, {found['above_2^-12_mean']:.0f} | "
            f"{found['columns_128']:.1%}, {found['columns_512']:.1%} |"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"


def _scientific(value: float | None) -> str:
    return "—" if value is None else f"{value:.1e}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _mebibytes(value: int | None) -> str:
    return "—" if value is None else f"{value / 2**20:,.0f} MiB"


if __name__ == "__main__":
    main()
