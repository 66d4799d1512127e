"""The DPO family as small functions in a table, WPO's weighting over any of them, WSPO, and KTO.

Every loss is unreduced, (B,). Notation: w the chosen and l the rejected sequence's log-ratio log π_θ − log π_ref (the
log-prob itself for reference-free losses), as a sum over tokens (``.sum``) or a mean (``.mean``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .segments import segment_means
from .sequence_stats import SequenceLogprobs, require_tokens, segment_sum


class LogRatio:
    """A sequence's log-ratio against the reference: ``sum`` over tokens and, where lengths are known, ``mean``."""

    def __init__(self, policy: SequenceLogprobs | Tensor, ref: SequenceLogprobs | Tensor | None):
        self.sum = _total(policy) if ref is None else _total(policy) - _total(ref).detach()
        self.length = None if isinstance(policy, Tensor) else policy.length

    @property
    def mean(self) -> Tensor:
        if self.length is None:
            raise ValueError(
                "this loss_type is defined on length-normalised log-probs: pass chosen and rejected as returned by "
                "sequence_logprobs, found plain tensors of sums"
            )
        return self.sum / self.length


def sigmoid(w: LogRatio, l: LogRatio, beta: float, label_smoothing: float = 0.0) -> Tensor:  # noqa: E741
    """DPO, arXiv 2305.18290 eq. 7; with label smoothing cDPO (Mitchell 2023)."""
    return _logistic(beta * (w.sum - l.sum), label_smoothing)


def hinge(w: LogRatio, l: LogRatio, beta: float) -> Tensor:  # noqa: E741
    """SLiC-HF, arXiv 2305.10425, on DPO's implicit rewards as in RSO, arXiv 2309.06657."""
    return torch.relu(1 - beta * (w.sum - l.sum))


def ipo(w: LogRatio, l: LogRatio, beta: float) -> Tensor:  # noqa: E741
    """IPO, arXiv 2310.12036 eq. 17 with τ = β, on length-normalised log-ratios as its authors confirmed to TRL."""
    return (w.mean - l.mean - 1 / (2 * beta)) ** 2


def robust(w: LogRatio, l: LogRatio, beta: float, label_smoothing: float = 0.1) -> Tensor:  # noqa: E741
    """Robust DPO, arXiv 2403.00409: unbiased under preference flips of probability ``label_smoothing`` < 1/2."""
    require_in("label_smoothing", label_smoothing, 0.0, 0.5, low_open=False)
    margin = beta * (w.sum - l.sum)
    clean, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair(w: LogRatio, l: LogRatio, beta: float, label_smoothing: float = 1e-3) -> Tensor:  # noqa: E741
    """EXO, arXiv 2402.00856 eq. 16 for two responses: KL(softmax of rewards ‖ (1 − ε, ε))."""
    require_in("label_smoothing", label_smoothing, 0.0, 1.0)
    margin = beta * (w.sum - l.sum)
    log_w, log_l = F.logsigmoid(margin), F.logsigmoid(-margin)
    return log_w.exp() * (log_w - math.log1p(-label_smoothing)) + log_l.exp() * (log_l - math.log(label_smoothing))


def nca_pair(w: LogRatio, l: LogRatio, beta: float) -> Tensor:  # noqa: E741
    """NCA, arXiv 2402.05369, for two responses of reward 1 and 0."""
    reward_w, reward_l = beta * w.sum, beta * l.sum
    return -F.logsigmoid(reward_w) - 0.5 * F.logsigmoid(-reward_w) - 0.5 * F.logsigmoid(-reward_l)


def bco_pair(w: LogRatio, l: LogRatio, beta: float) -> Tensor:  # noqa: E741
    """BCO, arXiv 2404.04656, on pairs and without the running reward shift."""
    return -F.logsigmoid(beta * w.sum) - F.logsigmoid(-beta * l.sum)


def sppo_hard(w: LogRatio, l: LogRatio, beta: float) -> Tensor:  # noqa: E741
    """SPPO, arXiv 2405.00675 eq. 4.7 with win probabilities 1 and 0; 1/β is its η."""
    return (w.sum - 0.5 / beta) ** 2 + (l.sum + 0.5 / beta) ** 2


