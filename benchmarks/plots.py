"""The report's pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import bench_linear_logprob as bench
import matplotlib
import peers
from bench_linear_logprob import Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

BLUE, PALE_BLUE, ORANGE, GREEN, PURPLE, GREY = "#1f5fa8", "#7fb0e0", "#d1662e", "#3f9c6b", "#8a62b5", "#8a8a8a"
COLORS = {"full logits": GREEN, "F.linear_cross_entropy": PURPLE, "TRL ChunkedLogProb": ORANGE, "bare product": GREY}
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.labelcolor": "#333333",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.dpi": 160,
}


def draw_all(results: Mapping[str, Any], output: Path) -> list[Path]:
    """One PNG for each picture that the results have something for."""
    drawings = {
        "time_tokens": draw_time_tokens,
        "time_vocab": draw_time_vocab,
        "memory_tokens": draw_memory,
        "error_tolerance": draw_tolerance,
        "product_and_rest": draw_split,
    }
    written = []
    for name, draw in drawings.items():
        with plt.rc_context(STYLE):
            figure = draw(results)
            if figure is not None:
                figure.savefig(output / f"{name}.png")
                plt.close(figure)
                written.append(output / f"{name}.png")
    return written


def color_of(name: str) -> str:
    if name.startswith("prefopt_fast"):
        return BLUE if " fast" in name else PALE_BLUE
    return COLORS.get(name, GREY)


def cases(results: Mapping[str, Any], section: str) -> list[tuple[dict[str, Any], dict[str, Row]]]:
    """(the case with its inputs' description, the present rows by name) of each case of a section."""
    found = []
    for case in results["sections"].get(section, ()):
        rows = {row["name"]: Row(**row) for row in case["rows"] if row["absent"] is None}
        found.append(({**results["inputs"][case["inputs"]], **case}, rows))
    return found


def draw_time_tokens(results: Mapping[str, Any]) -> Any:
    return _draw_times(results, "tokens", "tokens", "tokens", "Forward and backward, trainable head")


def draw_time_vocab(results: Mapping[str, Any]) -> Any:
    return _draw_times(results, "vocab", "vocab", "vocabulary", "Forward and backward over the vocabulary")


def _draw_times(results: Mapping[str, Any], section: str, key: str, label: str, title: str) -> Any:
    found = cases(results, section)
    if not found:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    names = _names(found)
    for name in names:
        points = [(case[key], rows[name].seconds, rows) for case, rows in found if name in rows]
        sizes = [size for size, _, _ in points]
        style = _line_style(name)
        left.plot(sizes, [seconds for _, seconds, _ in points], label=name, **style)
        if name == peers.PRODUCT.name:
            right.axhline(1.0, color=GREY, linestyle="--", linewidth=1.4)
        else:
            floors = [rows[peers.PRODUCT.name].seconds for _, _, rows in points]
            right.plot(sizes, [seconds / floor for (_, seconds, _), floor in zip(points, floors, strict=True)], **style)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(label)
        _ticks(axis.xaxis, sorted({case[key] for case, _ in found}))
    left.set_yscale("log")
    left.set_ylabel("seconds")
    left.set_title(title)
    right.set_ylabel("times the bare product")
    right.set_ylim(bottom=0)
    right.set_title("Over the product nobody can avoid")
    _caption(figure, results, found[0][0])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(names)))
    return figure


def draw_memory(results: Mapping[str, Any]) -> Any:
    found = cases(results, "tokens")
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for name in _names(found):
        sizes = [(case["tokens"], rows[name].extra_bytes) for case, rows in found if name in rows]
        points = [(tokens, size / 2**20) for tokens, size in sizes if size is not None]
        if name != peers.PRODUCT.name and points:
            axis.plot(*zip(*points, strict=True), label=name, **_line_style(name))
    tokens = [case["tokens"] for case, _ in found]
    logits = [4 * case["tokens"] * case["vocab"] / 2**20 for case, _ in found]
    axis.plot(tokens, logits, color="#444444", linestyle=":", linewidth=1.2, label="the N x V logits, fp32")
    axis.plot(
        tokens, [x / 10 for x in logits], color="#aaaaaa", linestyle=":", linewidth=1.2, label="a tenth of the logits"
    )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    _ticks(axis.xaxis, tokens)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:.2g}"))
    axis.set(xlabel="tokens", ylabel="MiB", title="Peak memory above inputs and gradients")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    _caption(figure, results, found[0][0])
    return figure


