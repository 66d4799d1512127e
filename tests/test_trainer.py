"""Training against float64 formulas from full logits, and against itself: batches, processes, stores, stops."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import time
import types
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from accelerate import DistributedType, ParallelismConfig
from conftest import relative_error
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from prefopt_fast import TokenStats, checkpoint, frozen, trainer
from prefopt_fast.batch import TRUNCATION_SIDES, encode, load_preferences
from prefopt_fast.cli import main
from prefopt_fast.config import OBJECTIVES, DataOptions, TrainConfig
from prefopt_fast.metrics import summarize
from prefopt_fast.objectives import make_objective
from prefopt_fast.policy import load_model, load_tokenizer
from prefopt_fast.trainer import BatchPlan, train

# With an ε far above any gradient Adam's update is linear in the gradient, so that weights compare as gradients do
# and not by the sign of their rounding.
LINEAR_ADAM = {"adam_epsilon": 1e4, "learning_rate": 1e4, "max_grad_norm": 0.0}


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here: only the test of the curves draws them."""
    if "curves" not in request.node.name:
        monkeypatch.setattr(trainer, "draw_curves", lambda output_dir, title: output_dir / "curves.png")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of three models of one tokenizer, one of another, and of pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    models = {name: tiny.make_model(folder / name, seed) for seed, name in enumerate(("model", "other", "third"))}
    foreign = tiny.make_model(folder / "foreign", 3, by_character=True, hidden_size=8)
    return models | {"foreign": foreign, "dataset": tiny.make_pairs(folder / "pairs.json", 10)}


def run(inputs: dict[str, str], output: Path, **options: Any) -> list[dict[str, Any]]:
    base = {"model": inputs["model"], "dataset": inputs["dataset"], "objective": "dpo", "save_steps": 0}
    train(TrainConfig(**base | options, output_dir=str(output)))
    return tiny.read_metrics(output)


class Truth:
    """Float64 statistics of responses from full logits, one unpadded sequence at a time."""

    def __init__(self, source: str):
        self.model = load_model(source).double().eval()

    @torch.no_grad()
    def __call__(self, row: dict[str, Any], response: str) -> tuple[Tensor, Tensor]:
        """log π(y_t) and log Σ_v π(v)² at each of the response's tokens."""
        prompt, answer = row["prompt_ids"], row[f"{response}_ids"]
        logits = self.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1)
        return log_probs.gather(-1, torch.tensor(answer)[:, None])[:, 0], (2 * log_probs).logsumexp(-1)


def first_rows(options: dict[str, Any], responses: tuple[str, ...] = ("chosen", "rejected")) -> list[dict[str, Any]]:
    """The encoded rows of the first step."""
    config = TrainConfig(**options, output_dir="")
    tokenizer = load_tokenizer(config.model)
    rows, _ = encode(load_preferences(config.dataset), tokenizer, config.max_length, config.truncation_side, responses)
    first = next(BatchPlan.of(config, len(rows), 1).batches())
    return [rows[position] for position in first]


def wpo_truth(options: dict[str, Any], beta: float) -> dict[str, float | tuple[float, float]]:
    """WPO's first loss, with sampled alignment, and what goes into it."""
    policy, ref = Truth(options["model"]), Truth(options["ref_model"])
    losses, weights, margins, terms = [], [], [], 0.0
    for row in first_rows(options):
        margin, weight = 0.0, 1.0
        for sign, response in ((1, "chosen"), (-1, "rejected")):
            (logprobs, log_sum_sq), (ref_logprobs, _) = policy(row, response), ref(row, response)
            margin += sign * beta * float((logprobs - ref_logprobs).sum())
            terms -= beta * float((logprobs + ref_logprobs).sum())
            weight *= math.exp((logprobs - log_sum_sq).mean())
        weight = min(weight, 1.0)
        losses.append(weight * math.log1p(math.exp(-margin)))
        weights.append(weight)
        margins.append(margin)
    count = len(losses)
    return {
        "loss": sum(losses) / count,
        "wpo/weight": sum(weights) / count,
        "wpo/effective_sample_size": sum(weights) ** 2 / sum(weight**2 for weight in weights) / count,
        "rewards/margins": (sum(margins) / count, terms / count),
    }


def dpo_truth(options: dict[str, Any]) -> dict[int, float]:
    """DPO's loss of each row of the first step."""
    policy, ref = Truth(options["model"]), Truth(options["ref_model"])
    losses = {}
    for row in first_rows(options):
        chosen, rejected = ((policy(row, name)[0] - ref(row, name)[0]).sum() for name in ("chosen", "rejected"))
        losses[row["row"]] = float(-F.logsigmoid(0.1 * (chosen - rejected)))
    return losses


def wspo_truth(options: dict[str, Any], gamma: float, level: str) -> float:
    """WSPO's first loss."""
    policy, ref = Truth(options["model"]), Truth(options["ref_model"])
    aligned, weak = Truth(options["weak_aligned_model"]), Truth(options["weak_ref_model"])
    losses = []
    for row in first_rows(options, ("chosen",)):
        strong = policy(row, "chosen")[0] - ref(row, "chosen")[0]
        residual = gamma * strong - (aligned(row, "chosen")[0] - weak(row, "chosen")[0])
        losses.append(float(residual.square().mean() if level == "token" else residual.mean() ** 2))
    return sum(losses) / len(losses)


def assert_close(found: dict[str, Any], expected: Mapping[str, float | tuple[float, float]], tolerance: float) -> None:
    """With a difference stands the size of its terms, which float32 cannot hold any better than to its epsilon."""
    for name, value in expected.items():
        value, terms = value if isinstance(value, tuple) else (value, 0.0)
        assert found[name] == pytest.approx(value, rel=tolerance, abs=torch.finfo(torch.float32).eps * terms), name


