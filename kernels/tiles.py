"""What the kernels share: loading a tile, from a product to logits and their gradient, and facts of the device."""

# Arguments of kernels have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Config, architecture

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2.0))
TOKEN_BLOCKS_PER_GROUP: tl.constexpr = tl.constexpr(16)

# Sizes that change from call to call: a specialization for each that happens to be 1 or a multiple of 16 would compile
# kernels in the middle of a run.
VARYING_SIZES = [
    *("n_tokens", "n_rows", "vocab_size", "n_columns", "n_splits", "tiles_per_split", "first_id", "n_frequent"),
    *("n_blocks", "n_chunks", "n_segments", "first_slot", "most_tiles", "room"),
]

# Of operators that look at values on the host, which a CUDA graph cannot capture.
SYNCHRONIZES = (torch.Tag.cudagraph_unsafe,)

Result = TypeVar("Result")

# Of kernels without a product, which Triton's defaults suit; their blocks are arguments.
SMALL = Config(block_n=0, block_v=0, block_h=0, num_warps=4, num_stages=3)


@triton.jit
def in_groups(index, n_blocks, n_ranges):
    """Token block and range of columns of one of n_blocks · n_ranges tiles.

    A group of token blocks takes one range side by side, then the next, so that what the programs of a moment read of
    hidden and weight stays in the L2 cache.
    """
    group_tiles = TOKEN_BLOCKS_PER_GROUP * n_ranges
    first_block = index // group_tiles * TOKEN_BLOCKS_PER_GROUP
    group_blocks = min(n_blocks - first_block, TOKEN_BLOCKS_PER_GROUP)
    return first_block + index % group_tiles % group_blocks, index % group_tiles // group_blocks


