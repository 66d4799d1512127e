"""transformers' Trainer without logits: its own SFT loss, and preference losses on pairs. Needs the ``train`` extra."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import transformers
    from accelerate.utils import gather_object
except ImportError as error:
    raise ImportError(
        "prefopt_fast.integrations.transformers needs transformers and accelerate: pip install 'prefopt_fast[train]'"
    ) from error

import datasets

from ..batch import IGNORE_INDEX, RESPONSES, collate
from ..head import LMHead
from ..metrics import Sums, summarize
from ..modules import GradTolerance, draw_seed
from ..packing import pack
from ..policy import ResponseModel, check_tokens, find_backbone, verify_head, verify_packing
from ..sequence_stats import sequence_logprobs
from ..token_stats import token_logprobs


def fused_causal_lm_loss(
    hidden: Tensor,  # (B, T, H)
    labels: Tensor,  # (B, T)
    head: LMHead,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,  # (B, T)
    grad_tolerance: GradTolerance = "auto",
    backend: str = "auto",
) -> Tensor:
    """transformers' ``ForCausalLMLoss``, from last hidden states instead of logits.

    Args:
        labels: token ids, or ``ignore_index``; position t is scored on ``labels[t + 1]``.
        num_items_in_batch: divisor of the summed loss; None for the number of scored positions.
        shift_labels: token ids as positions are scored on them, in place of ``labels``.
        grad_tolerance, backend: as in :func:`prefopt_fast.token_logprobs`.

    Raises:
        ValueError: as :func:`prefopt_fast.token_logprobs`.
    """
    targets = F.pad(labels[..., 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    stats = token_logprobs(
        hidden,
        head,
        targets.to(hidden.device),
        grad_tolerance=grad_tolerance,
        backend=backend,
        ignore_index=ignore_index,
        seed=draw_seed(grad_tolerance, hidden.dtype),
    )
    return -stats.logprobs.sum() / (stats.mask.sum() if num_items_in_batch is None else num_items_in_batch)


class FusedCausalLMLoss(contextlib.AbstractContextManager):
    """A Trainer's ``compute_loss_func`` with the loss the Trainer has without one, computed without logits.

    While it is entered, ``model`` computes logits of each sequence's last position alone, and its hidden states are
    kept until the loss has them.

    Args:
        model: the causal LM that the Trainer is given, also with PEFT adapters.
        grad_tolerance, backend: as in :func:`prefopt_fast.token_logprobs`.

    Raises:
        ValueError: a model whose head cannot be run apart, see :func:`prefopt_fast.policy.verify_head`.
    """

    def __init__(self, model: nn.Module, grad_tolerance: GradTolerance = "auto", backend: str = "auto"):
        _require_separate_head(model)
        self.model = model
        self.grad_tolerance = grad_tolerance
        self.backend = backend
        self._hidden: Tensor | None = None
        self._autocast: torch.dtype | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> FusedCausalLMLoss:
        def last_logits_alone(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return args, kwargs | {"logits_to_keep": 1}

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            self._hidden = hidden = output.last_hidden_state
            # Accelerate runs the model's forward pass under autocast, and Trainer the loss outside of it.
            enabled = torch.is_autocast_enabled(hidden.device.type)
            self._autocast = torch.get_autocast_dtype(hidden.device.type) if enabled else None

        self._hooks = [
            self.model.register_forward_pre_hook(last_logits_alone, with_kwargs=True),
            find_backbone(self.model).register_forward_hook(keep),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._hidden = [], None

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise RuntimeError(
                "FusedCausalLMLoss has seen no forward pass of its model: train inside its with statement"
            )
        if labels is None:
            raise ValueError("the batch has no labels: give the Trainer a data_collator that makes them")
        head = LMHead.from_model(self.model)
        options: dict[str, Any] = {"grad_tolerance": self.grad_tolerance, "backend": self.backend}
        with torch.autocast(hidden.device.type, self._autocast, enabled=self._autocast is not None):
            return fused_causal_lm_loss(hidden, labels, head, num_items_in_batch, **options)


@dataclass
class PairCollator:
    """Rows of :func:`prefopt_fast.batch.encode` → tensors with one row per pair, for :class:`PreferenceTrainer`.

    Columns that it knows besides: ``ref_chosen_logps`` and ``ref_rejected_logps`` (:func:`add_ref_logps`), and
    ``sample_weight`` (:func:`prefopt_fast.batch.add_sample_weights`).
    """

    pad_token_id: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows, pad_token_id=self.pad_token_id)
        sequences = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "targets": batch.targets}
        # Trainer and Accelerate slice and count batches by the first dimension: (2B, T), chosen first, as (B, 2, T).
        tensors = {name: value.view(2, len(rows), -1).transpose(0, 1) for name, value in sequences.items()}
        if "ref_chosen_logps" in rows[0]:
            tensors["ref_logps"] = torch.tensor([[row[f"ref_{name}_logps"] for name in RESPONSES] for row in rows])
        if batch.sample_weight is not None:
            tensors["sample_weight"] = batch.sample_weight
        return tensors


@torch.no_grad()
def add_ref_logps(
    encoded: datasets.Dataset, model: nn.Module, batch_size: int = 8, pad_token_id: int = 0
) -> datasets.Dataset:
    """``encoded`` with the summed log-probs of both responses under ``model``, the reference: TRL's columns
    ``ref_chosen_logps`` and ``ref_rejected_logps``.

    Args:
        encoded: rows of :func:`prefopt_fast.batch.encode`.
        model: a causal LM, such as the one to be trained, before it is. It runs on its own device, in evaluation mode.
        batch_size: pairs per forward pass.

    Raises:
        ValueError: as :class:`prefopt_fast.policy.ResponseModel`.
    """
    training, device = model.training, next(model.parameters()).device
    runner = ResponseModel(model).eval()
    sums = []
    for start in range(0, len(encoded), batch_size):
        rows = [encoded[i] for i in range(start, min(start + batch_size, len(encoded)))]
        stats, cu_seqlens = runner(collate(rows, pad_token_id=pad_token_id).to(device))
        sums.append(sequence_logprobs(stats, cu_seqlens).sum.view(2, -1).cpu())
    model.train(training)
    for name, column in zip(RESPONSES, torch.cat(sums, 1).tolist(), strict=True):
        encoded = encoded.add_column(f"ref_{name}_logps", column)
    return encoded


class PreferenceTrainer(transformers.Trainer):
    """transformers' Trainer on preference pairs, with :class:`PreferenceLoss` or :class:`WPOLoss` in place of its loss.

    The loss of an optimizer step is the mean over its pairs, of all processes and accumulated batches. What the loss
    module reports (rewards, WPO's weights …) is logged beside it, under the names of metrics.jsonl. As a base class
    before another Trainer's it gives that one the same.

    Args:
        loss: the loss module.
        data_collator: a :class:`PairCollator` (the default has ``processing_class``'s padding token).
        Others: the Trainer's. ``train_dataset`` and ``eval_dataset`` hold rows of :func:`prefopt_fast.batch.encode`,
            with :func:`add_ref_logps` unless the loss is reference-free.

    Raises:
        ValueError: a model whose head cannot be run apart, an option of the Trainer that contradicts this one, or data
            without the columns that the loss needs.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, loss: nn.Module, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loss: Any = loss
        self._sums = {"train": Sums(), "eval": Sums()}
        self._check_options()
        policy: Any = self.model
        _require_separate_head(policy)
        self._packs = verify_packing(policy)
        if not isinstance(self.data_collator, PairCollator):
            pad_token_id = getattr(self.processing_class, "pad_token_id", None)
            self.data_collator = PairCollator(0 if pad_token_id is None else pad_token_id)

    def _check_options(self) -> None:
        if self.args.remove_unused_columns:
            raise ValueError(
                "PreferenceTrainer needs TrainingArguments(remove_unused_columns=False): no column of its rows is an "
                "argument of the model"
            )
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError(
                "label_smoothing_factor and compute_loss_func are about the model's logits, which are never computed: "
                "label_smoothing is an argument of the loss"
            )
        if self.args.n_gpu > 1:
            raise ValueError("PreferenceTrainer needs one process per GPU: start it by torchrun or accelerate launch")
        frozen = getattr(getattr(self.loss, "objective", None), "frozen", None)
        if frozen not in ((), ("ref",)):
            raise ValueError(f"loss must be a PreferenceLoss or WPOLoss, found {type(self.loss).__name__}")
        wanted = {f"{name}_ids" for name in RESPONSES} | {f"ref_{name}_logps" for name in RESPONSES if frozen}
        for name in ("train_dataset", "eval_dataset"):
            split = getattr(self, name)
            for part in split.values() if isinstance(split, dict) else [split]:
                if missing := sorted(wanted - set(getattr(part, "column_names", wanted))):
                    raise ValueError(
                        f"{name} lacks {', '.join(missing)}: rows come from prefopt_fast.batch.encode, and the "
                        "reference's columns from add_ref_logps"
                    )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(len(batch["input_ids"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(pairs).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,  # pairs of the step
    ) -> Any:
        sequences = {name: value.transpose(0, 1).flatten(0, 1) for name, value in inputs.items() if value.dim() == 3}
        targets = sequences.pop("targets")
        pairs = len(inputs["input_ids"])
        if self._packs:  # no padding, and prompts once
            packing = pack(sequences["input_ids"], sequences["attention_mask"], pairs)
            hidden = _last_hidden_states(model, packing.inputs())[0][packing.place].view(*targets.shape, -1)
        else:
            hidden = _last_hidden_states(model, sequences)
        ref_logps = inputs["ref_logps"].T.flatten() if self.loss.objective.frozen else None
        weights = inputs.get("sample_weight")
        with self.accelerator.autocast():
            loss, metrics = self.loss(hidden, LMHead.from_model(model), targets, ref_logps, sample_weight=weights)
        self._sums["train" if model.training else "eval"].add({**metrics, "pairs": torch.tensor(float(pairs))})
        if num_items_in_batch is not None:
            # DistributedDataParallel averages over processes.
            loss = loss * (pairs * self.accelerator.num_processes / num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        evaluated = [name for name in logs if name.endswith("_loss") and name != "train_loss"]
        if evaluated or "loss" in logs:
            prefix = evaluated[0].removesuffix("loss") if evaluated else ""
            # In place: evaluate returns this dictionary.
            logs |= {prefix + name: value for name, value in self._means("eval" if evaluated else "train").items()}
        super().log(logs, start_time)

    def _means(self, mode: str) -> dict[str, float]:
        """Over the pairs of all processes since the last call."""
        total: dict[str, float] = {}
        for state in gather_object([self._sums[mode].state()]):
            for name, value in state.items():
                total[name] = total.get(name, 0.0) + value
        self._sums[mode] = Sums()
        return summarize(total) if total else {}


def _last_hidden_states(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the head is given, from a call of ``model`` as it is wrapped, with logits of one position per sequence."""
    captured: list[Tensor] = []
    hook = find_backbone(model).register_forward_hook(lambda _, __, output: captured.append(output.last_hidden_state))
    try:
        model(**inputs | {"logits_to_keep": 1, "use_cache": False})
    finally:
        hook.remove()
    return captured[0]


def _require_separate_head(model: Any) -> None:
    """Raise ValueError for a model that cannot be told to leave its logits out, or computes them in its own way."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" not in inspect.signature(causal_lm.forward).parameters:
        raise ValueError(f"{type(causal_lm).__name__}.forward has no logits_to_keep: its logits cannot be left out")
    verify_head(model, check_tokens(model))
