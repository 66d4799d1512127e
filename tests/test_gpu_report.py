"""The compiled kernels: checked here for the 16-bit forward, and the committed report for everything that ships."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import prefopt_fast.kernels
import pytest

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
    reported = [(entry["arch"], entry["kernel"], entry["config"]) for entry in committed["kernels"]]
    shipped = [
        (arch, spec.name, spec.config._asdict())
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
