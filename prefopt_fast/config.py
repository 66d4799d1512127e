"""What a run can be told, as dataclasses: ``prefopt-fast`` fills them from flags and YAML, Python by keyword.

Names are TRL's and transformers' where the meaning is the same. Nothing heavier than torch is imported here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from .losses import PAIRWISE_LOSSES, hyperparameter_names, loss_mixture, reference_free
from .sequence_stats import ALIGNMENTS, alignment_stat

OBJECTIVES = ("wpo", "wspo", "dpo", *PAIRWISE_LOSSES)  # "dpo" is sigmoid
RESPONSES = ("chosen", "rejected")
FROZEN_MODELS = ("ref", "weak_aligned", "weak_ref")
AUTOCAST_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}  # by Accelerate's names of mixed precision

# Options of pairwise losses, and the names their functions have for them.
_HYPERPARAMETERS = {
    "gamma": "gamma",
    "label_smoothing": "label_smoothing",
    "discopop_tau": "tau",
    "nll_weight": "nll_weight",
}
_SERVES_ONE = {
    **dict.fromkeys(("loss_type", "alignment", "clamp"), "wpo"),
    **dict.fromkeys(
        ("level", "weak_aligned_model", "weak_ref_model", "weak_aligned_logprobs", "weak_ref_logprobs"), "wspo"
    ),
}


def _option(help: str, default: Any = None, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": help}, **kwargs)


def _required(help: str) -> Any:
    return field(metadata={"help": help})


@dataclass(kw_only=True)
class ModelOptions:
    """How a model is loaded."""

    _argument_group_name = "model"

    model: str = _required("Folder or hub id of the causal language model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "Dtype of the weights; 'auto' is the checkpoint's own. In training one of 16 bits is for LoRA: bf16 or fp16 "
        "compute in 16 bits and keep updates in 32.",
        "float32",
    )
    attn_implementation: str | None = _option("Attention of transformers: 'sdpa', 'eager', 'flash_attention_2', …")
    trust_remote_code: bool = _option("Run Python code that a hub repository ships.", False)


@dataclass(kw_only=True)
class DataOptions:
    """Which preference pairs, and how they become tokens."""

    _argument_group_name = "data"

    dataset: str = _required(
        "Preference pairs: a JSON, JSONL or Parquet file, a folder of datasets.save_to_disk, or a hub id."
    )
    dataset_split: str | None = _option("Split of a dataset that has several (default: train).")
    max_length: int = _option("Longest sequence, prompt and response together, in tokens.", 1024)
    truncation_side: Literal["prompt_start", "sequence_start", "sequence_end"] = _option(
        "What goes of a longer sequence; 'sequence_end' is TRL's keep_start.", "prompt_start"
    )


@dataclass(kw_only=True)
class ComputeOptions:
    """How models are computed."""

    _argument_group_name = "computation"

    backend: Literal["auto", "torch", "triton", "reference"] = _option("Implementation of the LM head.", "auto")
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bf16 autocast (default: on CUDA GPUs with bf16 units).", "nargs": "?", "const": True},
    )
    fp16: bool = _option("fp16 autocast; in training with loss scaling.", False)

    def __post_init__(self) -> None:
        if self.bf16 and self.fp16:
            raise ValueError("give bf16 or fp16, not both")

    @property
    def mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """Autocast's dtype, by the name that accelerate has for it."""
        if self.fp16:
            return "fp16"
        on = self.bf16
        if on is None:
            on = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if on else "no"


