"""What a run reports: running means, metrics.jsonl, TensorBoard, and the curves at its end."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import METRICS_FILE, TEMPORARY, publish, write_bytes

EVAL = "eval_"
CURVES = "curves.png"
HEAD = "head/"  # what is told of the head's gradient


class Sums:
    """Of metrics over pairs, held on the pairs' device until asked for, so that adding never synchronizes."""

    def __init__(self, state: Mapping[str, float] | None = None):
        self.sums: dict[str, Tensor | float] = dict(state or {})

    def add(self, values: Mapping[str, Tensor]) -> None:
        """``values``: (B,) each, one entry per pair; or scalars that are to be summed."""
        for name, value in values.items():
            total = value.detach().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    def state(self) -> dict[str, float]:
        """The sums as Python numbers, exactly."""
        return {name: float(value) for name, value in self.sums.items()}


def summarize(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over the pairs from their sums; WPO's effective sample size (Σw)²/Σw² as a share of them.

    What is told of the head's gradient, over the pairs whose gradient was not exact.
    """
    pairs = sums["pairs"]
    inexact = sums.get(HEAD + "pairs", pairs)
    means = {
        name: value / (inexact if name.startswith(HEAD) else pairs)
        for name, value in sums.items()
        if name not in ("pairs", HEAD + "pairs")
    }
    if (squared := means.pop("wpo/squared_weight", None)) is not None:
        means["wpo/effective_sample_size"] = means["wpo/weight"] ** 2 / squared if squared else 0.0
    return means


class MetricsLog:
    """Appends to metrics.jsonl, after dropping what lies beyond ``step``: a resumed run writes those lines again."""

    def __init__(self, output_dir: Path, step: int, tensorboard: bool = False):
        self.path = output_dir / METRICS_FILE
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self.path.open("a")
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no infinity
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def sync(self) -> None:
        """Put on disk what was written: before a checkpoint that goes on from there."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that a kill cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def peak_memory() -> int:
    """Bytes: the CUDA allocator's peak, or this process's peak resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Title, unit of the y axis, and the metrics that share it.
_PANELS = (
    ("Loss", "mean over pairs", {"loss": "loss"}),
    (
        "Implicit rewards",
        "reward",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"},
    ),
    ("Reward accuracy", "share of pairs", {"rewards/accuracies": "chosen above rejected"}),
    (
        "WPO weights",
        "weight, share of pairs",
        {"wpo/weight": "mean", "wpo/effective_sample_size": "effective sample size"},
    ),
    (
        "Transferred log-ratio",
        "nats per token",
        {"wspo/log_ratio": "policy, scaled by gamma", "wspo/target": "weak pair"},
    ),
    ("WSPO residual", "nats per token", {"wspo/residual": "root mean square"}),
    ("Gradient norm", "before clipping", {"grad_norm": "norm"}),
    ("Learning rate", "", {"learning_rate": "learning rate"}),
)


_COLORS = ("#2f6db3", "#d1662e", "#3f9c6b")


def draw_curves(output_dir: Path, title: str) -> Path:
    """curves.png from metrics.jsonl: one panel per group of metrics that the run has, evaluations as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_lines(output_dir / METRICS_FILE)
    names = {name.removeprefix(EVAL) for line in lines for name in line}
    panels = [panel for panel in _PANELS if names & set(panel[2])]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    style: Any = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "axes.titlesize": 11,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            rows, columns, figsize=(4.2 * columns, 2.9 * rows), squeeze=False, layout="constrained"
        )
        for axis, (heading, unit, curves) in zip(axes.flat, panels, strict=False):
            for color, (name, label) in zip(_COLORS, curves.items(), strict=False):
                _draw(axis, lines, name, label, color)
            axis.set(title=heading, xlabel="step", ylabel=unit)
            axis.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
            axis.xaxis.get_major_locator().set_params(integer=True)
            if len(axis.get_legend_handles_labels()[1]) > 1:
                axis.legend()
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        figure.suptitle(title, fontsize=12)
        partial = output_dir / f"{CURVES}{TEMPORARY}"
        figure.savefig(partial, dpi=150, format="png")
        plt.close(figure)
    publish(partial, output_dir / CURVES)
    return output_dir / CURVES


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Each value's mean with up to ``width`` - 1 before it."""
    sums = [0.0, *accumulate(values)]
    return [(sums[end] - sums[max(0, end - width)]) / min(end, width) for end in range(1, len(sums))]


def _draw(axis: Any, lines: list[dict[str, Any]], name: str, label: str, color: str) -> None:
    """The metric as a line, through a running mean where it is long and noisy, and its evaluations as dots."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    if points:
        steps, values = zip(*points, strict=True)
        smooth = len(values) > 60
        axis.plot(steps, values, color=color, linewidth=0.8 if smooth else 1.6, alpha=0.3 if smooth else 1.0,
                  label=None if smooth else label, marker="o" if len(values) == 1 else None, markersize=3)  # fmt: skip
        if smooth:
            axis.plot(steps, running_mean(values, len(values) // 30), color=color, linewidth=1.6, label=label)
    held_out = [(line["step"], line[EVAL + name]) for line in lines if EVAL + name in line]
    if held_out:
        axis.plot(
            *zip(*held_out, strict=True),
            "o",
            color=color,
            markersize=4,
            markeredgecolor="white",
            label="held out" if color == _COLORS[0] else None,
        )
