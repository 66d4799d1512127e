"""An unbiased gradient from a few columns of the vocabulary: which columns, with what weights, how large an error.

A trained model's softmax is concentrated, so of dh_t = W[y_t] − Σ_v p_tv W_v few columns carry most. Per group of
tokens, column v is drawn with probability π_v = min(1, n_v / ε), n_v = (Σ_t (p_tv / tol_t)²)^½: for a sum of
independently drawn terms this π is the one with the least variance at a given number of columns. What is drawn is not p
but its deviation from a rank-1 control variate: with q the group's average distribution over the uncertain columns
(π < 1), δ_t the token's mass on them and μ = qᵀW,

    Σ_v p_tv W_v  =  Σ_{π=1} p_tv W_v + δ_t μ + Σ_{π<1} (p_tv − δ_t q_v) (W_v − μ),

in which (W_v − μ) may stand for W_v because Σ_v (p_tv − δ_t q_v) = 0. Only the last sum is sampled, each drawn column
weighed by 1/π_v, so the expectation over draws is the exact gradient. (Tokens that a draw leaves too wrong are computed
exactly instead. Which they are depends on the draw, which moves the mean: by up to 5 % of the tolerance, as measured on
peaked and capped softmaxes. No single column's draw suffices: see ``highest_epsilon``.)

Letters: C tokens in a group, V vocabulary, S columns drawn, H hidden size. The target's own column is left out of p
everywhere here: its coefficient 1 − p_y is kept exactly, beside the sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import GradReport

# ε for a group of C tokens starts at LEVEL · τ^POWER · √C, as the tails of a small chat model's softmax want it from
# τ = 2⁻⁴ to 2⁻¹⁰; a chunk can choose HEADROOM of what is expected, at least.
LEVEL, POWER, HEADROOM = 0.12, 1.2, 0.5
EPSILON_STEPS = 20  # at most: three to five where LEVEL is about right
# choose_epsilon's error over the one that the draws show starts at EXPECTED, with the weight of PRIOR groups: measured
# are 0.95 to 1.5 for text and mixtures of certain and uncertain tokens, up to 2.5 where all are certain.
EXPECTED, PRIOR = 1.0, 4
MARGIN = 0.7  # of the tolerance, aimed at: a group scatters by some 15 %
# dweight's squared error if all upstream gradients were equal: what it counts for, since it needs less margin, and how
# many squared tolerances of it make a group draw more columns.
COHERENT, COHERENT_LIMIT = 0.75, 4 / 3
CEILING = 0.8  # of the tolerance: exact tokens bring an estimate down to it; few large upstream gradients add 15 %
OUTLIER = 4.0  # tolerances that a token may be wrong by, as far as the draw shows: measured are up to 7
SKETCH = 64  # dimensions in which the norms of dweight's rows are estimated
LARGEST_RATIO = 4.0  # of a group's squared error over what is allowed, as far as later ones learn from it
NEGLIGIBLE = 0.1  # a token's gradient counts as at least this much of its group's root mean square

TINY = 1e-30  # no division by zero


def choose_epsilon(
    squares: Tensor,  # (groups, V), n_v²; overwritten
    lowest: float,
    highest: float,
    budget: float,
) -> tuple[float, float]:
    """The largest ε between ``lowest`` and ``highest`` with Σ n_v max(0, ε − n_v) ≤ budget; and that sum.

    The sum is the expected squared error Σ_v (1/π_v − 1) n_v² of a draw, in tolerances. It does not depend on the draw,
    and so neither does ε. It is convex and piecewise linear: all of Newton's steps but the first come from above.
    """
    scores = squares.sqrt_()
    epsilon = lowest
    for _ in range(EPSILON_STEPS):
        before = epsilon
        below = scores.where(scores < epsilon, 0)
        slope, offset = float(below.sum()), float(below.square_().sum())
        epsilon = max(lowest, min(highest, (budget + offset) / max(slope, TINY)))
        if abs(epsilon - before) <= 0.01 * epsilon:
            break
    return epsilon, epsilon * slope - offset


def highest_epsilon(tolerance: float) -> float:
    """What any group may choose at most.

    A column drawn with π_v = n_v / ε is wrong by p_tv / π_v ≤ ε tol_t for its token: from OUTLIER · τ on, failing
    tokens would be those with a draw, and the others be left without what they drew nothing of.
    """
    return OUTLIER / 2 * tolerance


def select_columns(
    score: Tensor,  # (V,)
    epsilon: float,
    uniform: Tensor,  # (V,), in [0, 1)
) -> tuple[Tensor, Tensor]:
    """Keep column v with probability min(1, score_v / epsilon): (S,) int64, ascending, and (S,) the probabilities.

    ``score`` is any measure of a column's part in the gradient that does not depend on ``uniform``: weighing what was
    kept by 1/keep leaves the gradient unbiased whatever the score. The kept columns are few: the call synchronizes an
    accelerator once, to learn how many.
    """
    keep = (score / epsilon).clamp_(max=1.0)
    columns = (uniform < keep).nonzero().squeeze(-1)
    return columns, keep[columns]


def token_weights(
    rest: Tensor,  # (C,), Σ_{v≠y} e^{z_v − shift}
    target: Tensor,  # (C,), e^{z_y − shift}
    typical: float,  # root mean square of 1 − p_y among the tokens before
) -> Tensor:
    """(C,) weights w with w_t · e^{z_tv − shift_t} = p_tv / tol_t, up to a constant.

    The tolerated error tol_t is the size of the token's gradient, for which 1 − p_y stands, and not less than what is
    negligible among all tokens. A partial sum in ``rest`` gives too large weights, never too small: columns chosen by
    them contain those that the whole sum would choose.
    """
    total = rest + target
    miss = rest / total
    rms = torch.linalg.vector_norm(miss.nan_to_num(0)) / len(miss) ** 0.5
    floor = NEGLIGIBLE * rms.clamp_(max=typical)
    return 1 / (miss.clamp(min=1e-6).clamp_(min=floor) * total)


def counted_tokens(rest: Tensor, target: Tensor, typical: float) -> float:
    """For how many tokens' squared errors choose_epsilon has room; arguments as those of token_weights.

    A token that is certain needs little of its tolerance. Counted half, it leaves the uncertain ones beside it about as
    much as they have in text.
    """
    return float((1 + (rest * token_weights(rest, target, typical)).square()).nansum()) / 2


class Sample(NamedTuple):
    """The sampled part of one group's gradient: Σ_v p_tv W_v ≈ coefficientsᵀ W[columns] + remainder ⊗ qᵀW."""

    columns: Tensor  # (S,), int64
    keep: Tensor  # (S,), π
    tail: Tensor  # (V,), q
    dropped: Tensor  # (C,), δ


