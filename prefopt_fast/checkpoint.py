"""Checkpoints that exist whole or not at all, and the identity of the run that a folder holds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
LOGPROBS = "logprobs"  # folder of the frozen models' stores
TEMPORARY = ".prefopt-partial"  # suffix of what is being written, and of what is being removed
_PREFIX = "checkpoint-"


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint of the highest step."""
    found = checkpoints(output_dir)
    return found[-1] if found else None


def checkpoints(output_dir: Path) -> list[Path]:
    """By rising step; a folder of that name was renamed into place, so it is whole."""
    found = [path for path in output_dir.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name[len(_PREFIX) :])


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"{_PREFIX}{step}"


def publish(partial: Path, final: Path) -> None:
    """Rename the finished folder or file ``partial`` to ``final``, with all of it on disk before the name is."""
    for path in [*partial.rglob("*"), partial]:
        _fsync(path)
    os.replace(partial, final)
    _fsync(final.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """All of the content under this name, or nothing, even if the machine stops."""
    partial = path.with_name(path.name + TEMPORARY)
    partial.write_bytes(content)
    publish(partial, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As :func:`write_bytes`."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def locked(folder: Path, doing: str, wait: bool = False) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when the process ends, however it ends.

    Where the file system has no locks, none is held.

    Raises:
        RuntimeError: another process holds it, "doing" the same, and is not to be waited for.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            os.close(descriptor)
            raise RuntimeError(f"another process is {doing} {folder}: wait for it, or use another folder") from None
        print(f"another process is {doing} {folder}: waiting for it", file=sys.stderr, flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def prune(output_dir: Path, limit: int | None) -> None:
    """Remove all but the last ``limit`` checkpoints, and whatever an interrupted run left half-written."""
    old = checkpoints(output_dir)[:-limit] if limit else []
    for path in old:
        # Renamed first: a removal cut short must not leave half a checkpoint under a checkpoint's name.
        os.replace(path, path.with_name(path.name + TEMPORARY))
    for path in output_dir.glob(f"*{TEMPORARY}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def compare(output_dir: Path, identity: Mapping[str, Any]) -> bool:
    """Whether ``output_dir`` holds the finished run that ``identity`` describes; entries it lacks are not compared.

    A run that has left neither metrics nor a checkpoint may become another: stores it has scored fit what they fit.

    Raises:
        ValueError: the folder holds another run, or something else; names what differs.
    """
    if not output_dir.exists():
        return False
    if not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file: choose another output_dir")
    run_file = output_dir / RUN_FILE
    if not run_file.exists():
        # What a run writes before its first step may be there from a kill between two writes.
        if foreign := sorted(path.name for path in output_dir.iterdir() if not path.name.endswith(TEMPORARY)):
            raise ValueError(
                f"{output_dir} is not empty and holds no run of prefopt-fast (found {', '.join(foreign[:5])}): "
                "choose another output_dir"
            )
        return False
    run = json.loads(run_file.read_text())
    there, here = run["identity"], json.loads(json.dumps(identity))
    different = [name for name in sorted({*there} & {*here}) if there[name] != here[name]]
    if different and (run["finished"] or _has_trained(output_dir)):
        lines = [f"  {name}: {there[name]!r} there, {here[name]!r} now" for name in different]
        stores = output_dir / LOGPROBS
        again = f" (with logprobs_dir {stores} to use what was scored for this one)" if stores.is_dir() else ""
        raise ValueError(
            f"{output_dir} holds another run, which differs in\n" + "\n".join(lines) + "\n"
            f"choose another output_dir{again}, or remove that folder"
        )
    return run["finished"]


def _has_trained(output_dir: Path) -> bool:
    metrics = output_dir / METRICS_FILE
    return bool(checkpoints(output_dir)) or (metrics.exists() and metrics.stat().st_size > 0)


def claim(output_dir: Path, identity: Mapping[str, Any]) -> bool:
    """Take ``output_dir`` for the run that ``identity`` describes; returns and raises what :func:`compare` does."""
    finished = compare(output_dir, identity)
    file, run = output_dir / RUN_FILE, {"identity": json.loads(json.dumps(identity)), "finished": False}
    if not file.exists() or not (finished or _has_trained(output_dir) or json.loads(file.read_text()) == run):
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(file, run)
    return finished


def mark_finished(output_dir: Path) -> None:
    run = json.loads((output_dir / RUN_FILE).read_text())
    write_json(output_dir / RUN_FILE, run | {"finished": True})


def rng_state() -> dict[str, Any]:
    """Of Python's and torch's generators, this process's accelerator included, in types torch.load takes unpickled."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.accelerator.is_available():
        state["accelerator"] = torch.get_device_module().get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "accelerator" in state:
        torch.get_device_module().set_rng_state(state["accelerator"])


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