@dataclass(kw_only=True)
class ObjectiveOptions:
    """What is minimized, and the frozen models it is measured against."""

    _argument_group_name = "objective"

    objective: str = _required(
        f"One of {', '.join(OBJECTIVES)}; or a sum of pairwise losses, 'sigmoid,bco_pair,sft', see loss_weights."
    )
    loss_type: str = _option("Pairwise loss that WPO weights, or a sum as 'sigmoid,sft'.", "sigmoid")
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of a sum's losses, in their order (default: 1 each; MPO: 0.8 0.2 1)."}
    )
    sample_weight_column: str | None = _option(
        "Column of the dataset with a number ≥ 0 that multiplies each pair's loss; the loss stays a sum over pairs "
        "divided by their number."
    )
    beta: float = _option("Strength of the implicit KL constraint (WPO's paper: 0.01).", 0.1)
    gamma: float | None = _option("WSPO: transfer strength (default 0.1). SimPO: target margin (default 0.5).")
    level: Literal["token", "sequence", "segment"] = _option(
        "WSPO: square per token (its code), per sequence (its paper), or per segment between the characters where the "
        "tokens of policy and weak models both end; the last two take weak models of another tokenizer.",
        "token",
    )
    alignment: str = _option(f"WPO: what makes a token on-policy; one of {', '.join(ALIGNMENTS)}.", "sampled")
    clamp: bool = _option("WPO: limit a pair's weight to 1 (its code does, TRL does not).", True)
    label_smoothing: float | None = _option(
        "Probability of a flipped preference: sigmoid (cDPO), sigmoid_norm, simpo, cpo (default 0), robust (0.1), "
        "exo_pair (0.001)."
    )
    discopop_tau: float | None = _option("discopop: temperature τ (default 0.05).")
    nll_weight: float | None = _option("cpo, orpo: weight of their NLL term (default 1).")
    sft_weight: float = _option("Adds this times the chosen response's NLL per token.", 0.0)
    ref_model: str | None = _option("Reference policy (default: the model that training starts from).")
    weak_aligned_model: str | None = _option("WSPO: the aligned weak model.")
    weak_ref_model: str | None = _option("WSPO: the weak model before its alignment.")
    ref_logprobs: str | None = _option("Store of 'prefopt-fast score' in place of the reference policy.")
    weak_aligned_logprobs: str | None = _option("WSPO: store in place of the aligned weak model.")
    weak_ref_logprobs: str | None = _option("WSPO: store in place of the weak reference.")
    logprobs_dir: str | None = _option(
        "Where stores of frozen models are kept and found (default: OUTPUT_DIR/logprobs)."
    )
    grad_tolerance: str = _option(
        "Relative error allowed to the head's gradient, which stays unbiased: a number (2^-8, the default, moves "
        "training less than a change of seed), 0 for exact, two as 'dhidden,dweight', or 'auto' (unit roundoff of "
        "16-bit hidden states; exact for 32).",
        "0.00390625",
    )


@dataclass(kw_only=True)
class LoraOptions:
    """Low-rank adapters."""

    _argument_group_name = "LoRA"

    use_peft: bool = _option("Train LoRA adapters instead of all weights, or on the adapter that model is.", False)
    lora_r: int = _option("Rank.", 16)
    lora_alpha: int = _option("Scale: the update is multiplied by lora_alpha / lora_r.", 32)
    lora_dropout: float = _option("Dropout before the adapter.", 0.0)
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter (default: every linear layer but the head)."}
    )
    merge_adapter: bool = _option("Save the merged model as well, in OUTPUT_DIR/merged.", False)

    @property
    def changed_lora_options(self) -> list[str]:
        """Names of those that have not their default."""
        return [option.name for option in fields(LoraOptions) if getattr(self, option.name) != option.default]


