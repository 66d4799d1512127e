"""transformers' Trainer without logits: its own SFT loss, and preference losses on pairs. Needs the ``train`` extra."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

try:
    import transformers
    from accelerate.utils import gather_object
except ImportError as error:
    raise ImportError(
        "prefopt_fast.integrations.transformers needs transformers and accelerate: in prefopt_fast's checkout, "
        "pip install -c constraints.txt -e '.[train]'"
    ) from error

import datasets

from ..batch import IGNORE_INDEX, ResponseBatch, collate
from ..config import FROZEN_MODELS, RESPONSES
from ..head import LMHead
from ..metrics import Sums, summarize
from ..modules import GradTolerance
from ..objectives import Objective
from ..packing import pack
from ..policy import (
    ResponseModel,
    check_tokens,
    evaluation,
    find_backbone,
    kept_hidden_states,
    require_whole_sequences,
    verify_head,
    verify_packing,
)
from ..sequence_stats import sequence_logprobs
from ..token_stats import TokenStats, token_logprobs


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
    )
    return -stats.logprobs.sum() / (stats.mask.sum() if num_items_in_batch is None else num_items_in_batch)


class FusedCausalLMLoss(contextlib.AbstractContextManager):
    """A Trainer's ``compute_loss_func`` with the loss the Trainer has without one, computed without logits; label
    smoothing, which a Trainer leaves to a ``compute_loss_func`` where it has one, excepted.

    While it is entered, ``model`` computes logits of each sequence's last position alone, and its hidden states are
    kept until the loss has them: those of its last forward pass.

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
        self._shift_labels: Tensor | None = None
        self._autocast: torch.dtype | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> FusedCausalLMLoss:
        def last_logits_alone(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            self._shift_labels = kwargs.get("shift_labels")  # of sequences whose tokens processes share out
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
        self._hooks, self._hidden, self._shift_labels = [], None, None

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        hidden, shift_labels = self._hidden, self._shift_labels
        self._hidden = self._shift_labels = None
        if hidden is None:
            raise RuntimeError(
                "FusedCausalLMLoss has seen no forward pass of its model: train inside its with statement"
            )
        if labels is None:
            raise ValueError("the batch has no labels: give the Trainer a data_collator that makes them")
        head = LMHead.from_model(self.model)
        options: dict[str, Any] = {
            "shift_labels": shift_labels,
            "grad_tolerance": self.grad_tolerance,
            "backend": self.backend,
        }
        with torch.autocast(hidden.device.type, self._autocast, enabled=self._autocast is not None):
            return fused_causal_lm_loss(hidden, labels, head, num_items_in_batch, **options)


@dataclass
class PairCollator:
    """Rows of :func:`prefopt_fast.batch.encode` → tensors with one row per pair, for :class:`PreferenceTrainer`.

    Columns that it knows besides: those of :func:`add_ref_logps` and :func:`add_token_logps`, and ``sample_weight``
    (:func:`prefopt_fast.batch.add_sample_weights`).

    Args:
        responses: those of each pair that the loss is about; WSPO's is about the chosen one alone.
    """

    pad_token_id: int = 0
    responses: tuple[str, ...] = RESPONSES

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows, self.responses, self.pad_token_id)
        sequences = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "targets": batch.targets}
        for name in FROZEN_MODELS:
            columns = [f"{name}_{response}_logps" for response in self.responses]
            if all(column in rows[0] for column in columns):
                values = [row[column] for column in columns for row in rows]
                by_token = isinstance(values[0], list) or getattr(values[0], "ndim", 0) == 1
                sequences[f"{name}_logps"] = _by_token(values, batch, name) if by_token else torch.tensor(values)
        # Trainer and Accelerate slice and count batches by the first dimension: (R · B, …) as (B, R, …).
        grid = (len(self.responses), len(rows))
        tensors = {name: value.unflatten(0, grid).transpose(0, 1) for name, value in sequences.items()}
        if batch.sample_weight is not None:
            tensors["sample_weight"] = batch.sample_weight
        return tensors


def _by_token(values: list[list[float]], batch: ResponseBatch, name: str) -> Tensor:
    """(S, T) of the log-probs of each sequence's response tokens, 0 elsewhere."""
    for i, (found, length) in enumerate(zip(values, batch.cu_seqlens.diff().tolist(), strict=True)):
        if len(found) != length:
            row = int(batch.rows[i % len(batch.rows)])
            raise ValueError(f"row {row}: {len(found)} log-probs of {name} for {length} response tokens")
    padded = torch.zeros(batch.targets.shape)
    padded.view(-1)[batch.positions] = torch.tensor([value for found in values for value in found])
    return padded


