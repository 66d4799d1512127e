"""The passes over a tile of fp32 logits in C, compiled when a CPU first needs them; without a compiler torch does.

torch's own operations walk over a tile once for each: to subtract, exponentiate, sum, square, weigh, compare, gather.
Compiled, that is two walks, in a third of the time. ``CC`` names the compiler (cc), as it does for the C code of Triton
and torch.compile. Half a second in each process is less than a cache on disk, for every kind of processor that sees it,
would be trouble.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu_passes.c")
FLAGS = "-O3 -march=native -fopenmp-simd -fno-math-errno -fno-trapping-math -shared -fPIC"
MAX_THREADS = 3  # a C pass has one thread: with more of them than this, torch's operations are as fast

logger = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled passes; None where there is no compiler, none that can, or no folder for what it makes."""
    command = shlex.split(os.environ.get("CC", "cc"))
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            output = os.path.join(folder, "cpu_passes.so")
            subprocess.run(
                [*command, *FLAGS.split(), "-o", output, str(SOURCE), "-lm"], check=True, capture_output=True
            )
            compiled = ctypes.CDLL(output)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error).encode()
        logger.info("without passes in C, torch's take their place: %s", reason.decode(errors="replace").strip())
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    compiled.exp_sums.argtypes = (number, pointer, number, number, pointer, pointer)
    compiled.keep_columns.argtypes = (
        *(pointer, number, number, number, number, pointer, pointer, pointer),
        *(pointer, pointer, pointer, number, pointer, pointer, pointer, number, number),
    )
    compiled.exp_sums.restype = compiled.keep_columns.restype = None
    return compiled


def usable(logits: Tensor) -> bool:
    """Whether the passes over tiles of such logits are to be compiled ones, in the calling thread."""
    return (
        logits.device.type == "cpu"
        and logits.dtype == torch.float32
        and library() is not None
        and torch.get_num_threads() <= MAX_THREADS
    )


def exp_sums(
    logits: Tensor,  # (T, C), contiguous; overwritten with e = exp(logits − shift)
    shift: Tensor,  # (C,)
    sums: Tensor,  # (K, C), K ≤ 3, contiguous: Σ e, Σ e², Σ (logits − shift) e over the T rows are added to it
) -> None:
    compiled = library()
    assert compiled is not None
    compiled.exp_sums(len(sums), logits.data_ptr(), *logits.shape, shift.data_ptr(), sums.data_ptr())


def keep_columns(
    exp: Tensor,  # (T, C), contiguous
    first: int,  # vocabulary entry of its first row
    average: Tensor,  # (C,)
    weights: Tensor,  # (C,)
    threshold: Tensor,  # (groups, T)
    mass: Tensor,  # (groups, T), strides as threshold's; overwritten with Σ_t average_t · e_t
    square: Tensor,  # (groups, T), strides as threshold's; overwritten with Σ_t weights_t · e_t²
    bounds: Tensor,  # (groups + 1,) int64: group g has the tokens bounds[g] … bounds[g + 1]
    counts: Tensor,  # (groups,) int64, of what is kept; increased
    columns: Tensor,  # (groups, capacity) int64
    kept: Tensor,  # (groups, capacity, width)
) -> None:
    """Append to each group's ``columns`` and ``kept`` the rows where ``square`` exceeds ``threshold``."""
    compiled = library()
    assert compiled is not None
    compiled.keep_columns(
        exp.data_ptr(), *exp.shape, first, len(counts), bounds.data_ptr(), average.data_ptr(), weights.data_ptr(),
        threshold.data_ptr(), mass.data_ptr(), square.data_ptr(), mass.stride(0), counts.data_ptr(), columns.data_ptr(),
        kept.data_ptr(), *kept.shape[1:],
    )  # fmt: skip
