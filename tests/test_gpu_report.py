"""The compiled kernels: checked here for the 16-bit forward, and the committed report for everything that ships."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import prefopt_fast.kernels
import pytest
import torch
from conftest import make_problem
from prefopt_fast.kernels import linear_logprob, sampled_grad
from prefopt_fast.kernels.sequence_statistics import sequence_statistics
from triton.tools.tensor_descriptor import TensorDescriptor

import prefopt_fast as pf

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gpu_report() -> ModuleType:
    pytest.importorskip("triton")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("gpu_report")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_forward_compiles_for_every_architecture(gpu_report: ModuleType, tmp_path: Path) -> None:
    # In its own process: this one may run Triton's interpreter, whose kernels cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, BENCHMARKS / "gpu_report.py", "--kernel", "forward_bf16", "--out", tmp_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert {entry["arch"] for entry in report["kernels"]} == set(gpu_report.ARCHITECTURES)
    for entry in report["kernels"]:
        architecture = gpu_report.ARCHITECTURES[entry["arch"]]
        found = " ".join(entry["instructions"])
        assert architecture.matrix in found and architecture.copy in found
        assert entry["spills_in_main_loops"] == 0
        assert 0 < entry["shared_bytes"] <= architecture.shared_program

    committed = json.loads((gpu_report.RESULTS / "gpu_report.json").read_text())
    if committed["triton"] == report["triton"]:
        shipped = {(entry["arch"], entry["kernel"]): entry for entry in committed["kernels"]}
        assert all(shipped[entry["arch"], entry["kernel"]] == entry for entry in report["kernels"]), (
            "benchmarks/results/gpu_report.json is not what the kernels compile to: run make gpu-report"
        )


def test_committed_report_covers_what_ships(gpu_report: ModuleType) -> None:
    committed = json.loads((gpu_report.RESULTS / "gpu_report.json").read_text())
    reported = [(entry["arch"], entry["kernel"], entry["config"], entry["source"]) for entry in committed["kernels"]]
    shipped = [
        (arch, spec.name, spec.config._asdict(), gpu_report.source_digest(spec.kernel))
        for arch in gpu_report.ARCHITECTURES
        for spec in gpu_report.specializations(arch)
    ]
    assert reported == shipped, "run make gpu-report"
    assert not any(entry["problems"] for entry in committed["kernels"])


def test_every_kernel_is_listed(gpu_report: ModuleType) -> None:
    listed = {spec.kernel.__name__ for spec in gpu_report.specializations("sm_90")}
    kernels = set()
    for found in pkgutil.iter_modules(prefopt_fast.kernels.__path__, "prefopt_fast.kernels."):
        members = vars(importlib.import_module(found.name)).items()
        kernels |= {name for name, member in members if name.endswith("_kernel") and hasattr(member, "arg_names")}
    assert kernels and kernels == listed


def test_what_is_compiled_is_what_is_launched(
    gpu_report: ModuleType, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(linear_logprob, "MIN_SAMPLED_WORK", 0)
    monkeypatch.setattr(sampled_grad, "MAX_SHARE", 1.0)
    # The interpreter upcasts 16-bit operands, and has TMA descriptors where it can and pointers elsewhere.
    specs = [(arch, spec) for arch in ("sm_80", "sm_90") for spec in gpu_report.specializations(arch)]
    listed = {(arch, spec.name): spec for arch, spec in specs if "bf16" not in spec.name}
    launches: dict[str, list[dict[str, object]]] = {}

    def recorder(kernel: Any) -> Callable[..., None]:
        def record(*args: object, **kwargs: object) -> None:
            found = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            launches.setdefault(kernel.__name__, []).append(found)

        return record

    for kernel in {spec.kernel.__name__: spec.kernel for spec in listed.values()}.values():
        monkeypatch.setattr(kernel, "pre_run_hooks", [recorder(kernel)])
    for hidden_size in (32, 21):  # whose rows are of whole 16 bytes, and are not
        hidden, weight, targets = make_problem(40, 160, hidden_size, device=device)
        head = pf.LMHead(weight.requires_grad_())
        hidden.requires_grad_()
        targets[::7] = -100  # rows are then picked by index
        for tolerance in (0.0, 2.0**-3):
            stats = pf.token_logprobs(
                hidden, head, targets, ("log_sum_sq_probs",), grad_tolerance=tolerance, backend="triton"
            )
            stats.logprobs.sum().backward()
        pf.token_log_ratio(hidden, head, hidden, head, targets, backend="triton")
        biased = pf.LMHead(weight, torch.zeros(160, device=device, requires_grad=True))
        for other in (biased, pf.LMHead(weight.detach())):
            again = pf.token_logprobs(hidden, other, targets, grad_tolerance=2.0**-3, backend="triton")
            again.logprobs.sum().backward()
    cu_seqlens = torch.tensor([0, 15, 40], dtype=torch.int32, device=device)
    sequence_statistics(stats.logprobs, stats.mask, stats.log_sum_sq_probs, cu_seqlens)

    launched = {
        key
        for key, spec in listed.items()
        if any(_is_launch_of(spec, launch) for launch in launches.get(spec.kernel.__name__, ()))
    }
    assert launched == set(listed)


def _is_launch_of(spec: Any, launch: dict[str, Any]) -> bool:
    """Whether operands have the compiled types, and constants are the same but for sizes of blocks and slots."""

    def kind(value: object) -> str:
        if isinstance(value, torch.Tensor):
            names = {torch.bool: "i1", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
            return "*" + names.get(value.dtype, "i64")
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{kind(value.base)[1:]}"
        return "fp32" if isinstance(value, float) else "i32"

    same = all(kind(launch[name]) == expected.split("[")[0] for name, expected in spec.signature.items())
    return same and all(
        isinstance(launch[name], int) if type(value) is int else launch[name] == value
        for name, value in spec.constexprs.items()
    )


def test_spills_by_loop(gpu_report: ModuleType) -> None:
    # 0: outside; an outer loop of 1-6 around the product's loop of 2-4; 7: EXIT; 8-9: a wait's slow path, laid out
    # behind the end, entered from the product's loop and jumping back into it.
    ops = ["STL", "LDL", "HGMMA", "BRA", "BRA", "STL", "BRA", "EXIT", "STL", "BRA"]
    jumps, ends = {3: 8, 4: 2, 6: 1, 9: 4}, {7, 9}
    counts = gpu_report._count(ops, jumps, ends)
    assert counts["instructions"] == {"HGMMA": 1, "LDL": 1, "STL": 3}
    assert (counts["spills"], counts["spills_in_loops"], counts["spills_in_main_loops"]) == (4, 3, 0)
    # The slow path is no part of a loop if it leaves the kernel instead; a spill beside the product is in a main loop.
    assert gpu_report._count(ops, jumps | {9: 7}, ends)["spills_in_loops"] == 2
    assert gpu_report._count(["STL", "HGMMA", "LDL", "BRA", "EXIT"], {3: 1}, {4})["spills_in_main_loops"] == 1
    # Without products every loop is a main loop.
    assert gpu_report._count(["STL", "LDL", "BRA", "EXIT"], {2: 1}, {3})["spills_in_main_loops"] == 1


@pytest.mark.parametrize("buffers", [2, 3])
def test_buffers_that_copies_overwrite(gpu_report: ModuleType, buffers: int) -> None:
    """Two steps ahead of a product that still runs: a ring of two is back where it was."""
    tile = "!ttg.memdesc<128x64xbf16, #shared, #smem, mutable>"
    copies = "\n".join(
        f"%{ring}_{step} = ttg.memdesc_index %{ring}[%c{step}] : -> {tile}\n"
        f"%t_{ring}_{step} = ttg.async_copy_global_to_local %p, %{ring}_{step} mask %m : -> <128x64xbf16>"
        for ring in ("g", "h", "other")
        for step in range(2)
    )
    ttgir = f"""
        %g = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x128x64xbf16, #shared, #smem, mutable>
        %h = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable>
        %other = ttg.local_alloc : () -> !ttg.memdesc<2x64x128xbf16, #shared, #smem, mutable>
        {copies}
        scf.for %k = %c0 to %c4 {{
        %now = ttg.memdesc_index %g[%k] : -> {tile}
        %turned = ttg.memdesc_trans %h_1 : -> {tile}
        %total = ttng.warp_group_dot %now, %turned, %sum {{isAsync = true}} : -> tensor<128x128xf32, #mma>
        %next = ttg.async_copy_global_to_local %p, %g_1 mask %m : -> <128x64xbf16>
    """
    assert gpu_report._overwritten_buffers(ttgir) == (["%g"] if buffers == 2 else [])


def test_checks_find_what_they_look_for(gpu_report: ModuleType) -> None:
    hopper = gpu_report.ARCHITECTURES["sm_90"]
    ttir = (
        "tt.descriptor_load %a\n%3 = tt.dot %0, %1, %2 : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>"
    )
    good = {
        "spills_in_main_loops": 0,
        "shared_bytes": hopper.shared_program,
        "programs_per_processor": 1,
        "instructions": {"HGMMA": 4, "UTMALDG": 2},
    }

    def problems(**changes: object) -> str:
        return "; ".join(gpu_report._problems(good | changes, ttir, hopper))

    assert problems() == ""
    assert "spilled" in problems(spills_in_main_loops=1)
    assert "shared memory" in problems(shared_bytes=hopper.shared_program + 1)
    assert "multiprocessor" in problems(programs_per_processor=0)
    assert "HGMMA" in problems(instructions={"HMMA": 4, "UTMALDG": 2})
    assert "UTMALDG" in problems(instructions={"HGMMA": 4, "LDGSTS": 2})
