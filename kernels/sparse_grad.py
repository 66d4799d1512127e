"""An unbiased gradient from a few columns of the vocabulary: which columns, with what weights, how large an error.

Letters: C tokens in a chunk, V vocabulary, S columns kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """Columns kept for a chunk. ``keep`` is the probability with which each one was drawn: 1/keep weighs it."""

    columns: Tensor  # (S,), int64, ascending
    keep: Tensor  # (S,), in (0, 1]; 1 for a column that is kept in every draw


def select_columns(
    score: Tensor,  # (V,)
    targets: Tensor,  # (C,), int64
    epsilon: float,
    uniform: Tensor,  # (V,), in [0, 1)
) -> Selection:
    """Keep column v with probability min(1, score_v / epsilon), and the targets' columns always.

    ``score`` is any measure of a column's part in the gradient that does not depend on ``uniform``: weighing what was
    kept by 1/keep leaves the gradient unbiased whatever the score. The kept columns are few: the call synchronizes an
    accelerator once, to learn how many.
    """
    keep = (score / epsilon).clamp_(max=1.0).index_fill_(0, targets, 1.0)
    columns = (uniform < keep).nonzero().squeeze(-1)
    return Selection(columns, keep[columns])