def draw_tolerance(results: Mapping[str, Any]) -> Any:
    found = cases(results, "tolerance")
    rows = found[0][1] if found else {}
    points = [
        (tolerance, rows[name])
        for tolerance in results["plan"]["tolerances"]
        if (name := peers.format_tolerance(tolerance)) in rows and rows[name].errors
    ]
    if not points:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    tolerances = [tolerance for tolerance, _ in points]
    left.plot(tolerances, tolerances, color=GREY, linestyle="--", linewidth=1.4, label="the tolerance")
    for name, color in (("dhidden", BLUE), ("dweight", ORANGE)):
        left.plot(tolerances, [row.errors[name] for _, row in points], "o-", color=color, label=name)
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter(FuncFormatter(_power_of_two))
    left.set(ylabel="relative error (Frobenius)", title="Error against tolerance")
    left.legend()
    floor = rows[peers.PRODUCT.name].seconds
    right.plot(tolerances, [row.seconds / floor for _, row in points], "o-", color=BLUE)
    right.axhline(1.0, color=GREY, linestyle="--", linewidth=1.4)
    right.set_ylim(bottom=0)
    right.set(ylabel="times the bare product", title="Time of forward and backward")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(_power_of_two))
        axis.set_xlabel("grad_tolerance")
    _caption(figure, results, found[0][0])
    return figure


def draw_split(results: Mapping[str, Any]) -> Any:
    found = cases(results, "main")
    rows = [row for _, named in found for row in named.values() if row.profile]
    if not rows:
        return None
    rows.sort(key=lambda row: sum(row.profile.values()), reverse=True)
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.45 * len(rows)), layout="constrained")
    names = [row.name for row in rows]
    products = [row.profile[bench.PRODUCTS] for row in rows]
    rests = [sum(row.profile.values()) - product for row, product in zip(rows, products, strict=True)]
    axis.barh(names, products, color=BLUE, height=0.62, label="matrix products")
    axis.barh(names, rests, left=products, color=ORANGE, height=0.62, alpha=0.85, label="the rest")
    for i, (product, rest) in enumerate(zip(products, rests, strict=True)):
        axis.annotate(
            f"{product:.3g} + {rest:.3g} s",
            (product + rest, i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="#444444",
        )
    axis.margins(x=0.16)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.set(
        xlabel="seconds, forward and backward, one thread, under the profiler",
        title="Time in matrix products and in the rest",
    )
    axis.legend(loc="upper right")
    _caption(figure, results, found[0][0])
    return figure


def _names(found: Iterable[tuple[dict[str, Any], dict[str, Row]]]) -> list[str]:
    return list(dict.fromkeys(name for _, rows in found for name in rows))


def _line_style(name: str) -> dict[str, Any]:
    if name == peers.PRODUCT.name:
        return {"color": GREY, "linestyle": "--", "linewidth": 1.4}
    return {"color": color_of(name), "marker": "o", "zorder": 3 if name.startswith("prefopt_fast") else 2}


def _ticks(axis: Any, values: list[int]) -> None:
    axis.set_major_locator(matplotlib.ticker.FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 10_000 else f"{value / 1000:.0f}k")
    )


def _power_of_two(value: float, _: Any) -> str:
    return peers.format_tolerance(value)


def _caption(figure: Any, results: Mapping[str, Any], case: Mapping[str, Any]) -> None:
    env = results["environment"]
    where = f"{env['device']}, {env['threads']} threads" if env["device"] else ""
    figure.suptitle(
        f"{case['source']} inputs, H {case['hidden']:,}, {case['dtype']} · {where} · {env['date'][:10]}",
        fontsize=8,
        color="#777777",
        x=0.99,
        ha="right",
    )
