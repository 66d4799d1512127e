"""What is gained by drawing columns: errors of our gradient beside those of the largest columns, as many of them.

The deterministic rule keeps every column whose score is above a threshold and leaves the others to the rank-1 term
alone. What it neglects it always neglects, so that neither a second run nor a second step makes up for it; the error of
drawn columns falls with the number of draws.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import peers
import torch
from bench_linear_logprob import float64_truth, relative_errors
from inputs import Problem
from prefopt_fast.kernels import sparse_grad, torch_backend
from torch import Tensor

import prefopt_fast as pf

DRAWS = 8
_SEARCH_STEPS = 8
_NAMES = ("dhidden", "dweight")


def compare_rules(problem: Problem, tolerances: tuple[float, ...]) -> list[dict[str, Any]]:
    """For each tolerance the share of columns that are drawn, and relative errors (Frobenius, against float64) of
    dhidden and dweight: of one draw, of the mean of DRAWS draws, and of as many largest columns."""
    truth = float64_truth(problem.leaves())
    found = []
    for tolerance in tolerances:
        draws = [_gradients(problem, tolerance, seed) for seed in range(DRAWS)]
        kept = sum(share for share, _ in draws) / DRAWS
        mean = {name: sum(gradients[name].double() for _, gradients in draws) / DRAWS for name in _NAMES}
        low, high = 1e-6, 1e6  # of the threshold, in units of what Steering starts with
        for _ in range(_SEARCH_STEPS):
            level = (low * high) ** 0.5
            with _largest_columns(level):
                share, largest = _gradients(problem, tolerance, 0)
            low, high = (level, high) if share > kept else (low, level)
        found.append(
            {
                "tolerance": tolerance,
                "columns_kept": kept,
                "drawn": relative_errors(draws[0][1], truth),
                "mean_of_draws": relative_errors(mean, truth),
                "largest_kept": share,
                "largest": relative_errors(largest, truth),
            }
        )
    return found


def markdown(found: list[dict[str, Any]], inputs: str) -> str:
    lines = [
        "## Drawn columns against the largest ones",
        "",
        f"{inputs} Errors of dhidden and dweight; the deterministic rule is given as many columns.",
        "",
        f"| tolerance | columns | one draw | mean of {DRAWS} draws | columns | the largest, always |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        errors = [
            ", ".join(f"{value:.1e}" for value in row[key].values()) for key in ("drawn", "mean_of_draws", "largest")
        ]
        lines.append(
            f"| {peers.format_tolerance(row['tolerance'])} | {row['columns_kept']:.1%} | {errors[0]} | {errors[1]} | "
            f"{row['largest_kept']:.1%} | {errors[2]} |"
        )
    return "\n".join(lines)


def _gradients(problem: Problem, tolerance: float, seed: int) -> tuple[float, dict[str, Tensor]]:
    problem = problem.leaves()
    head = pf.LMHead(problem.weight)
    stats = pf.token_logprobs(
        problem.hidden, head, problem.targets, grad_tolerance=tolerance, backend="torch", seed=seed
    )
    peers.backward(stats.logprobs, problem)
    assert stats.grad_report is not None and problem.hidden.grad is not None and problem.weight.grad is not None
    return stats.grad_report.columns_kept, {"dhidden": problem.hidden.grad, "dweight": problem.weight.grad}


@contextlib.contextmanager
def _largest_columns(level: float) -> Iterator[None]:
    """Our operator with the deterministic rule, its threshold the same for all chunks."""
    candidates = torch_backend._candidates

    def above_threshold(walk: Any, groups: Any, epsilon: float, typical: float, uniform: Tensor) -> Any:
        return candidates(walk, groups, epsilon, typical, torch.ones_like(uniform))

    def select(score: Tensor, epsilon: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
        columns = (score > epsilon).nonzero().squeeze(-1)
        return columns, score.new_ones(len(columns))

    with (
        mock.patch.object(torch_backend, "_candidates", above_threshold),
        mock.patch.object(torch_backend, "select_columns", select),
        mock.patch.object(torch_backend, "choose_epsilon", lambda squares, lowest, highest, budget: (lowest, budget)),
        mock.patch.object(sparse_grad, "HEADROOM", level),
        mock.patch.object(sparse_grad.Steering, "adapt", lambda self: None),
    ):
        yield
