"""The ``prefopt-fast`` command. Its options are the dataclasses of config.py, from ``--config file.yaml`` and flags."""

from __future__ import annotations

import argparse
import difflib
import dis
import io
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

USAGE = """\
usage: prefopt-fast COMMAND [options]

Align language models with WPO, WSPO and the DPO family.

commands:
  train    train a policy on preference pairs
  score    store the per-token log-probs of a frozen model, for train to reuse
  demo     run the weak-to-strong experiment on generated data
  bench    measure against other implementations (from a checkout of the repository)

prefopt-fast COMMAND --help shows a command's options; --version the version.
"""

# pyproject.toml's, by the modules that a command may lack.
_EXTRAS = {
    "train": ("transformers", "accelerate", "datasets", "peft", "safetensors", "numpy", "yaml", "tqdm", "matplotlib"),
    "tensorboard": ("tensorboard",),
    "triton": ("triton",),
    "flash": ("flash_attn",),
    "bench": ("pytest",),
}

Config = TypeVar("Config")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for an error, 2 for wrong usage, 130 for an interrupt."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # help has ≤ and β, which not every console can show
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        from . import __version__

        print(f"prefopt-fast {__version__}")
        return 0
    if command not in COMMANDS:
        return _fail(f"command must be one of {', '.join(COMMANDS)}; found {command!r}", 2)
    try:
        return COMMANDS[command](rest)
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'stopped; the same command goes on from what is done'}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        extra = next((name for name, modules in _EXTRAS.items() if (error.name or "").split(".")[0] in modules), None)
        how = "" if extra is None else f": in the checkout, pip install -c constraints.txt -e '.[{extra}]'"
        return _fail(f"{error.name or error} is not installed{how}", 1)
    except Exception as error:
        if isinstance(error, OSError) and error.filename and error.strerror:  # the system's
            return _fail(f"{error.filename}: {error.strerror}", 1)
        if not _raised_here(error):
            raise
        return _fail(str(error), 1)


def _raised_here(error: Exception) -> bool:
    """Whether a raise statement of this package made the error, and so its message says what is to be done."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith(__package__):
        return False
    # Neither what an operation of ours raised, such as a look-up, nor an assertion: those are defects, to be reported
    # with their traceback.
    return (
        not isinstance(error, AssertionError)
        and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    )


def _fail(message: str, status: int) -> int:
    print(f"prefopt-fast: error: {message}", file=sys.stderr)
    return status


def train(arguments: Sequence[str]) -> int:
    from .config import TrainConfig

    config = parse(TrainConfig, "prefopt-fast train", arguments)
    _quiet_libraries()
    from .trainer import train

    train(config)
    return 0


def score(arguments: Sequence[str]) -> int:
    from .config import ScoreConfig

    config = parse(ScoreConfig, "prefopt-fast score", arguments)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("score runs in one process: train scores its frozen models in all that it has")
    _quiet_libraries()
    import torch

    from .batch import encode, load_preferences
    from .policy import load_model, load_tokenizer
    from .scoring import StoreKey
    from .scoring import score as write_store

    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    rows = load_preferences(config.dataset, config.dataset_split)
    encoded, report = encode(rows, tokenizer, config.max_length, config.truncation_side, config.responses)
    print(f"{config.dataset}: {report}")
    key = StoreKey.of(config.model, tokenizer, encoded, config.max_length, config.truncation_side)
    model = load_model(config.model, config.dtype, config.trust_remote_code, config.attn_implementation)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        store = write_store(
            model.to(device), encoded, key, config.out, config.batch_size, tokenizer.pad_token_id, config.backend
        )
    print(f"{len(store.rows)} rows in {config.out}")
    return 0


def demo(arguments: Sequence[str]) -> int:
    from .demo import main as run

    return run(list(arguments)) or 0


def bench(arguments: Sequence[str]) -> int:
    report = Path(__file__).resolve().parent.parent / "benchmarks" / "report.py"
    if not report.is_file():
        raise FileNotFoundError(
            f"bench runs benchmarks/report.py of the repository, and this installation has none ({report}): clone the "
            "repository and install it with pip install -e '.[bench]'"
        )
    sys.argv = [str(report), *arguments]
    sys.path.insert(0, str(report.parent))
    runpy.run_path(str(report), run_name="__main__")
    return 0


def _quiet_libraries() -> None:
    """No bars but our own: theirs, one per folder read or written, cut ours to pieces."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"train": train, "score": score, "demo": demo, "bench": bench}


def parse(config: type[Config], prog: str, arguments: Sequence[str]) -> Config:
    """``config`` from ``--config file.yaml`` and flags, which win; its base classes are the groups of the help.

    Raises:
        ValueError, FileNotFoundError: a YAML file that is missing, is no mapping, or has unknown keys; what ``config``
            raises. SystemExit: wrong flags, or --help.
    """
    from transformers import HfArgumentParser

    groups: Any = config.__bases__
    parser = HfArgumentParser(groups, prog=prog, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags win over it.")
    pre_parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    pre_parser.add_argument("--config", action="append", default=[])
    known, flags = pre_parser.parse_known_args(arguments)
    if len(known.config) > 1:
        raise ValueError(f"config must be one file, found {', '.join(known.config)}")
    names = [field.name for field in fields(config)]  # type: ignore[arg-type]
    from_file = [flag for path in known.config for flag in _flags_of_file(Path(path).expanduser(), names)]
    *parts, _, unknown = parser.parse_args_into_dataclasses(
        [*from_file, *flags], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}{_suggestion(unknown[0], names)}")
    options = {name: value for part in parts for name, value in vars(part).items()}
    # Which the shell leaves alone after "=", and nobody expands in a file.
    home = {n: os.path.expanduser(v) for n, v in options.items() if isinstance(v, str) and v.startswith("~")}
    return config(**options | home)


def _flags_of_file(path: Path, names: list[str]) -> list[str]:
    """The file's options as flags: then types, choices and errors are those of flags."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        root, content = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"config {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"config {path} must be a mapping of options, found {type(content).__name__}")
    given = [str(key.value).replace("-", "_") for key, _ in root.value]
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise ValueError(f"config {path} has {', '.join(twice)} twice")
    content = {str(name).replace("-", "_"): value for name, value in content.items()}
    if unknown := [name for name in content if name not in names]:
        raise ValueError(f"config {path} has unknown options {', '.join(unknown)}{_suggestion(unknown[0], names)}")
    flags: list[str] = []
    for name, value in content.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def _suggestion(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), names, 1)
    return f" (did you mean {close[0]}?)" if close else ""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option, and no default of None: where there is a rule instead, the help states it."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def add_argument(self, action: argparse.Action) -> None:
        if not any(option.startswith("--no_") for option in action.option_strings):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        option = action.option_strings[-1]  # the spelling with hyphens
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{option.replace('--', '--[no-]', 1) if action.default is True else option} {values}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.required:
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.choices is not None:
            return "{" + ",".join(map(str, action.choices)) + "}"
        kind: Any = action.type
        return {int: "INT", float: "FLOAT", str: "TEXT"}.get(kind, "BOOL")

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        required = " ".join(self._format_action_invocation(action) for action in actions if action.required)
        return f"usage: {self._prog} {required} [options]\n\n"