def alike(
    features: Tensor,  # (N, K)
    sizes: list[int],  # of the groups
) -> list[Tensor]:
    """The tokens' indices (int64) in groups of similar features: halved along their principal component, and the halves
    again.

    Tokens that use the same columns need fewer of them, and have more of their tail in common. The gradient stays
    unbiased: groups depend on the hidden states, not on the draw.
    """
    features = features.cpu().nan_to_num(0, 0, 0)
    features = features / features.abs().amax().clamp(min=TINY)

    def halve(tokens: Tensor, sizes: list[int]) -> list[Tensor]:
        if len(sizes) == 1:
            return [tokens]
        own = features[tokens]
        own -= own.mean(0)
        component = torch.linalg.eigh(own.T @ own).eigenvectors[:, -1]
        tokens = tokens[(own @ component).argsort(stable=True)]
        groups = len(sizes) // 2
        middle = sum(sizes[:groups])
        return halve(tokens[:middle], sizes[:groups]) + halve(tokens[middle:], sizes[groups:])

    return halve(torch.arange(len(features), device=features.device), sizes)


def make_sample(
    columns: Tensor,  # (S,), int64
    keep: Tensor,  # (S,), 1 for a column that is kept in every draw
    probs: Tensor,  # (S, C), of these columns
    column_mass: Tensor,  # (V,), any average of the tokens' distributions that does not depend on the draw; overwritten
    total: Tensor,  # (C,), Σ_v p_tv
) -> Sample:
    """The control variate that goes with a group's columns."""
    certain = keep == 1
    tail = column_mass.index_fill_(0, columns[certain], 0.0)
    tail /= tail.sum().clamp_(min=torch.finfo(tail.dtype).tiny)
    return Sample(columns, keep, tail, total - certain.to(probs.dtype) @ probs)


