"""Heads on several ranks: parameters that FSDP2, ZeRO-3 or tensor parallelism shard, as plain tensors and back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from .head import LMHead


def full_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter, also where this rank holds a ZeRO-3 partition of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_sharded(parameter: Tensor | None) -> bool:
    """Whether this is a DTensor or a parameter under DeepSpeed's ZeRO-3."""
    return parameter is not None and (hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id"))


def tensor_parallel_group(weight: Any) -> dist.ProcessGroup | None:
    """The ranks that share out a DTensor's rows over the mesh dimension "tp" (torchtitan's, accelerate's, transformers'
    name); None for any other weight, which is gathered: a slower way to the same numbers if its mesh is one of TP."""
    names = weight.device_mesh.mesh_dim_names or () if hasattr(weight, "device_mesh") else ()
    if "tp" not in names or not weight.placements[names.index("tp")].is_shard(0):
        return None
    return weight.device_mesh.get_group("tp")


def localize(head: LMHead, dtype: torch.dtype) -> LMHead:
    """``head`` with plain tensors in place of sharded parameters: this rank's rows where it has a group, else all.

    Collective where something is gathered: every rank takes part, with or without tokens, here and in the backward.
    The weight is gathered, and its gradient reduced, in ``dtype``. Gradients are averaged over the ranks, as
    FSDP2 and DeepSpeed average those of all other parameters.
    """
    if not is_sharded(head.weight) and not is_sharded(head.bias):
        return head
    start = head.vocab_start
    if head.group is not None and hasattr(head.weight, "device_mesh"):
        start = -(-head.vocab_size // dist.get_world_size(head.group)) * dist.get_rank(head.group)  # as torch.chunk
    weight = _plain(head.weight, head.group, dtype)
    bias = None if head.bias is None else _plain(head.bias, head.group, head.bias.dtype)
    return replace(head, weight=weight, bias=bias, vocab_start=start)


def _plain(parameter: Any, group: dist.ProcessGroup | None, dtype: torch.dtype) -> Tensor:
    if hasattr(parameter, "ds_id"):
        return _GatherZero3.apply(parameter)
    if not hasattr(parameter, "device_mesh"):
        return parameter
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh = parameter.device_mesh
    own = [group is not None and mesh.get_group(dim) == group for dim in range(mesh.ndim)]
    # Ranks that are not data-parallel compute equal gradients, whose mean is the gradient.
    layout = [Shard(0) if mine else Replicate() for mine in own]
    grad_layout = [Shard(0) if mine else Partial("avg") for mine in own]
    return parameter.to(dtype).redistribute(placements=layout).to_local(grad_placements=grad_layout)


class _GatherZero3(torch.autograd.Function):
    """A ZeRO-3 parameter in whole; its gradient meets DeepSpeed's own hooks on the parameter, which partition it."""

    @staticmethod
    def forward(ctx: Any, parameter: Any) -> Tensor:
        ctx.parameter = parameter
        if parameter.ds_status.name == "AVAILABLE":
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach()  # on leaving the parameter is given other data; these stay, for the backward too

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parameter = ctx.parameter
        if parameter.ds_status.name != "AVAILABLE":
            # autograd adds a gradient to a parameter of its shape alone, so this one is whole until that has happened.
            def release(_: Tensor) -> None:
                hook.remove()
                if not parameter.ds_active_sub_modules:  # tied to the embedding, whose hooks release it later
                    parameter.partition()

            parameter.all_gather()
            hook = parameter.register_post_accumulate_grad_hook(release)
        return grad