@dataclass(kw_only=True)
class TrainingOptions:
    """The loop."""

    _argument_group_name = "training"

    output_dir: str = _required("Where the model, checkpoints, metrics.jsonl and curves.png go.")
    num_train_epochs: float = _option("Passes over the pairs.", 1.0)
    max_steps: int = _option("Optimizer steps; overrides num_train_epochs where positive.", -1)
    per_device_train_batch_size: int = _option("Pairs per process and forward pass.", 2)
    per_device_eval_batch_size: int = _option("The same, in evaluation and for frozen models.", 8)
    gradient_accumulation_steps: int = _option("Forward passes per optimizer step.", 1)
    learning_rate: float = _option("Peak learning rate of AdamW.", 1e-6)
    lr_scheduler_type: str = _option("Schedule of transformers.get_scheduler.", "linear")
    warmup_ratio: float = _option("Share of the steps over which the learning rate rises.", 0.0)
    weight_decay: float = _option("AdamW's decay of matrices; biases and norms are not decayed.", 0.0)
    adam_beta1: float = _option("AdamW's β₁.", 0.9)
    adam_beta2: float = _option("AdamW's β₂.", 0.999)
    adam_epsilon: float = _option("AdamW's ε.", 1e-8)
    max_grad_norm: float = _option("Gradients are clipped to this norm; 0 turns that off.", 1.0)
    gradient_checkpointing: bool = _option("Recompute activations in the backward pass.", False)
    disable_dropout: bool = _option("Turn the model's own dropout off.", True)
    seed: int = _option("Of data order, dropout and adapter initialization.", 42)
    eval_dataset: str | None = _option("Held-out pairs.")
    eval_split: str | None = _option("Split of eval_dataset where it has several (default: train).")
    test_split_size: float | None = _option("Share of the dataset to hold out for evaluation, in (0, 1).")
    eval_steps: int | None = _option("Steps between evaluations (default: at the end alone).")
    logging_steps: int = _option("Steps between lines of metrics.jsonl.", 1)
    save_steps: int = _option("Steps between checkpoints; 0 turns them off.", 500)
    save_total_limit: int | None = _option("Checkpoints kept (default: all).")
    report_to: Literal["none", "tensorboard"] = _option("Further sink of the metrics.", "none")