def coefficients(
    sample: Sample,
    probs: Tensor,  # (S, C), of the sample's columns; overwritten
    total: Tensor,  # (C,), Σ_v p_tv
) -> tuple[Tensor, Tensor]:
    """(S, C) coefficients of W[columns], and the (C,) remainder that multiplies qᵀW."""
    probs.addr_(sample.tail[sample.columns], sample.dropped, alpha=-1).div_(sample.keep[:, None])
    return probs, total - probs.sum(0)


def sampling_variance(
    keep: Tensor,  # (S,)
    squares: Tensor,  # (S, C), of the coefficients
    rows: Tensor,  # (S, H), W[columns]
    mean: Tensor,  # (H,), μ or an estimate of it
) -> Tensor:
    """(C,) what these columns add to the expected squared error of each token's sampled gradient.

    With b_v ~ Bernoulli(π_v), Var Σ_v (b_v / π_v) a_v x_v = Σ_v (1 − π_v) / π_v · a_v² ‖x_v‖², for which stands
    Σ_{v drawn} (1 − π_v) (a_v / π_v)² ‖x_v‖², here with x_v = W_v − μ.
    """
    distance = torch.linalg.vector_norm(rows, dim=1).square_() - 2 * (rows @ mean) + mean @ mean
    return (distance.clamp_(min=0) * (1 - keep)) @ squares


def coherent_variance(
    keep: Tensor,  # (S,)
    coefficients: Tensor,  # (S, C)
    hidden: Tensor,  # (C, SKETCH), a random projection of the hidden states
) -> float:
    """Expected squared error of dweight (Frobenius) where all tokens have one upstream gradient, as in a sequence.

    Hidden states share directions, so that a column's errors add up: that can exceed Σ_t of the tokens' own by far.
    """
    return float((1 - keep) @ (coefficients @ hidden).square_().sum(1))


class Errors(NamedTuple):
    """Of one gradient of a group of tokens, as its draw lets expect; all but the tolerance are squared."""

    tolerance: float
    size: float
    error: Tensor  # (C,), of the tokens that are not computed exactly
    coherent: float = 0.0  # error of dweight if all upstream gradients are equal


class Estimate(NamedTuple):
    """What one sampled group of tokens is expected to be wrong by."""

    errors: list[Errors]  # of dweight, dhidden or both
    tokens: int  # C, those computed exactly included
    share: float  # of the columns drawn
    dropped: float  # largest δ_t
    level: float  # ε / √C
    expected: float  # the ratio that choose_epsilon foresaw

    def ratio(self) -> float:
        """Squared error over what is allowed, of the gradient that is worst off."""
        return max(
            max(float(error.sum()), COHERENT * coherent) / max(tolerance**2 * size, TINY)
            for tolerance, size, error, coherent in self.errors
        )


