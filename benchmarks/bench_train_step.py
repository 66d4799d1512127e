"""A training step of WPO and one of WSPO in several loops: TRL's, the papers' authors', TRL's on our operator, our
trainers in TRL, and our own loop.

All train the same pairs (one epoch of exactly those, whose tokens are the same whatever the order), with the same
truncation, batch size, fp32 weights and arithmetic, pair weights that are not clamped, without gradient checkpointing,
each in a process of its own, one after the other in every round. Seconds and memory are medians over the rounds,
seconds step by step.
TRL, the authors and WPOTrainer keep the frozen models in memory and run them every step; our loop and WSPOTrainer run
them over all pairs first, as TRL does with "trl-precomputed". The time of the whole command, loading included, is what
compares those.

The authors' scripts need versions of TRL that no current transformers runs under. What they compute in a step stands
here anew, in transformers' Trainer: see AuthorsTrainer. WSPO's weak models are the policy's first quarter of layers,
and those with noise, which is about as weak as theirs were (1.5B parameters for 7B).

Memory is the process's peak less what it had before loading anything, and less the policy's weights and Adam's two
moments, which no loop can do without.

    python benchmarks/bench_train_step.py --model FOLDER --data pairs.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
TRAINERS = {
    "ours": "prefopt_fast train",
    "ours-in-trl": "WPOTrainer",
    "trl-fast": "TRL DPOTrainer, use_fast_logprobs",
    "trl": "TRL DPOTrainer",
    "authors": "the authors' step",
    "wspo-ours": "prefopt_fast train",
    "wspo-ours-in-trl": "WSPOTrainer",
    "wspo-authors-chosen": "the authors' step, chosen responses alone",
    "wspo-authors": "the authors' step",
    "trl-precomputed": "TRL DPOTrainer, precompute_ref_log_probs",
    "trl-defaults": "TRL DPOTrainer, its defaults (bf16, gradient checkpointing)",
}
ON_REQUEST = ("trl-precomputed", "trl-defaults")
# What the others' tokens/s and memory are compared with.
BASELINES = {"WPO": ("trl", "TRL's"), "WSPO": ("wspo-authors", "the authors'")}
WEAK = ("weak_aligned", "weak_ref")

SHORT = {"rounds": 1, "steps": 1, "batch_size": 1, "max_length": 32}


@dataclass
class Result:
    """name: one of TRAINERS. step_seconds: of each step. wall_seconds: of the whole command. tokens: real ones of all
    steps, prompts included (of WSPO's those of the chosen responses' sequences, whatever else a loop computes).
    peak_rss, extra_memory: bytes, the latter above model and optimizer (0: not measured). absent: why there is no
    measurement."""

    name: str
    step_seconds: list[float]
    wall_seconds: float = 0.0
    tokens: float = 0.0
    peak_rss: int = 0
    loss: float | None = None
    absent: str | None = None
    extra_memory: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / sum(self.step_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("PREFOPT_FAST_MODEL"), help="folder or hub id")
    parser.add_argument("--data", default=os.environ.get("PREFOPT_FAST_DATA"), help="preference pairs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2, help="pairs")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument(
        "--trainers", nargs="+", choices=TRAINERS, default=[name for name in TRAINERS if name not in ON_REQUEST]
    )
    parser.add_argument("--short", action="store_true", help="one step of one short pair: to test the benchmark itself")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.model or not options.data:
        parser.error("--model and --data are needed (or PREFOPT_FAST_MODEL and PREFOPT_FAST_DATA)")
    if options.short:
        vars(options).update(SHORT)
    if options.worker:
        work(options)
        return
    from report import environment

    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in SHORT}
    settings["model"], settings["data"] = Path(options.model).name, Path(options.data).name
    results: dict[str, Any] = {"environment": environment("cpu"), "settings": settings, "trainers": []}
    rounds: dict[str, list[Result]] = {name: [] for name in options.trainers}
    with tempfile.TemporaryDirectory() as scratch:
        pairs = Path(scratch) / "pairs.jsonl"
        settings["tokens"] = write_pairs(options, pairs)
        if any(name.startswith("wspo") for name in options.trainers):
            make_weak_models(options.model, Path(scratch))
        for number in range(options.rounds):
            for name in options.trainers:
                found = measure(name, options, pairs, Path(scratch) / f"{name}-{number}")
                rounds[name].append(found)
                results["trainers"] = [asdict(median(runs)) for runs in rounds.values() if runs]
                results["rounds"] = {name: [asdict(run) for run in runs] for name, runs in rounds.items()}
                text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
                (options.output / "train_step.json").write_text(text)
                said = found.absent or f"{found.tokens_per_second:.0f} tokens/s in the steps"
                print(f"round {number + 1}, {name}, {TRAINERS[name]}: {said}", flush=True)
    print(markdown(results))


def median(runs: list[Result]) -> Result:
    """Medians over rounds; a trainer that failed in one of them is absent."""
    if failed := [run for run in runs if run.absent]:
        return failed[0]
    return Result(
        runs[0].name,
        [statistics.median(seconds) for seconds in zip(*(run.step_seconds for run in runs), strict=True)],
        statistics.median(run.wall_seconds for run in runs),
        runs[0].tokens,
        int(statistics.median(run.peak_rss for run in runs)),
        runs[0].loss,
        extra_memory=int(statistics.median(run.extra_memory for run in runs)),
    )


def write_pairs(options: argparse.Namespace, path: Path) -> dict[str, int]:
    """The first pairs that keep response tokens when cut to max_length, in TRL's conversational format.

    Returns their numbers of tokens in batches as they come: padded, real ones, and those that packing computes.
    """
    from prefopt_fast.batch import collate, encode, load_preferences, normalize
    from prefopt_fast.packing import pack
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
    tokens = dict.fromkeys(("padded", "real", "packed"), 0)
    for start in range(0, needed, options.batch_size):
        batch = collate([encoded[i] for i in range(start, start + options.batch_size)])
        tokens["padded"] += batch.input_ids.numel()
        tokens["real"] += int(batch.attention_mask.sum())
        tokens["packed"] += pack(batch.input_ids, batch.attention_mask, options.batch_size).input_ids.numel()
    return tokens


def make_weak_models(model: str, folder: Path) -> None:
    """Write WSPO's weak models to ``folder``, under their names."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for name in WEAK:
        AutoTokenizer.from_pretrained(model).save_pretrained(folder / name)
    layers = max(1, AutoConfig.from_pretrained(model).num_hidden_layers // 4)
    weak = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, num_hidden_layers=layers)
    weak.save_pretrained(folder / "weak_ref")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in weak.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.01 * float(parameter.std(correction=0)))
    weak.save_pretrained(folder / "weak_aligned")


def measure(name: str, options: argparse.Namespace, pairs: Path, folder: Path) -> Result:
    """One run in a process of its own."""
    sizes = ("--steps", str(options.steps), "--batch-size", str(options.batch_size))
    command = [
        *(sys.executable, __file__, "--worker", name, "--model", options.model, "--data", str(pairs), *sizes),
        *("--max-length", str(options.max_length), "--output", str(folder)),
    ]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # its own peak, which RUSAGE_CHILDREN would mix with others'
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        lines = log.read().strip().splitlines()
    result = Result(name, [], time.perf_counter() - start, peak_rss=usage.ru_maxrss * 1024)
    if process.returncode:
        result.absent = f"exit status {process.returncode}: {lines[-1] if lines else ''}"
        return result
    found = json.loads((folder / "result.json").read_text())
    result.step_seconds, result.tokens, result.loss = found["step_seconds"], found["tokens"], found["loss"]
    result.extra_memory = result.peak_rss - found["rss_before"] - 3 * 4 * found["parameters"]
    return result


def work(options: argparse.Namespace) -> None:
    """In a process of its own: train, and write result.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))
    loop = options.worker.removeprefix("wspo-")
    run = run_ours if loop == "ours" else run_authors if loop.startswith("authors") else run_trl
    result = {"parameters": model.num_parameters(), **run(options)}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "result.json").write_text(json.dumps(result))


def weak_models(options: argparse.Namespace) -> dict[str, str]:
    """Of a worker, beside its data; none for WPO."""
    if not options.worker.startswith("wspo"):
        return {}
    return {f"{name}_model": str(Path(options.data).parent / name) for name in WEAK}


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    from prefopt_fast.config import TrainConfig
    from prefopt_fast.trainer import train

    before, weak = peak_rss(), weak_models(options)
    objective: dict[str, Any] = {"objective": "wspo", **weak} if weak else {"objective": "wpo", "clamp": False}
    train(
        TrainConfig(
            model=options.model,
            dataset=options.data,
            output_dir=str(options.output / "run"),
            max_length=options.max_length,
            truncation_side="sequence_end",
            per_device_train_batch_size=options.batch_size,
            max_steps=options.steps,
            save_steps=0,
            **objective,
        )
    )
    steps = [json.loads(line) for line in (options.output / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "rss_before": before,
        "step_seconds": [step["seconds"] for step in steps],
        "tokens": sum(step["tokens_per_second"] * step["seconds"] for step in steps),
        "loss": statistics.mean(step["loss"] for step in steps),
    }


def run_trl(options: argparse.Namespace) -> dict[str, Any]:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from prefopt_fast.integrations.trl import WPOConfig, WPOTrainer, WSPOConfig, WSPOTrainer, use_fast_logprobs

    before = peak_rss()
    name = options.worker
    trainer_class, config_class, own = DPOTrainer, DPOConfig, {"use_weighting": True}
    if name == "ours-in-trl":
        trainer_class, config_class, own = WPOTrainer, WPOConfig, {"clamp": False}
    elif name == "wspo-ours-in-trl":
        trainer_class, config_class, own = WSPOTrainer, WSPOConfig, {}
    else:
        own["precompute_ref_log_probs"] = name == "trl-precomputed"
    config = config_class(
        **common_arguments(options),
        max_length=options.max_length,
        bf16=name == "trl-defaults",
        gradient_checkpointing=name == "trl-defaults",
        **own,
    )
    clock = make_clock()
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args=config,
        train_dataset=datasets.load_dataset("json", data_files=options.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[clock],
        **weak_models(options),
    )
    with use_fast_logprobs() if name == "trl-fast" else contextlib.nullcontext():
        trainer.train()
    logged = [line for line in trainer.state.log_history if "num_tokens" in line]
    return {
        "rss_before": before,
        "step_seconds": clock.seconds,
        "tokens": logged[-1]["num_tokens"],
        "loss": statistics.mean(line["loss"] for line in logged if "loss" in line),
    }


def run_authors(options: argparse.Namespace) -> dict[str, Any]:
    import transformers

    from prefopt_fast.batch import IGNORE_INDEX, collate, encode, load_preferences
    from prefopt_fast.config import RESPONSES
    from prefopt_fast.policy import load_tokenizer

    before, weak = peak_rss(), weak_models(options)
    responses = RESPONSES[:1] if options.worker.endswith("chosen") else RESPONSES

    class AuthorsTrainer(transformers.Trainer):
        """The arithmetic of scripts/run_wpo.py in github.com/wzhouad/WPO (a104458) and train/wspo/trainer.py in
        github.com/zwhong714/weak-to-strong-preference-optimization (ef81694): padded pairs, fp32 logits of all
        positions, their log-softmax, for WPO their softmax and its squares, every frozen model in every step, and for
        WSPO rejected responses of which nothing but a metric is made. WPO's pair weight is not clamped here.
        """

        frozen: dict[str, Any]

        def logps(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
            logits, targets = outputs.logits.float(), inputs["targets"].clamp_min(0)
            return logits, logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]

        def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
            mask = inputs["targets"] != IGNORE_INDEX
            lengths = mask.sum(1)
            logits, policy = self.logps(model, inputs)
            with torch.no_grad():
                frozen = {name: self.logps(other, inputs)[1] for name, other in self.frozen.items()}
            log_ratio = (policy - frozen["ref"]) * mask
            if weak:
                target = (frozen["weak_aligned_model"] - frozen["weak_ref_model"]) * mask
                losses = (0.1 * log_ratio - target).square().sum(1) / lengths
                return losses[: options.batch_size].mean()
            alignment = (logits.softmax(-1) ** 2).sum(-1).log()
            weights = (((policy - alignment) * mask).sum(1) / lengths).detach().exp()
            chosen, rejected = log_ratio.sum(1).chunk(2)
            losses = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))
            return (losses * weights.view(2, -1).prod(0)).mean()

    def tensors(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(rows, responses)
        return {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "targets")}

    def load(source: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    rows, _ = encode(load_preferences(options.data), load_tokenizer(options.model), options.max_length, "sequence_end")
    clock = make_clock()
    trainer = AuthorsTrainer(
        load(options.model),
        transformers.TrainingArguments(**common_arguments(options), remove_unused_columns=False),
        data_collator=tensors,
        train_dataset=rows,
        callbacks=[clock],
    )
    trainer.frozen = {name: load(source).eval() for name, source in {"ref": options.model, **weak}.items()}
    trainer.train()
    counted = RESPONSES[:1] if weak else RESPONSES
    return {
        "rss_before": before,
        "step_seconds": clock.seconds,
        "tokens": sum(len(row["prompt_ids"]) + len(row[f"{name}_ids"]) for row in rows for name in counted),
        "loss": statistics.mean(line["loss"] for line in trainer.state.log_history if "loss" in line),
    }


def common_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """transformers' TrainingArguments that all Trainers here share."""
    return {
        "output_dir": str(options.output / "run"),
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.steps,
        "learning_rate": 1e-6,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
    }


def make_clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    return Clock()


def peak_rss() -> int:
    """Bytes this process has had at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def markdown(results: Mapping[str, Any]) -> str:
    settings, env = results["settings"], results["environment"]
    lines = [
        "## A training step",
        "",
        f"{settings['model']} on {settings['data']}: {settings['steps']} steps of {settings['batch_size']} pairs, "
        f"max_length {settings['max_length']}, fp32, medians of {settings.get('rounds', 1)} rounds; {env['device']}, "
        f"{env['threads']} threads, {env['date']}.",
    ]
    if tokens := settings.get("tokens"):
        lines[2] += (
            f" Of the pairs' {tokens['padded']:,} tokens with padding {tokens['real']:,} are real, and "
            f"{tokens['packed']:,} are computed where padding is left out and prompts are shared."
        )
    rows = [Result(**row) for row in results["trainers"]]
    for objective, (baseline, whose) in BASELINES.items():
        own = [row for row in rows if row.name.startswith("wspo") == (objective == "WSPO")]
        compared = next((row for row in own if row.name == baseline and not row.absent), None)
        if own:
            lines += [
                "",
                f"| {objective} | seconds per step | tokens/s in the steps | times {whose} | the whole command | "
                f"tokens/s over it | mean loss | peak RSS | memory above model and optimizer | times {whose} |",
                "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
                *(_line(row, compared) for row in own),
            ]
    return "\n".join(lines)


def _line(row: Result, compared: Result | None) -> str:
    label = TRAINERS.get(row.name, row.name)
    if row.absent:
        return f"| {label} | absent: {row.absent} | | | | | | | | |"
    speed = f"{row.tokens_per_second / compared.tokens_per_second:.2f}" if compared else ""
    memory = f"{row.extra_memory / 2**30:.2f} GiB" if row.extra_memory else "not measured"
    ratio = f"{row.extra_memory / compared.extra_memory:.2f}" if compared and compared.extra_memory else ""
    return (
        f"| {label} | {statistics.median(row.step_seconds):.1f} | {row.tokens_per_second:.0f} | {speed} | "
        f"{row.wall_seconds:.0f} s | {row.tokens / row.wall_seconds:.0f} | {row.loss:.4f} | "
        f"{row.peak_rss / 2**30:.2f} GiB | {memory} | {ratio} |"
    )


if __name__ == "__main__":
    main()
