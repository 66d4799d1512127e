"""TRL 1.16: its own trainers on our operator, and its DPOTrainer with our WPO and WSPO. Needs the ``trl`` extra."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

try:
    import trl
except ImportError as error:
    raise ImportError(
        "prefopt_fast.integrations.trl needs TRL 1.16 (Python 3.11+): in prefopt_fast's checkout, "
        "pip install -c constraints.txt -e '.[trl]'"
    ) from error
if Version(trl.__version__).release[:2] != (1, 16):
    raise ImportError(
        f"prefopt_fast.integrations.trl knows TRL >=1.16,<1.17, found {trl.__version__}: in prefopt_fast's checkout, "
        "pip install -c constraints.txt -e '.[trl]'"
    )

import datasets
import trl.trainer.utils
from accelerate.utils import is_peft_model, tqdm
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput, get_config_model_id

from ..batch import IGNORE_INDEX
from ..config import FROZEN_MODELS
from ..frozen import stored
from ..head import LMHead
from ..kernels.dispatch import resolve_backend
from ..losses import hyperparameter_names, loss_mixture, reference_free
from ..objectives import Objective, pair_objective, wspo_objective
from ..policy import (
    check_tokens,
    disable_dropout,
    evaluation,
    find_backbone,
    hidden_states,
    kept_hidden_states,
    load_model,
    load_tokenizer,
    require_whole_sequences,
    verify_head,
    verify_packing,
)
from ..scoring import LogprobStore, data_digest, tokenizer_digest
from ..token_stats import TokenStats, resolve_grad_tolerance, token_logprobs

Tolerance = float | str | tuple[float, float]

_OURS = {"mean_logits": "mean_logit"}  # TRL's names of statistics, where they are not ours
_trls_use_triton = trl.trainer.utils._use_triton
_in_use: list[use_fast_logprobs] = []


class use_fast_logprobs(contextlib.AbstractContextManager):
    """TRL's trainers compute their log-probs by :func:`prefopt_fast.token_logprobs`, from this call on.

    What :class:`trl.kernels.ChunkedLogProbFunction` returns is returned: the same values up to rounding (in 16-bit
    formats TRL rounds every logit, we do not; of logits that tie for the maximum, each counts as top-1), the same
    shapes and dtypes. On CPUs only response positions are computed, as TRL has it on GPUs. Trainers that exist already
    are served too. Undone at the end of a ``with`` block, or by ``undo()``; uses nest.

    Args:
        grad_tolerance, backend: as in :func:`prefopt_fast.token_logprobs`.

    Raises:
        ValueError, RuntimeError: a tolerance or backend that does not exist.
    """

    def __init__(self, grad_tolerance: Tolerance = "auto", backend: str = "auto"):
        _check_compute_options(grad_tolerance, backend)
        self.function = _FastLogProbFunction(grad_tolerance, backend)
        _in_use.append(self)
        _install()

    def undo(self) -> None:
        """What was in use before is in use again; a second call does nothing."""
        if self in _in_use:
            _in_use.remove(self)
            _install()

    def __exit__(self, *_: object) -> None:
        self.undo()


def _install() -> None:
    """The latest use's function, or TRL's, under every name that a loaded module of TRL has for it."""
    function = _in_use[-1].function if _in_use else ChunkedLogProbFunction
    modules = [module for name, module in list(sys.modules.items()) if f"{name}.".startswith("trl.")]
    for module in modules:
        for name, value in list(vars(module).items()):
            if value is ChunkedLogProbFunction or isinstance(value, _FastLogProbFunction):
                setattr(module, name, function)
    trl.trainer.utils._use_triton = _is_compact if _in_use else _trls_use_triton


def _is_compact(device: torch.device) -> bool:
    """Whether to score valid positions alone, which TRL leaves to devices that do not compile for each shape."""
    return device.type == "cpu" or _trls_use_triton(device)


class _FastLogProbFunction:
    """``apply`` with the arguments and results of ChunkedLogProbFunction.apply."""

    def __init__(self, grad_tolerance: Tolerance, backend: str):
        self.grad_tolerance, self.backend = grad_tolerance, backend

    def apply(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        stats = token_logprobs(
            hidden,
            LMHead(weight.to(hidden.dtype), bias, final_logit_softcapping, logit_scale, temperature),
            targets,
            tuple(_OURS.get(name, name) for name in OPTIONAL_OUTPUTS if name in outputs),
            self.grad_tolerance,
            self.backend,
        )
        entropy = stats.entropy
        if entropy is not None and stats.logprobs.requires_grad:
            settings = (temperature, chunk_size, final_logit_softcapping, logit_scale)
            entropy = _EntropyGradient.apply(entropy, hidden, weight, bias, targets, settings)
        found = (stats.logprobs, entropy, stats.log_sum_sq_probs, stats.mean_logit)
        return *(None if value is None else value.float() for value in found), stats.is_top1


class _EntropyGradient(torch.autograd.Function):
    """The identity on our entropy, with TRL's gradient: GRPO's entropy bonus, off by default, is what needs one."""

    @staticmethod
    def forward(
        ctx: Any,
        entropy: Tensor,  # (N,)
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        settings: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.settings = settings
        device = hidden.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *operands, targets = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        leaves = [x if x is None else x.detach().requires_grad_(n) for x, n in zip(operands, needed, strict=True)]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            entropy = ChunkedLogProbFunction.apply(*leaves, targets, *ctx.settings, ("entropy",))[1]
        grads = iter(torch.autograd.grad(entropy, [x for x in leaves if x is not None and x.requires_grad], grad))
        return None, *(next(grads) if n else None for n in needed), None, None


@dataclass
class _Config(DPOConfig):
    """What WPOConfig and WSPOConfig share."""

    grad_tolerance: str = field(
        default="auto",
        metadata={"help": "Relative error allowed to the head's gradient: 0 is exact, 'auto' exact in float32."},
    )
    backend: str = field(default="auto", metadata={"help": "Implementation of the LM head: auto, torch or triton."})

    # Options of DPOConfig that can have no effect here, and the value that says so.
    _without_effect: ClassVar[dict[str, Any]] = {
        "use_weighting": False,
        "use_liger_kernel": False,
        "padding_free": False,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        with contextlib.suppress(ValueError, TypeError):  # a number as text, as a command line has it
            self.grad_tolerance = float(self.grad_tolerance)  # type: ignore[assignment]
        _check_compute_options(self.grad_tolerance, self.backend)
        for name, value in self._without_effect.items():
            if (found := getattr(self, name)) != value:
                raise ValueError(f"{type(self).__name__} cannot honour {name}={found!r}: leave it at {value!r}")

    def objective(self) -> Objective:
        raise NotImplementedError


@dataclass
class WPOConfig(_Config):
    """DPOConfig for :class:`WPOTrainer`.

    ``loss_type`` is any of ``prefopt_fast.PAIRWISE_LOSSES``, or a list of them with ``loss_weights`` of which one at
    least has a reference; ``label_smoothing`` and ``discopop_tau`` go to the losses that take them, and raise where
    none does.

    Args:
        alignment: what makes a token on-policy: "sampled", "greedy" or "none".
        clamp: limit a pair's weight to 1 (the authors' code does; TRL's ``use_weighting`` does not).
        grad_tolerance, backend: as in :func:`prefopt_fast.token_logprobs`.

    Raises:
        ValueError: an option that contradicts WPO or is out of range.
    """

    alignment: str = field(default="sampled", metadata={"help": "What makes a token on-policy: sampled, greedy, none."})
    clamp: bool = field(default=True, metadata={"help": "Limit a pair's weight to 1."})

    # Options of DPOConfig that are hyperparameters: the name that a loss has for each, and the value that leaves it be.
    _hyperparameters: ClassVar[dict[str, tuple[str, float]]] = {
        "label_smoothing": ("label_smoothing", 0.0),
        "discopop_tau": ("tau", 0.05),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if reference_free(self.loss_mixture):
            raise ValueError(
                f"loss_type {', '.join(self.loss_type)} has no reference, which DPOTrainer always computes"
            )
        accepted = hyperparameter_names(self.loss_mixture)
        for option, (name, default) in self._hyperparameters.items():
            if name not in accepted and (found := getattr(self, option)) != default:
                raise ValueError(
                    f"loss_type {', '.join(self.loss_type)} makes no use of {option}={found!r}: leave it at {default!r}"
                )
        self.objective()  # what a loss has to say against its hyperparameters comes before any work

    @property
    def loss_mixture(self) -> dict[str, float]:
        return loss_mixture(dict(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True)))

    def objective(self) -> Objective:
        accepted = hyperparameter_names(self.loss_mixture)
        given = {name: getattr(self, option) for option, (name, _) in self._hyperparameters.items()}
        hyperparameters = {name: value for name, value in given.items() if name in accepted}
        weighting = (self.alignment, self.clamp)
        return pair_objective(self.loss_mixture, self.beta, hyperparameters, weighting=weighting)


@dataclass
class WSPOConfig(_Config):
    """DPOConfig for :class:`WSPOTrainer`; the frozen models are always scored before training starts.

    Args:
        gamma: positive transfer strength.
        level: "token" or "sequence", as in :func:`prefopt_fast.wspo_loss`.
        ref_logprobs, weak_aligned_logprobs, weak_ref_logprobs: folders written by ``prefopt-fast score`` for the
            training data, with ``--truncation-side sequence_end`` and the same ``--max-length``.
        grad_tolerance, backend: as in :func:`prefopt_fast.token_logprobs`.

    Raises:
        ValueError: an option that contradicts WSPO or is out of range.
    """

    gamma: float = field(default=0.1, metadata={"help": "Transfer strength."})
    level: str = field(default="token", metadata={"help": "Square per token, or per sequence: token, sequence."})
    ref_logprobs: str | None = field(default=None, metadata={"help": "Store in place of the reference policy."})
    weak_aligned_logprobs: str | None = field(default=None, metadata={"help": "Store in place of the model."})
    weak_ref_logprobs: str | None = field(default=None, metadata={"help": "Store in place of the model."})
    precompute_ref_log_probs: bool = field(default=True, metadata={"help": "WSPO always does."})

    _without_effect: ClassVar[dict[str, Any]] = _Config._without_effect | {
        "precompute_ref_log_probs": True,
        "loss_type": ["sigmoid"],
        "loss_weights": None,
        "label_smoothing": 0.0,
        "discopop_tau": 0.05,
        "beta": 0.1,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level not in ("token", "sequence"):
            raise ValueError(f'level must be "token" or "sequence" in TRL\'s trainer; found {self.level!r}')
        self.objective()  # raises for gamma
        if self.truncation_mode != "keep_start" and any(getattr(self, f"{name}_logprobs") for name in FROZEN_MODELS):
            raise ValueError(f"stored log-probs need truncation_mode='keep_start', found {self.truncation_mode!r}")

    def objective(self) -> Objective:
        return wspo_objective(self.gamma, self.level)


@dataclass
class _HeadOutput(FusedCausalLMOutput):
    """TRL's output, and what greedy alignment needs."""

    max_logprob: Tensor | None = None


