"""The command: help, options from YAML and flags, exit statuses, and messages in place of tracebacks."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch

from prefopt_fast import cli
from prefopt_fast.cli import main, parse
from prefopt_fast.config import ScoreConfig, TrainConfig
from prefopt_fast.scoring import LogprobStore

REQUIRED = ["--model", "m", "--dataset", "d", "--objective", "dpo", "--output-dir", "o"]


def parsed(*arguments: str) -> TrainConfig:
    return parse(TrainConfig, "prefopt-fast train", arguments)


def test_help_names_every_command(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n  {command} ") == 2 for command in cli.COMMANDS)


def test_help_needs_no_extra() -> None:
    """In a process of its own, through the module: neither help nor version imports transformers."""
    program = (
        "import sys; from prefopt_fast.cli import main; "
        "assert main(['--help']) == main(['--version']) == 0; assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: prefopt-fast COMMAND")


def test_train_help_lists_every_option_once(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    options = [line[0].replace("[no-]", "") for line in lines if line and line[0].startswith("--")]
    names = [option.lstrip("-").replace("-", "_") for option in options]
    assert sorted(names) == sorted(["config", *(field.name for field in dataclasses.fields(TrainConfig))])


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "objective: wpo\nmodel: there\ndataset: d\noutput_dir: o\nlearning_rate: 1e-5\nclamp: false\n"
        "beta: 0.01\nlora_target_modules: [q_proj, v_proj]\nuse_peft: true\neval_steps: null\nmax_steps: -1\n"
    )
    config = parsed("--model", "here", "--config", str(file), "--beta=0.02", "--bf16")
    assert (config.model, config.beta, config.bf16) == ("here", 0.02, True)
    assert (config.learning_rate, config.clamp, config.eval_steps) == (1e-5, False, None)
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert parsed("--config", str(file), "--clamp").clamp is True


def test_both_spellings_and_switches() -> None:
    config = parsed(*REQUIRED, "--max_length", "7", "--no-disable-dropout", "--grad-tolerance", "0.004,0.001")
    assert (config.max_length, config.disable_dropout) == (7, False)
    assert config.head_tolerance == (0.004, 0.001)


@pytest.mark.parametrize(
    "content, message",
    [
        ("learning_rte: 1\n", r"config .*file.yaml has unknown options learning_rte \(did you mean learning_rate\?\)"),
        ("- 1\n", r"must be a mapping of options, found list"),
        ("a: [\n", r"is not YAML"),
        ("max_steps: 3\nmax-steps: 1\n", r"has max_steps twice"),
    ],
)
def test_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture, content: str, message: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(content)
    assert main(["train", "--config", str(file)]) == 1
    assert_error(capsys, message)
    assert main(["train", "--config", str(file), "--config", str(file)]) == 1
    assert_error(capsys, "config must be one file, found ")


def test_help_on_a_console_without_its_characters() -> None:
    command = [sys.executable, "-m", "prefopt_fast", "train", "--help"]
    subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)


def test_a_launcher_without_an_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """torchrun starts processes that Accelerate does not join on CPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", *REQUIRED]) == 1
    assert_error(capsys, r"the launcher started 2 processes .* Accelerate sees 1: each would train alone")
    assert main(["score", "--model", "m", "--dataset", "d", "--out", str(tmp_path / "store")]) == 1
    assert_error(capsys, "score runs in one process")


