"""What the demo prints, writes and draws. Every sentence about who wins is computed from the numbers."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import matplotlib
import torch
import transformers

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .metrics import running_mean

Scores = Mapping[str, float]
SeedResults = Mapping[str, Any]

COLUMNS = {"reward": "reward", "style": "style", "accuracy": "accuracy", "perfect": "perfect", "kl": "KL"}
OPERATION_COLUMNS = ("copy", "sort", "reverse")
BINS = [10 ** (step / 10) for step in range(-40, 1)]  # of WPO weights, 10⁻⁴ to 1
MAX_LOSS = 0.05  # of accuracy, that still counts as kept

COLORS = {
    "weak SFT": "#b9bec6",
    "weak aligned (DPO)": "#7d8590",
    "strong SFT": "#c9a86a",
    "strong SFT on chosen": "#a67c2d",
    "strong DPO": "#d1662e",
    "strong WSPO token": "#7fb0de",
    "strong WSPO sequence": "#2f6db3",
    "DPO": "#d1662e",
    "WPO sampled": "#2f6db3",
    "WPO greedy": "#3f9c6b",
    "WPO none": "#8a64b0",
    "on-policy": "#2f6db3",
    "weak model's": "#7d8590",
    "far": "#d1662e",
}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelcolor": "#444a52",
    "axes.edgecolor": "#b9bec6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaed",
    "grid.linewidth": 0.8,
    "text.color": "#23272e",
    "xtick.color": "#444a52",
    "ytick.color": "#444a52",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


# ---- tables


def spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean ± standard deviation; the mean alone of a single value."""
    text = f"{fmean(values):{sign}.{digits}f}"
    return f"{text}±{stdev(values):.{digits}f}" if len(values) > 1 else text


def score_table(scores: Mapping[str, Sequence[Scores]], head: str) -> list[list[str]]:
    """Rows of cells, a heading first, from each method's scores of every seed."""
    rows = [[head, *COLUMNS.values(), *OPERATION_COLUMNS]]
    for name, seeds in scores.items():
        cells = [spread([seed[metric] for seed in seeds]) for metric in COLUMNS]
        rows.append([name, *cells, *(f"{fmean(seed[op] for seed in seeds):.2f}" for op in OPERATION_COLUMNS)])
    return rows


def weight_table(results: Sequence[SeedResults]) -> list[list[str]]:
    weights = by_source(results)
    alignments = next(iter(weights.values())).keys()
    rows = [["pairs", *(f"{alignment}: {what}" for alignment in alignments for what in ("mean", "share"))]]
    for source, of in weights.items():
        cells = (spread([measure(w) for w in of[a]]) for a in alignments for measure in (fmean, effective))
        rows.append([source, *cells])
    return rows


def as_text(rows: Sequence[Sequence[str]]) -> str:
    columns = []
    for column in zip(*rows, strict=True):
        width, numbers = max(map(len, column)), is_numeric(column)
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in column])
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---:" if is_numeric(column) else "---" for column in zip(*rows, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def is_numeric(column: Sequence[str]) -> bool:
    """Whether every cell below the heading begins as a number does."""
    return all(cell[0] in "+-0123456789" for cell in column[1:])


# ---- verdicts


class Claim(NamedTuple):
    """``differences``, one for each seed, support the claim where they are above ``threshold``."""

    text: str
    differences: list[float]
    threshold: float = 0.0

    @property
    def row(self) -> list[str]:
        support = sum(difference > self.threshold for difference in self.differences)
        n = len(self.differences)
        verdict = "holds" if support == n else "mixed" if support else "does not hold"
        return [verdict, f"{support} of {n}", spread(self.differences, sign="+"), self.text]


