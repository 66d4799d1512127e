"""The GPU benchmark on tiny problems and the CPU: its whole way from the checks to the plots, and the tuner."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
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
import inputs
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
    assert list(results["parts"]) == ["check", "goals", "profile", "measure"]
    for part in results["parts"].values():
        assert part["error"] is None and part["seconds"] > 0 and part["environment"]["kernels"] in text
    assert all(goal.measured for goal in gpu_tables.goals(results)) and "not measured" not in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"time.png", "memory.png", "speedup.png", "tflops.png"}


def test_out_of_time_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = ["--device", "cpu", "--quick", "--parts", "measure", "--minutes", "0.001", "--out", str(tmp_path)]
    assert gpu_bench.main(command) == 0
    results = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert not results["cases"] and len(results["left_out"]) > 20
    assert results["left_out"][0] in (tmp_path / "gpu_bench.md").read_text()


def test_parts_keep_each_others_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that fails is named and ends neither the others nor what they found before."""
    command = ["--device", "cpu", "--quick", "--minutes", "0", "--out", str(tmp_path), "--parts"]
    passed = gpu_checks.Check("a check", 0.0, 0.0)
    monkeypatch.setattr(gpu_checks, "run_checks", lambda *_: iter([passed]))
    assert gpu_bench.main([*command, "check"]) == 0

    def broken(bench: gpu_bench.Bench) -> None:
        raise RuntimeError("no such | kernel")

    monkeypatch.setattr(gpu_bench.Bench, "profile", broken)
    assert gpu_bench.main([*command, "profile", "measure"]) == 1
    results = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert [check["name"] for check in results["checks"]] == ["a check"]
    errors = {name: part["error"] for name, part in results["parts"].items()}
    assert errors == {"check": None, "profile": "RuntimeError: no such | kernel", "measure": None}
    assert results["left_out"] and "RuntimeError: no such / kernel" in (tmp_path / "gpu_bench.md").read_text()


