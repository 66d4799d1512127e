"""Drop-in modules for ``liger_kernel.chunked_loss`` 0.8: change the import, keep the code.

Constructors, forward arguments, results (loss and detached auxiliary outputs) and their normalisation are Liger's; the
computation is :func:`prefopt_fast.token_logprobs`. Two arguments have no effect: ``compiled``, since there is nothing
to compile, and ``chunk_size``, since memory is bounded whatever the number of sequences. liger-kernel itself is not
needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..head import LMHead
from ..losses import kto_loss, log_odds_ratio, preference_loss, reference_free
from ..objectives import pair_objective
from ..sequence_stats import SequenceLogprobs, sequence_logprobs
from ..token_stats import token_logprobs

LossAndAux = tuple[Tensor, tuple[Tensor, ...]]

_DPO_LOSS_TYPES = (
    *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust"),
    *("bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"),
)


class _FusedLinearLoss(nn.Module):
    """Log-probs of padded sequences, and what Liger reports of the logits without having them."""

    ignore_index: int
    use_ref_model: bool
    average_log_prob: bool

    def _sequences(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> SequenceLogprobs:
        if target.dim() != 2:
            raise ValueError(f"target must be (sequences, T), found {tuple(target.shape)}")
        head = LMHead(weight, bias)
        return sequence_logprobs(token_logprobs(hidden, head, target, ignore_index=self.ignore_index))

    def _logps(self, sequences: SequenceLogprobs) -> Tensor:
        return sequences.mean if self.average_log_prob else sequences.sum

    def _ref_logps(
        self, ref_input: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, target: Tensor
    ) -> Tensor:
        """(sequences,); without a reference model zeros, as if it were sure of every token."""
        if not self.use_ref_model:
            return torch.zeros(len(target), device=target.device)
        if ref_input is None or ref_weight is None:
            raise ValueError("use_ref_model=True needs ref_input and ref_weight")
        with torch.no_grad():
            return self._logps(self._sequences(ref_input, ref_weight, ref_bias, target))


class _FusedLinearPreferenceLoss(_FusedLinearLoss):
    """α · NLL of the chosen tokens (a mean over the batch's tokens) + mean over pairs of a pairwise loss."""

    def __init__(
        self,
        loss_type: str,
        beta: float,
        alpha: float,
        compute_nll_loss: bool,
        use_ref_model: bool,
        average_log_prob: bool,
        ignore_index: int,
        hyperparameters: dict[str, float],
    ):
        super().__init__()
        self.loss_type = loss_type
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.ignore_index = ignore_index
        self.hyperparameters = hyperparameters
        pair_objective(loss_type, beta, hyperparameters)  # raises what the loss has to say against them

    def _forward(
        self,
        weight: Tensor,  # (V, H)
        hidden: Tensor,  # (2B, T, H)
        target: Tensor,  # (2B, T)
        bias: Tensor | None,  # (V,)
        ref: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
        nll_target: Tensor | None = None,  # (2B, T)
    ) -> LossAndAux:
        if len(target) % 2:
            raise ValueError(f"target must hold the chosen and then as many rejected sequences, found {len(target)}")
        pairs = len(target) // 2
        chosen, rejected = self._sequences(hidden, weight, bias, target).chunk(2)
        logps = torch.stack([self._logps(chosen), self._logps(rejected)])
        ref_logps = None if reference_free([self.loss_type]) else self._ref_logps(*ref, target).view(2, pairs)
        # SimPO and ORPO want the lengths too; the others take means for sums where average_log_prob says so.
        w, l = (chosen, rejected) if self.loss_type in ("simpo", "orpo") else logps  # noqa: E741
        ref_w, ref_l = (None, None) if ref_logps is None else ref_logps
        loss = preference_loss(w, l, ref_w, ref_l, self.loss_type, self.beta, **self.hyperparameters).mean()
        nll = torch.zeros((), device=hidden.device)
        if self.compute_nll_loss:
            scored = chosen
            if nll_target is not None:
                scored = self._sequences(hidden[:pairs], weight, bias, nll_target[:pairs])
            nll = -scored.sum.sum() / scored.length.sum()
            loss = loss + self.alpha * nll
        count = pairs * target.shape[1] * len(weight)
        logits_mean = [_sum_logits(part, weight, bias) / count for part in hidden.chunk(2)]
        aux = (*logps, *logits_mean, nll, *(self.beta * (logps if ref_logps is None else logps - ref_logps)))
        return loss, tuple(value.detach() for value in aux)

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> LossAndAux:
        return self._forward(lin_weight, _input, target, bias)


class LigerFusedLinearDPOLoss(_FusedLinearPreferenceLoss):
    """DPO and its relatives: :func:`prefopt_fast.preference_loss` under Liger's calling convention.

    Raises:
        ValueError: a ``loss_type`` that Liger lacks, or a ``label_smoothing`` or ``discopop_tau`` that the loss makes
            no use of (Liger ignores it, also for "sigmoid"; :class:`prefopt_fast.PreferenceLoss` has cDPO).
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        if loss_type not in _DPO_LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(_DPO_LOSS_TYPES)}; found {loss_type!r}")
        hyperparameters = {}
        if loss_type in ("robust", "exo_pair"):
            hyperparameters["label_smoothing"] = label_smoothing
        elif label_smoothing:
            raise ValueError(
                f"label_smoothing has no effect on loss_type {loss_type!r} in Liger: leave it at 0, or take "
                "prefopt_fast.PreferenceLoss, where it has for sigmoid"
            )
        if loss_type == "discopop":
            hyperparameters["tau"] = discopop_tau
        elif discopop_tau != 0.05:
            raise ValueError(f"discopop_tau has no effect on loss_type {loss_type!r}: leave it out")
        super().__init__(
            loss_type, beta, alpha, compute_nll_loss, use_ref_model, average_log_prob, ignore_index, hyperparameters
        )

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (2B, T, H)
        target: Tensor,  # (2B, T)
        bias: Tensor | None = None,  # (V,)
        ref_input: Tensor | None = None,  # (2B, T, H)
        ref_weight: Tensor | None = None,  # (V, H)
        ref_bias: Tensor | None = None,  # (V,)
    ) -> LossAndAux:
        """The loss, and (chosen and rejected log-probs (B,), their mean logits, NLL, chosen and rejected rewards (B,)).

        Raises:
            ValueError: shapes, dtypes or targets that do not fit, or a missing reference.
        """
        return self._forward(lin_weight, _input, target, bias, (ref_input, ref_weight, ref_bias))


class LigerFusedLinearSimPOLoss(_FusedLinearPreferenceLoss):
    """SimPO under Liger's calling convention; results as :meth:`LigerFusedLinearDPOLoss.forward`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ):
        options = {"gamma": gamma, "label_smoothing": label_smoothing}
        super().__init__("simpo", beta, alpha, compute_nll_loss, False, True, ignore_index, options)


class LigerFusedLinearCPOLoss(_FusedLinearPreferenceLoss):
    """CPO under Liger's calling convention; results as :meth:`LigerFusedLinearDPOLoss.forward`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        options = {"nll_weight": 0.0, "label_smoothing": label_smoothing}
        super().__init__("cpo", beta, alpha, compute_nll_loss, False, average_log_prob, ignore_index, options)


class LigerFusedLinearORPOLoss(_FusedLinearPreferenceLoss):
    """ORPO under Liger's calling convention; its results have the means of log σ(log odds) and of the log odds too."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ):
        super().__init__("orpo", beta, 1.0, compute_nll_loss, False, True, ignore_index, {"nll_weight": 0.0})

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,  # (2B, T)
    ) -> LossAndAux:
        loss, aux = self._forward(lin_weight, _input, target, bias, nll_target=nll_target)
        log_odds = log_odds_ratio(aux[0], aux[1])
        return loss, (*aux, F.logsigmoid(log_odds).mean(), log_odds.mean())