class Steering:
    """Lets each chunk choose an ε with which the estimated errors stay within the tolerance, and keeps the record."""

    def __init__(self, tolerance: float, groups: int) -> None:
        self.tolerance = tolerance
        self.level = LEVEL * tolerance**POWER  # of ε / √C
        self.expected, self.found = PRIOR * EXPECTED, float(PRIOR)  # sums over groups: ratios foreseen, and estimated
        self.groups = groups  # to come
        self.skip = self.patience = 0
        self.chunks = self.dense_chunks = 0
        self.kept = self.largest_mass = 0.0
        self.recent: list[Estimate] = []
        self.error, self.size = [0.0, 0.0], [0.0, 0.0]  # squared, of each gradient that is needed
        self.coherent = 0.0

    def lowest_epsilon(self, tokens: int) -> float:
        """What a group of so many tokens may choose at least. n_v is the norm of C numbers, so that ε grows with √C at
        a given share of columns."""
        return HEADROOM * self.level * tokens**0.5

    def budget(self) -> float:
        """Of choose_epsilon, for each of counted_tokens: with it the estimated error is about what is aimed at."""
        return MARGIN**2 * self.tolerance**2 * self.expected / self.found

    def wants_dense(self, groups: int) -> bool:
        """Whether a walk for so many groups should not even be tried: after failures in a row 3, 9, 21, … are not."""
        self.skip -= 1
        if self.skip < 0:
            return False
        self.record_dense(groups)
        return True

    def record_dense(self, groups: int, in_vain: bool = False) -> None:
        """So many groups of a walk cannot be sampled; of a walk in vain none can, for they need too many columns."""
        self.chunks += groups
        self.dense_chunks += groups
        if in_vain:
            self.patience = min(2 * self.patience + 3, 63)
            self.skip = self.patience

    def record(self, estimate: Estimate) -> Tensor:
        """A group was sampled; returns which of its tokens, (C,) bool, are to be computed exactly all the same.

        The whole keeps its tolerance: the worst tokens are, where a group's errors leave too little room for those of
        the groups to come, which are expected to be as wrong as aimed at and may be. Where errors of dweight add up
        over a group, any of its tokens are, evenly: of fewer less adds up.
        """
        self.chunks += 1
        self.recent.append(estimate)
        later = max(0, self.groups - self.chunks) / self.chunks
        exact = torch.zeros_like(estimate.errors[0].error, dtype=torch.bool)
        for k, (tolerance, size, error, coherent) in enumerate(estimate.errors):
            self.size[k] += size
            allowed, own = tolerance**2 * self.size[k], (MARGIN * tolerance) ** 2 * size
            room = max(own, allowed * (CEILING**2 + (CEILING**2 - MARGIN**2) * later) - self.error[k])
            worst = error.argsort(descending=True)
            remaining = error[worst].flip(0).cumsum(0).flip(0)  # of a token and of all that are better
            exact[worst] |= remaining > room
            room = max(own / COHERENT, allowed * (1 + (1 - MARGIN**2 / COHERENT) * later) - self.coherent)
            if coherent > room:  # of a share s of the tokens it is s · alone + s² · (coherent − alone)
                half = float(error.sum()) / 2
                square = max(coherent - 2 * half, TINY)
                left = min(1.0, ((half**2 + square * room) ** 0.5 - half) / square)
                exact |= (torch.arange(len(exact) + 1, device=exact.device) * (1 - left)).ceil().diff() > 0
            self.coherent += min(coherent, room)
            self.error[k] += float(error.masked_fill(exact, 0).sum())
        sampled = float((~exact).sum()) / estimate.tokens
        self.kept += 1 - sampled + sampled * estimate.share
        self.largest_mass = max(self.largest_mass, estimate.dropped)
        return exact

    def adapt(self) -> None:
        """Learn from what was recorded since the last time."""
        if not self.recent:
            return
        groups = len(self.recent)
        # The groups' mean and that of the whole, of which one group of uncertain tokens may be most.
        ratios = [min(LARGEST_RATIO, estimate.ratio()) for estimate in self.recent]  # NaN counts as the largest
        sizes = [estimate.errors[0].size for estimate in self.recent]
        mean = sum(ratios) / groups
        whole = sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True)) / max(sum(sizes), TINY)
        self.found += groups * max(mean, whole)
        self.expected += sum(estimate.expected for estimate in self.recent)
        self.level = sum(estimate.level for estimate in self.recent) / groups
        self.patience = 0
        self.recent.clear()

    def report(self) -> GradReport:
        kept = (self.kept + self.dense_chunks) / max(self.chunks, 1)
        error = max(error / max(size, TINY) for error, size in zip(self.error, self.size, strict=True)) ** 0.5
        return GradReport(kept, self.largest_mass, error, self.dense_chunks, self.chunks)


def failing_tokens(
    error: Tensor,  # (C,), squared
    size: Tensor,  # (C,), squared
    tolerance: float,
) -> Tensor:
    """(C,) bool: tokens to be computed exactly, so that each of the rest is wrong by no more than 4τ of its own size.

    A token predicted with certainty has almost no gradient, and an error relative to its own norm would mean nothing:
    its size counts as at least a tenth of the root mean square.
    """
    return error > (OUTLIER * tolerance) ** 2 * size.clamp(min=NEGLIGIBLE**2 * size.mean())