def claims(results: Sequence[SeedResults]) -> list[Claim]:
    def between(methods: Mapping[str, Sequence[Scores]], a: str, b: str, metric: str) -> list[float]:
        return [x[metric] - y[metric] for x, y in zip(methods[a], methods[b], strict=True)]

    transfer, sft = transfer_scores(results), "strong SFT"
    made = []
    for level in ("sequence", "token"):
        wspo = f"strong WSPO {level}"
        made += [
            Claim(f"WSPO {level} takes style over: above strong SFT", between(transfer, wspo, sft, "style")),
            Claim(
                f"WSPO {level} goes beyond its teacher's style", between(transfer, wspo, "weak aligned (DPO)", "style")
            ),
            Claim(
                f"WSPO {level} keeps reversing: at most {MAX_LOSS} below strong SFT",
                between(transfer, wspo, sft, "reverse"),
                -MAX_LOSS,
            ),
            Claim(f"WSPO {level} beats SFT on chosen in reward", between(transfer, wspo, f"{sft} on chosen", "reward")),
            Claim(f"WSPO {level} beats direct DPO in reward", between(transfer, wspo, "strong DPO", "reward")),
        ]
    weights = by_source(results)
    for source in ("weak model's", "far"):
        pairs = zip(weights["on-policy"]["sampled"], weights[source]["sampled"], strict=True)
        made.append(
            Claim(f"on-policy pairs outweigh {source} pairs (sampled)", [fmean(a) - fmean(b) for a, b in pairs])
        )
    for setting in results[0]["wpo"]["settings"]:
        scores = wpo_scores(results, setting)
        made += [
            Claim(f"{name} beats DPO in reward, {setting}", between(scores, name, "DPO", "reward"))
            for name in scores
            if name != "DPO"
        ]
    return made


# ---- results by what they are of


def transfer_scores(results: Sequence[SeedResults]) -> dict[str, list[Scores]]:
    return by_name([result["weak_to_strong"]["scores"] for result in results])


def wpo_scores(results: Sequence[SeedResults], setting: str) -> dict[str, list[Scores]]:
    return by_name([result["wpo"]["settings"][setting]["scores"] for result in results])


def by_source(results: Sequence[SeedResults]) -> dict[str, dict[str, list[list[float]]]]:
    """Initial weights: source → alignment → one list for each seed."""
    return {source: by_name(of) for source, of in by_name([result["wpo"]["weights"] for result in results]).items()}


def by_name(seeds: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [seed[name] for seed in seeds] for name in seeds[0]}


def effective(weights: Sequence[float]) -> float:
    return sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)


# ---- the report


class Section(NamedTuple):
    title: str
    note: str
    rows: list[list[str]]  # the heading first


def sections(results: Mapping[str, Any]) -> list[Section]:
    seeds, recipe = list(results["seeds"].values()), results["recipe"]
    over = count(seeds) + ", mean±standard deviation" * (len(seeds) > 1)
    says = dict(seeds[0]["weak_to_strong"]["says"])
    half = recipe["steps"] * recipe["wpo_batch"] // 2
    labels = {"right labels": "the judge's labels", "coin-flip labels": "labels decided by a coin"}
    return [
        Section(
            "Weak to strong",
            f"{over}. One response sampled to each of {recipe['test_prompts']} held-out prompts.\n"
            "Reward: style (0 to 1) plus 1 for a correct answer; perfect: both in full. KL: mean of\n"
            "log π - log π_SFT over the sampled responses, in nats per response, π_SFT the model that training\n"
            "started from. The recipe was settled on seeds 100 to 102, which are not among the default ones.",
            score_table(transfer_scores(seeds), "model"),
        ),
        Section(
            "What they say",
            f"Seed {next(iter(results['seeds']))}, asked “{says.pop('prompt')}”.",
            [["model", "response"], *([name, text] for name, text in says.items())],
        ),
        Section(
            "WPO: weights of pairs before training",
            "Share: effective sample size over the number of pairs. On-policy pairs are sampled from the strong\n"
            "SFT model; far ones answer four times in five with any symbols.",
            weight_table(seeds),
        ),
        *(
            Section(
                f"WPO against DPO, {setting}",
                f"{recipe['steps']} steps on {half} on-policy and {half} far pairs, these with {labels[setting]}.",
                score_table(wpo_scores(seeds, setting), "loss"),
            )
            for setting in seeds[0]["wpo"]["settings"]
        ),
        Section(
            "What holds",
            "Seeds in which the difference goes the claimed way.",
            [["verdict", "seeds", "difference", "claim"], *(claim.row for claim in claims(seeds))],
        ),
    ]


