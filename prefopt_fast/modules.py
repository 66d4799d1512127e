"""The losses as ``nn.Module``: hidden states, a head and targets in; the mean loss over pairs, and metrics, out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .head import LMHead
from .objectives import Objective, pair_objective, wspo_objective
from .sequence_stats import require_tokens, segment_sum
from .token_stats import token_logprobs, validate_inputs

GradTolerance = float | str | tuple[float, float]
Output = tuple[Tensor, dict[str, Tensor]]


class _ResponseLoss(nn.Module):
    """An objective on the scored tokens of a batch of sequences, padded or packed."""

    def __init__(self, objective: Objective, ignore_index: int, grad_tolerance: GradTolerance, backend: str):
        super().__init__()
        self.objective = objective
        self.ignore_index = ignore_index
        self.grad_tolerance = grad_tolerance
        self.backend = backend

    def _loss(
        self,
        hidden: Tensor,  # (S, T, H), or (N, H) with cu_seqlens
        head: LMHead,
        targets: Tensor,  # (S, T), or (N,)
        frozen: Mapping[str, Tensor],  # of targets' shape, or (S,)
        cu_seqlens: Tensor | None,  # (S + 1,)
        sample_weight: Tensor | None,  # (B,)
    ) -> Output:
        validate_inputs(hidden, head, targets, self.objective.stats, self.ignore_index)
        keep = targets != self.ignore_index
        lengths = segment_sum(keep, cu_seqlens)
        require_tokens(lengths)
        if len(lengths) % len(self.objective.responses):
            raise ValueError(
                f"targets must hold the chosen sequences and then as many rejected ones, found {len(lengths)} sequences"
            )
        pairs = len(lengths) // len(self.objective.responses)
        if sample_weight is not None and sample_weight.shape != (pairs,):
            raise ValueError(f"sample_weight must be ({pairs},), one for each pair, found {tuple(sample_weight.shape)}")
        rows = keep.flatten().nonzero().squeeze(-1)  # once: on an accelerator it is a synchronization
        stats = token_logprobs(
            hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows),
            head,
            targets.flatten()[rows],
            stats=self.objective.stats,
            grad_tolerance=self.grad_tolerance,
            backend=self.backend,
        )
        packed = {name: value.flatten()[rows] if value.shape == keep.shape else value for name, value in frozen.items()}
        loss, metrics = self.objective.function(stats, nn.functional.pad(lengths.cumsum(0), (1, 0)), packed)
        if sample_weight is not None:
            loss = loss * sample_weight
        return loss.mean(), metrics


class _PairLoss(_ResponseLoss):
    def forward(
        self,
        hidden: Tensor,  # (2B, T, H), or (N, H) with cu_seqlens
        head: LMHead,
        targets: Tensor,  # (2B, T), or (N,)
        ref_logps: Tensor | None = None,  # (2B,), or of targets' shape
        cu_seqlens: Tensor | None = None,  # (2B + 1,)
        sample_weight: Tensor | None = None,  # (B,)
    ) -> Output:
        """Mean loss over the B pairs, Σ_i w_i ℓ_i / B for ``sample_weight`` w, and metrics, detached, (B,) each.

        Args:
            hidden: last hidden states, the B chosen sequences first, then the B rejected ones.
            targets: the token that each position predicts, or ``ignore_index`` where it predicts no response token.
            ref_logps: the reference's log-probs, by sequence (sums) or by token; None for reference-free losses.
            cu_seqlens: offsets of packed sequences, from 0 to N.

        Raises:
            ValueError: what :func:`prefopt_fast.token_logprobs` and :func:`prefopt_fast.preference_loss` raise, and
                shapes that do not fit.
        """
        if (ref_logps is None) == ("ref" in self.objective.frozen):
            wanted = "needs ref_logps" if ref_logps is None else "is reference-free: ref_logps must be None"
            raise ValueError(f"this {type(self).__name__} {wanted}")
        if ref_logps is None:
            return self._loss(hidden, head, targets, {}, cu_seqlens, sample_weight)
        sequences = (len(targets) if cu_seqlens is None else len(cu_seqlens) - 1,)
        if ref_logps.shape not in (sequences, targets.shape):
            raise ValueError(
                f"ref_logps must be {sequences}, sums by sequence, or {tuple(targets.shape)} as targets; "
                f"found {tuple(ref_logps.shape)}"
            )
        return self._loss(hidden, head, targets, {"ref": ref_logps}, cu_seqlens, sample_weight)


class PreferenceLoss(_PairLoss):
    """Any member of the DPO family, or a mixture.

    Args:
        loss_type, beta, hyperparameters: as in :func:`prefopt_fast.preference_loss`.
        sft_weight: adds this times the chosen response's NLL per token.
        ignore_index: targets with this value are not scored.
        grad_tolerance, backend: as in :func:`prefopt_fast.token_logprobs`. The columns behind an inexact gradient are
            drawn with torch's CPU generator: ``torch.manual_seed`` governs them.

    Raises:
        ValueError: as :func:`prefopt_fast.preference_loss`, at construction.
    """

    def __init__(
        self,
        loss_type: str | Mapping[str, float] = "sigmoid",
        beta: float = 0.1,
        *,
        sft_weight: float = 0.0,
        ignore_index: int = -100,
        grad_tolerance: GradTolerance = "auto",
        backend: str = "auto",
        **hyperparameters: float,
    ):
        objective = pair_objective(loss_type, beta, hyperparameters, sft_weight)
        super().__init__(objective, ignore_index, grad_tolerance, backend)


class WPOLoss(_PairLoss):
    """WPO over any member of the DPO family, or a mixture.

    Args:
        alignment: as in :func:`prefopt_fast.wpo_weights`. clamp: as in :func:`prefopt_fast.wpo_loss`.
        sft_weight: adds this times the chosen response's NLL per token, which WPO's weight does not multiply.
        Others, and what is raised: as in :class:`PreferenceLoss`.
    """

    def __init__(
        self,
        loss_type: str | Mapping[str, float] = "sigmoid",
        beta: float = 0.1,
        *,
        alignment: str = "sampled",
        clamp: bool = True,
        sft_weight: float = 0.0,
        ignore_index: int = -100,
        grad_tolerance: GradTolerance = "auto",
        backend: str = "auto",
        **hyperparameters: float,
    ):
        objective = pair_objective(loss_type, beta, hyperparameters, sft_weight, weighting=(alignment, clamp))
        super().__init__(objective, ignore_index, grad_tolerance, backend)


class WSPOLoss(_ResponseLoss):
    """WSPO on chosen responses.

    Args:
        gamma, level: as in :func:`prefopt_fast.wspo_loss`.
        Others: as in :class:`PreferenceLoss`.
    """

    def __init__(
        self,
        gamma: float = 0.1,
        level: str = "token",
        *,
        sft_weight: float = 0.0,
        ignore_index: int = -100,
        grad_tolerance: GradTolerance = "auto",
        backend: str = "auto",
    ):
        super().__init__(wspo_objective(gamma, level, sft_weight), ignore_index, grad_tolerance, backend)
        self.level = level

    def forward(
        self,
        hidden: Tensor,  # (B, T, H), or (N, H) with cu_seqlens
        head: LMHead,
        targets: Tensor,  # (B, T), or (N,)
        ref_logps: Tensor,  # of targets' shape
        weak_aligned_logps: Tensor,  # of targets' shape
        weak_ref_logps: Tensor,  # of targets' shape
        cu_seqlens: Tensor | None = None,  # (B + 1,)
        sample_weight: Tensor | None = None,  # (B,)
        segments: Tensor | None = None,  # of targets' shape
    ) -> Output:
        """Mean loss over the B chosen responses and metrics, see :meth:`PreferenceLoss.forward`.

        ``ref_logps``, ``weak_aligned_logps`` and ``weak_ref_logps`` are log-probs of the targets' tokens, such as
        :func:`prefopt_fast.token_logprobs` gives, and any value where a target is ignored; ``segments`` goes with level
        "segment", as in :func:`prefopt_fast.wspo_loss`.

        Raises:
            ValueError: what :func:`prefopt_fast.token_logprobs` raises, and shapes that do not fit.
        """
        if (segments is None) == (self.level == "segment"):
            found = "without" if segments is None else "with"
            raise ValueError(f'segments go with level "segment"; found level {self.level!r} {found} segments')
        frozen = {"ref": ref_logps, "weak_aligned": weak_aligned_logps, "weak_ref": weak_ref_logps}
        if segments is not None:
            frozen["segments"] = segments
        for name, value in frozen.items():
            if value.shape != targets.shape:
                raise ValueError(
                    f"log-probs and segments must have targets' shape {tuple(targets.shape)}, found {name} "
                    f"{tuple(value.shape)}"
                )
        return self._loss(hidden, head, targets, frozen, cu_seqlens, sample_weight)
