"""Tables and plots of what gpu_bench.py measured; ``python benchmarks/gpu_tables.py FOLDER`` writes them anew."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MODES = {
    "forward": "forward",
    "forward_wpo": "forward with log Σ p²",
    "frozen": "forward + backward, frozen head",
    "trainable": "forward + backward, trainable head",
}
PROFILED_KERNELS = 20  # in the table; all of them stand in gpu_bench.json
TIME_GOALS = (  # (what, the step, that over which it is, at most) of what the project set out to reach on an H100
    ("forward over the bare product, which is to have 0.65 of its rate", "forward", "product", 1 / 0.65),
    ("forward + backward, trainable head, over TRL's", "trainable", "TRL", 0.5),
    ("forward + backward, frozen head, over the forward alone", "frozen", "forward", 1.25),
)
MOST_MIB = 256.0
Results = dict[str, Any]


class Goal(NamedTuple):
    """What was measured in each round; where nothing was, the reason."""

    name: str
    measured: list[float]
    limit: float
    reason: str = ""

    @property
    def met(self) -> bool:
        return bool(self.measured) and statistics.median(self.measured) <= self.limit


def write(results: Results, out: Path) -> str:
    """gpu_bench.md; returns it."""
    text = "\n".join(_lines(results)) + "\n"
    (out / "gpu_bench.md").write_text(text)
    return text


def plot(results: Results, out: Path) -> None:
    """The plots, where matplotlib can be imported and anything was timed."""
    if any("ms" in case for case in results["cases"]):
        try:
            import matplotlib
        except ImportError:
            print("matplotlib is not installed: no plots")
        else:
            matplotlib.use("Agg")
            _plots(results, out)


def goals(results: Results) -> Iterator[Goal]:
    """Each goal, with the ratio of every round and with extra memory in MiB."""
    found = results.get("goals") or {"absent": {}, "ms": {}, "extra_mib": {}}
    error = results.get("parts", {}).get("goals", {}).get("error")

    def reason(*steps: str) -> str:
        return next((found["absent"][step] for step in steps if step in found["absent"]), error or "not run")

    for name, step, base, limit in TIME_GOALS:
        rounds = zip(found["ms"].get(step, []), found["ms"].get(base, []), strict=False)  # a last one may be cut off
        yield Goal(name, [ms / other for ms, other in rounds], limit, reason(step, base))
    for step in ("trainable", "frozen"):
        extra = [found["extra_mib"][step]] if step in found["extra_mib"] else []
        yield Goal(f"extra memory, {step} head, MiB", extra, MOST_MIB, reason(step))


def find(results: Results, shape: str, tokens: int, mode: str, method: str) -> Results | None:
    """The measurement of a case, or None where there is none."""
    wanted = (shape, tokens, mode, method)
    for case in results["cases"]:
        if (case["shape"], case["tokens"], case["mode"], case["method"]) == wanted and "ms" in case:
            return case
    return None


def _product(results: Results, shape: str, tokens: int) -> Results | None:
    """The bare product's measurement, scaled from the largest that was made where ``tokens`` are more."""
    products = [p for p in results["products"] if p["shape"] == shape and p["tokens"] <= tokens]
    if not products:
        return None
    nearest = max(products, key=lambda p: p["tokens"])
    return {**nearest, "ms": nearest["ms"] * tokens / nearest["tokens"]}


def _unique(results: Results, field: str, **fixed: Any) -> list[Any]:
    cases = (case for case in results["cases"] if all(case[name] == value for name, value in fixed.items()))
    return list(dict.fromkeys(case[field] for case in cases))


def _lines(results: Results) -> Iterator[str]:
    environment = results["environment"]
    versions = ", ".join(f"{name} {found or 'absent'}" for name, found in environment["versions"].items())
    yield f"# Measured on {environment['device']}"
    yield ""
    yield (
        f"{environment['date']}; {environment.get('memory_gib', '?')} GiB, "
        f"{environment.get('multiprocessors', '?')} multiprocessors, CUDA {environment.get('cuda', 'none')}, "
        f"Python {environment['python']}, {versions}; {results['dtype']}. Written by `make gpu-bench`."
    )
    yield ""
    yield (
        "Medians of 3 to 20 calls between CUDA events, the L2 cache flushed before each. Synthetic inputs, as "
        "concentrated as a real model's (benchmarks/inputs.py). Extra memory: peak above inputs and gradients. "
        "TFLOP/s: 2NVH for the forward and for each gradient, recomputed logits not counted, and their share of the "
        "bare product's rate on the same operands."
    )
    yield from _part_lines(results)
    yield from _goal_lines(results)
    for shape in _unique(results, "shape"):
        yield from _shape_lines(results, shape)
    yield from _profile_lines(results)
    yield from _check_lines(results)
    if results["tuned"]:
        yield from ("", "## Tuned configurations", "", "```json", json.dumps(results["tuned"]), "```")
    if results["left_out"]:
        yield from ("", "## Left out for want of time", "", *(f"- {name}" for name in results["left_out"]))