def test_wpo_first_step(inputs: dict[str, str], tmp_path: Path) -> None:
    options = {"model": inputs["model"], "dataset": inputs["dataset"], "objective": "wpo", "ref_model": inputs["other"]}
    options |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    metrics = run(inputs, tmp_path / "out", **options, max_steps=1)
    assert_close(metrics[0], wpo_truth(options, 0.1), 1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_wspo_first_step(inputs: dict[str, str], tmp_path: Path, level: str) -> None:
    options = {"model": inputs["model"], "dataset": inputs["dataset"], "objective": "wspo", "level": level}
    options |= {"ref_model": inputs["third"], "weak_aligned_model": inputs["other"], "weak_ref_model": inputs["model"]}
    metrics = run(inputs, tmp_path / "out", **options, gamma=0.5, max_steps=1)
    assert_close(metrics[0], {"loss": wspo_truth(options, 0.5, level)}, 1e-5)
    if level == "sequence":
        target, found = metrics[0]["wspo/target"], metrics[0]["wspo/log_ratio"]
        assert metrics[0]["wspo/residual"] >= abs(target - found) - 1e-6


def test_wspo_from_weak_models_of_another_tokenizer(inputs: dict[str, str], tmp_path: Path) -> None:
    """At sequence level each side counts by its mean over its own tokens."""
    other = tiny.make_model(tmp_path / "foreign-aligned", 4, by_character=True, hidden_size=8)
    options = {"model": inputs["model"], "dataset": inputs["dataset"], "objective": "wspo", "level": "sequence"}
    options |= {"ref_model": inputs["third"], "weak_aligned_model": other, "weak_ref_model": inputs["foreign"]}
    metrics = run(inputs, tmp_path / "out", **options, gamma=0.5, max_steps=1)

    policy, ref, aligned, weak = (
        Truth(options[name]) for name in ("model", "ref_model", "weak_aligned_model", "weak_ref_model")
    )
    tokenizer = load_tokenizer(inputs["foreign"])
    own, _ = encode(load_preferences(inputs["dataset"]), tokenizer, 1024, responses=("chosen",))
    losses = []
    for row in first_rows(options, ("chosen",)):
        weak_row = own[row["row"]]
        target = aligned(weak_row, "chosen")[0].mean() - weak(weak_row, "chosen")[0].mean()
        strong = policy(row, "chosen")[0].mean() - ref(row, "chosen")[0].mean()
        losses.append(float((0.5 * strong - target) ** 2))
    assert_close(metrics[0], {"loss": sum(losses) / len(losses)}, 1e-5)

    with pytest.raises(ValueError, match=r"another tokenizer than .*use level sequence"):
        run(inputs, tmp_path / "token", **options | {"level": "token"})
    assert not (tmp_path / "token").exists()


def test_a_store_may_have_rows_that_the_weak_tokenizer_drops(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = {"objective": "wspo", "level": "sequence", "weak_aligned_model": inputs["foreign"], "max_steps": 2}
    options |= {"weak_ref_model": inputs["foreign"], "max_length": 24, "truncation_side": "sequence_end"}
    expected = run(inputs, tmp_path / "model", **options, ref_model=inputs["other"])
    assert re.search(r"weak models' tokens: . of 10 rows", capsys.readouterr().out)
    score = ["score", "--model", inputs["other"], "--dataset", inputs["dataset"], "--out", str(tmp_path / "store")]
    assert main([*score, "--max-length=24", "--truncation-side=sequence_end", "--responses", "chosen"]) == 0
    found = run(inputs, tmp_path / "store-given", **options, ref_logprobs=str(tmp_path / "store"))
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_a_gradient(objective: str) -> None:
    weak = {"weak_aligned_model": "a", "weak_ref_model": "b"} if objective == "wspo" else {}
    config = TrainConfig(model="m", dataset="d", output_dir="o", objective=objective, sft_weight=0.5, **weak)
    made = make_objective(config)
    sequences = len(made.responses) * 2
    logprobs = (-torch.rand(sequences * 3)).requires_grad_()
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    stats = TokenStats(logprobs, mask, log_sum_sq_probs=logprobs.detach() - 1)
    logprobs_of = {name: -torch.rand(sequences * 3) for name in made.frozen}
    loss, metrics = made.function(stats, torch.arange(0, sequences * 3 + 1, 3), logprobs_of)
    loss.sum().backward()
    assert loss.shape == (2,) and logprobs.grad is not None and bool((logprobs.grad[:6] != 0).all())
    assert all(value.shape == (2,) and not value.requires_grad for value in metrics.values())


def test_what_the_gradient_of_the_head_did_is_logged(inputs: dict[str, str], tmp_path: Path) -> None:
    steps = {"max_steps": 2, "ref_model": inputs["other"]}
    for line in run(inputs, tmp_path / "sampled", **steps, grad_tolerance="0.1"):
        assert 0 < line["head/columns_kept"] <= 1
        assert 0 <= line["head/estimated_error"] <= 0.1
        assert "head/pairs" not in line
    exact = run(inputs, tmp_path / "exact", **steps, grad_tolerance="0")[0]
    assert not any(name.startswith("head/") for name in exact)
    sums = {"pairs": 8.0, "loss": 4.0, "head/columns_kept": 1.0, "head/pairs": 2.0}
    assert summarize(sums) == {"loss": 0.5, "head/columns_kept": 0.5}, "over the pairs whose gradient was not exact"


def test_mixtures_are_named_as_in_trl(inputs: dict[str, str], tmp_path: Path) -> None:
    def config(**options: Any) -> TrainConfig:
        return TrainConfig(model="m", dataset="d", output_dir="o", **options)

    mpo = config(objective="dpo,bco_pair,sft", loss_weights=[0.8, 0.2, 1.0], label_smoothing=0.1)
    assert mpo.loss_mixture == {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    assert config(objective="wpo", loss_type="ipo,sft").loss_mixture == {"ipo": 1.0, "sft": 1.0}
    assert make_objective(config(objective="simpo,sft", gamma=0.3)).frozen == ()
    for options, message in (
        ({"objective": "wpo,sft"}, "wpo is none of the pairwise ones: WPO weights a sum that loss_type names"),
        ({"objective": "ipo,ipo"}, "objective must name different losses"),
        ({"objective": "ipo,sft", "loss_weights": [1.0]}, r"one weight for each; found ipo,sft and \[1.0\]"),
        ({"objective": "ipo,sft", "loss_weights": [1.0, -1.0]}, "weight of sft in loss_type must be positive"),
        ({"objective": "ipo,sft", "gamma": 0.3}, "ipo,sft makes no use of gamma"),
        ({"objective": "wspo", "loss_weights": [1.0]}, "wspo makes no use of loss_weights"),
        ({"objective": "wspo", "label_smoothing": 0.1}, "wspo makes no use of label_smoothing"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**options)
    first = {"max_steps": 1, "label_smoothing": 0.2, "ref_model": inputs["other"]}
    smoothed = run(inputs, tmp_path / "smoothed", **first)
    mixed = run(inputs, tmp_path / "mixed", objective="dpo,sft", loss_weights=[0.5, 2.0], **first)
    rows = first_rows({"model": inputs["model"], "dataset": inputs["dataset"], "objective": "dpo"})
    nll = sum(-float(Truth(inputs["model"])(row, "chosen")[0].mean()) for row in rows) / len(rows)
    assert mixed[0]["loss"] == pytest.approx(0.5 * smoothed[0]["loss"] + 2.0 * nll, rel=1e-5)


def test_sft_term_is_the_chosen_nll_per_token(inputs: dict[str, str], tmp_path: Path) -> None:
    plain = run(inputs, tmp_path / "plain", max_steps=1)
    with_sft = run(inputs, tmp_path / "sft", max_steps=1, sft_weight=2.0)
    rows = first_rows({"model": inputs["model"], "dataset": inputs["dataset"], "objective": "dpo"})
    nll = sum(-float(Truth(inputs["model"])(row, "chosen")[0].mean()) for row in rows) / len(rows)
    assert with_sft[0]["loss"] - plain[0]["loss"] == pytest.approx(2.0 * nll, rel=1e-5)


def test_accumulation_changes_nothing(inputs: dict[str, str], tmp_path: Path) -> None:
    """10 pairs in steps of 4: the last step has 2 pairs, one forward pass instead of two."""
    options = {"objective": "wpo", "ref_model": inputs["other"], "num_train_epochs": 2.0} | LINEAR_ADAM
    one = run(inputs, tmp_path / "one", per_device_train_batch_size=4, **options)
    many = run(inputs, tmp_path / "many", per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    assert_same_run(tmp_path / "one", tmp_path / "many", Path(inputs["model"]))
    assert len(one) == len(many) == 6 and one[2]["epoch"] == 1.0


def test_sample_weights(inputs: dict[str, str], tmp_path: Path) -> None:
    """Weights of 1 change nothing; others scale their pair's loss and gradient, however pairs are batched."""
    pairs = json.loads(Path(inputs["dataset"]).read_text())

    def weighted(weights: list[Any]) -> dict[str, Any]:
        file = tmp_path / "weighted.json"
        file.write_text(json.dumps([pair | {"w": weight} for pair, weight in zip(pairs, weights, strict=True)]))
        return {"dataset": str(file), "sample_weight_column": "w", "ref_model": inputs["other"]}

    plain = run(inputs, tmp_path / "plain", ref_model=inputs["other"], max_steps=2)
    ones = run(inputs, tmp_path / "ones", **weighted([1] * 10), max_steps=2)
    assert ones == [line | {"sample_weight": 1.0} for line in plain]
    weights = [0.0, 0.5, *range(1, 9)]
    options = weighted(weights) | {"max_steps": 1, "grad_tolerance": "0"} | LINEAR_ADAM
    one = run(inputs, tmp_path / "one", per_device_train_batch_size=10, **options)
    run(inputs, tmp_path / "many", per_device_train_batch_size=2, gradient_accumulation_steps=5, **options)
    assert_same_run(tmp_path / "one", tmp_path / "many", Path(inputs["model"]))
    losses = dpo_truth({"model": inputs["model"], "objective": "dpo", "per_device_train_batch_size": 10} | options)
    expected = sum(weights[row] * loss for row, loss in losses.items()) / 10
    assert_close(one[0], {"loss": expected, "sample_weight": 3.65}, 1e-5)

    with pytest.raises(ValueError, match=r"row 9: w must be a finite number of at least 0, found -2\.0"):
        run(inputs, tmp_path / "bad", **weighted([1.0] * 9 + [-2.0]))
    with pytest.raises(ValueError, match="no column 'v'; found prompt, chosen, rejected, w"):
        run(inputs, tmp_path / "bad", **weighted([1] * 10) | {"sample_weight_column": "v"})
    with pytest.raises(ValueError, match="sample_weights"):
        run(inputs, tmp_path / "one", per_device_train_batch_size=10, **options | weighted([2] * 10))
    assert not (tmp_path / "bad").exists()


def assert_same_run(one: Path, other: Path, start: Path) -> None:
    """Equal metrics, and equal updates of the weights, to fp32 rounding."""
    for line, expected in zip(tiny.read_metrics(other), tiny.read_metrics(one), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    before, found, expected = (tiny.read_weights(folder) for folder in (start, other, one))
    update = torch.cat([(expected[name] - before[name]).flatten() for name in before])
    assert float(update.norm()) > 1e-2
    assert relative_error(torch.cat([(found[name] - before[name]).flatten() for name in before]), update) < 1e-4


def train_layer_by_layer(options: dict[str, Any]) -> None:
    """In a process of its own, of which each layer's weights are sharded apart, and what is left together."""
    run = trainer.Loop.run

    def checked(loop: trainer.Loop) -> None:
        assert sum(isinstance(module, FSDPModule) for module in loop.model.modules()) == 2 + 1
        run(loop)

    trainer.Loop.run = checked  # type: ignore[method-assign]
    tiny.train_in_child(options)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_compute_what_one_does(inputs: dict[str, str], tmp_path: Path, sharded: bool) -> None:
    """Steps of 4 pairs, 2 + 2 in two processes; the last of 9 pairs leaves the second process none."""
    options = {"objective": "wpo", "ref_model": inputs["other"], "num_train_epochs": 1.0} | LINEAR_ADAM
    options |= {"model": inputs["model"], "dataset": inputs["dataset"], "save_steps": 1, "save_total_limit": 1}
    options |= {"gradient_accumulation_steps": 2, "test_split_size": 0.1, "max_length": 12}
    shared = options | {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 1}
    target = train_layer_by_layer if sharded else tiny.train_in_child
    assert tiny.in_two_processes(target, shared, sharded=sharded) == [0, 0]
    run(inputs, tmp_path / "one", **options | {"per_device_train_batch_size": 2})
    assert_same_run(tmp_path / "one", tmp_path / "two", Path(inputs["model"]))
    saved = tmp_path / "two" / "checkpoint-2"
    assert len(list(saved.glob("process-*.pt"))) == 2
    assert (saved / trainer.OPTIMIZER).is_dir() == sharded


def test_a_killed_sharded_run_goes_on_to_the_same_bits(inputs: dict[str, str], tmp_path: Path) -> None:
    """In mixed precision, where at first a policy is its own reference to the last bit."""
    options = {"model": inputs["model"], "dataset": inputs["dataset"], "objective": "wpo", "max_steps": 4, "bf16": True}
    options |= {"save_steps": 1, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "grad_tolerance": 0.1}
    whole, killed = (options | {"output_dir": str(tmp_path / name)} for name in ("whole", "killed"))
    assert tiny.in_two_processes(tiny.train_in_child, whole, sharded=True) == [0, 0]
    assert -signal.SIGKILL in tiny.in_two_processes(tiny.train_in_child, killed, ("step", 3), sharded=True)
    assert checkpoint.latest_checkpoint(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-2"
    with pytest.raises(ValueError, match="sharded: True there, False now"):
        train(TrainConfig(**killed | {"bf16": False}))
    assert tiny.in_two_processes(tiny.train_in_child, killed, sharded=True) == [0, 0]
    lines = tiny.read_metrics(tmp_path / "killed")
    assert lines == tiny.read_metrics(tmp_path / "whole")
    assert lines[0]["rewards/chosen"] == 0 != lines[3]["rewards/chosen"]
    weights = [tiny.read_weights(tmp_path / name) for name in ("killed", "whole")]
    assert weights[0].keys() == tiny.read_weights(inputs["model"]).keys()  # tied weights once
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("launch", "options", "message"),
    [
        ({"distributed_type": DistributedType.FSDP}, {}, "FSDP of version 2 .*found FSDP"),
        ({"distributed_type": DistributedType.DEEPSPEED}, {}, "found DEEPSPEED"),
        ({"is_fsdp2": True}, {"dtype": "bfloat16"}, "dtype must be float32, .*found bfloat16"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, {}, "cp_size, sp_size and tp_size .*must be 1"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, {}, "cp_size, sp_size and tp_size .*must be 1"),
    ],
)
def test_launches_that_are_refused(
    launch: dict[str, Any], options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"distributed_type": DistributedType.MULTI_GPU, "is_fsdp2": False, "parallelism_config": None}
    state |= {"num_processes": 1, "mixed_precision": "bf16"} | launch
    plugin = types.SimpleNamespace(mixed_precision_policy=None)
    launched = types.SimpleNamespace(**state, state=types.SimpleNamespace(fsdp_plugin=plugin))
    monkeypatch.setattr(trainer, "Accelerator", lambda **_: launched)
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(model="m", dataset="d", output_dir="o", objective="dpo", **options))


def test_sharded_adapters(inputs: dict[str, str], tmp_path: Path) -> None:
    """Saved without their base, and merged, as by processes that are not sharded."""
    options = {"model": inputs["model"], "dataset": inputs["dataset"], "objective": "dpo", "max_steps": 2}
    options |= {"use_peft": True, "merge_adapter": True, "learning_rate": 1e-2, "per_device_train_batch_size": 1}
    for name in ("sharded", "whole"):
        run_options = options | {"output_dir": str(tmp_path / name)}
        assert tiny.in_two_processes(tiny.train_in_child, run_options, sharded=name == "sharded") == [0, 0]
    for file in ("adapter_model.safetensors", f"{trainer.MERGED}/model.safetensors"):
        found, expected = (tiny.read_weights(tmp_path / name, file) for name in ("sharded", "whole"))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name])


def train_until_one_is_interrupted(options: dict[str, Any]) -> None:
    """In a process of its own, of which that of rank 1 gets a signal in the second step, and both have to stop."""
    step = trainer.Loop._train_step

    def interrupted(loop: trainer.Loop, batch: list[int]) -> Tensor:
        if loop.step == 1 and os.environ["RANK"] == "1":
            for _ in range(2):  # as the terminal's and the launcher's
                os.kill(os.getpid(), signal.SIGINT)
        return step(loop, batch)

    trainer.Loop._train_step = interrupted  # type: ignore[method-assign]
    with pytest.raises(trainer.Interrupted, match="stopped after step 2 of 4"):
        tiny.train_in_child(options)


def test_a_signal_to_one_process_stops_all_after_the_same_step(inputs: dict[str, str], tmp_path: Path) -> None:
    options = {"model": inputs["model"], "dataset": inputs["dataset"], "objective": "dpo", "max_steps": 4}
    options |= {"save_steps": 0, "output_dir": str(tmp_path / "out")}
    assert tiny.in_two_processes(train_until_one_is_interrupted, options) == [0, 0]
    saved = tmp_path / "out" / "checkpoint-2"
    assert {path.name for path in saved.glob("process-*.pt")} == {"process-0.pt", "process-1.pt"}


def test_plan_visits_every_pair_once_an_epoch() -> None:
    config = TrainConfig(
        model="m", dataset="d", output_dir="o", objective="dpo", per_device_train_batch_size=2, num_train_epochs=2.5
    )
    plan = BatchPlan.of(config, pairs=7, processes=2)
    batches = list(plan.batches())
    assert [len(batch) for batch in batches] == [4, 3, 4, 3, 4]
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == list(range(7))
    assert batches[:2] != batches[2:4]
    assert list(plan.batches(3)) == batches[3:]


def test_evaluation_on_a_split_and_on_a_file(inputs: dict[str, str], tmp_path: Path) -> None:
    lines = run(inputs, tmp_path / "split", test_split_size=0.3, eval_steps=2, max_steps=3, logging_steps=2)
    assert [(line["step"], "eval_loss" in line) for line in lines] == [(2, False), (2, True), (3, False), (3, True)]
    held_out = tiny.make_pairs(tmp_path / "held-out.json", 4, seed=1)
    lines = run(inputs, tmp_path / "file", eval_dataset=held_out, max_steps=1, ref_model=inputs["other"])
    options = {"model": str(tmp_path / "file"), "ref_model": inputs["other"], "dataset": held_out, "objective": "dpo"}
    losses = dpo_truth(options | {"per_device_train_batch_size": 4})
    assert lines[-1]["eval_loss"] == pytest.approx(sum(losses.values()) / 4, rel=1e-5)


def test_evaluation_data_has_a_split_of_its_own(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    held_out, both = tiny.make_pairs(tmp_path / "held-out.json", 4, seed=1), str(tmp_path / "both")
    splits = {"pairs": load_preferences(inputs["dataset"]), "held": load_preferences(held_out)}
    datasets.DatasetDict(splits).save_to_disk(both)
    options = {"ref_model": inputs["other"], "max_steps": 1}
    expected = run(inputs, tmp_path / "files", eval_dataset=held_out, **options)
    options |= {"dataset": both, "dataset_split": "pairs", "eval_dataset": both, "eval_split": "held"}
    assert run(inputs, tmp_path / "splits", **options) == expected
    run(inputs, tmp_path / "files", **options)  # the run is known by its data
    assert "nothing to do" in capsys.readouterr().out


DROPOUT: dict[str, dict[str, Any]] = {
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5, "parallel_attn": False},
    "starcoder2": {"residual_dropout": 0.5, "embedding_dropout": 0.5, "attention_dropout": 0.5},
    "gpt_bigcode": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
}


@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_is_off_wherever_a_family_keeps_it(family: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(family, **sizes, **DROPOUT[family])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    options = {"model": str(tmp_path), "dataset": "d", "output_dir": "o", "objective": "dpo"}
    ids = torch.arange(3, 15)[None]
    for off in (False, True):
        policy = trainer._build_policy(TrainConfig(**options, disable_dropout=off), None).train()
        assert torch.equal(policy(ids).logits, policy(ids).logits) == off
    assert {name: getattr(policy.config, name) for name in DROPOUT[family]} == DROPOUT[family]


def test_the_clock_counts_the_wait_for_the_device(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_await_device", lambda: time.sleep(0.3))
    run(inputs, tmp_path / "out", max_steps=2)
    assert all(line["seconds"] > 0.3 for line in tiny.read_metrics(tmp_path / "out", timings=True))


def test_a_run_without_a_step_may_be_changed(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a lack of memory in the first step: what was scored is used again."""

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    options = {"ref_model": inputs["other"]}
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Loop, "_train_step", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            run(inputs, tmp_path / "out", **options)
    monkeypatch.setattr(frozen, "load_model", out_of_memory)
    assert len(run(inputs, tmp_path / "out", **options, per_device_train_batch_size=1)) == 10
    with pytest.raises(ValueError, match=r"per_device_train_batch_size: 1 there, 2 now(.|\n)*with logprobs_dir"):
        run(inputs, tmp_path / "out", **options)


def test_adapter_and_merged_model(inputs: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = {"use_peft": True, "lora_r": 2, "learning_rate": 1e-2, "max_steps": 3}
    lines = run(inputs, output, **options, merge_adapter=True, lora_target_modules=["all-linear"])
    assert lines[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)  # the base is the reference
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        adapted, merged, base = (
            load_model(str(path))(ids).logits for path in (output, output / "merged", inputs["model"])
        )
    assert relative_error(merged, adapted) < 1e-5 < relative_error(base, adapted)
    run(inputs, tmp_path / "later", **options)
    assert not (tmp_path / "later" / "merged").exists()
    run(inputs, tmp_path / "later", **options, merge_adapter=True)
    found, expected = (tiny.read_weights(folder / "merged") for folder in (tmp_path / "later", output))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_is_trained_on(inputs: dict[str, str], tmp_path: Path) -> None:
    """From itself, which is the reference too; the base stays what it is."""
    options = {"use_peft": True, "learning_rate": 1e-2, "max_steps": 2}
    run(inputs, tmp_path / "first", **options, lora_r=2)
    adapter = inputs | {"model": str(tmp_path / "first")}
    lines = run(adapter, tmp_path / "next", **options, save_steps=1, merge_adapter=True)
    assert lines[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6) != lines[1]["rewards/margins"]
    before, after = (tiny.read_weights(tmp_path / name, "adapter_model.safetensors") for name in ("first", "next"))
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "next" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (inputs["model"], 2)
    ids = torch.arange(2, 12)[None]
    adapted, merged = (load_model(str(tmp_path / name))(ids).logits for name in ("next", "next/merged"))
    assert relative_error(merged, adapted) < 1e-5

    for path in [*(tmp_path / "next").iterdir()]:  # as a kill after the first step's checkpoint leaves it
        if path.name == "run.json":
            path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
        elif path.is_file():
            path.unlink()
    run(adapter, tmp_path / "next", **options, save_steps=1, merge_adapter=True)
    again = tiny.read_weights(tmp_path / "next", "adapter_model.safetensors")
    assert all(torch.equal(again[name], after[name]) for name in after)
    with pytest.raises(ValueError, match="is a PEFT adapter: use_peft trains it on"):
        run(adapter, tmp_path / "other")
    with pytest.raises(ValueError, match=r"leave out lora_r: model .* is an adapter, which has its own"):
        run(adapter, tmp_path / "other", use_peft=True, lora_r=8)
    assert not (tmp_path / "other").exists()


def test_gradient_checkpointing_and_low_precision(inputs: dict[str, str], tmp_path: Path) -> None:
    plain = run(inputs, tmp_path / "plain", max_steps=2, learning_rate=1e-3)
    recomputed = run(inputs, tmp_path / "recomputed", max_steps=2, learning_rate=1e-3, gradient_checkpointing=True)
    half = run(inputs, tmp_path / "bf16", max_steps=2, learning_rate=1e-3, dtype="bfloat16")
    assert recomputed == plain
    assert half[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.02)
    assert tiny.read_weights(tmp_path / "bf16")["model.norm.weight"].dtype == torch.bfloat16


def test_stores_are_reused_and_given(inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = str(tmp_path / "store")
    assert main(["score", "--model", inputs["other"], "--dataset", inputs["dataset"], "--out", store]) == 0
    expected = run(inputs, tmp_path / "model", ref_model=inputs["other"], logprobs_dir=str(tmp_path / "logprobs"))
    loaded: list[str] = []

    def record(source: str, *arguments: Any) -> Any:
        loaded.append(source)
        return load_model(source, *arguments)

    monkeypatch.setattr(trainer, "load_model", record)
    monkeypatch.setattr(frozen, "load_model", record)
    again = run(inputs, tmp_path / "again", ref_model=inputs["other"], logprobs_dir=str(tmp_path / "logprobs"))
    assert loaded == [inputs["model"]]
    computed = {"ref_model": inputs["other"], "logprobs_dir": str(tmp_path / "logprobs"), "backend": "reference"}
    run(inputs, tmp_path / "computed otherwise", **computed)
    assert loaded[1:] == [inputs["other"], inputs["model"]]
    given = run(inputs, tmp_path / "given", ref_logprobs=store)
    assert loaded[3:] == [inputs["model"]] and again == expected
    for line, other in zip(given, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-6)

    score = ["score", "--dataset", inputs["dataset"], "--responses", "chosen", "--model", inputs["third"]]
    assert main([*score, "--out", str(tmp_path / "chosen")]) == 0
    weak = {"weak_aligned_logprobs": str(tmp_path / "chosen"), "weak_ref_model": inputs["other"]}
    with pytest.raises(ValueError, match="of the same responses, found ref_logprobs chosen, rejected; weak_aligned_"):
        run(inputs, tmp_path / "x", objective="wspo", ref_logprobs=store, **weak)
    with pytest.raises(ValueError, match="was made from something else, it differs in data"):
        run(
            inputs | {"dataset": tiny.make_pairs(tmp_path / "other.json", 10, seed=5)},
            tmp_path / "x",
            ref_logprobs=store,
        )
    with pytest.raises(ValueError, match=r"differs in .*truncation"):
        run(inputs, tmp_path / "x", ref_logprobs=store, max_length=512)
    with pytest.raises(FileNotFoundError, match="holds no log-prob store"):
        run(inputs, tmp_path / "x", ref_logprobs=str(tmp_path))
    assert not (tmp_path / "x").exists()


def test_policy_is_the_only_model_in_memory(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref] = []

    def record(*arguments: Any) -> Any:
        assert not any(reference() for reference in models)
        model = load_model(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(frozen, "load_model", record)
    build = trainer._build_policy

    def check(*arguments: Any) -> Any:
        assert len(models) == 3 and not any(reference() for reference in models)
        return build(*arguments)

    monkeypatch.setattr(trainer, "_build_policy", check)
    weak = {"weak_aligned_model": inputs["other"], "weak_ref_model": inputs["third"]}
    run(inputs, tmp_path / "out", objective="wspo", max_steps=1, **weak)


def test_same_run_again_says_it_is_finished(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = run(inputs, tmp_path / "out", max_steps=2)
    assert run(inputs, tmp_path / "out", max_steps=2) == lines
    assert "finished after 2 steps: nothing to do" in capsys.readouterr().out
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match=r"max_steps: 2 there, 3 now"):
        run(inputs, tmp_path / "out", max_steps=3)
    with pytest.raises(ValueError, match=r"holds another run, which differs in\n  model: "):
        run(inputs | {"model": inputs["other"]}, tmp_path / "out", max_steps=2)
    with pytest.raises(ValueError, match=r"differs in\n  data: "):
        run(inputs | {"dataset": tiny.make_pairs(tmp_path / "p.json", 10, seed=5)}, tmp_path / "out", max_steps=2)
    assert before == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_interrupt_leaves_a_checkpoint(inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_steps": 4, "learning_rate": 1e-3}
    whole = run(inputs, tmp_path / "whole", **options)
    step = trainer.Loop._train_step

    def interrupted(loop: trainer.Loop, batch: list[int]) -> Tensor:
        if loop.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(loop, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Loop, "_train_step", interrupted)
        with pytest.raises(trainer.Interrupted, match="stopped after step 2 of 4; the same command goes on"):
            run(inputs, tmp_path / "out", **options)
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert run(inputs, tmp_path / "out", **options) == whole


def test_nan_stops_the_run(inputs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step|a gradient up to step \d is not finite"):
        run(inputs, tmp_path / "out", learning_rate=1e30, max_steps=3, max_grad_norm=0.0)


@pytest.mark.parametrize("at", [2, 3])
def test_a_gradient_that_is_not_finite_is_never_saved(
    at: int, inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite; the last checkpoint before stays, and so it is at the last step."""
    forward = trainer.Loop._forward

    def spiked(loop: trainer.Loop, *operands: Any) -> Any:
        loss, metrics, stats = forward(loop, *operands)
        if loop.step == at:
            loss = loss + (loss - loss.detach()).abs().sqrt()  # adds 0, of infinite slope
        return loss, metrics, stats

    options = {"max_steps": 4, "save_steps": 1, "save_total_limit": 1, "logging_steps": 10}
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Loop, "_forward", spiked)
        with pytest.raises(FloatingPointError, match=f"a gradient up to step {at + 1} is not finite"):
            run(inputs, tmp_path / "out", **options)
    (last,) = (tmp_path / "out").glob("checkpoint-*")
    assert last.name == f"checkpoint-{at}"
    assert all(weight.isfinite().all() for weight in tiny.read_weights(last).values())
    assert run(inputs, tmp_path / "out", **options)[-1]["step"] == 4


@pytest.mark.parametrize("options", [{"max_steps": 1}, {"max_steps": 2, "save_steps": 1}], ids=["last", "checkpoint"])
def test_a_weight_that_is_not_finite_is_never_saved(
    options: dict[str, Any], inputs: dict[str, str], tmp_path: Path
) -> None:
    """The gradient is finite, the update is not."""
    with pytest.raises(FloatingPointError, match="a weight is not finite after step 1"):
        run(inputs, tmp_path / "out", learning_rate=1e38, **options)
    assert not [*(tmp_path / "out").glob("checkpoint-*"), *(tmp_path / "out").glob("*.safetensors")]


def test_a_folder_has_one_run_at_a_time(inputs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with checkpoint.locked(tmp_path / "out", "training in"):
        with pytest.raises(RuntimeError, match=r"another process is training in .*out: wait for it, or use another"):
            run(inputs, tmp_path / "out", max_steps=1)
        assert not list((tmp_path / "out").iterdir())
    assert run(inputs, tmp_path / "out", max_steps=1)


def test_folders_of_the_finished_model_are_published_again(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer of several chat templates has a folder of them, there already where a kill came late."""
    model = shutil.copytree(inputs["model"], tmp_path / "model")
    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(model)
    options = {"max_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(trainer.checkpoint, "mark_finished", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(inputs | {"model": str(model)}, tmp_path / "out", **options)
    assert (tmp_path / "out" / "additional_chat_templates").is_dir()
    run(inputs | {"model": str(model)}, tmp_path / "out", **options)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_what_fails_after_training_is_made_up_for_without_it(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 1, "use_peft": True, "merge_adapter": True, "output": tmp_path / "out"}
    drawn: list[Path] = []
    for broken in ("_save_merged", "draw_curves"):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, broken, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(inputs, **options)
        monkeypatch.setattr(trainer.Loop, "_train_step", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(trainer, "draw_curves", lambda output_dir, title: drawn.append(output_dir))
    run(inputs, **options)
    assert (tmp_path / "out" / trainer.MERGED / "model.safetensors").is_file() and drawn == [tmp_path / "out"]


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "out" / "thesis.partial"

    def full(state: dict[str, Any], path: Path) -> None:
        foreign.touch()
        raise RuntimeError("unexpected pos 4608 vs 4502")  # what torch.save says of a full disk

    monkeypatch.setattr(trainer.torch, "save", full)
    with pytest.raises(RuntimeError, match=r"checkpoint-1 could not be written, and is not there: unexpected pos"):
        run(inputs, tmp_path / "out", max_steps=2, save_steps=1)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    monkeypatch.undo()
    run(inputs, tmp_path / "out", max_steps=2, save_steps=1)
    assert foreign.is_file()  # nobody's business


@pytest.mark.parametrize("adapters", [False, True])
def test_what_text_does_not_go_through_stays(adapters: bool, tmp_path: Path) -> None:
    """Of a multimodal model; DistributedDataParallel would wait for its gradients."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 40, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    options = {"model": str(tmp_path), "dataset": "d", "output_dir": "o", "objective": "dpo", "use_peft": adapters}
    policy = trainer._build_policy(TrainConfig(**options), None)
    policy(torch.arange(3, 15)[None]).logits.sum().backward()
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert any("language_model" in name for name in trained) and not any("vision" in name for name in trained)


def test_training_in_16_bits_is_remarked_on(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for peft in (False, True):  # adapters are kept in float32
        run(inputs, tmp_path / str(peft), max_steps=1, dtype="bfloat16", use_peft=peft)
        assert ("weights in torch.bfloat16 lose updates" in capsys.readouterr().out) != peft


def test_tensorboard_and_curves(inputs: dict[str, str], tmp_path: Path) -> None:
    run(inputs, tmp_path / "out", max_steps=2, report_to="tensorboard")
    assert list((tmp_path / "out" / "tensorboard").iterdir())
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_missing_tensorboard_is_found_first(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError) as error:
        run(inputs, tmp_path / "out", report_to="tensorboard", ref_model=inputs["other"])
    assert error.value.name == "tensorboard" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "ppo"}, r"objective must be one of wpo, wspo, dpo, .*; found 'ppo'"),
        ({"objective": "wpo", "loss_type": "ppo"}, r"loss_type must be one of sigmoid, .*; found 'ppo'"),
        ({"objective": "wpo", "alignment": "best"}, r"alignment must be one of sampled, greedy, none; found 'best'"),
        ({"loss_type": "ipo"}, r"objective dpo makes no use of loss_type: .*name it as the objective"),
        ({"gamma": 0.2}, r"objective dpo makes no use of gamma"),
        ({"weak_ref_model": "m"}, r"objective dpo makes no use of weak_ref_model"),
        ({"objective": "hinge", "label_smoothing": 0.1}, r"hinge makes no use of label_smoothing"),
        ({"objective": "wspo", "beta": 0.2}, r"wspo makes no use of beta"),
        ({"objective": "wspo", "weak_ref_model": "m"}, r"wspo needs weak_aligned_model or weak_aligned_logprobs"),
        ({"objective": "simpo", "ref_model": "m"}, r"simpo is reference-free: leave out ref_model"),
        ({"ref_model": "m", "ref_logprobs": "s"}, r"ref_model or ref_logprobs, not both"),
        ({"eval_dataset": "d", "ref_logprobs": "s"}, r"eval_dataset needs ref_model"),
        ({"max_steps": 0}, r"max_steps or num_train_epochs must be positive, found 0"),
        ({"per_device_train_batch_size": 0}, r"per_device_train_batch_size must be at least 1, found 0"),
        ({"learning_rate": math.inf}, "learning_rate must be finite, found inf"),
        ({"num_train_epochs": math.inf}, "num_train_epochs must be finite, found inf"),
        ({"seed": -1}, r"seed must be in \[0, 2³²\), found -1"),
        ({"use_peft": True, "lora_alpha": 0}, "lora_alpha must be positive, found 0"),
        ({"warmup_ratio": 2.0}, r"warmup_ratio must be in \[0, 1\], found 2.0"),
        ({"test_split_size": 1.0}, r"test_split_size must be in \(0, 1\)"),
        ({"eval_steps": 5}, r"eval_steps needs eval_dataset or test_split_size"),
        ({"grad_tolerance": "tight"}, r"grad_tolerance must be 'auto', a number in \[0, 1\).*found 'tight'"),
        ({"bf16": True, "fp16": True}, r"bf16 or fp16, not both"),
        ({"merge_adapter": True}, r"merge_adapter needs use_peft"),
        ({"lora_r": 4, "lora_target_modules": ["q_proj"]}, r"lora_r, lora_target_modules needs use_peft"),
        ({"eval_split": "test"}, r"eval_split needs eval_dataset"),
        ({"adam_beta1": 1.5}, r"adam_beta1 must be in \[0, 1\), found 1.5"),
        ({"use_peft": True, "lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), found 1.0"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "constant has no warm-up, constant_with_warmup has"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"model": "m", "dataset": "d", "output_dir": "o", "objective": "dpo"} | options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"beta": 0.0}, ValueError, r"beta must be in \(0, inf\), found 0"),
        ({"objective": "robust", "label_smoothing": 0.6}, ValueError, r"label_smoothing must be in \[0, 0.5\)"),
        ({"lr_scheduler_type": "steep"}, ValueError, "lr_scheduler_type must, .* one of linear, cosine, .*'steep'"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, ValueError, "at learning_rate 1e-08, .*'poly"),
        ({"model": "no/such/folder"}, FileNotFoundError, "no/such/folder"),
        ({"ref_model": "no/such/folder"}, FileNotFoundError, "no/such/folder"),
        ({"dataset": "pairs.csv.json"}, FileNotFoundError, "pairs.csv.json"),
        ({"test_split_size": 0.99}, ValueError, "leaves none of 10 pairs for training"),
        ({"use_peft": True, "lora_target_modules": ["q"]}, ValueError, r"lora_target_modules \['q'\]: .*not found"),
        (
            {"use_peft": True, "lora_target_modules": ["q_proj", "lm_head"], "merge_adapter": True},
            ValueError,
            "to which it is tied",
        ),
    ],
)
def test_bad_input_leaves_nothing_behind(
    inputs: dict[str, str], tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(inputs, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_choices_are_those_of_the_library() -> None:
    sides = DataOptions.__dataclass_fields__["truncation_side"].type
    assert all(side in str(sides) for side in TRUNCATION_SIDES)


def test_real_model_first_steps(real_model: str, real_data: str, tmp_path: Path) -> None:
    """Loss and weights of WPO and WSPO on real text against float64 from full logits."""
    common = {"dataset": real_data, "max_length": 256, "max_steps": 1, "save_steps": 0}
    moved = common | {"model": real_model, "objective": "wpo", "learning_rate": 1e-4, "output_dir": str(tmp_path / "a")}
    train(TrainConfig(**moved))
    options = {"dataset": real_data, "max_length": 256, "model": str(tmp_path / "a"), "ref_model": real_model}
    wpo = options | {"objective": "wpo"}
    train(TrainConfig(**wpo, max_steps=1, save_steps=0, output_dir=str(tmp_path / "wpo")))
    assert_close(tiny.read_metrics(tmp_path / "wpo")[0], wpo_truth(wpo, 0.1), 1e-4)
    wspo = options | {"objective": "wspo", "weak_aligned_model": str(tmp_path / "a"), "weak_ref_model": real_model}
    train(TrainConfig(**wspo, max_steps=1, save_steps=0, output_dir=str(tmp_path / "wspo")))
    assert_close(tiny.read_metrics(tmp_path / "wspo")[0], {"loss": wspo_truth(wspo, 0.1, "token")}, 1e-4)
