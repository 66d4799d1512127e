"""The benchmarks in their short mode: what they measure is right, and the report says who is absent and why."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_linear_logprob as bench  # noqa: E402
import bench_train_step  # noqa: E402
import inputs  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402


@pytest.fixture(scope="module")
def problem() -> inputs.Problem:
    return inputs.synthetic(64, 512, 32)


def test_synthetic_inputs_are_as_concentrated_as_the_measured_ones() -> None:
    found = inputs.concentration(inputs.synthetic(512, 16_384, 256))
    # The bounds are what ten seeds give, around the real model's 1.2, 0.65, 58 and (three times the columns at a third
    # of the vocabulary) 0.13.
    assert 0.8 < found["entropy_median"] < 1.8
    assert 0.55 < found["top1_mean"] < 0.75
    assert 40 < found["above_2^-12_mean"] < 85
    assert 0.06 < found["columns_128"] < 0.2


def test_synthetic_inputs_are_reproducible_and_of_the_asked_dtype() -> None:
    first, second = (inputs.synthetic(16, 300, 24, dtype=torch.bfloat16, seed=3) for _ in range(2))
    assert first.hidden.dtype == first.weight.dtype == torch.bfloat16
    assert torch.equal(first.hidden, second.hidden) and torch.equal(first.targets, second.targets)
    assert not torch.equal(first.hidden, inputs.synthetic(16, 300, 24, dtype=torch.bfloat16).hidden)


def test_upstream_is_that_of_pairs() -> None:
    problem = inputs.synthetic(2048, 64, 8)
    sequences = problem.upstream.view(-1, problem.sequence_length)
    assert len(sequences) == 4 and bool((sequences == sequences[:, :1]).all())
    assert bool((sequences[:2] > 0).all()) and bool((sequences[2:] < 0).all())


@pytest.mark.parametrize(
    "peer", [peer for peer in peers.all_peers("cpu") if not peer.compiled], ids=lambda peer: peer.name
)
def test_peers_do_the_same_work(problem: inputs.Problem, peer: peers.Peer) -> None:
    if reason := bench.probe(peer, problem.leaves()):
        pytest.skip(reason)
    truth = bench.float64_truth(problem)
    errors = bench.errors(peer, problem, truth)
    if errors is None:
        assert peer in peers.FLOORS
        return
    plain = bench.errors(peers.Peer("plain", peers.full_logits), problem, truth)
    assert plain is not None
    fast = peers.FAST_TOLERANCE if " fast " in peer.name else 0.0
    for name, error in errors.items():
        assert error <= 3 * plain[name] + (0.0 if name == "logprobs" else 1.5 * fast), name


def test_a_frozen_head_takes_no_gradient(problem: inputs.Problem) -> None:
    leaves = problem.leaves(train_head=False)
    peers.backward(peers.full_logits(leaves), leaves)
    assert leaves.hidden.grad is not None and leaves.weight.grad is None


def test_statistic_is_asked_for_or_refused(problem: inputs.Problem) -> None:
    leaves = problem.with_stats("log_sum_sq_probs").leaves()
    assert bench.probe(peers.our_peers("cpu")[1], leaves) is None
    assert "log_sum_sq_probs" in (bench.probe(peers.Peer("lce", peers.linear_cross_entropy()), leaves) or "")


def test_peak_memory_is_that_of_the_logits() -> None:
    """Autograd through full logits holds the logits, their exponentials in the backward, and little else."""
    problem = inputs.synthetic(512, 16_384, 32).leaves()  # beside whose logits what else the process does is small
    (extra,) = bench.peak_memories(["full logits"], problem).values()
    if extra is None:
        pytest.skip("this system does not tell the high-water mark of a process")
    assert 2 <= extra / (4 * problem.tokens * problem.vocab) <= 5.5


def test_what_fails_is_absent_with_the_reason(problem: inputs.Problem) -> None:
    def broken(problem: inputs.Problem) -> None:
        raise RuntimeError("no kernel image\nand more")

    rows = bench.compare(problem, [peers.Peer("broken", broken), peers.PRODUCT], rounds=2, memory=False)
    assert rows["broken"].absent == "RuntimeError: no kernel image"
    assert len(rows["bare product"].total) == 2 and rows["bare product"].seconds > 0


def test_format_tolerance() -> None:
    assert peers.format_tolerance(2.0**-8) == "2⁻⁸"
    assert peers.format_tolerance(0.003) == "0.003"


def test_short_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", "--short", "--output", str(tmp_path)])
    try:
        report.main()
    finally:
        torch.set_flush_denormal(False)  # in this process other tests go on
    printed = capsys.readouterr().out
    assert "## Figures to reach" in printed
    results = json.loads((tmp_path / "linear_logprob.json").read_text())
    assert set(results["sections"]) == {"main", "frozen", "wpo", "wide", "tokens", "vocab", "tolerance"}
    text = (tmp_path / "report.md").read_text()
    assert all(f"| {name} |" in text for name in results["peers"])
    assert "left out of the short mode" in text
    assert {path.name for path in tmp_path.glob("*.png")} >= {"time_tokens.png", "memory_tokens.png"}


def test_figures_come_from_rounds_in_pairs() -> None:
    """The machine slows down by half between two rounds: the ratio does not notice."""
    rows = {
        "a": bench.Row("a", forward=[1.0, 2.0, 1.0], backward=[1.0, 2.0, 1.0]),
        "b": bench.Row("b", forward=[0.5, 1.0, 0.5], backward=[0.5, 1.0, 0.5]),
    }
    assert report.ratio(rows, "a", "b") == 2.0
    assert report.ratio(rows, "a", "missing") is None


def test_train_step_table_names_the_absent() -> None:
    results = {
        "environment": {"device": "x", "threads": 2, "date": "d"},
        "settings": {"model": "m", "data": "p", "steps": 1, "batch_size": 2, "max_length": 8},
        "trainers": [
            vars(bench_train_step.Result("ours", [2.0, 4.0], 10.0, 60.0, 2**30, 0.5)),
            vars(bench_train_step.Result("trl", [], absent="exit status 1: no module")),
        ],
    }
    text = bench_train_step.markdown(results)
    assert "| prefopt_fast train | 3.0 | 10 |  | 10 s | 6 | 0.5000 | 1.00 GiB |" in text
    assert "absent: exit status 1: no module" in text


def test_drift_of_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of every variant on a few pairs: the exact one is its own reference."""
    pytest.importorskip("transformers")
    import drift

    pairs = [
        {"prompt": f"say {i} words about item {i}", "chosen": "one two three " * 20, "rejected": "no"}
        for i in range(40)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.setattr(drift, "VARIANTS", drift.VARIANTS[:2])
    flags = ["--data", str(data), "--steps", "1", "--seeds", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["drift.py", "small", *flags])
    drift.main()
    found = json.loads((tmp_path / "drift.json").read_text())["small"]
    assert all(point["kl"] == 0 for curve in found["curves"]["exact"].values() for point in curve)
    assert all(point["kl"] >= 0 for curve in found["curves"]["bf16"].values() for point in curve)
    assert len(found["kl_between_seeds"]) == 1 and (tmp_path / "drift.png").exists()