def _part_lines(results: Results) -> Iterator[str]:
    parts = results.get("parts")
    if parts:
        yield from ("", "| part | run | sources | seconds | |", "| --- | --- | --- | --- | --- |")
        for name, part in parts.items():
            run, seconds = part["environment"], "" if part["seconds"] is None else f"{part['seconds']:.0f}"
            yield f"| {name} | {run['date']} | {run['kernels']} | {seconds} | {_cell(part['error'] or '')} |"


def _goal_lines(results: Results) -> Iterator[str]:
    found = results.get("goals")
    yield from ("", "## Goals" + (f" ({found['shape']}, N = {found['tokens']})" if found else ""), "")
    yield "Medians over interleaved rounds of one call each, and quartiles."
    yield from ("", "| | measured | quartiles | at most | met |", "| --- | --- | --- | --- | --- |")
    for goal in goals(results):
        if goal.measured:
            cells = [f"{statistics.median(goal.measured):.3f}", _quartiles(goal.measured)]
        else:
            cells = [f"not measured: {_cell(goal.reason)}", ""]
        verdict = ("yes" if goal.met else "no") if goal.measured else ""
        yield "| " + " | ".join([goal.name, *cells, f"{goal.limit:.2f}", verdict]) + " |"


def _quartiles(values: list[float]) -> str:
    if len(values) < 2:
        return ""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.3f} to {high:.3f}"


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _shape_lines(results: Results, shape: str) -> Iterator[str]:
    for tokens in sorted(_unique(results, "tokens", shape=shape)):
        product = _product(results, shape, tokens)
        cases = {
            (case["method"], case["mode"]): case
            for case in results["cases"]
            if (case["shape"], case["tokens"]) == (shape, tokens)
        }
        modes = [mode for mode in MODES if any(mode == found for _, found in cases)]
        yield from ("", f"## {shape}, N = {tokens}", "")
        if product:
            yield f"Bare product: {product['ms']:.2f} ms, {product['tflops']:.0f} TFLOP/s."
            yield ""
        yield "| | " + " | ".join(f"{MODES[mode]}: ms | TFLOP/s | extra MiB" for mode in modes) + " |"
        yield "| --- |" + " --- | --- | --- |" * len(modes)
        for method in dict.fromkeys(method for method, _ in cases):
            cells = [method]
            for mode in modes:
                case = cases.get((method, mode), {"absent": ""})
                if "ms" in case:
                    share = f" ({case['tflops'] / product['tflops']:.0%})" if product else ""
                    cells += [f"{case['ms']:.2f}", f"{case['tflops']:.0f}{share}", f"{case['extra_mib']:.0f}"]
                else:
                    cells += [_cell(case["absent"]), "", ""]
            yield "| " + " | ".join(cells) + " |"


def _profile_lines(results: Results) -> Iterator[str]:
    for profile in results.get("profiles", ()):
        kernels = profile["kernels"]
        busy = sum(spent for _, spent in kernels.values())
        kept = "exact" if profile["columns_kept"] is None else f"{profile['columns_kept']:.1%} of the columns"
        yield from ("", f"## Profile: {profile['shape']}, N = {profile['tokens']}, {MODES[profile['mode']]}, 2⁻⁸", "")
        yield f"{profile['ms']:.2f} ms without the profiler, kernels {busy:.2f} ms; {kept}."
        yield from ("", "| kernel | launches | ms |", "| --- | --- | --- |")
        for name, (launches, spent) in list(kernels.items())[:PROFILED_KERNELS]:
            yield f"| {_cell(name)[:80]} | {launches} | {spent:.3f} |"
        rest = list(kernels.values())[PROFILED_KERNELS:]
        if rest:
            yield f"| {len(rest)} others | {sum(n for n, _ in rest)} | {sum(spent for _, spent in rest):.3f} |"


