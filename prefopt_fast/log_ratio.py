"""WSPO's target: the weak aligned model's log-ratio against the weak reference, token by token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .head import LMHead
from .kernels.dispatch import resolve_backend
from .parallel import is_sharded
from .sequence_stats import require_tokens, segment_sum
from .token_stats import product_dtype, product_weight, token_logprobs, validate_inputs


class TokenLogRatio(NamedTuple):
    """``ratio``: log π_aligned(y_t) − log π_ref(y_t), the shape of targets, 0 where ignored; ``mean``: (B,), of each
    sequence's scored tokens, or None for one-dimensional targets without ``cu_seqlens``. Both are detached."""

    ratio: Tensor
    mean: Tensor | None


@torch.no_grad()
def token_log_ratio(
    aligned_hidden: Tensor,  # (…, H)
    aligned_head: LMHead,
    ref_hidden: Tensor,  # (…, ref H)
    ref_head: LMHead,
    targets: Tensor,  # (…)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    backend: str = "auto",
    ignore_index: int = -100,
) -> TokenLogRatio:
    """Log-ratio of two frozen models that share a tokenizer on the same targets (arXiv 2410.18640, r_t).

    On a Triton device one merge of both heads' partial sums writes the ratio alone; elsewhere it is the difference of
    two :func:`token_logprobs` calls. Dtypes as there; targets are (B, T) or (N,), and the hidden sizes of the models
    may differ.

    Args:
        cu_seqlens: offsets into packed targets (N,), as in :func:`sequence_logprobs`.

    Raises:
        ValueError, RuntimeError, NotImplementedError: what token_logprobs raises.
    """
    pairs = ((aligned_hidden, aligned_head), (ref_hidden, ref_head))
    for hidden, head in pairs:
        validate_inputs(hidden, head, targets, (), ignore_index)
    targets = targets.long()
    length = None
    if targets.dim() != 1 or cu_seqlens is not None:
        length = segment_sum(targets != ignore_index, cu_seqlens)
        require_tokens(length)
    whole = not any(head.group or is_sharded(head.weight) or is_sharded(head.bias) for _, head in pairs)
    if whole and resolve_backend(backend, targets.device) == "triton":
        from .kernels.log_ratio import log_ratio

        def operands(hidden: Tensor, head: LMHead) -> tuple[Tensor, Tensor, Tensor | None]:
            hidden = hidden.to(product_dtype(hidden))
            return hidden.reshape(-1, hidden.shape[-1]), product_weight(hidden, head), head.bias

        ratio = log_ratio(
            *operands(aligned_hidden, aligned_head),
            *operands(ref_hidden, ref_head),
            targets.reshape(-1),
            (aligned_head.transform, ref_head.transform),
            ignore_index,
        ).reshape(targets.shape)
    else:
        aligned, ref = (
            token_logprobs(hidden, head, targets, backend=backend, ignore_index=ignore_index).logprobs
            for hidden, head in pairs
        )
        ratio = aligned - ref
    return TokenLogRatio(ratio, None if length is None else segment_sum(ratio, cu_seqlens) / length)
