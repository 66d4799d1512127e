"""Gradients that are computed by hand once, and refuse to be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *operands: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(
            'gradients of log-probs cannot be differentiated again (create_graph=True): backend="reference" can'
        )


class _Unpacked:
    """A ctx whose saved tensors are unpacked, which checkpointing allows once in a backward."""

    def __init__(self, ctx: Any) -> None:
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def once_differentiable(backward: Backward) -> Backward:
    """torch's decorator of this name leaves gradients without a graph where the upstream one has none: to second
    derivatives, of Σ log p say, this function's part would be silently missing.

    Its operands that want gradients must be among the saved tensors.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            found = backward(ctx, *grads)
        operands = [tensor for tensor in ctx.saved_tensors if tensor is not None and tensor.requires_grad]
        return tuple(None if grad is None else _Refuse.apply(grad, *operands) for grad in found)

    return once
