"""Tables and plots of what gpu_bench.py measured; ``python benchmarks/gpu_tables.py FOLDER`` writes them anew."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODES = {
    "forward": "forward",
    "forward_wpo": "forward with log Σ p²",
    "frozen": "forward + backward, frozen head",
    "trainable": "forward + backward, trainable head",
}
PROFILED_KERNELS = 20  # in the table; all of them stand in gpu_bench.json
Results = dict[str, Any]


def write(results: Results, out: Path) -> str:
    """gpu_bench.md and, where matplotlib can be imported, the plots; returns the Markdown."""
    text = "\n".join(_lines(results)) + "\n"
    (out / "gpu_bench.md").write_text(text)
    if any("ms" in case for case in results["cases"]):
        try:
            import matplotlib
        except ImportError:
            print("matplotlib is not installed: no plots")
        else:
            matplotlib.use("Agg")
            _plots(results, out)
    return text


def goals(results: Results) -> Iterator[tuple[str, float, float]]:
    """(what, measured, at most) of what the project set out to reach on an H100; only what was measured."""
    shape, tokens = "Llama-3 8B", 8192
    forward, frozen, trainable, trl = (
        find(results, shape, tokens, mode, method)
        for mode, method in (
            ("forward", "prefopt_fast, exact"),
            ("frozen", "prefopt_fast, 2⁻⁸"),
            ("trainable", "prefopt_fast, 2⁻⁸"),
            ("trainable", "TRL ChunkedLogProb"),
        )
    )
    product = _product(results, shape, tokens)
    if forward and product:
        yield (
            "time of the bare product over the forward's, at least 0.65: its inverse",
            forward["ms"] / product["ms"],
            1 / 0.65,
        )
    if trainable and trl:
        yield "forward + backward, trainable head, over TRL's", trainable["ms"] / trl["ms"], 0.5
    if frozen and forward:
        yield "forward + backward, frozen head, over the forward alone", frozen["ms"] / forward["ms"], 1.25
    if trainable:
        yield "extra memory, trainable head, MiB", trainable["extra_mib"], 256.0


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
    yield from _goal_lines(results)
    for shape in _unique(results, "shape"):
        yield from _shape_lines(results, shape)
    yield from _profile_lines(results)
    yield from _check_lines(results)
    if results["tuned"]:
        yield from ("", "## Tuned configurations", "", "```json", json.dumps(results["tuned"]), "```")
    if results["left_out"]:
        yield from ("", "## Left out for want of time", "", *(f"- {name}" for name in results["left_out"]))


def _goal_lines(results: Results) -> Iterator[str]:
    found = list(goals(results))
    if found:
        yield from (
            "",
            "## Goals (Llama-3 8B, N = 8192)",
            "",
            "| | measured | at most | met |",
            "| --- | --- | --- | --- |",
        )
    for name, measured, limit in found:
        yield f"| {name} | {measured:.2f} | {limit:.2f} | {'yes' if measured <= limit else 'no'} |"


def _shape_lines(results: Results, shape: str) -> Iterator[str]:
    for tokens in sorted(_unique(results, "tokens", shape=shape)):
        product = _product(results, shape, tokens)
        modes = [mode for mode in MODES if mode in _unique(results, "mode", shape=shape, tokens=tokens)]
        yield from ("", f"## {shape}, N = {tokens}", "")
        if product:
            yield f"Bare product: {product['ms']:.2f} ms, {product['tflops']:.0f} TFLOP/s."
            yield ""
        yield "| | " + " | ".join(f"{MODES[mode]}: ms | TFLOP/s | extra MiB" for mode in modes) + " |"
        yield "| --- |" + " --- | --- | --- |" * len(modes)
        for method in _unique(results, "method", shape=shape, tokens=tokens):
            cells = [method]
            for mode in modes:
                case = find(results, shape, tokens, mode, method)
                if case:
                    share = f" ({case['tflops'] / product['tflops']:.0%})" if product else ""
                    cells += [f"{case['ms']:.2f}", f"{case['tflops']:.0f}{share}", f"{case['extra_mib']:.0f}"]
                else:
                    cells += [_reason(results, shape, tokens, mode, method), "", ""]
            yield "| " + " | ".join(cells) + " |"


def _reason(results: Results, shape: str, tokens: int, mode: str, method: str) -> str:
    wanted = {"shape": shape, "tokens": tokens, "mode": mode, "method": method}
    reasons = _unique({"cases": [case for case in results["cases"] if "absent" in case]}, "absent", **wanted)
    return reasons[0].replace("|", "/") if reasons else ""


def _profile_lines(results: Results) -> Iterator[str]:
    for profile in results.get("profiles", ()):
        kernels = profile["kernels"]
        busy = sum(spent for _, spent in kernels.values())
        kept = "exact" if profile["columns_kept"] is None else f"{profile['columns_kept']:.1%} of the columns"
        yield from ("", f"## Profile: {profile['shape']}, N = {profile['tokens']}, {MODES[profile['mode']]}, 2⁻⁸", "")
        yield f"{profile['ms']:.2f} ms without the profiler, kernels {busy:.2f} ms; {kept}."
        yield from ("", "| kernel | launches | ms |", "| --- | --- | --- |")
        for name, (launches, spent) in list(kernels.items())[:PROFILED_KERNELS]:
            yield f"| {name.replace('|', '/')[:80]} | {launches} | {spent:.3f} |"
        rest = list(kernels.values())[PROFILED_KERNELS:]
        if rest:
            yield f"| {len(rest)} others | {sum(n for n, _ in rest)} | {sum(spent for _, spent in rest):.3f} |"


def _check_lines(results: Results) -> Iterator[str]:
    if not results["checks"]:
        return
    failed = sum(not check["passed"] for check in results["checks"])
    yield from ("", f"## Correctness: {len(results['checks'])} checks, {failed} failed", "")
    yield from ("| check | error | limit | |", "| --- | --- | --- | --- |")
    for check in results["checks"]:
        verdict = "" if check["passed"] else "failed"
        yield f"| {check['name'].replace('|', '/')} | {check['error']:.2e} | {check['limit']:.2e} | {verdict} |"


def _plots(results: Results, out: Path) -> None:
    _curves(results, out / "time.png", "ms", "milliseconds, forward + backward, trainable head")
    _curves(results, out / "memory.png", "extra_mib", "MiB above inputs and gradients, trainable head")
    _speedups(results, out / "speedup.png")
    _rates(results, out / "tflops.png")


def _colours(results: Results) -> dict[str, Any]:
    """One colour for a method in every plot: ours red, the others from the palette."""
    from matplotlib import colormaps

    names = _unique(results, "method")
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
    print(write(json.loads((folder / "gpu_bench.json").read_text()), folder))