def add_ref_logps(
    encoded: datasets.Dataset,
    model: nn.Module,
    batch_size: int = 8,
    pad_token_id: int = 0,
    dtype: torch.dtype | None = None,
) -> datasets.Dataset:
    """``encoded`` with the summed log-probs of both responses under ``model``, the reference: TRL's columns
    ``ref_chosen_logps`` and ``ref_rejected_logps``.

    Args:
        encoded: rows of :func:`prefopt_fast.batch.encode`.
        model: a causal LM, such as the one to be trained, before it is. It runs on its own device, in evaluation mode.
        batch_size: pairs per forward pass.
        dtype: of autocast, None for none: torch.bfloat16 for ``TrainingArguments(bf16=True)``, so that policy and
            reference round alike.

    Raises:
        ValueError: as :class:`prefopt_fast.policy.ResponseModel`.
    """
    scored = _score(encoded, model, RESPONSES, batch_size, pad_token_id, dtype)
    sums = [sequence_logprobs(stats, cu_seqlens).sum.view(2, -1).cpu() for stats, cu_seqlens in scored]
    for name, column in zip(RESPONSES, torch.cat(sums, 1).tolist(), strict=True):
        encoded = _without(encoded, f"ref_{name}_logps").add_column(f"ref_{name}_logps", column)
    return encoded


def add_token_logps(
    encoded: datasets.Dataset,
    model: nn.Module,
    name: str,
    batch_size: int = 8,
    pad_token_id: int = 0,
    dtype: torch.dtype | None = None,
) -> datasets.Dataset:
    """``encoded`` with the log-probs of each chosen response's tokens under ``model``, one of WSPO's frozen models:
    the column ``{name}_chosen_logps``, as :class:`prefopt_fast.integrations.trl.WSPOTrainer` knows it too.

    Args:
        name: "ref", "weak_aligned" or "weak_ref".
        model: a causal LM of the tokenizer that ``encoded`` was made with.
        Others, and what is raised: as in :func:`add_ref_logps`.

    Raises:
        ValueError: another name.
    """
    if name not in FROZEN_MODELS:
        raise ValueError(f"name must be one of {', '.join(FROZEN_MODELS)}; found {name!r}")
    rows: list[list[float]] = []
    for stats, cu_seqlens in _score(encoded, model, RESPONSES[:1], batch_size, pad_token_id, dtype):
        rows += [part.tolist() for part in stats.logprobs.cpu().split(cu_seqlens.diff().tolist())]
    column = f"{name}_chosen_logps"
    return _without(encoded, column).add_column(column, rows, feature=datasets.List(datasets.Value("float32")))


def _without(encoded: datasets.Dataset, column: str) -> datasets.Dataset:
    """So that data can be scored again, by the policy of a next round."""
    return encoded.remove_columns(column) if column in encoded.column_names else encoded


@torch.no_grad()
def _score(
    encoded: datasets.Dataset,
    model: nn.Module,
    responses: tuple[str, ...],
    batch_size: int,
    pad_token_id: int,
    dtype: torch.dtype | None,
) -> Iterator[tuple[TokenStats, Tensor]]:
    """Statistics and cu_seqlens of each batch."""
    device, runner = next(model.parameters()).device, ResponseModel(model)
    with evaluation(model):
        for start in tqdm(range(0, len(encoded), batch_size), desc="scoring", unit="batch", disable=None):
            rows = [encoded[i] for i in range(start, min(start + batch_size, len(encoded)))]
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                stats, cu_seqlens = runner(collate(rows, responses, pad_token_id).to(device))
            yield stats, cu_seqlens


