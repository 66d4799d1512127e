"""The language-model head: everything between the last hidden state and the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from . import parallel


@dataclass(frozen=True, eq=False)  # of tensors there is no one truth of ==
class LMHead:
    """logits = cap(logit_scale · (hidden @ weightᵀ + bias)) / temperature, with cap(x) = softcap · tanh(x / softcap).

    Weight and bias may be sharded over data-parallel ranks (DTensors of FSDP2, ZeRO-3 parameters): each call gathers
    them, and their gradients go back sharded and averaged. With a ``group`` the vocabulary is shared out instead:
    weight and bias are this rank's rows (or DTensors sharded over the group), hidden states and targets are equal on
    all its ranks, and only statistics of tokens are exchanged. Either way all ranks take part in each call and its
    backward.

    Args:
        weight: (V, H), any floating dtype; gradients flow where it requires them. With a group (rows of this rank, H).
        bias: (V,) or None; with a group, of the weight's rows.
        softcap: positive, or None for no cap (Gemma 2: 30).
        logit_scale: factor on the product (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        temperature: positive divisor of the final logits.
        group: the process group whose ranks hold the vocabulary, each some of its rows.
        vocab_start: token id of the weight's first row on this rank (a DTensor knows its own).

    Raises:
        ValueError: shapes that do not fit, a soft-cap, scale or temperature that is not positive, or rows without a
            group that could hold the others.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    group: dist.ProcessGroup | None = None
    vocab_start: int = 0

    def __post_init__(self) -> None:
        shape = parallel.full_shape(self.weight)
        if len(shape) != 2 or not self.weight.is_floating_point():
            raise ValueError(f"weight must be a floating-point (V, H) matrix, found {tuple(shape)} {self.weight.dtype}")
        if self.bias is not None and not self.bias.is_floating_point():
            raise ValueError(f"bias must be floating-point, found {self.bias.dtype}")
        if self.bias is not None and parallel.full_shape(self.bias) != shape[:1]:
            raise ValueError(
                f"bias must have one entry for each of the {shape[0]} rows of weight {tuple(shape)}, "
                f"found shape {tuple(parallel.full_shape(self.bias))}"
            )
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be positive and finite, or None, found {self.softcap}")
        if not 0 < self.logit_scale < math.inf:
            raise ValueError(f"logit_scale must be positive and finite, found {self.logit_scale}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, found {self.temperature}")
        if self.vocab_start < 0 or (self.vocab_start and self.group is None):
            raise ValueError(
                f"vocab_start must be this rank's first token id, 0 without a group; found {self.vocab_start} and "
                f"group {self.group}"
            )
        if self.group is not None and not shape[0]:
            raise ValueError(f"weight must have a row on every rank of group, found {tuple(shape)}")

    @property
    def vocab_size(self) -> int:
        """Rows of the weight: V, but with a ``group`` and plain tensors those of this rank."""
        return parallel.full_shape(self.weight)[0]

    @property
    def hidden_size(self) -> int:
        return parallel.full_shape(self.weight)[1]

    @property
    def transform(self) -> tuple[float, float | None]:
        """(scale, cap) with logits = cap · tanh(scale · x / cap), or scale · x: the temperature folded into both."""
        softcap = None if self.softcap is None else self.softcap / self.temperature
        return self.logit_scale / self.temperature, softcap

    def with_temperature(self, temperature: float) -> LMHead:
        """The same head at another temperature; raises ValueError where that is not positive."""
        return replace(self, temperature=temperature)

    @classmethod
    def from_model(cls, model: Any) -> LMHead:
        """Read weight, bias, soft-cap and scale from a transformers causal LM, through PEFT and wrapper modules.

        The weight is the model's own parameter, so tied embeddings stay tied. A LoRA adapter on the head itself
        contributes its (differentiable) delta, which costs one (V, H) tensor per call; its dropout is not applied.
        A head that tensor parallelism shards by vocabulary, over the mesh dimension "tp", stays sharded; one that
        bitsandbytes holds in 4 bits is dequantized for the call.

        Rows that only pad the vocabulary, as Inkling's configs say, are left out. What a family does to its logits
        beyond what its config says, this cannot see: :func:`prefopt_fast.policy.verify_head` can.

        Raises:
            ValueError: the model is an encoder-decoder, or has no output embedding, or one that is quantized in another
                way, not a linear map, adapted by anything but plain LoRA, a part of one, or both sharded and padded.
        """
        while hasattr(model, "module") and not hasattr(model, "get_output_embeddings"):
            model = model.module  # DistributedDataParallel and its like
        require_decoder(model)
        layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if layer is None:
            raise ValueError(f"{type(model).__name__} has no output embedding: a causal language model is needed")
        weight, bias = _effective_weight(layer)
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        rows, vocab_size = parallel.full_shape(weight)[0], getattr(config, "vocab_size", 0)
        if rows < vocab_size:
            raise ValueError(
                f"the output embedding has {rows} of the vocabulary's {vocab_size} rows, and is no DTensor that knows "
                "of the others: give LMHead this rank's weight with group and vocab_start"
            )
        if (used := getattr(config, "unpadded_vocab_size", None) or rows) < rows:
            if parallel.is_sharded(weight):
                raise ValueError(
                    f"the output embedding is sharded, and {rows - used} of its {rows} rows pad the vocabulary: give "
                    "LMHead the weight without them"
                )
            weight, bias = weight[:used], None if bias is None else bias[:used]

        def product(names: tuple[str, ...]) -> float:
            if config.model_type == "mpt":  # whose logit_scale goes unused
                return 1.0
            return math.prod(float(factor) for name in names if (factor := getattr(config, name, None)) is not None)

        softcaps = [cap for name in _SOFTCAPS if (cap := getattr(config, name, None))]
        factor, divisor = product(_FACTORS), product(_DIVISORS)
        if config.model_type == "hyperclovax":
            divisor = 1 / divisor
        return cls(
            weight,
            bias,
            softcap=softcaps[0] if softcaps else None,
            logit_scale=factor / divisor,
            group=parallel.tensor_parallel_group(weight),
        )


def require_decoder(model: Any) -> None:
    """Raise ValueError for an encoder-decoder, which would read the response that it is to predict."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder: a causal language model is needed")


# What configs call what their models do to logits: Gemma, RecurrentGemma and xLSTM; Cohere, Falcon-H1 and Muse; Granite
# and Inkling.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")


def _effective_weight(layer: Any) -> tuple[Tensor, Tensor | None]:
    if hasattr(layer, "modules_to_save"):  # peft: a trained copy stands in for the original
        names = [layer.active_adapter] if isinstance(layer.active_adapter, str) else layer.active_adapters
        layer = layer.original_module if layer.disable_adapters or not names else layer.modules_to_save[names[0]]
    if hasattr(layer, "base_layer"):  # peft: LoRA on the head
        if layer.disable_adapters and layer.merged:
            layer.unmerge()  # as its own forward does, which never runs here
        weight, bias = _effective_weight(layer.base_layer)
        if not layer.disable_adapters and not layer.merged:
            for name in layer.active_adapters:
                if not hasattr(layer, "lora_A") or name in getattr(layer, "lora_variant", ()):
                    raise ValueError(
                        f"adapter {name!r} on the output embedding is not plain LoRA ({type(layer).__name__}, or a "
                        "variant such as DoRA): merge it first, or keep it off the head"
                    )
                if name in layer.lora_A:
                    weight = weight + layer.get_delta_weight(name).to(weight.dtype)
                    if (delta := getattr(layer.lora_B[name], "bias", None)) is not None:  # AdaLoRA has no modules
                        delta = (delta * layer.scaling[name]).to(weight.dtype)
                        bias = delta if bias is None else bias + delta
        return weight, bias
    own = getattr(layer, "weight", None)
    if own is not None and hasattr(own, "quant_state"):  # bitsandbytes in 4 bits, packed and frozen
        from bitsandbytes.functional import dequantize_4bit

        own = dequantize_4bit(own.detach(), own.quant_state)
    if not isinstance(own, Tensor) or len(parallel.full_shape(own)) != 2 or not own.is_floating_point():
        found = f"{own.dtype} {tuple(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
        raise ValueError(
            f"the output embedding ({type(layer).__name__}) must hold a floating-point (V, H) weight, found {found}; "
            "keep the head out of quantization"
        )
    return own, getattr(layer, "bias", None)