def apo_zero(w: LogRatio, l: LogRatio, beta: float) -> Tensor:  # noqa: E741
    """APO-zero, arXiv 2408.06266 eq. 7: chosen responses better than the model's own."""
    return torch.sigmoid(-beta * w.sum) + torch.sigmoid(beta * l.sum)


def apo_down(w: LogRatio, l: LogRatio, beta: float) -> Tensor:  # noqa: E741
    """APO-down, arXiv 2408.06266 eq. 8: chosen responses worse than the model's own."""
    return torch.sigmoid(beta * w.sum) + torch.sigmoid(-beta * (w.sum - l.sum))


def discopop(w: LogRatio, l: LogRatio, beta: float, tau: float = 0.05) -> Tensor:  # noqa: E741
    """DiscoPOP's log-ratio modulated loss, arXiv 2406.08414 eq. 5."""
    require_in("tau", tau, 0.0, math.inf)
    margin = beta * (w.sum - l.sum)
    blend = F.logsigmoid(margin / tau)  # a logarithm, since e^−margin may overflow where the blend vanishes
    return -torch.expm1(blend) * -F.logsigmoid(margin) + torch.exp(blend - margin)


def sigmoid_norm(w: LogRatio, l: LogRatio, beta: float, label_smoothing: float = 0.0) -> Tensor:  # noqa: E741
    """Length-normalised DPO (Tülu 3, arXiv 2411.15124 eq. 6)."""
    return _logistic(beta * (w.mean - l.mean), label_smoothing)