class _Trainer(DPOTrainer):
    """DPOTrainer whose policy computes token statistics by our operator; subclasses make a loss of them."""

    _config: ClassVar[type[_Config]]
    _frozen_inputs: ClassVar[tuple[str, ...]]  # what a batch says of frozen models
    args: Any
    model: Any
    processing_class: Any
    _signature_columns: Any
    _fused = False

    def __init__(self, model: Any, ref_model: Any = None, args: _Config | None = None, **kwargs: Any):
        args = self._resolve_args(model, args)
        self._objective = args.objective()
        super().__init__(model, ref_model, args, **kwargs)
        if args.disable_dropout:  # which DPOTrainer does of modules alone, and attention's is a number
            disable_dropout(self.model)
        self._fuse_heads()

    def _fuse_heads(self) -> None:
        """Once, before anything is scored: to DPOTrainer's head a policy is not quite its own reference."""
        if self._fused:
            return
        self._fused = True
        if self._is_vision_dataset:
            raise ValueError(f"{type(self).__name__} trains on text; found images in the dataset")
        _require_one_device(model=self.model, ref_model=self.ref_model)
        verify_head(self.model, check_tokens(self.model))
        if self.aux_loss_enabled:
            with torch.no_grad(), evaluation(self.model):
                outputs = self.model(input_ids=check_tokens(self.model), output_router_logits=True, use_cache=False)
            if outputs.get("aux_loss") is None:
                raise ValueError(
                    f"{type(self.model).__name__} makes no router loss for router_aux_loss_coef "
                    f"{self.router_aux_loss_coef} to weigh: set it to 0.0"
                )
        # The router's loss is one of all positions, in the layout that they have in DPOTrainer.
        sides = len(self._objective.responses)
        packs = not self.aux_loss_enabled and verify_packing(self.model)
        stats = ("entropy", "mean_logit", "is_top1", *self._objective.stats)
        _add_fast_head(self.model, stats, self.args, sides, packs)
        if self.ref_model is not None:
            ref = self.accelerator.unwrap_model(self.ref_model)
            # FSDP has sharded it already: nothing but its whole forward runs, and its kind says as much.
            packs = packs if _kind(ref) == _kind(self.model) else verify_packing(ref)
            _add_fast_head(ref, (), self.args, sides, packs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        require_whole_sequences(self.accelerator)
        plugin = self.accelerator.state.fsdp_plugin if self.accelerator.is_fsdp2 else None
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # Accelerate's has a model's outputs in 16 bits: of log-probs that would be three digits.
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    @classmethod
    def _resolve_args(cls, model: Any, args: Any) -> Any:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            return cls._config(f"{name.split('/')[-1]}-{cls._name}")
        if not isinstance(args, cls._config):
            raise TypeError(f"args must be a {cls._config.__name__}, found {type(args).__name__}")
        return args

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """DPOTrainer's, and after training too for new data that have the frozen models' log-probs: DPOTrainer refuses
        all, since it could not score them."""
        splits = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        columns = [set(getattr(split, "column_names", None) or ()) for split in splits]
        if not self.precompute_ref_logps or not all(set(self._frozen_inputs) <= found for found in columns):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if not isinstance(eval_dataset, dict):  # Trainer's has each of a dictionary's evaluated by this method
            eval_dataset = self._prepare_dataset(eval_dataset, self.processing_class, self.args, "eval")
        return super(DPOTrainer, self).evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _frozen_logps(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Each frozen model's log-probs, by token (S, T - 1) or by sequence (S,)."""
        raise NotImplementedError

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        ours = ("completion_mask", *self._frozen_inputs)
        model_inputs = {name: value for name, value in inputs.items() if name not in ours} | {"use_cache": False}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**model_inputs, **router, labels=labels, fused_lm_head=True)
        stats = TokenStats(
            outputs.log_probs,
            outputs.label_mask,
            log_sum_sq_probs=outputs.log_sum_sq_probs,
            max_logprob=outputs.max_logprob,
            backend=self.args.backend,
        )
        losses, metrics = self._objective.function(stats, None, self._frozen_logps(inputs))
        loss = losses.mean()
        metrics.pop("wpo/squared_weight", None)  # of which a mean says nothing
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = outputs.aux_loss[None]
        metrics["entropy"] = outputs.entropy[stats.mask]
        sides = len(self._objective.responses)
        masks = stats.mask.chunk(sides)
        parts = (self._objective.responses, masks, outputs.mean_logits.chunk(sides))
        for name, mask, mean_logits in zip(*parts, strict=True):
            metrics[f"logits/{name}"] = mean_logits[mask]
        metrics["mean_token_accuracy"] = outputs.is_top1.chunk(sides)[0][masks[0]]
        self._record(metrics, inputs["attention_mask"].sum())
        if return_outputs:  # for compute_metrics, which takes logits
            with torch.no_grad():
                outputs = model(**model_inputs)
        return (loss, outputs) if return_outputs else loss

    def _record(self, metrics: dict[str, Tensor], tokens: Tensor) -> None:
        """Means over all processes' values under DPOTrainer's names; one synchronization."""
        mode = "train" if self.model.training else "eval"
        sums = [tokens.float(), *(values.detach().float().sum() for values in metrics.values())]
        counts = torch.tensor([0.0, *(values.numel() for values in metrics.values())], device=tokens.device)
        sums, counts = self.accelerator.reduce(torch.stack((torch.stack(sums), counts)), "sum").tolist()
        for name, total, count in zip(metrics, sums[1:], counts[1:], strict=True):
            self._metrics[mode][name].append(total / max(count, 1.0))
        if mode == "train":
            self._total_train_tokens += int(sums[0]) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def _kind(model: Any) -> tuple[type, str]:
    """What decides whether a model packs: see verify_packing. FSDP derives a class of its own."""
    model = model.get_base_model() if is_peft_model(model) else model
    return model.config.__class__, model.config._attn_implementation


def _add_fast_head(model: Any, stats: tuple[str, ...], args: _Config, sides: int, packs: bool) -> Callable[[], None]:
    """Make ``model(..., labels=labels, fused_lm_head=True)`` return statistics (S, T - 1) of labels[:, 1:].

    TRL's add_fused_lm_head by our operator: inside the model's forward, so that wrappers' hooks see its parameters.
    Where the model ``packs``, without padding, and with what the ``sides`` of a pair share computed once. What is
    returned gives the model its own forward back.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    _remove_trls_head(model)
    patched = vars(model).get("forward")

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def fast_forward(self: Any, *inputs: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        forward = functools.partial(type(self).forward, self) if patched is None else patched
        if not fused_lm_head:
            return forward(*inputs, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        mask = labels != IGNORE_INDEX
        positions = F.pad(mask, (0, 1)).flatten().nonzero().squeeze(-1)
        aux_loss = None
        if kwargs.get("output_router_logits"):  # whose loss the model makes, beside logits of one position
            with kept_hidden_states(self) as kept:
                aux_loss = forward(*inputs, **kwargs, logits_to_keep=1).aux_loss
            hidden = kept[0].flatten(0, 1)[positions]
        elif packs:
            ids, attention_mask = kwargs["input_ids"], kwargs["attention_mask"]
            hidden = hidden_states(self, ids, attention_mask, positions, packs, len(ids) // sides)
        else:
            hidden = find_backbone(self)(*inputs, **kwargs).last_hidden_state.flatten(0, 1)[positions]
        found = token_logprobs(
            hidden,
            LMHead.from_model(self),
            labels[mask],
            stats,
            args.grad_tolerance,
            args.backend,
        )
        fields = {
            "log_probs": found.logprobs,
            "mean_logits": found.mean_logit,
            **{name: getattr(found, name) for name in ("entropy", "log_sum_sq_probs", "max_logprob", "is_top1")},
        }
        padded = {k: v.new_zeros(mask.shape).masked_scatter(mask, v) for k, v in fields.items() if v is not None}
        return _HeadOutput(label_mask=mask, aux_loss=aux_loss, **padded)

    def undo() -> None:
        if patched is None:
            del model.forward
        else:
            model.forward = patched

    model.forward = types.MethodType(fast_forward, model)
    return undo


def _remove_trls_head(model: Any) -> None:
    """Which calls the forward of this very model, also where it is a copy's: a snapshot would follow the training."""
    function = getattr(vars(model).get("forward"), "__func__", None)
    if function is None or function.__code__.co_filename != trl.trainer.utils.__file__:
        return
    original = inspect.getclosurevars(function).nonlocals["original_forward"]
    if getattr(original, "__func__", None) is type(model).forward:
        del model.forward
    else:
        model.forward = original


class WPOTrainer(_Trainer):
    """WPO (arXiv 2406.11827) with DPOTrainer's arguments, data, metrics and checkpoints.

    A data set with the columns ``ref_chosen_logps`` and ``ref_rejected_logps`` (a response's summed log-prob) needs no
    reference where ``precompute_ref_log_probs`` is set. Metrics are DPOTrainer's and ``wpo/weight``.

    Raises:
        ValueError, TypeError: what DPOTrainer raises; a model whose logits are not those of its backbone and head;
            prompt-learning adapters, images.
    """

    _config, _name, _tag_names = WPOConfig, "WPO", ["trl", "wpo"]
    _paper = {  # noqa: RUF012
        "title": "WPO: Enhancing RLHF with Weighted Preference Optimization",
        "id": "2406.11827",
    }
    _frozen_inputs = ("ref_chosen_logps", "ref_rejected_logps")

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if set(self._frozen_inputs) <= set(dataset.column_names or ()):
            return dataset
        self._fuse_heads()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _frozen_logps(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        if self.precompute_ref_logps:
            return {"ref": torch.cat([inputs[name] for name in self._frozen_inputs])}
        ref_model = self.model if self.ref_model is None else self.ref_model
        return {"ref": torch.cat(self.compute_ref_log_probs(ref_model, inputs))}


@dataclass
class DataCollatorForWSPO(DataCollatorForPreference):
    """Batches of chosen responses alone, with the frozen models' log-probs (B, T - 1), 0 where nothing is scored.

    spread_mean: give every token the mean of the weak models' log-probs, which may be those of another tokenizer's
        tokens; all that sequence-level WSPO asks of them.
    """

    spread_mean: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        prompts = [{**example, "rejected_ids": []} for example in examples]  # never longer than with a response
        for example in prompts:
            example.pop("ref_chosen_logps", None)  # DPO's is one number
        batch = {name: value[: len(examples)] for name, value in super().torch_call(prompts).items()}
        mask = batch["completion_mask"][:, 1:].bool()
        for name in _FROZEN_COLUMNS:
            if name in examples[0]:
                spread = self.spread_mean and name != "ref_chosen_logps"
                rows = [
                    self._fit(name, example[name], int(m.sum()), spread)
                    for example, m in zip(examples, mask, strict=True)
                ]
                batch[name] = torch.zeros(mask.shape).masked_scatter(mask, torch.cat(rows))
        return batch

    def _fit(self, name: str, values: Any, count: int, spread: bool) -> Tensor:
        found = torch.as_tensor(values, dtype=torch.float32)
        if found.dim() == 1 and len(found) and spread:
            found = found.mean().expand(count)
        if found.shape != (count,):
            raise ValueError(
                f"{name} must hold a log-prob for each of a response's {count} tokens, found {tuple(found.shape)}"
            )
        return found


_FROZEN_COLUMNS = tuple(f"{name}_chosen_logps" for name in FROZEN_MODELS)
_ROW = "prefopt_fast_row"  # a row's number in the data set that the trainer was given


class WSPOTrainer(_Trainer):
    """WSPO (arXiv 2410.18640) with DPOTrainer's arguments, data and checkpoints; trained on chosen responses alone.

    The frozen models are scored before training starts and take no memory in it. Each may be a model, a store (see
    :class:`WSPOConfig`) or a column of the data set, ``ref_chosen_logps``, ``weak_aligned_chosen_logps`` and
    ``weak_ref_chosen_logps``: for every row the log-probs of the chosen response's tokens. At level "sequence" the weak
    models' columns may be of another tokenizer's tokens.

    Args:
        weak_aligned_model, weak_ref_model: a causal LM or its folder or hub id, with the policy's vocabulary.

    Raises:
        ValueError, TypeError: what DPOTrainer raises; a frozen model given twice or not at all, or of another
            vocabulary; a store or column that does not fit; what WPOTrainer refuses.
    """

    _config, _name, _tag_names = WSPOConfig, "WSPO", ["trl", "wspo"]
    _paper = {  # noqa: RUF012
        "title": "Weak-to-Strong Preference Optimization: Stealing Reward from Weak Aligned Model",
        "id": "2410.18640",
    }
    _frozen_inputs = _FROZEN_COLUMNS

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *,
        weak_aligned_model: str | PreTrainedModel | None = None,
        weak_ref_model: str | PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        args = self._resolve_args(model, args)
        columns = getattr(kwargs.get("train_dataset"), "column_names", None) or ()
        self._weak_models = {"weak_aligned": weak_aligned_model, "weak_ref": weak_ref_model}
        for name, source in {"ref": ref_model, **self._weak_models}.items():
            store = getattr(args, f"{name}_logprobs")
            _require_one_device(**{f"{name}_model": source})
            if source is not None and store:
                raise ValueError(f"give {name}_model or {name}_logprobs, not both: the store stands for a model")
            if name != "ref" and source is None and not store and f"{name}_chosen_logps" not in columns:
                raise ValueError(
                    f"WSPO needs {name}_model, {name}_logprobs, or the column {name}_chosen_logps in train_dataset"
                )
        collator = kwargs.setdefault(
            "data_collator",
            DataCollatorForWSPO(
                pad_token_id=0,  # any token: padding is on the right and masked
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                pad_to_multiple_of=args.pad_to_multiple_of,
                spread_mean=args.level == "sequence",
            ),
        )
        if not isinstance(collator, DataCollatorForWSPO):
            raise TypeError(f"data_collator must be a DataCollatorForWSPO, found {type(collator).__name__}")
        super().__init__(model, ref_model, args, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        if isinstance(dataset, datasets.IterableDataset):
            raise ValueError("WSPO scores its frozen models before training: give a map-style dataset")
        if _ROW not in dataset.column_names:  # stores name rows as they were before any is dropped
            dataset = dataset.add_column(_ROW, list(range(len(dataset))))
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys((*self._signature_columns, *_FROZEN_COLUMNS)))

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The data set with a column for each frozen model; DPOTrainer calls this where it would add its own."""
        missing = [frozen for frozen in FROZEN_MODELS if f"{frozen}_chosen_logps" not in dataset.column_names]
        stores = {frozen: path for frozen in missing if (path := getattr(self.args, f"{frozen}_logprobs"))}
        if stores and name != "train":
            raise ValueError(f"{', '.join(stores)}_logprobs hold the training data alone: the {name} data needs models")
        self._fuse_heads()
        for frozen in set(missing) - set(stores) - {"ref"}:
            self._require_vocabulary(frozen)
        for frozen in missing:
            if frozen in stores:
                rows = self._stored(stores[frozen], dataset, frozen)
            else:
                rows = self._score(frozen, dataset, name, batch_size)
            feature = datasets.List(datasets.Value("float32"))
            dataset = dataset.add_column(f"{frozen}_chosen_logps", rows, feature=feature)
        return dataset

    def _require_vocabulary(self, frozen: str) -> None:
        source = self._weak_models[frozen]
        if source is None:
            raise ValueError(f"the data needs {frozen}_model, or the column {frozen}_chosen_logps")
        if isinstance(source, str):
            same = load_tokenizer(source, self.args.trust_remote_code).get_vocab() == self._tokenizer.get_vocab()
        else:
            same = LMHead.from_model(source).vocab_size == LMHead.from_model(self.model).vocab_size
        if not same:
            raise ValueError(
                f"{frozen}_model has another vocabulary than the policy: its log-probs are of other tokens. At level "
                f"sequence, give its own tokens' log-probs as the column {frozen}_chosen_logps"
            )

    def _stored(self, path: str, dataset: Any, frozen: str) -> list[list[float]]:
        store = LogprobStore.open(path)
        limit = sys.maxsize if self.args.max_length is None else self.args.max_length
        columns = {"row": dataset[_ROW], "prompt_ids": dataset["prompt_ids"]}
        for response in store.responses:
            pairs = zip(dataset["prompt_ids"], dataset[f"{response}_ids"], strict=True)
            columns[f"{response}_ids"] = [ids[: limit - len(prompt)] for prompt, ids in pairs]
        encoded = datasets.Dataset.from_dict(columns)
        # Equal tokens were cut alike, whatever the store says of how.
        key = replace(
            store.key, tokenizer=tokenizer_digest(self._tokenizer), data=data_digest(encoded), temperature=1.0
        )
        stored(store, key, frozen)
        return [store[row, "chosen"].tolist() for row in encoded["row"]]

    def _score(self, frozen: str, dataset: Any, name: str, batch_size: int) -> list[list[float]]:
        model: Any = self.model if self.ref_model is None else self.ref_model
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=self.data_collator))
        rows: list[list[float]] = []
        with contextlib.ExitStack() as lent:  # a weak model may be one that the caller goes on with
            if frozen != "ref":
                model = self._weak_models[frozen]
                if isinstance(model, str):
                    model = load_model(model, self.model.dtype, self.args.trust_remote_code)
                model = model.to(self.accelerator.device)
                lent.enter_context(evaluation(model))
                lent.callback(
                    _add_fast_head(model, (), self.args, len(self._objective.responses), verify_packing(model))
                )
            for batch in tqdm(loader, desc=f"Scoring the {name} data with {frozen}"):
                scored = (self.compute_ref_log_probs(model, batch), batch["completion_mask"][:, 1:])
                gathered = self.accelerator.gather_for_metrics(self.accelerator.pad_across_processes(scored, dim=1))
                rows += [logps[mask.bool()].tolist() for logps, mask in zip(*gathered, strict=True)]
        return rows

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """(B, T - 1) log-probs of the chosen responses, where DPOTrainer's method has their sums."""
        found = []

        def recorded(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            found.append(outputs.log_probs)
            return outputs

        super().compute_ref_log_probs(
            recorded, {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
        )
        return found[0]

    def _frozen_logps(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        return {name: inputs[column] for name, column in zip(FROZEN_MODELS, _FROZEN_COLUMNS, strict=True)}


def _require_one_device(**models: Any) -> None:
    """Raise ValueError for a model that ``device_map`` split: its hidden states end on another device than its head."""
    for name, model in models.items():
        devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
        if len(devices) > 1:
            raise ValueError(
                f"{name} must be on one device, found it split over {', '.join(sorted(devices))}: use accelerate "
                "launch or torchrun, or one visible GPU (CUDA_VISIBLE_DEVICES) with "
                'model_init_kwargs={"device_map": None}'
            )


def _check_compute_options(grad_tolerance: Tolerance, backend: str) -> None:
    resolve_grad_tolerance(grad_tolerance, torch.float32)
    resolve_backend(backend, torch.device("cuda"))  # which any backend may run on: names alone are checked here