def _check_lines(results: Results) -> Iterator[str]:
    for checks, when in ((results["checks"], ""), (results.get("tuned_checks"), " of the tuned configurations")):
        if checks:
            failed = sum(not check["passed"] for check in checks)
            yield from ("", f"## Correctness{when}: {len(checks)} checks, {failed} failed", "")
            yield from ("| check | error | limit | |", "| --- | --- | --- | --- |")
            for check in checks:
                verdict = "" if check["passed"] else "failed"
                yield f"| {_cell(check['name'])} | {check['error']:.2e} | {check['limit']:.2e} | {verdict} |"


def _plots(results: Results, out: Path) -> None:
    _curves(results, out / "time.png", "ms", "milliseconds, forward + backward, trainable head")
    _curves(results, out / "memory.png", "extra_mib", "MiB above inputs and gradients, trainable head")
    _speedups(results, out / "speedup.png")
    _rates(results, out / "tflops.png")


def _colours(results: Results) -> dict[str, Any]:
    """One colour in every plot for each method that was timed: ours red, the others from the palette."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(case["method"] for case in results["cases"] if "ms" in case))
    ours = [name for name in names if name.startswith("prefopt_fast")]
    others = [name for name in names if name not in ours]
    reds = {name: colormaps["Reds"](0.9 - 0.2 * i) for i, name in enumerate(ours)}
    return reds | {name: colormaps["tab10"]((0, 1, 2, 4, 5, 6, 7, 8, 9)[i % 9]) for i, name in enumerate(others)}


def _curves(results: Results, path: Path, field: str, label: str) -> None:
    """One panel for a shape: ``field`` against the number of tokens."""
    from matplotlib import pyplot

    shapes, colours = _unique(results, "shape"), _colours(results)
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(4.2 * len(shapes), 4.4), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        tokens = sorted(_unique(results, "tokens", shape=shape))
        for method, colour in colours.items():
            found = [find(results, shape, n, "trainable", method) for n in tokens]
            points = [(case["tokens"], case[field]) for case in found if case]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=method)
        axis.set(title=shape, xlabel="tokens", xscale="log", yscale="log" if field == "ms" else "symlog")
        axis.set_xticks(tokens, [f"{n // 1024}k" if n >= 1024 else str(n) for n in tokens])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(label)
    handles = dict(pair[::-1] for axis in axes[0] for pair in zip(*axis.get_legend_handles_labels(), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _speedups(results: Results, path: Path) -> None:
    """How many times longer each method takes than ours, frozen and trainable head, at the first number of tokens."""
    from matplotlib import pyplot

    reference = "prefopt_fast, 2⁻⁸"
    tokens = results["cases"][0]["tokens"]
    shapes, colours = _unique(results, "shape", tokens=tokens), _colours(results)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for axis, mode in zip(axes, ("frozen", "trainable"), strict=True):
        for row, (method, colour) in enumerate(colours.items()):
            for column, shape in enumerate(shapes):
                ours = find(results, shape, tokens, mode, reference) or find(
                    results, shape, tokens, mode, "prefopt_fast, exact"
                )
                case = find(results, shape, tokens, mode, method)
                if ours and case:
                    width = 0.8 / len(colours)
                    axis.bar(column - 0.4 + (row + 0.5) * width, case["ms"] / ours["ms"], width, color=colour)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(title=f"{MODES[mode]}, N = {tokens}", ylabel=f"time over that of {reference}")
        axis.set_xticks(range(len(shapes)), shapes)
    _legend(figure, colours)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _rates(results: Results, path: Path) -> None:
    """TFLOP/s of every method and mode at the first number of tokens, and the bare product's as a line."""
    from matplotlib import pyplot

    tokens = results["cases"][0]["tokens"]
    shapes, colours = _unique(results, "shape", tokens=tokens), _colours(results)
    modes = ("forward", "frozen", "trainable")
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(4.2 * len(shapes), 4.4), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        width = 0.8 / len(colours)
        for row, (method, colour) in enumerate(colours.items()):
            for column, mode in enumerate(modes):
                if case := find(results, shape, tokens, mode, method):
                    axis.bar(column - 0.4 + (row + 0.5) * width, case["tflops"], width, color=colour)
        if product := _product(results, shape, tokens):
            axis.axhline(product["tflops"], color="black", linewidth=0.8, linestyle="--")
        axis.set(title=f"{shape}, N = {tokens}")
        axis.set_xticks(range(len(modes)), modes)
    axes[0][0].set_ylabel("TFLOP/s (dashed: bare product)")
    _legend(figure, colours)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _legend(figure: Any, colours: dict[str, Any]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=method) for method, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize="small")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = json.loads((folder / "gpu_bench.json").read_text())
    print(write(results, folder))
    plot(results, folder)