def simpo(w: LogRatio, l: LogRatio, beta: float, gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:  # noqa: E741
    """SimPO, arXiv 2405.14734 eq. 6: reference-free, target margin ``gamma``."""
    require_in("gamma", gamma, -math.inf, math.inf)
    return _logistic(beta * (w.mean - l.mean) - gamma, label_smoothing)


def orpo(w: LogRatio, l: LogRatio, beta: float, nll_weight: float = 1.0) -> Tensor:  # noqa: E741
    """ORPO, arXiv 2403.07691 eq. 6: NLL of the chosen response plus β (its λ) times the log odds ratio loss."""
    require_in("nll_weight", nll_weight, 0.0, math.inf, low_open=False)
    return nll_weight * -w.mean - beta * F.logsigmoid(log_odds_ratio(w.mean, l.mean))


def cpo(w: LogRatio, l: LogRatio, beta: float, nll_weight: float = 1.0, label_smoothing: float = 0.0) -> Tensor:  # noqa: E741
    """CPO, arXiv 2401.08417 eq. 5: reference-free DPO plus the chosen response's NLL (per token, as in its code)."""
    require_in("nll_weight", nll_weight, 0.0, math.inf, low_open=False)
    nll = -w.mean if nll_weight else 0.0
    return _logistic(beta * (w.sum - l.sum), label_smoothing) + nll_weight * nll


def sft(w: LogRatio, l: LogRatio, beta: float) -> Tensor:  # noqa: E741
    """The chosen response's NLL per token: a term of mixtures (MPO, arXiv 2411.10442) that makes no use of β."""
    return -w.mean


class PairwiseLoss(NamedTuple):
    function: Callable[..., Tensor]
    reference_free: bool
    hyperparameters: tuple[str, ...]  # beside β

    @classmethod
    def of(cls, function: Callable[..., Tensor], reference_free: bool = False) -> PairwiseLoss:
        # Looked up here, once: torch.compile(dynamic=True) does not trace a look at a function's signature.
        names = [name for name in inspect.signature(function).parameters if name not in ("w", "l", "beta")]
        return cls(function, reference_free, tuple(names))


PAIRWISE_LOSSES = {
    loss.function.__name__: loss
    for loss in (
        *map(PairwiseLoss.of, (sigmoid, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard)),
        *map(PairwiseLoss.of, (apo_zero, apo_down, discopop, sigmoid_norm)),
        *(PairwiseLoss.of(function, reference_free=True) for function in (simpo, orpo, cpo, sft)),
    )
}


def preference_loss(
    chosen: SequenceLogprobs | Tensor,  # (B,)
    rejected: SequenceLogprobs | Tensor,  # (B,)
    ref_chosen: SequenceLogprobs | Tensor | None = None,  # (B,)
    ref_rejected: SequenceLogprobs | Tensor | None = None,  # (B,)
    loss_type: str | Mapping[str, float] = "sigmoid",
    beta: float = 0.1,
    **hyperparameters: float,
) -> Tensor:
    """Unreduced pairwise loss (B,), differentiable in ``chosen`` and ``rejected``, not in the reference.

    Args:
        chosen, rejected: the policy's, from :func:`sequence_logprobs`; plain (B,) sums do for losses that are not
            length-normalised.
        ref_chosen, ref_rejected: the reference's, of the same responses; None for reference-free losses alone.
        loss_type: a key of ``PAIRWISE_LOSSES``, each of which names its paper; or a weighted sum of several as
            {loss_type: weight}, such as MPO's {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}. Its reference-free members
            see the policy's log-probs alone.
        beta: positive strength of the implicit KL constraint.
        hyperparameters: the loss function's own (``label_smoothing``, ``tau``, ``gamma``, ``nll_weight``); in a sum
            each goes to every member that takes it.

    Raises:
        ValueError: unknown loss or hyperparameter, a value or weight out of range, missing or superfluous references,
            shapes that do not fit.
    """
    mixture = loss_mixture(loss_type)
    allowed = hyperparameter_names(mixture)
    name = " + ".join(mixture)
    if unknown := sorted(set(hyperparameters) - set(allowed)):
        raise ValueError(f"{name} takes {', '.join(allowed) or 'no hyperparameter beside beta'}; found {unknown}")
    require_in("beta", beta, 0.0, math.inf)
    if reference_free(mixture):
        if not (ref_chosen is None and ref_rejected is None):
            raise ValueError(f"{name} is reference-free: ref_chosen and ref_rejected must be None")
    elif ref_chosen is None or ref_rejected is None:
        raise ValueError(f"{name} needs ref_chosen and ref_rejected")
    _require_one_shape(1, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    policy = LogRatio(chosen, None), LogRatio(rejected, None)
    ratio = LogRatio(chosen, ref_chosen), LogRatio(rejected, ref_rejected)
    terms = []
    for member, weight in mixture.items():
        loss = PAIRWISE_LOSSES[member]
        own = {name: value for name, value in hyperparameters.items() if name in loss.hyperparameters}
        term = loss.function(*(policy if loss.reference_free else ratio), beta, **own)
        terms.append(term if weight == 1 else weight * term)
    return sum(terms[1:], terms[0])


def wpo_loss(
    chosen: SequenceLogprobs | Tensor,  # (B,)
    rejected: SequenceLogprobs | Tensor,  # (B,)
    ref_chosen: SequenceLogprobs | Tensor | None,  # (B,)
    ref_rejected: SequenceLogprobs | Tensor | None,  # (B,)
    chosen_weight: Tensor,  # (B,)
    rejected_weight: Tensor,  # (B,)
    loss_type: str | Mapping[str, float] = "sigmoid",
    beta: float = 0.1,
    clamp: bool = True,
    **hyperparameters: float,
) -> Tensor:
    """WPO (arXiv 2406.11827 eq. 4): a pairwise loss times the pair's detached weight, (B,).

    ``chosen_weight`` and ``rejected_weight`` come from :func:`wpo_weights`; see :func:`wpo_pair_weight` for ``clamp``
    and :func:`preference_loss` for the rest, and for what is raised.
    """
    loss = preference_loss(chosen, rejected, ref_chosen, ref_rejected, loss_type, beta, **hyperparameters)
    _require_one_shape(1, chosen=chosen, chosen_weight=chosen_weight, rejected_weight=rejected_weight)
    return wpo_pair_weight(chosen_weight, rejected_weight, clamp) * loss


def wpo_pair_weight(chosen_weight: Tensor, rejected_weight: Tensor, clamp: bool = True) -> Tensor:
    """w(x, y_w) · w(x, y_l), detached, and at most 1 where ``clamp`` (the authors' code clamps, TRL does not)."""
    weight = (chosen_weight * rejected_weight).detach()
    return weight.clamp(max=1.0) if clamp else weight


def wspo_loss(
    policy: Tensor,  # (B, T)
    ref: Tensor,  # (B, T)
    weak_aligned: Tensor,  # (B, T)
    weak_ref: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    gamma: float = 0.1,
    level: str = "token",
    segments: Tensor | None = None,  # (B, T)
) -> Tensor:
    """WSPO (arXiv 2410.18640): regress γ · (log π_θ − log π_ref) onto log π_weak-aligned − log π_weak-ref, (B,).

    Args:
        policy, ref, weak_aligned, weak_ref: log-probs of the chosen responses' tokens; differentiable in ``policy``.
        mask: bool, True at scored tokens.
        gamma: positive transfer strength.
        level: "token" for 1/|y| Σ_t (γ s_t − r_t)² (the authors' code), "sequence" for (1/|y| Σ_t (γ s_t − r_t))²
            (the paper's formula), "segment" for the token level with each residual replaced by its segment's mean: for
            weak models of another tokenizer, derived in :mod:`prefopt_fast.segments`.
        segments: at level "segment" alone, integers: the segment of each token from :func:`shared_segments`, -1 for
            tokens that do not count. The weak log-probs are then those of :func:`spread_over_segments`.

    Raises:
        ValueError: an unknown level, shapes that do not fit, or (on the CPU) a sequence without a scored token.
    """
    if level not in ("token", "sequence", "segment"):
        raise ValueError(f'level must be "token", "sequence" or "segment"; found {level!r}')
    if (level == "segment") != (segments is not None):
        found = "without" if segments is None else "with"
        raise ValueError(f'level "segment" needs segments, and no other level takes them; found "{level}" {found} them')
    require_in("gamma", gamma, 0.0, math.inf)
    _require_one_shape(
        2, policy=policy, ref=ref, weak_aligned=weak_aligned, weak_ref=weak_ref, mask=mask, segments=segments
    )
    if segments is not None and segments.is_floating_point():
        raise ValueError(f"segments must be integers, found {segments.dtype}")
    mask = mask.bool() if segments is None else mask.bool() & (segments >= 0)
    length = segment_sum(mask, None)
    require_tokens(length)
    residual = gamma * (policy - ref.detach()) - (weak_aligned - weak_ref).detach()
    # where, not a product: what padding holds may be infinite.
    residual = torch.where(mask, residual, 0.0)
    if level == "sequence":
        return (residual.sum(-1) / length).square()
    if segments is not None:
        residual = segment_means(residual, segments, mask)
    return residual.square().sum(-1) / length


def kto_loss(
    logprobs: SequenceLogprobs | Tensor,  # (B,)
    ref_logprobs: SequenceLogprobs | Tensor,  # (B,)
    desirable: Tensor,  # (B,)
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (arXiv 2402.01306 eq. 8) of single sequences, (B,): λ_D (1 − σ(r − z₀)) or λ_U (1 − σ(z₀ − r)).

    Args:
        logprobs, ref_logprobs: summed log-probs of each response, or what :func:`sequence_logprobs` returns;
            differentiable in ``logprobs``.
        desirable: bool, whether each response is wanted.
        kl: the batch's estimate of KL(π_θ ‖ π_ref) in nats, from mismatched prompts and responses; z₀ = β·max(kl, 0),
            detached.
        beta, desirable_weight, undesirable_weight: the paper's β, λ_D and λ_U.

    Raises:
        ValueError: shapes that do not fit, ``desirable`` that is not boolean, a value out of range.
    """
    require_in("beta", beta, 0.0, math.inf)
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        require_in(name, weight, 0.0, math.inf, low_open=False)
    _require_one_shape(1, logprobs=logprobs, ref_logprobs=ref_logprobs, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be boolean, found {desirable.dtype}")
    if isinstance(kl, Tensor) and kl.numel() != 1:
        raise ValueError(f"kl must be one number, found shape {tuple(kl.shape)}")
    reward = beta * LogRatio(logprobs, ref_logprobs).sum
    baseline = beta * torch.as_tensor(kl, dtype=reward.dtype, device=reward.device).detach().reshape(()).clamp(min=0)
    wanted = desirable_weight * torch.sigmoid(baseline - reward)
    unwanted = undesirable_weight * torch.sigmoid(reward - baseline)
    return torch.where(desirable, wanted, unwanted)


def loss_mixture(loss_type: str | Mapping[str, float]) -> dict[str, float]:
    """{member of ``PAIRWISE_LOSSES``: weight}; raises ValueError for unknown members, or weights not positive."""
    if not isinstance(loss_type, (str, Mapping)):
        raise ValueError(f"loss_type must be a name or a mapping of names to weights, found {loss_type!r}")
    mixture = {loss_type: 1.0} if isinstance(loss_type, str) else dict(loss_type)
    if not mixture or (unknown := [name for name in mixture if name not in PAIRWISE_LOSSES]):
        found = ", ".join(map(repr, unknown)) if mixture else "an empty mapping"
        raise ValueError(f"loss_type must be one of {', '.join(PAIRWISE_LOSSES)}; found {found}")
    for name, weight in mixture.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of {name} in loss_type must be positive and finite, found {weight}")
    return mixture


def reference_free(mixture: Iterable[str]) -> bool:
    """Whether none of these losses uses a reference."""
    return all(PAIRWISE_LOSSES[name].reference_free for name in mixture)


def hyperparameter_names(mixture: Iterable[str]) -> list[str]:
    """What these losses take beside β."""
    return list(dict.fromkeys(name for member in mixture for name in PAIRWISE_LOSSES[member].hyperparameters))


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """ORPO's log odds(y_w) − log odds(y_l), odds(y) = p / (1 − p), from length-normalised log-probs."""
    given, dtype = chosen.dtype, torch.promote_types(chosen.dtype, torch.float32)
    # Of p = 1 to the last digit the odds are infinite; those of a rounding less, with the same slope, are not.
    below = -torch.finfo(dtype).eps
    chosen, rejected = (x - (x - below).clamp(min=0).detach() for x in (chosen.to(dtype), rejected.to(dtype)))
    return ((chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))).to(given)


def _logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """−log σ(margin), in expectation over preference flips of probability ``label_smoothing`` < 1/2 (cDPO)."""
    require_in("label_smoothing", label_smoothing, 0.0, 0.5, low_open=False)
    if not label_smoothing:
        return -F.logsigmoid(margin)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x < 0, by whichever of log1p and expm1 keeps its digits (Mächler 2012)."""
    # Both branches are made safe where they are not chosen: where() would let their NaN gradients through.
    near = x > -0.6931471805599453
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, by_expm1, by_log1p)


def require_in(name: str, value: float, low: float, high: float, low_open: bool = True) -> None:
    if not (low < value < high or (not low_open and value == low)):
        raise ValueError(f"{name} must be in {'(' if low_open else '['}{low:g}, {high:g}), found {value}")


def _total(logprobs: SequenceLogprobs | Tensor) -> Tensor:
    return logprobs if isinstance(logprobs, Tensor) else logprobs.sum


def _require_one_shape(dimensions: int, **arguments: SequenceLogprobs | Tensor | None) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in arguments.items():
        if value is not None:
            shapes[name] = tuple(_total(value).shape)
        if isinstance(value, SequenceLogprobs):
            others = {"mean": value.mean, "length": value.length}
            shapes |= {f"{name}.{field}": tuple(x.shape) for field, x in others.items() if x is not None}
    if len({*shapes.values()}) > 1 or len(next(iter(shapes.values()))) != dimensions:
        expected = ("(B,)", "(B, T)")[dimensions - 1]
        raise ValueError(
            f"shapes must be equal, {expected}; found " + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )
