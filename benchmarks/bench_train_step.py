"""A training step of WPO, ours against TRL's DPOTrainer with use_weighting=True: seconds, tokens per second, memory.

Both train the same pairs (one epoch of exactly those, whose tokens are the same whatever the order), with the same
truncation, batch size, fp32 weights and arithmetic, without gradient checkpointing, each in a process of its own.
TRL keeps the reference model in memory and runs it every step, or with "trl-precomputed" runs it over all pairs first,
as ours does; the time of the whole command, loading included, is what compares those.

    python benchmarks/bench_train_step.py --model FOLDER --data pairs.json --steps 4
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TRAINERS = {
    "ours": "prefopt_fast train",
    "trl": "TRL DPOTrainer",
    "trl-precomputed": "TRL DPOTrainer, precompute_ref_log_probs",
    "trl-defaults": "TRL DPOTrainer, its defaults (bf16, gradient checkpointing)",
}


@dataclass
class Result:
    """step_seconds: of each step. wall_seconds: of the whole command. tokens: real ones of all steps, prompts included.
    peak_rss: bytes. absent: why there is no measurement."""

    name: str
    step_seconds: list[float]
    wall_seconds: float = 0.0
    tokens: float = 0.0
    peak_rss: int = 0
    loss: float | None = None
    absent: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("PREFOPT_FAST_MODEL"), help="folder or hub id")
    parser.add_argument("--data", default=os.environ.get("PREFOPT_FAST_DATA"), help="preference pairs")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2, help="pairs")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=["ours", "trl", "trl-precomputed"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.model or not options.data:
        parser.error("--model and --data are needed (or PREFOPT_FAST_MODEL and PREFOPT_FAST_DATA)")
    if options.worker:
        run_trl(options)
        return
    from report import environment

    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "max_length")}
    settings["model"], settings["data"] = Path(options.model).name, Path(options.data).name
    results: dict[str, Any] = {"environment": environment("cpu"), "settings": settings, "trainers": []}
    with tempfile.TemporaryDirectory() as scratch:
        pairs = Path(scratch) / "pairs.jsonl"
        write_pairs(options, pairs)
        for name in options.trainers:
            folder = Path(scratch) / name
            found = measure(name, options, pairs, folder)
            results["trainers"].append(asdict(found))
            (options.output / "train_step.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            print(found.absent or f"{found.name}: {statistics.median(found.step_seconds):.1f} s per step", flush=True)
    print(markdown(results))


def write_pairs(options: argparse.Namespace, path: Path) -> None:
    """The first pairs that keep response tokens when cut to max_length, in TRL's conversational format."""
    from prefopt_fast.batch import encode, load_preferences, normalize
    from prefopt_fast.policy import load_tokenizer

    rows = load_preferences(options.data)
    needed = options.steps * options.batch_size
    encoded, _ = encode(rows, load_tokenizer(options.model), options.max_length, "sequence_end")
    if len(encoded) < needed:
        raise ValueError(f"{options.data} has {len(encoded)} usable pairs, {needed} are needed")
    with path.open("w") as file:
        for index in encoded["row"][:needed]:
            pair = normalize(rows[index], index)
            pair.pop("template_kwargs")
            file.write(json.dumps(pair) + "\n")


def measure(name: str, options: argparse.Namespace, pairs: Path, folder: Path) -> Result:
    common = ["--model", options.model, "--max-length", str(options.max_length)]
    if name == "ours":
        command = [
            *(sys.executable, "-m", "prefopt_fast", "train", "--objective", "wpo", *common),
            *("--dataset", str(pairs), "--truncation-side", "sequence_end", "--max-steps", str(options.steps)),
            *("--per-device-train-batch-size", str(options.batch_size), "--save-steps", "0"),
            *("--output-dir", str(folder)),
        ]
    else:
        command = [
            *(sys.executable, __file__, "--worker", name, *common, "--data", str(pairs), "--output", str(folder)),
            *("--steps", str(options.steps), "--batch-size", str(options.batch_size)),
        ]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # its own peak, which RUSAGE_CHILDREN would mix with others'
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        lines = log.read().strip().splitlines()
    result = Result(TRAINERS[name], [], time.perf_counter() - start, peak_rss=usage.ru_maxrss * 1024)
    if process.returncode:
        result.absent = f"exit status {process.returncode}: {lines[-1] if lines else ''}"
        return result
    if name == "ours":
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        result.step_seconds = [step["seconds"] for step in steps]
        result.tokens = sum(step["tokens_per_second"] * step["seconds"] for step in steps)
        result.loss = statistics.mean(step["loss"] for step in steps)
    else:
        found = json.loads((folder / "result.json").read_text())
        result.step_seconds, result.tokens, result.loss = found["step_seconds"], found["tokens"], found["loss"]
    return result


def run_trl(options: argparse.Namespace) -> None:
    """In a process of its own: train, and write the steps' seconds."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    defaults = options.worker == "trl-defaults"
    config = DPOConfig(
        output_dir=str(options.output),
        use_weighting=True,
        max_length=options.max_length,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        learning_rate=1e-6,
        use_cpu=True,
        bf16=defaults,
        gradient_checkpointing=defaults,
        precompute_ref_log_probs=options.worker == "trl-precomputed",
        save_strategy="no",
        report_to="none",
        logging_steps=1,
    )
    clock = Clock()
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args=config,
        train_dataset=datasets.load_dataset("json", data_files=options.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[clock],
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "num_tokens" in line]
    losses = [line["loss"] for line in logged if "loss" in line]
    result = {"step_seconds": clock.seconds, "tokens": logged[-1]["num_tokens"], "loss": statistics.mean(losses)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "result.json").write_text(json.dumps(result))


def markdown(results: Mapping[str, Any]) -> str:
    settings, env = results["settings"], results["environment"]
    lines = [
        "## A training step of WPO",
        "",
        f"{settings['model']} on {settings['data']}: {settings['steps']} steps of {settings['batch_size']} pairs, "
        f"max_length {settings['max_length']}, fp32; {env['device']}, {env['threads']} threads, {env['date']}.",
        "",
        "| | seconds per step | tokens/s in the steps | the whole command | tokens/s over it | peak RSS | mean loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in (Result(**row) for row in results["trainers"]):
        if row.absent:
            lines.append(f"| {row.name} | absent: {row.absent} | | | | | |")
            continue
        lines.append(
            f"| {row.name} | {statistics.median(row.step_seconds):.1f} | {row.tokens / sum(row.step_seconds):.0f} | "
            f"{row.wall_seconds:.0f} s | {row.tokens / row.wall_seconds:.0f} | {row.peak_rss / 2**30:.2f} GiB | "
            f"{row.loss:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