def test_a_file_has_the_spelling_of_flags(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("learning-rate: 1.0e-3\nmax_length: 9\n")
    config = parsed(*REQUIRED, "--config", str(tmp_path / "file.yaml"))
    assert (config.learning_rate, config.max_length) == (1e-3, 9)


def test_missing_file(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", *REQUIRED, "--config", "no.yaml"]) == 1
    assert_error(capsys, r"config no.yaml does not exist")


def test_wrong_flags(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file.yaml").write_text("max_steps: many\n")
    assert parse(TrainConfig, "train", [*REQUIRED, "--output-dir=~/out"]).output_dir == f"{Path.home()}/out"
    for arguments, message in (
        (["--learning-rte", "1"], r"unknown --learning-rte, 1 \(did you mean learning_rate\?\)"),
        (["--level", "word"], r"invalid choice: 'word'"),
        (["--config", str(tmp_path / "file.yaml")], r"--max[-_]steps: invalid int value: 'many'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["train", *REQUIRED, *arguments])
        assert stopped.value.code == 2
        assert_error(capsys, message)


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["trian"]) == 2
    assert_error(capsys, r"command must be one of train, score, demo, bench; found 'trian'")
    output = tmp_path / "out"
    arguments = ["train", "--model", "./none", "--dataset", "d", "--objective", "dpo", "--output-dir", str(output)]
    assert main(arguments) == 1
    assert_error(capsys, r"\./none does not exist")
    assert not output.exists()
    assert main([*arguments, "--gamma", "1"]) == 1
    assert_error(capsys, r"objective dpo makes no use of gamma")
    (tmp_path / "file").touch()
    assert main([*arguments, "--config", str(tmp_path / "file" / "x")]) == 1
    assert_error(capsys, rf"{tmp_path}/file/x: Not a directory")


def test_errors_from_elsewhere_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "train", lambda _: int("a defect"))  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="a defect"):
        main(["train"])


def test_defects_of_the_package_keep_their_traceback(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Only what a raise statement says is meant for users."""
    model, pairs = tiny.make_model(tmp_path / "model"), tiny.make_pairs(tmp_path / "pairs.json", 2)
    output = tmp_path / "out"
    output.mkdir()
    (output / "run.json").write_text("{}")
    arguments = ["--model", model, "--dataset", pairs, "--objective", "dpo", "--output-dir", str(output)]
    with pytest.raises(KeyError, match="identity"):
        main(["train", *arguments])


def test_missing_extra_and_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def needs_more(arguments: Sequence[str]) -> int:
        raise ModuleNotFoundError(f"No module named '{arguments[0]}'", name=arguments[0])

    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", needs_more)
    for module, message in (
        ("peft", r"peft is not installed: in the checkout, pip install -c constraints.txt -e '.\[train\]'"),
        ("tensorboard", r"tensorboard is not installed: .* -e '.\[tensorboard\]'"),
        ("pytest", r"pytest is not installed: .* -e '.\[bench\]'"),
        ("torch.utils.nothing", r"torch.utils.nothing is not installed$"),
    ):
        assert main(["train", module]) == 1
        assert_error(capsys, message)
    monkeypatch.setitem(cli.COMMANDS, "train", interrupted)
    assert main(["train"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_bench_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "prefopt_fast" / "cli.py"))
    assert main(["bench"]) == 1
    assert_error(capsys, r"clone the repository and install it")


def test_score_then_train_from_the_command_line(tmp_path: Path) -> None:
    """The one test through the installed module and a process of its own."""
    model, pairs = tiny.make_model(tmp_path / "model"), tiny.make_pairs(tmp_path / "pairs.json", 4)
    store, output = tmp_path / "store", tmp_path / "out"
    assert main(["score", "--model", model, "--dataset", pairs, "--out", str(store), "--responses", "chosen"]) == 0
    command = [sys.executable, "-m", "prefopt_fast", "train", "--objective", "wspo", "--model", model]
    command += ["--dataset", pairs, "--output-dir", str(output), "--max-steps", "2"]
    command += [f"--{name}-logprobs={store}" for name in ("ref", "weak-aligned", "weak-ref")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"model in {output}" in done.stdout and "residual" in done.stderr
    lines = tiny.read_metrics(output)
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["loss"] == pytest.approx(0.0, abs=1e-10)
    assert json.loads((output / "run.json").read_text())["finished"] is True


def test_score_options() -> None:
    config = parse(ScoreConfig, "prefopt-fast score", ["--model", "m", "--dataset", "d", "--out", "o"])
    assert (config.responses, config.batch_size, config.max_length) == (["chosen", "rejected"], 8, 1024)


@pytest.mark.parametrize("bf16_gpu", [False, True])
def test_score_computes_in_the_precision_of_train(monkeypatch: pytest.MonkeyPatch, bf16_gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # torch says yes of every GPU if it may emulate.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16_gpu or including_emulation
    )
    common = {"model": "m", "dataset": "d"}
    for options in ({}, {"bf16": True}, {"bf16": False}, {"fp16": True}):
        both = (
            ScoreConfig(**common, **options, out="o"),
            TrainConfig(**common, **options, objective="dpo", output_dir="o"),
        )
        expected = "fp16" if options.get("fp16") else "bf16" if options.get("bf16", bf16_gpu) else "no"
        assert [config.mixed_precision for config in both] == [expected] * 2
    with pytest.raises(ValueError, match="bf16 or fp16, not both"):
        ScoreConfig(**common, out="o", bf16=True, fp16=True)


def test_a_store_of_another_dtype_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, pairs = tiny.make_model(tmp_path / "model"), tiny.make_pairs(tmp_path / "pairs.json", 4)
    data = ["--model", model, "--dataset", pairs]
    train = ["train", *data, "--objective", "dpo", "--max-steps", "1"]
    for dtype, flags in (("bfloat16", ["--bf16"]), ("float32", [])):
        store = str(tmp_path / dtype)
        assert main(["score", *data, "--out", store, *flags]) == 0
        assert LogprobStore.open(store).settings["dtype"] == dtype
        capsys.readouterr()
        assert main([*train, "--ref-logprobs", store, "--output-dir", str(tmp_path / f"out-{dtype}")]) == 0
        note = f"ref_logprobs {store} was computed in {dtype}, and this run computes in float32"
        assert (note in capsys.readouterr().out) == (dtype == "bfloat16")


def assert_error(capsys: pytest.CaptureFixture, message: str) -> None:
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and re.search(message, errors[0]), errors
