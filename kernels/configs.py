"""The launch configuration of each kernel: a table by architecture, kernel, operand width and hidden size.

``configs.json`` is what the offline tuner (benchmarks) rewrites; nothing is tuned while a user's program runs. An
architecture the table does not know takes the "default" entry, which fits in 99 KiB of shared memory.
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any, NamedTuple

import torch


class Config(NamedTuple):
    """Tile of ``block_n`` tokens × ``block_v`` columns, ``block_h`` of the hidden size per step of its product."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int

    @property
    def blocks(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"BLOCK_N": self.block_n, "BLOCK_V": self.block_v, "BLOCK_H": self.block_h}

    @property
    def launch(self) -> dict[str, int]:
        """Everything in it that a launch takes."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@functools.cache
def _table() -> dict[str, dict[str, dict[str, list[dict[str, Any]]]]]:
    return json.loads((files(__package__) / "configs.json").read_text())


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", …; "interpreter" where the kernels run on the CPU in Triton's interpreter."""
    if device.type == "cuda":
        if torch.version.hip:
            return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return "xpu" if device.type == "xpu" else "interpreter"


def entries(kernel: str, arch: str, bits: str) -> list[tuple[int | None, Config]]:
    """(max_hidden, configuration) of each line for a kernel and operand width, by rising hidden size."""
    table = _table()
    lines = table.get(arch, table["default"]).get(kernel, table["default"][kernel])[bits]
    return [(line["max_hidden"], Config(*(line[field] for field in Config._fields))) for line in lines]


def lookup(kernel: str, arch: str, dtype: torch.dtype, hidden_size: int) -> Config:
    """The first line whose ``max_hidden`` is not under ``hidden_size``."""
    lines = entries(kernel, arch, str(8 * dtype.itemsize))
    return next(config for limit, config in lines if limit is None or hidden_size <= limit)
