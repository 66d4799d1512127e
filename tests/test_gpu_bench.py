"""The GPU benchmark on tiny problems and the CPU: its whole way from the checks to the plots, and the tuner."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_bench
import gpu_checks
import gpu_tables
import gpu_tune
from prefopt_fast.kernels import configs

OURS = "prefopt_fast, exact"


@pytest.fixture
def table() -> Iterator[dict]:
    """The table of configurations, read anew afterwards."""
    configs._table.cache_clear()
    yield configs._table()
    configs._table.cache_clear()


def test_whole_way_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the torch path stands in for the kernels
    assert gpu_bench.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert results["checks"] and all(check["passed"] for check in results["checks"])
    assert not results["left_out"]
    for profile in results["profiles"]:
        launches, spent = profile["kernels"]["aten::mm"]
        assert profile["ms"] > 0 and launches > 0 and spent > 0
    for mode in gpu_bench.MODES:
        for shape in gpu_bench.QUICK_SHAPES:
            assert gpu_tables.find(results, shape, gpu_bench.QUICK_TOKENS[0], mode, OURS)["ms"] > 0
    absent = {case["method"]: case["absent"] for case in results["cases"] if "absent" in case}
    assert "GPU" in absent["CCE, exact"]
    text = (tmp_path / "gpu_bench.md").read_text()
    assert all(case["method"] in text for case in results["cases"])
    assert [profile["mode"] for profile in results["profiles"]] == ["trainable", "frozen"]
    assert text.count("## Profile") == 2
    assert {path.name for path in tmp_path.glob("*.png")} == {"time.png", "memory.png", "speedup.png", "tflops.png"}


def test_out_of_time_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = ["--device", "cpu", "--quick", "--parts", "measure", "--minutes", "0.001", "--out", str(tmp_path)]
    assert gpu_bench.main(command) == 0
    results = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert not results["cases"] and len(results["left_out"]) > 20
    assert results["left_out"][0] in (tmp_path / "gpu_bench.md").read_text()


def test_out_of_memory_and_errors_are_no_crash(tmp_path: Path) -> None:
    def out_of_memory(problem: object) -> None:
        raise torch.OutOfMemoryError("2 TiB")

    def broken(problem: object) -> None:
        raise RuntimeError("first line\nsecond line")

    bench = gpu_bench.Bench("cpu", tmp_path, minutes=1.0, quick=True)
    for forward, reason in ((out_of_memory, "out of memory"), (broken, "RuntimeError: first line")):
        case = gpu_bench.Case("tiny", 32, "trainable", gpu_bench.Peer("peer", forward))
        assert bench.run(case) == {"absent": reason}


def test_goals_read_the_measurements() -> None:
    def case(mode: str, method: str, ms: float) -> dict:
        return {"shape": "Llama-3 8B", "tokens": 8192, "mode": mode, "method": method, "ms": ms, "extra_mib": 100.0}

    results = {
        "products": [{"shape": "Llama-3 8B", "tokens": 8192, "ms": 6.5, "tflops": 1.0}],
        "cases": [
            case("forward", OURS, 10.0),
            case("frozen", "prefopt_fast, 2⁻⁸", 12.0),
            case("trainable", "prefopt_fast, 2⁻⁸", 20.0),
            case("trainable", "TRL ChunkedLogProb", 50.0),
        ],
    }
    measured = [round(value, 3) for _, value, _ in gpu_tables.goals(results)]
    assert measured == [1.538, 0.4, 1.2, 100.0]
    assert all(value <= limit + 1e-9 for _, value, limit in gpu_tables.goals(results))


def test_tuner_takes_the_fastest(table: dict) -> None:
    times = iter([3.0, 1.0, 2.0, 4.0])
    rewritten = gpu_tune.tune("cpu", "triton", 60.0, ["forward"], True, lambda step: next(times), lambda message: None)
    fastest = next(gpu_tune.candidates(gpu_tune.KERNELS["forward"], quick=True))  # the second after what is shipped
    assert configs.lookup("forward", "interpreter", torch.float32, 32) == fastest
    assert json.loads(gpu_tune.to_json(rewritten)) == rewritten


def test_tuner_keeps_shared_layouts(table: dict) -> None:
    tile = configs.lookup("sampled_grad_logits", "sm_90", torch.bfloat16, 4096)
    inner = configs.lookup("sampled_dhidden", "sm_90", torch.bfloat16, 4096)
    assert gpu_tune.fits("sampled_dhidden", inner, "sm_90", torch.bfloat16, 4096)
    assert not gpu_tune.fits("sampled_dhidden", inner._replace(block_v=2 * tile.block_v), "sm_90", torch.bfloat16, 4096)
    for name, kernel in gpu_tune.KERNELS.items():
        found = list(gpu_tune.candidates(kernel, quick=False))
        assert 8 <= len(found) <= 40 and len(set(found)) == len(found), name


def test_a_failing_check_is_a_result() -> None:
    def broken() -> Iterator[gpu_checks.Check]:
        yield gpu_checks.Check("first", 1.0, 2.0)
        raise ValueError("no such thing")

    first, second = gpu_checks._guarded("name", broken())
    assert first.passed and not second.passed and "no such thing" in second.name
