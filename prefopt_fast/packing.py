"""A batch through a transformers backbone without padding, and with what responses share computed once.

Chosen and rejected answer the same prompt, and in a causal model a position sees only what precedes it: their hidden
states over the common beginning are the same. Each token of a common beginning, and no padding, is given to the
backbone; every layer but attention treats tokens one by one. Attention runs per sequence, whose tokens are gathered
from wherever they were computed (Wang and Hegde, "Accelerating Direct Preference Optimization with Prefix Sharing",
arXiv 2410.20305, do it with one block-sparse mask).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SDPA, FLASH = "sdpa", "flash_attention_2"


class Packing(NamedTuple):
    """How the tokens of S sequences (S, T) are computed: M of them, counted once per sequence, as P.

    input_ids, position_ids: (1, P) int64, of the computed tokens, by sequence and time. place: (S · T,) int64, where
    each real token of the padded layout was computed. keys: (M,) int64, the same of each sequence's tokens, one after
    the other. own: number of tokens computed for each sequence, sum P. lengths: of the sequences, sum M. cu_own,
    cu_lengths: (S + 1,) int32, their offsets.
    """

    input_ids: Tensor
    position_ids: Tensor
    place: Tensor
    keys: Tensor
    own: list[int]
    lengths: list[int]
    cu_own: Tensor
    cu_lengths: Tensor

    def inputs(self) -> dict[str, Any]:
        """What a model or backbone for which :func:`packable` holds is called with."""
        _install()
        # A mask of four dimensions is handed on as it is, where none would be replaced by one over all P² pairs.
        mask = self.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool)
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": mask,
            "use_cache": False,
            "packing": self,
        }


def pack(
    input_ids: Tensor,  # (S, T), padded on the right
    attention_mask: Tensor,  # (S, T)
    pairs: int,
) -> Packing:
    """Sequence s shares with sequence s mod ``pairs`` what both begin with; synchronizes an accelerator once."""
    real = attention_mask.bool()
    leader = torch.arange(len(real), device=real.device) % pairs
    same = (input_ids == input_ids[leader]) & real & real[leader]
    shared = same.long().cumprod(1).bool()
    shared[:pairs] = False
    computed = real & ~shared
    place = (computed.flatten().cumsum(0) - 1).view_as(computed)
    place = torch.where(shared, place[leader], place)
    positions = torch.arange(real.shape[1], device=real.device).expand_as(real)
    counts = torch.stack([computed.sum(1), real.sum(1)])
    bounds = F.pad(counts.cumsum(1), (1, 0)).int()
    return Packing(
        input_ids[computed][None], positions[computed][None], place.flatten(), place[real], *counts.tolist(), *bounds
    )


def packable(backbone: nn.Module) -> bool:
    """Whether this looks like a model whose layers, apart from an attention known here, treat tokens one by one.

    Looks: that positions and attention are honoured is for a comparison of its hidden states to tell.
    """
    parameters = inspect.signature(backbone.forward).parameters
    accepts = "position_ids" in parameters and any(kind.kind is kind.VAR_KEYWORD for kind in parameters.values())
    return accepts and getattr(getattr(backbone, "config", None), "_attn_implementation", None) in (SDPA, FLASH)


@functools.cache
def _install() -> None:
    """Let transformers' attention functions of these names attend by a ``packing`` where one comes with the call."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name, packed in ((SDPA, _packed_sdpa), (FLASH, _packed_flash)):
        ALL_ATTENTION_FUNCTIONS.register(name, _with_packing(ALL_ATTENTION_FUNCTIONS[name], packed))


def _with_packing(usual: Callable, packed: Callable) -> Callable:
    @functools.wraps(usual)
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        packing = options.pop("packing", None)
        if packing is None:
            return usual(module, query, key, value, attention_mask, **options)
        states = (x.transpose(1, 2) for x in (query, key, value))
        return packed(packing, *states, **options), None

    return attention


def _packed_sdpa(
    packing: Packing,
    query: Tensor,  # (1, P, heads, D)
    key: Tensor,  # (1, P, key heads, D)
    value: Tensor,  # (1, P, key heads, D)
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    """(1, P, heads, D), sequence by sequence.

    A shared beginning attends once more for each sequence, and what it finds is dropped: with a square causal mask,
    which needs no memory, that costs no more than a mask that leaves it out.
    """
    outputs = []
    whole = (x.index_select(1, packing.keys).split(packing.lengths, 1) for x in (query, key, value))
    for own, length, *sequence in zip(packing.own, packing.lengths, *whole, strict=True):
        q, k, v = (x.transpose(1, 2) for x in sequence)
        mask = None
        if sliding_window is not None and sliding_window < length:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # kernels want either of both
        output = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output[:, :, length - own :].transpose(1, 2))
    return torch.cat(outputs, 1)


def _packed_flash(
    packing: Packing,
    query: Tensor,  # (1, P, heads, D)
    key: Tensor,  # (1, P, key heads, D)
    value: Tensor,  # (1, P, key heads, D)
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Tensor:
    """(1, P, heads, D) in one call: its causal mask is aligned to each sequence's end, so that own queries suffice."""
    from flash_attn import flash_attn_varlen_func

    device = query.device.type
    # Under autocast, rotary embeddings are in float32 and values are not.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    size = value.shape[-1]  # smaller than the queries' in multi-head latent attention
    value = F.pad(value, (0, query.shape[-1] - size))
    output = flash_attn_varlen_func(
        query[0].to(dtype),
        key[0].to(dtype).index_select(0, packing.keys),
        value[0].to(dtype).index_select(0, packing.keys),
        packing.cu_own,
        packing.cu_lengths,
        max(packing.own),
        max(packing.lengths),
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
    )
    return output[None, ..., :size]