class LigerFusedLinearKTOLoss(_FusedLinearLoss):
    """KTO under Liger's calling convention, in which ``_input`` comes before ``lin_weight``."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob

    def forward(
        self,
        _input: Tensor,  # (S, T, H)
        lin_weight: Tensor,  # (V, H)
        target: Tensor,  # (S, T)
        bias: Tensor | None = None,  # (V,)
        preference_labels: Tensor | None = None,  # (S,)
        ref_input: Tensor | None = None,  # (S, T, H)
        ref_weight: Tensor | None = None,  # (V, H)
        ref_bias: Tensor | None = None,  # (V,)
        kl: Tensor | None = None,
    ) -> LossAndAux:
        """The loss, and the sums over chosen and over rejected responses of log-probs, logits and rewards.

        Raises:
            ValueError: as :meth:`LigerFusedLinearDPOLoss.forward`, or ``preference_labels`` that are not boolean.
        """
        if preference_labels is None or preference_labels.dtype != torch.bool:
            found: Any = None if preference_labels is None else preference_labels.dtype
            raise ValueError(f"preference_labels must be a boolean tensor, True for wanted responses; found {found}")
        logps = self._logps(self._sequences(_input, lin_weight, bias, target))
        ref_logps = self._ref_logps(ref_input, ref_weight, ref_bias, target)
        # kto_loss has max(kl, 0) for its baseline, as the paper; Liger takes kl as it is, so it goes to the other side.
        baseline = ref_logps if kl is None else ref_logps + kl
        loss = kto_loss(logps, baseline, preference_labels, 0.0, self.beta).mean()
        parts = [preference_labels, ~preference_labels]
        rewards = self.beta * (logps - ref_logps)
        logits = [_sum_logits(_input[part], lin_weight, bias) for part in parts]
        aux = (*(logps[part].sum() for part in parts), *logits, *(rewards[part].sum() for part in parts))
        return loss, tuple(value.detach() for value in aux)


def _sum_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Over all positions and the vocabulary: Σ_tv (h_t · W_v + b_v) = Σ_t h_t · Σ_v W_v + positions · Σ_v b_v."""
    total = hidden.detach().sum((0, 1), dtype=torch.float32) @ weight.detach().sum(0, dtype=torch.float32)
    return total if bias is None else total + hidden[..., 0].numel() * bias.detach().float().sum()