class PreferenceTrainer(transformers.Trainer):
    """transformers' Trainer on preference pairs, with a :class:`PreferenceLoss`, :class:`WPOLoss` or :class:`WSPOLoss`
    in place of its loss.

    The loss of an optimizer step is the mean over its pairs, of all processes and accumulated batches. What the loss
    module reports (rewards, WPO's weights …) is logged beside it, under the names of metrics.jsonl. As a base class
    before another Trainer's it gives that one the same.

    Args:
        loss: the loss module.
        data_collator: a :class:`PairCollator` (the default has ``processing_class``'s padding token).
        Others: the Trainer's. ``train_dataset`` and ``eval_dataset`` hold rows of :func:`prefopt_fast.batch.encode`,
            with :func:`add_ref_logps` unless the loss is reference-free; for WSPO, which trains on chosen responses
            alone, with :func:`add_token_logps` of its three frozen models.

    Raises:
        ValueError: a model whose head cannot be run apart, an option of the Trainer that contradicts this one, or data
            without the columns that the loss needs.
        TypeError: another data_collator.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, loss: nn.Module, **kwargs: Any):
        third = args[2] if len(args) > 2 and callable(args[2]) else None  # the Trainer's data_collator
        if not isinstance(collator := kwargs.get("data_collator", third), PairCollator | None):
            raise TypeError(f"data_collator must be a PairCollator, found {type(collator).__name__}")
        super().__init__(*args, **kwargs)
        self.loss: Any = loss
        self._sums = {"train": Sums(), "eval": Sums()}
        require_whole_sequences(self.accelerator)
        responses = self._check_options().responses
        policy: Any = self.model
        _require_separate_head(policy)
        self._packs = verify_packing(policy)
        if not isinstance(self.data_collator, PairCollator):
            pad_token_id = getattr(self.processing_class, "pad_token_id", None)
            self.data_collator = PairCollator(0 if pad_token_id is None else pad_token_id, responses)
        elif tuple(self.data_collator.responses) != responses:
            raise ValueError(
                f"{type(loss).__name__} is about {' and '.join(responses)} responses, the data_collator "
                f"has {' and '.join(self.data_collator.responses)}"
            )

    def _check_options(self) -> Objective:
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
        objective = getattr(self.loss, "objective", None)
        if not isinstance(objective, Objective):
            raise ValueError(f"loss must be a PreferenceLoss, WPOLoss or WSPOLoss, found {type(self.loss).__name__}")
        if getattr(self.loss, "level", None) == "segment":
            raise ValueError('WSPO at level "segment" needs both tokenizers\' segments: prefopt-fast train has them')
        for name in ("train_dataset", "eval_dataset"):
            split = getattr(self, name)
            for part in split.values() if isinstance(split, dict) else [split]:
                self._check_columns(name, part)
        return objective

    def _check_columns(self, name: str, split: Any) -> None:
        objective = self.loss.objective
        by_token = len(objective.responses) == 1
        frozen = [f"{model}_{response}_logps" for model in objective.frozen for response in objective.responses]
        wanted = {f"{response}_ids" for response in objective.responses}.union(frozen)
        source = "add_token_logps" if by_token else "add_ref_logps"
        # A stream may not know its columns.
        if missing := sorted(wanted - set(getattr(split, "column_names", None) or wanted)):
            raise ValueError(
                f"{name} lacks {', '.join(missing)}: rows come from prefopt_fast.batch.encode, and the frozen models' "
                f"columns from {source}"
            )
        features = getattr(split, "features", None) or {}
        if by_token and any(isinstance(features.get(column), datasets.Value) for column in frozen):
            raise ValueError(f"{name} holds sums of log-probs: WSPO needs those of tokens, from {source}")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if not isinstance(eval_dataset, str):  # the name of a split that was checked
            self._check_columns("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        self._check_columns("test_dataset", test_dataset)
        return super().get_test_dataloader(test_dataset)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._sums["eval"] = Sums()  # predict, which logs nothing, leaves its own behind
        return super().evaluation_loop(*args, **kwargs)

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
        # (B, R, …) as (R · B, …)
        responses = {name: value.transpose(0, 1).flatten(0, 1) for name, value in inputs.items() if value.dim() > 1}
        sequences = {name: responses[name] for name in ("input_ids", "attention_mask")}
        columns = [f"{name}_logps" for name in self.loss.objective.frozen]
        if missing := [name for name in columns if name not in inputs]:  # of data that does not know its columns
            raise ValueError(f"the batch lacks {', '.join(missing)}, from add_ref_logps or add_token_logps")
        targets, pairs = responses["targets"], len(inputs["input_ids"])
        if self._packs:  # no padding, and prompts once
            packing = pack(sequences["input_ids"], sequences["attention_mask"], pairs)
            hidden = _last_hidden_states(model, packing.inputs())[0][packing.place].view(*targets.shape, -1)
        else:
            hidden = _last_hidden_states(model, sequences)
        weights = inputs.get("sample_weight")
        with self.accelerator.autocast():
            loss, metrics = self.loss(
                hidden,
                LMHead.from_model(model),
                targets,
                **{name: responses[name] for name in columns},
                sample_weight=weights,
            )
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
    if getattr(find_backbone(model).config, "output_router_logits", False):  # for a loss that takes no packed masks
        inputs = inputs | {"output_router_logits": False}
    with kept_hidden_states(model) as kept:
        model(**inputs | {"logits_to_keep": 1, "use_cache": False})
    return kept[0]


def _require_separate_head(model: Any) -> None:
    """Raise ValueError for a model that cannot be told to leave its logits out, or computes them in its own way."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" not in inspect.signature(causal_lm.forward).parameters:
        raise ValueError(f"{type(causal_lm).__name__}.forward has no logits_to_keep: its logits cannot be left out")
    verify_head(model, check_tokens(model))