def write(results: Mapping[str, Any], output_dir: Path, seconds: float, processes: int) -> str:
    """Write results.json, results.md and the pictures; returns what to print."""
    seeds = list(results["seeds"].values())
    parts = sections(results)
    run = {
        "seconds": round(seconds),
        "processes": processes,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in PICTURES.items():
            draw(seeds, output_dir / name)
    markdown = [
        "# Weak-to-strong with WSPO, and WPO against DPO",
        *(f"## {part.title}\n\n{part.note}\n\n{as_markdown(part.rows)}" for part in parts),
        "## Pictures",
        *(f"![{name}]({name})" for name in PICTURES),
        "Run: " + ", ".join(f"{name} {value}" for name, value in run.items()) + ".",
    ]
    (output_dir / "results.md").write_text("\n\n".join(markdown) + "\n")
    tables = {part.title: part.rows for part in parts}
    (output_dir / "results.json").write_text(json.dumps({"run": run, "tables": tables, **results}, indent=1) + "\n")
    text = "\n\n".join(f"{part.title}\n{part.note}\n\n{as_text(part.rows)}" for part in parts)
    files = "\n".join(f"  {output_dir / name}" for name in ("results.md", "results.json", *PICTURES))
    return f"\n{text}\n\nDone in {seconds:.0f} s. Tables and pictures:\n{files}"


# ---- pictures


def draw_comparison(seeds: Sequence[SeedResults], path: Path) -> None:
    scores = transfer_scores(seeds)
    panels = {"reward": "Reward", "style": "Style", "accuracy": "Accuracy", "perfect": "Perfect responses"}
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.9), sharey=True, layout="constrained")
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        places = draw_bars(axis, {name: [seed[metric] for seed in of] for name, of in scores.items()})
        axis.set_yticks(places, list(scores))
        axis.set(title=title, xlim=(0, 2.25 if metric == "reward" else 1.13), ylim=(places[-1] + 0.6, -0.6))
    save(figure, path, f"The strong model, taught by a weak one  ·  bars: mean of {count(seeds)}, dots: each seed")


def draw_bars(axis: Axes, values: Mapping[str, Sequence[float]], top: float = 0.0) -> list[float]:
    """A row for each name, from ``top`` down: a bar to the mean, its value, a dot for each seed; the rows' places."""
    places = [top + row for row in range(len(values))]
    for place, (name, of) in zip(places, values.items(), strict=True):
        axis.barh(place, fmean(of), height=0.62, color=COLORS[name], alpha=0.85)
        axis.plot(
            of, [place] * len(of), "o", markersize=4, color="white", markeredgecolor="#23272e", markeredgewidth=0.8
        )
        axis.annotate(f"{fmean(of):.2f}", (max(of), place), (6, 0), textcoords="offset points", va="center")
    axis.grid(axis="y", visible=False)
    return places


def draw_curves(seeds: Sequence[SeedResults], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11.5, 7), layout="constrained")
    losses = by_name([seed["pretrain"]["sft_loss"] for seed in seeds])
    lines = {f"{name} SFT": [smooth(curve) for curve in of] for name, of in losses.items()}
    draw_lines(axes[0, 0], lines, (0, None))
    axes[0, 0].set(title="SFT on the corpus", xlabel="step", ylabel="nats per token")
    curves = by_name([seed["weak_to_strong"]["curves"] for seed in seeds])
    for axis, metric in zip(axes.flat[1:], ("reward", "style", "accuracy"), strict=True):
        lines = {
            name.removesuffix(" (DPO)"): [[(step, scores[metric]) for step, scores in curve.items()] for curve in of]
            for name, of in curves.items()
        }
        draw_lines(axis, lines)
        axis.set(title=f"{metric.capitalize()} during alignment", xlabel="step")
    save(figure, path, f"Training  ·  lines: mean of {count(seeds)}, bands: their range")


