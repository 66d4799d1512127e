"""What a kill leaves behind, and what a run makes of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import tiny
import torch

from prefopt_fast import checkpoint


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"model": tiny.make_model(folder / "model"), "dataset": tiny.make_pairs(folder / "pairs.json", 10)}


def run(*arguments: object) -> int | None:
    child = tiny.children().Process(target=tiny.train_in_child, args=arguments)
    child.start()
    child.join(120)
    return child.exitcode


KILLS = [
    ("scoring", 2),
    ("step", 2),  # before the first checkpoint
    ("metrics", 1),  # a step is logged, its checkpoint not begun
    ("weights written", 1),  # the first file of a checkpoint
    ("weights written", 2),  # weights are there, optimizer and scheduler not
    ("checkpoint written", 2),  # complete but not renamed (the first call publishes metrics.jsonl)
    ("checkpoint renamed", 2),  # before old ones are removed (the first call is the start's)
    ("step", 2),  # between two checkpoints
    ("finish", 1),  # the model is saved, the run not marked
]

# Where what is saved differs.
OF_ADAPTERS = [("step", 2), ("weights written", 2), ("checkpoint renamed", 2), ("finish", 1)]


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "wpo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 3},
        {
            "objective": "dpo",
            "use_peft": True,
            "lora_r": 2,
            "lora_dropout": 0.3,
            "test_split_size": 0.2,
            "eval_steps": 2,
        },
    ],
    ids=["full", "adapter"],
)
def test_killed_run_ends_as_one_never_killed(inputs: dict[str, str], tmp_path: Path, options: dict) -> None:
    options = inputs | options | {"learning_rate": 1e-2, "max_steps": 7, "save_steps": 2, "save_total_limit": 1}
    options |= {"per_device_eval_batch_size": 2, "warmup_ratio": 0.3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(options | {"output_dir": str(whole)}) == 0
    for kill in KILLS if options["objective"] == "wpo" else OF_ADAPTERS:
        assert run(options | {"output_dir": str(broken)}, kill) == -signal.SIGKILL, kill
    assert run(options | {"output_dir": str(broken)}) == 0

    name = "adapter_model.safetensors" if options.get("use_peft") else "model.safetensors"
    expected, found = tiny.read_weights(whole, name), tiny.read_weights(broken, name)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    assert tiny.read_metrics(whole) == tiny.read_metrics(broken)
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in broken.iterdir())
    assert checkpoint.latest_checkpoint(broken) == broken / "checkpoint-6"


def test_checkpoint_holds_no_code(inputs: dict[str, str], tmp_path: Path) -> None:
    options = inputs | {"objective": "dpo", "max_steps": 3, "save_steps": 2, "output_dir": str(tmp_path / "out")}
    assert run(options) == 0
    folder = checkpoint.latest_checkpoint(tmp_path / "out")
    assert folder is not None
    for file in folder.glob("*.pt"):
        torch.load(file, weights_only=True)
    assert {file.suffix for file in folder.iterdir()} <= {".json", ".safetensors", ".pt"}


def test_latest_checkpoint_is_by_number_and_ignores_unfinished(tmp_path: Path) -> None:
    assert checkpoint.latest_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.prefopt-partial", "checkpoint-final"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_prune_keeps_the_last(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "file").touch()
    (tmp_path / "final.prefopt-partial").mkdir()
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    checkpoint.prune(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 2


def test_claim_names_what_differs(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert checkpoint.claim(output, {"seed": 1, "beta": 0.1}) is False
    assert checkpoint.claim(output, {"seed": 1, "beta": 0.1}) is False
    (output / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"seed: 1 there, 2 now\nchoose another output_dir, or remove") as error:
        checkpoint.claim(output, {"seed": 2, "beta": 0.1})
    assert "beta" not in str(error.value)
    checkpoint.mark_finished(output)
    assert checkpoint.claim(output, {"seed": 1, "beta": 0.1}) is True


def test_claim_takes_over_what_has_not_trained(tmp_path: Path) -> None:
    stores, metrics, saved = (tmp_path / name for name in ("logprobs", "metrics.jsonl", "checkpoint-1"))
    assert checkpoint.claim(tmp_path, {"seed": 1}) is False
    stores.mkdir()
    metrics.touch()
    assert checkpoint.claim(tmp_path, {"seed": 2}) is False
    assert json.loads((tmp_path / "run.json").read_text())["identity"] == {"seed": 2}
    for keep, undo in (
        (lambda: metrics.write_text("{}\n"), lambda: metrics.write_text("")),
        (saved.mkdir, saved.rmdir),
        (lambda: checkpoint.mark_finished(tmp_path), lambda: None),
    ):
        keep()
        with pytest.raises(ValueError, match=rf"seed: 2 there, 3 now\n.*\(with logprobs_dir {stores} to use what"):
            checkpoint.claim(tmp_path, {"seed": 3})
        undo()
    assert checkpoint.claim(tmp_path, {"seed": 2}) is True and stores.is_dir()


def test_claim_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"thesis.tex is a file"):
        checkpoint.claim(tmp_path / "thesis.tex", {})
    with pytest.raises(ValueError, match=r"holds no run of prefopt-fast \(found thesis.tex\)"):
        checkpoint.claim(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_claim_after_a_kill_while_the_run_file_was_written(tmp_path: Path) -> None:
    (tmp_path / "run.json.prefopt-partial").write_text('{"ident')
    assert checkpoint.claim(tmp_path, {"seed": 1}) is False
    assert json.loads((tmp_path / "run.json").read_text())["identity"] == {"seed": 1}


def test_rng_state_round_trip(tmp_path: Path) -> None:
    import random

    torch.save(checkpoint.rng_state(), tmp_path / "rng.pt")
    expected = torch.rand(3), random.random()
    checkpoint.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