def test_a_lost_device_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything saved so far, the case included that lost it."""

    def lost(*_: object, **__: object) -> None:
        monkeypatch.setattr(gpu_checks, "works", lambda device: False)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    command = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--parts", "profile", "measure"]
    monkeypatch.setattr(gpu_bench.inputs, "synthetic", lost)
    monkeypatch.setattr(gpu_bench.Bench, "profile", lambda bench: None)
    assert gpu_bench.main(command) == 1
    results = json.loads((tmp_path / "gpu_bench.json").read_text())
    (case,) = results["cases"]
    assert case["absent"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert results["parts"]["measure"]["error"].startswith("the device no longer works")

    monkeypatch.setattr(gpu_bench.Bench, "profile", lost)
    assert gpu_bench.main(command) == 1
    assert "cut off" not in (tmp_path / "gpu_bench.md").read_text()
    results = json.loads((tmp_path / "gpu_bench.json").read_text())
    assert results["cases"] == [case] and results["profiles"] == []


def test_out_of_memory_and_errors_are_no_crash(tmp_path: Path) -> None:
    def raises(error: Exception) -> gpu_bench.Peer:
        def forward(problem: object) -> None:
            raise error

        return gpu_bench.Peer("peer", forward)

    bench = gpu_bench.Bench("cpu", tmp_path, minutes=1.0, quick=True)
    for error, reason in (
        (torch.OutOfMemoryError("2 TiB"), "out of memory"),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
        (ModuleNotFoundError("No module named 'trl'"), "No module named 'trl'"),
    ):
        case = gpu_bench.Case("tiny", 32, "trainable", raises(error))
        assert bench.attempt(lambda case=case: bench.run(case)) == {"absent": reason}


def test_important_cases_come_first(tmp_path: Path) -> None:
    bench = gpu_bench.Bench("cpu", tmp_path, minutes=1.0, quick=False)
    cases = list(bench.cases())
    assert len(set(cases)) == len(cases)
    first = next(i for i, case in enumerate(cases) if not case.peer.name.startswith(("prefopt_fast", "TRL")))
    assert {case.mode for case in cases[:first]} == set(gpu_bench.MODES)
    shapes = list(dict.fromkeys(case.shape for case in cases))
    assert shapes == list(inputs.GPU_MODELS) and {case.shape for case in cases[:first]} == {shapes[0]}
    compiled = [i for i, case in enumerate(cases) if case.peer.compiled]
    assert compiled[-1] == len(cases) - 1 and {cases[i].tokens for i in compiled} == {gpu_bench.TOKENS[0]}


def test_goals_read_the_measurements() -> None:
    """Ratios are taken within a round; what lacks an input is named with the reason."""
    found = {
        "shape": "Llama-3 8B",
        "tokens": 8192,
        "absent": {},
        "ms": {
            "product": [6.6, 13.2],
            "forward": [10.0, 20.0],
            "frozen": [12.0, 24.0],
            "trainable": [30.0, 60.0],
            "TRL": [50.0, 100.0],
        },
        "extra_mib": {"frozen": 300.0, "trainable": 100.0},
    }
    goals = list(gpu_tables.goals({"goals": found}))
    assert [round(goal.measured[-1], 3) for goal in goals] == [1.515, 0.6, 1.2, 100.0, 300.0]
    assert [goal.met for goal in goals] == [True, False, True, True, False]
    assert all(goal.measured[0] == pytest.approx(goal.measured[-1]) for goal in goals)

    del found["ms"]["TRL"]
    found["absent"]["TRL"] = "No module named 'trl'"
    lines = "\n".join(gpu_tables._goal_lines({"goals": found}))
    assert "TRL's | not measured: No module named 'trl' |  | 0.50 |  |" in lines
    parts = {"goals": {"error": "RuntimeError: broken"}}
    assert "\n".join(gpu_tables._goal_lines({"goals": None, "parts": parts})).count("not measured: Runtime") == 5


def test_tuner_takes_the_fastest(table: dict) -> None:
    times = iter([3.0, 1.0, 2.0, 4.0])
    rewritten = gpu_tune.tune("cpu", "triton", 60.0, ["forward"], True, lambda step: next(times), lambda message: None)
    fastest = next(gpu_tune.candidates(gpu_tune.KERNELS["forward"], quick=True))  # the second after what is shipped
    assert configs.lookup("forward", "interpreter", torch.float32, 32) == fastest
    assert json.loads(gpu_tune.to_json(rewritten)) == rewritten


def test_tuned_configurations_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = list(gpu_checks.run_checks("cpu", "torch", quick=True, after_tuning=True))
    assert all(check.passed for check in checks)
    exact, fast = gpu_checks.QUICK_CASES
    assert {check.name.partition(":")[0] for check in checks} == {exact.name, fast.name}
    assert all("columns" in check.name or "fast" in check.name for check in checks if fast.name in check.name)

    failing = gpu_checks.Check("a kernel", 1.0, 0.0)
    monkeypatch.setattr(gpu_checks, "run_checks", lambda *arguments: iter([failing] * arguments[3]))
    monkeypatch.setattr(gpu_tune, "tune", lambda *_: {"interpreter": {}})
    monkeypatch.setattr(gpu_bench.Bench, "profile", lambda bench: None)
    command = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--parts", "check", "profile", "--tune"]
    assert gpu_bench.main(command) == 1
    assert "## Correctness of the tuned configurations: 1 checks, 1 failed" in (tmp_path / "gpu_bench.md").read_text()


def test_tuner_keeps_shared_layouts(table: dict) -> None:
    tile = configs.lookup("sampled_grad_logits", "sm_90", torch.bfloat16, 4096)
    inner = configs.lookup("sampled_dhidden", "sm_90", torch.bfloat16, 4096)
    assert gpu_tune.fits("sampled_dhidden", inner, "sm_90", torch.bfloat16, 4096)
    assert not gpu_tune.fits("sampled_dhidden", inner._replace(block_v=2 * tile.block_v), "sm_90", torch.bfloat16, 4096)
    for name, kernel in gpu_tune.KERNELS.items():
        found = list(gpu_tune.candidates(kernel, quick=False))
        assert 8 <= len(found) <= 40 and len(set(found)) == len(found), name


def test_a_failing_check_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[gpu_checks.Check]:
        yield gpu_checks.Check("first", 1.0, 2.0)
        raise ValueError("no such thing")

    first, second = gpu_checks._guarded("name", broken(), "cpu")
    assert first.passed and not second.passed and "no such thing" in second.name
    monkeypatch.setattr(gpu_checks, "works", lambda device: False)
    checks = gpu_checks._guarded("name", broken(), "cuda")
    assert [next(checks).passed, next(checks).passed] == [True, False]
    with pytest.raises(ValueError, match="no such thing"):
        next(checks)


def failed(checks: Iterator[gpu_checks.Check]) -> list[str]:
    return [check.name.rpartition(": ")[2] for check in checks if not check.passed]


def test_checks_notice_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A top-1 that never is, statistics as bad as 16-bit logits', memory nobody has written, and TF32 is no excuse."""
    run, case = gpu_checks._run, gpu_checks.QUICK_CASES[1]

    def broken(*arguments: object) -> dict:
        found = run(*arguments)
        if arguments[6] == "torch":
            found["is_top1"] = torch.zeros_like(found["is_top1"])
            found["entropy"] = found["entropy"] * (1 + 1e-4)
            found["dweight"] = torch.empty_like(found["dweight"])
        return found

    monkeypatch.setattr(gpu_checks, "_run", broken)
    with gpu_checks._filled_memory():
        assert failed(gpu_checks._exact_checks(case, "cpu", "torch")) == ["entropy", "is_top1", "dweight"]
    assert not torch.are_deterministic_algorithms_enabled()
    case = replace(gpu_checks.QUICK_CASES[0], tf32=True)
    assert failed(gpu_checks._exact_checks(case, "cpu", "torch"))[:1] == ["is_top1"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_checks_of_repeated_gradients_notice_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(gpu_checks.QUICK_REPEATED_CASE, vocab=64, hidden=16)
    with gpu_checks._sampling("triton"):
        assert not failed(gpu_checks._repeat_checks(case, "cpu", 1))
    grad, draws = torch.autograd.grad, iter(range(9))

    def race(*arguments: object, **options: object) -> tuple[torch.Tensor, ...]:
        first, *others = grad(*arguments, **options)
        return (first + next(draws), *others)

    monkeypatch.setattr(torch.autograd, "grad", race)
    with gpu_checks._sampling("triton"):
        names = failed(gpu_checks._repeat_checks(case, "cpu", 1))
    assert names == ["of 1 fast gradients repeated, those of other bits", "fast dhidden, one chunk at a time"]


def test_checks_tell_a_sampled_gradient_from_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(loss: Callable, fullgraph: bool) -> Callable:
        return lambda hidden, weight, tolerance: loss(hidden, weight, 0.0)

    small = gpu_bench.inputs.synthetic(64, 128, 16)
    monkeypatch.setattr(gpu_checks.inputs, "synthetic", lambda *_: small)
    monkeypatch.setattr(torch, "compile", lambda loss, fullgraph: loss)
    with gpu_checks._sampling("triton"):
        assert not failed(gpu_checks._compile_checks("cpu", "triton"))
        monkeypatch.setattr(torch, "compile", exact)
        names = failed(gpu_checks._compile_checks("cpu", "triton"))
        assert names == ["dhidden", "dweight"]
        assert not failed(gpu_checks._opchecks("cpu"))


def test_inputs_are_concentrated_under_a_soft_cap() -> None:
    bias = torch.full((4096,), -20.0)
    problem = gpu_bench.inputs.synthetic(64, 4096, 64, bias=bias, softcap=20.0)
    logits = 20.0 * torch.tanh((problem.hidden @ problem.weight.T + bias) / 20.0)
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).median()
    assert 0.8 < entropy < 2.4