@dataclass(kw_only=True)
class TrainConfig(ModelOptions, DataOptions, ObjectiveOptions, LoraOptions, ComputeOptions, TrainingOptions):
    """Everything ``prefopt-fast train`` can be told.

    Raises:
        ValueError: values that are unknown, out of range, without effect on the objective, or contradictory.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_objective()
        self._check_frozen()
        self._check_ranges()

    def _check_objective(self) -> None:
        names = self.objective.split(",")
        if not set(names) <= set(OBJECTIVES):
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; found {self.objective!r}")
        if len(names) > 1 and (whole := [name for name in names if name in ("wpo", "wspo")]):
            raise ValueError(
                f"objective {self.objective} sums losses, and {whole[0]} is none of the pairwise ones: "
                "WPO weights a sum that loss_type names, and sft_weight adds NLL to either"
            )
        alignment_stat(self.alignment)
        parameters: tuple[str, ...] = ("beta", "loss_weights", "label_smoothing", "discopop_tau", "nll_weight")
        if self.objective != "wspo":
            accepted = hyperparameter_names(self.loss_mixture)
            parameters = tuple(option for option, name in _HYPERPARAMETERS.items() if name not in accepted)
        elsewhere = [option for option, objective in _SERVES_ONE.items() if objective != self.objective]
        defaults = {option.name: option.default for option in fields(self)}
        if idle := [option for option in (*parameters, *elsewhere) if getattr(self, option) != defaults[option]]:
            hint = "; to train with that loss, name it as the objective" if "loss_type" in idle else ""
            raise ValueError(f"objective {self.objective} makes no use of {', '.join(idle)}: leave it out{hint}")

    def _check_frozen(self) -> None:
        for name in FROZEN_MODELS:
            model, store = getattr(self, f"{name}_model"), getattr(self, f"{name}_logprobs")
            if model and store:
                raise ValueError(f"give {name}_model or {name}_logprobs, not both: the store stands for a model")
            if store and self.eval_dataset:
                raise ValueError(
                    f"eval_dataset needs {name}_model: {name}_logprobs holds the training data alone "
                    "(test_split_size holds out a part of it)"
                )
            if self.objective == "wspo" and name != "ref" and not (model or store):
                raise ValueError(f"objective wspo needs {name}_model or {name}_logprobs")
        without = self.objective != "wspo" and reference_free(self.loss_mixture)
        if without and (given := [name for name in ("ref_model", "ref_logprobs") if getattr(self, name)]):
            raise ValueError(f"{' + '.join(self.loss_mixture)} is reference-free: leave out {', '.join(given)}")

    def _check_ranges(self) -> None:
        at_least = {
            "max_length": 2,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "lora_r": 1,
            "save_steps": 0,
            "learning_rate": 0,
            "weight_decay": 0,
            "adam_epsilon": 0,
            "max_grad_norm": 0,
            "sft_weight": 0,
        } | {name: 1 for name in ("eval_steps", "save_total_limit") if getattr(self, name) is not None}
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "sft_weight", "num_train_epochs"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, found {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2³²), found {self.seed}")
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha must be positive, found {self.lora_alpha}")
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            raise ValueError(
                f"max_steps or num_train_epochs must be positive, found {self.max_steps} and {self.num_train_epochs}"
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must be in [0, 1], found {self.warmup_ratio}")
        if self.warmup_ratio and self.lr_scheduler_type == "constant":
            raise ValueError("lr_scheduler_type constant has no warm-up, constant_with_warmup has")
        for name in ("adam_beta1", "adam_beta2", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), found {getattr(self, name)}")
        if self.test_split_size is not None and not 0 < self.test_split_size < 1:
            raise ValueError(f"test_split_size must be in (0, 1), found {self.test_split_size}")
        if self.test_split_size is not None and self.eval_dataset:
            raise ValueError("give eval_dataset or test_split_size, not both")
        if self.eval_steps is not None and self.test_split_size is None and not self.eval_dataset:
            raise ValueError("eval_steps needs eval_dataset or test_split_size")
        if self.eval_split and not self.eval_dataset:
            raise ValueError("eval_split needs eval_dataset")
        if (changed := self.changed_lora_options) and not self.use_peft:
            raise ValueError(f"{', '.join(changed)} needs use_peft")
        self.head_tolerance  # noqa: B018 - raises where it is no tolerance

    @property
    def loss_mixture(self) -> dict[str, float]:
        """The pairwise losses that are trained, or that WPO weights, with their weights: see preference_loss."""
        option = "loss_type" if self.objective == "wpo" else "objective"
        names = ["sigmoid" if name == "dpo" else name for name in getattr(self, option).split(",")]
        weights = [1.0] * len(names) if self.loss_weights is None else self.loss_weights
        if len(weights) != len(names) or len(set(names)) < len(names):
            raise ValueError(
                f"{option} must name different losses, and loss_weights hold one weight for each; "
                f"found {getattr(self, option)} and {self.loss_weights}"
            )
        return loss_mixture(dict(zip(names, weights, strict=True)))

    @property
    def hyperparameters(self) -> dict[str, float]:
        """Those of the pairwise loss that were given, by the names its function has."""
        given = {name: getattr(self, option) for option, name in _HYPERPARAMETERS.items()}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def head_tolerance(self) -> float | str | tuple[float, float]:
        """``grad_tolerance`` as token_logprobs takes it."""
        if self.grad_tolerance == "auto":
            return "auto"
        try:
            numbers = tuple(float(part) for part in str(self.grad_tolerance).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 2) or not all(0 <= number < 1 for number in numbers):
            raise ValueError(
                "grad_tolerance must be 'auto', a number in [0, 1), or two as '0.004,0.001'; "
                f"found {self.grad_tolerance!r}"
            )
        return numbers if len(numbers) == 2 else numbers[0]


@dataclass(kw_only=True)
class ScoreOptions:
    """The store."""

    _argument_group_name = "store"

    out: str = _required("Folder of the store; an unfinished one is finished.")
    responses: list[str] = field(
        default_factory=lambda: ["chosen", "rejected"],
        metadata={"help": "Responses to score; WSPO needs 'chosen' alone."},
    )
    batch_size: int = _option("Rows per forward pass.", 8)


@dataclass(kw_only=True)
class ScoreConfig(ModelOptions, DataOptions, ComputeOptions, ScoreOptions):
    """Everything ``prefopt-fast score`` can be told."""