def draw_wpo(seeds: Sequence[SeedResults], path: Path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.2), layout="constrained")
    weights = by_source(seeds)
    for axis, alignment in zip(axes[0], next(iter(weights.values())), strict=True):
        for source, of in weights.items():
            values = [max(weight, BINS[0]) for weight in chain.from_iterable(of[alignment])]
            share = [1 / len(values)] * len(values)
            axis.hist(values, BINS, weights=share, color=COLORS[source], alpha=0.25)
            axis.hist(values, BINS, weights=share, color=COLORS[source], histtype="step", linewidth=1.4, label=source)
        axis.set(title=f"Pairs before training: {alignment}", xlabel="weight of the pair", xscale="log")
    axes[0, 0].set_ylabel("share of the pairs")
    axes[0, 0].legend(frameon=False, loc="upper left")
    settings = seeds[0]["wpo"]["settings"]
    last = list(settings)[-1]
    training = by_name([seed["wpo"]["settings"][last]["training"] for seed in seeds])
    for axis, curve, title, top in (
        (axes[1, 0], "effective_share", "Effective sample size over training", 1.0),
        (axes[1, 1], "far_share", "Far pairs' share of all weight", 0.6),
    ):
        lines = {name: [smooth(run[curve]) for run in of] for name, of in training.items()}
        draw_lines(axis, lines, (0, top))
        axis.set(title=title, xlabel=f"step ({last})")
    axes[1, 0].set_ylabel("share of the batch")
    axes[1, 1].axhline(0.5, color=COLORS["DPO"], linewidth=1.2)
    axes[1, 1].annotate("DPO", (1, 0.5), (4, 4), textcoords="offset points", color=COLORS["DPO"])
    draw_settings(axes[1, 2], {setting: wpo_scores(seeds, setting) for setting in settings})
    save(figure, path, f"WPO weighs pairs by how on-policy they are  ·  {count(seeds)}")


def draw_settings(axis: Axes, scores: Mapping[str, Mapping[str, Sequence[Scores]]]) -> None:
    """Reward of each loss, in groups by setting."""
    places: list[float] = []
    for setting, of in scores.items():
        top = places[-1] + 2 if places else 0.0
        axis.text(0.02, top - 0.8, f"far pairs with {setting}", va="center", color="#444a52")
        places += draw_bars(axis, {name: [seed["reward"] for seed in seeds] for name, seeds in of.items()}, top)
    axis.set_yticks(places, [name for of in scores.values() for name in of])
    axis.set(title="Reward at equal steps", xlim=(0, 2.25), ylim=(places[-1] + 0.6, -1.3))


def draw_lines(
    axis: Axes,
    lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    ylim: tuple[float | None, float | None] = (None, None),
) -> None:
    """Of each name's curves, one per seed as (x, y) points: their mean, the range as a band, the name at the end."""
    ends = []
    for name, seeds in lines.items():
        color = COLORS.get(name) or COLORS[f"{name} (DPO)"]
        x = [point[0] for point in seeds[0]]
        columns = list(zip(*([y for _, y in points] for points in seeds), strict=True))
        axis.plot(x, [fmean(column) for column in columns], color=color, linewidth=1.8)
        axis.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15, linewidth=0)
        ends.append((x[-1], fmean(columns[-1]), name, color))
    axis.margins(x=0.01)
    axis.set_ylim(*ylim)
    low, high = axis.get_ylim()
    ends.sort(key=lambda end: end[1])
    gap, places = 0.065 * (high - low), [end[1] for end in ends]
    for i in range(1, len(places)):  # labels of close ends are pushed up, a line each …
        places[i] = max(places[i], places[i - 1] + gap)
    places[-1] = min(places[-1], high)
    for i in reversed(range(len(places) - 1)):  # … and back down from above the frame
        places[i] = min(places[i], places[i + 1] - gap)
    for place, (x_end, _, name, color) in zip(places, ends, strict=True):
        axis.annotate(
            name,
            (x_end, place),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            annotation_clip=False,
        )


def smooth(curve: Sequence[float]) -> list[tuple[int, float]]:
    """Points of the running mean over 10 steps, of which the first is 1."""
    return list(enumerate(running_mean(curve, 10), 1))


def save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def count(seeds: Sequence[Any]) -> str:
    return f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"


PICTURES: dict[str, Callable[[Sequence[SeedResults], Path], None]] = {
    "comparison.png": draw_comparison,
    "curves.png": draw_curves,
    "wpo_weights.png": draw_wpo,
}