@triton.jit
def load_tile(source, row, column, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """(ROWS, COLUMNS) of a row-major (n_rows, n_columns) matrix, zero outside of it."""
    if TMA:
        tile = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        offsets = rows[:, None].to(tl.int64) * n_columns + columns[None, :]
        tile = tl.load(source + offsets, mask=(rows < n_rows)[:, None] & (columns < n_columns)[None, :], other=0.0)
    return tile


@triton.jit
def merge_splits(
    partials,  # (2 or more, splits, n), fp32: each split's maximum m and Σ 2^(z−m)
    tokens,  # (BLOCK_N,)
    n_tokens,
    n_splits,
    BLOCK_SPLITS: tl.constexpr,
):
    """The tokens' maximum m and Σ 2^(z−m): −∞ and 0 where all entries are masked, 0 and 0 outside."""
    splits = tl.arange(0, BLOCK_SPLITS)
    scored = tokens < n_tokens
    inside = (splits < n_splits)[:, None] & scored[None, :]
    slots = partials + splits[:, None].to(tl.int64) * n_tokens + tokens[None, :]
    split_maximum = tl.load(slots, mask=inside, other=float("-inf"))
    maximum = tl.where(scored, tl.max(split_maximum, 0), 0.0)
    reference = tl.where(maximum == float("-inf"), 0.0, maximum)
    split_total = tl.load(slots + tl.cast(n_splits, tl.int64) * n_tokens, mask=inside, other=0.0)
    return maximum, tl.sum(split_total * tl.exp2(split_maximum - reference[None, :]), 0)


@triton.jit
def base2_logits(product, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Base-2 logits: log₂e · softcap · tanh(scale · x / softcap), or log₂e · scale · x."""
    if HAS_SOFTCAP:
        # tanh(a) = 1 − 2 / (1 + e^(2a)): the exponential may overflow to inf or vanish, and both limits are right.
        inverse = 1.0 / (1.0 + tl.exp2(product * (2.0 * LOG2E * scale / softcap)))
        logits = softcap * LOG2E * (1.0 - 2.0 * inverse)
    else:
        logits = product * (scale * LOG2E)
    return logits


@triton.jit
def grad_of_product(
    product,  # (BLOCK_N, BLOCK_V), fp32
    tokens,  # (BLOCK_N,)
    columns,  # (BLOCK_V,)
    targets,  # (n,)
    token_factors,  # (3, n), fp32: see _token_factors in linear_logprob.py
    n_tokens,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
):
    """∂loss/∂x of a tile from recomputed x = hidden @ weightᵀ + bias: ∂logp/∂z_v = [v = y] − p_v."""
    inside = tokens < n_tokens
    target = tl.load(targets + tokens, mask=inside, other=-1).to(tl.int32)
    lse = tl.load(token_factors + tokens, mask=inside, other=float("inf"))
    factor = tl.load(token_factors + n_tokens + tokens, mask=inside, other=0.0)
    at_target = tl.load(token_factors + 2 * n_tokens + tokens, mask=inside, other=0.0)
    logits = base2_logits(product, scale, softcap, HAS_SOFTCAP)
    grad = tl.exp2(logits - lse[:, None]) * factor[:, None]
    grad = tl.where(columns[None, :] == target[:, None], at_target[:, None], grad)
    if HAS_SOFTCAP:
        # d cap·tanh(x/cap) / dx = 1 − (z/cap)²
        ratio = logits * (1.0 / (softcap * LOG2E))
        grad *= 1.0 - ratio * ratio
    return grad


def on_device(function: Callable[..., Result]) -> Callable[..., Result]:
    """With the device of its first operand as the current one, on which Triton launches whatever the operands', and
    without autocast, which would compute in 16 bits what is written in fp32."""

    @wraps(function)
    def guarded(first: Tensor, *operands: Any) -> Result:
        kind = first.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return guarded(first, *operands)
        if kind == "cpu":
            return function(first, *operands)
        with torch.get_device_module(first.device).device(first.device):
            return function(first, *operands)

    return guarded


def cdiv(numerator: int, denominator: int) -> int:
    """⌈numerator / denominator⌉ on the host, where triton.cdiv, which kernels can call too, takes 4 µs."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@cache
def processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 3  # the interpreter's: any few, so that work is shared out, and shared out unevenly


def tma_available(*operands: Tensor) -> bool:
    """Tensor memory access needs Hopper or later and rows of whole 16 bytes; the interpreter plays it as well."""
    arch = architecture(operands[0].device)
    return (has_tma(arch) or arch == "interpreter") and all(
        t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0 for t in operands
    )


def kernel_operands(*matrices: Tensor) -> tuple[Tensor, ...]:
    """The matrices in a dtype that the kernels take; raises NotImplementedError for float64."""
    if any(matrix.dtype == torch.float64 for matrix in matrices):
        raise NotImplementedError('the Triton kernels take bf16, fp16 and fp32, found float64: use backend="torch"')
    # Triton's interpreter would multiply the bit patterns of bf16 as integers.
    return tuple(m.float() if m.dtype == torch.bfloat16 and m.device.type == "cpu" else m for m in matrices)


def operand(matrix: Tensor, block: list[int], tma: bool) -> Any:
    return TensorDescriptor.from_tensor(matrix, block) if tma else matrix


def dot_precision() -> str:
    """How fp32 products are computed: by torch's own switch, as torch.mm would."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class Specialization(NamedTuple):
    """One kernel as it is compiled: hand ``ASTSource(kernel, signature, constexprs)`` to ``triton.compile``."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]  # arguments that are multiples of 16, as pointers and hidden sizes are
    config: Config


def specialize(
    name: str, kernel: Any, config: Config, types: dict[str, str], constexprs: dict[str, Any]
) -> Specialization:
    """``types`` names the operands; other arguments are floats (``scale``, ``softcap``) or integers."""
    constexprs = {**{block: size for block, size in config.blocks.items() if block in kernel.arg_names}, **constexprs}
    signature = {
        argument: types.get(argument, "fp32" if argument in ("scale", "softcap") else "i32")
        for argument in kernel.arg_names
        if argument not in constexprs
    }
    unaligned = getattr(kernel, "do_not_specialize_on_alignment", ())  # which interpreted kernels have not
    divisible = tuple(
        argument
        for argument, kind in signature.items()
        if (kind.startswith("*") and argument not in unaligned) or argument in ("hidden_size", "grad_stride")
    )
    return Specialization(name, kernel, signature, constexprs, divisible, config)


def has_tma(arch: str) -> bool:
    return arch.startswith("sm_") and int(arch[3:]) >= 90


def operand_type(dtype: str, rows: int, columns: int, tma: bool) -> str:
    return f"tensordesc<{dtype}[{rows}, {columns}]>" if tma else f"*{dtype}"
