"""A language model, a tokenizer and preference pairs of a size that trains in milliseconds, and training on them."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator, DistributedType, ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(30)]
EOS = "<eos>"


def make_tokenizer(words: list[str], by_character: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([EOS, "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split = pre_tokenizers.Split("", "isolated") if by_character else pre_tokenizers.WhitespaceSplit()
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token="<unk>")


def make_model(folder: Path, seed: int = 0, by_character: bool = False, hidden_size: int = 16) -> str:
    """A random model of some hundred weights with its tokenizer, in ``folder``."""
    tokenizer = make_tokenizer(list("w0123456789 ") if by_character else WORDS, by_character)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_pairs(file: Path, count: int, seed: int = 0) -> str:
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(2, 9))) + " "

    rows = [{"prompt": text(), "chosen": text() + EOS, "rejected": text() + EOS} for _ in range(count)]
    file.write_text(json.dumps(rows))
    return str(file)


def read_metrics(output_dir: Path | str, timings: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    clocked = () if timings else ("tokens_per_second", "seconds", "peak_memory_gib")
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in clocked} for line in lines]


def read_weights(output_dir: Path | str, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(output_dir) / name)


@functools.cache
def children() -> multiprocessing.context.ForkServerContext:
    """Processes forked from one that has done the imports: a start costs milliseconds, a kill is a kill."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny", "prefopt_fast.trainer", "peft", "matplotlib.pyplot"])
    return context


def in_two_processes(target: Callable[..., None], *arguments: Any, sharded: bool = False) -> list[int | None]:
    """Exit codes of ``target(*arguments)`` in each of two, as a launcher would start it; None for one that hangs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    if sharded:  # as accelerate launch --use_fsdp --fsdp_version 2 says it
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
        environment["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"  # of trainers that ask
    processes = [
        children().Process(target=_launched, args=(environment | {"RANK": r, "LOCAL_RANK": r}, target, arguments))
        for r in ("0", "1")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _launched(environment: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    if "ACCELERATE_USE_FSDP" in environment:
        _shard_on_cpus()
    target(*arguments)


def _shard_on_cpus() -> None:
    """Accelerate takes FSDP for accelerators alone; what it then calls of torch runs on CPUs too."""
    make_state = AcceleratorState.__init__

    def sharding(state: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make_state(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if state.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(state.mixed_precision)
            state.fsdp_plugin = fsdp_plugin
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharding  # type: ignore[method-assign]


def share_sequences_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers' accelerators are as under context parallelism from here on, which only several GPUs can start."""
    create = transformers.Trainer.create_accelerator_and_postprocess

    def sharing(trainer: transformers.Trainer) -> None:
        create(trainer)
        monkeypatch.setattr(Accelerator, "parallelism_config", ParallelismConfig(cp_size=2))

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", sharing)


def train_in_child(options: dict[str, Any], kill_at: tuple[str, int] | None = None) -> None:
    """In a process of its own: ``prefopt_fast.trainer.train``, ended by SIGKILL at the n-th visit of a place."""
    torch.set_num_threads(1)
    from prefopt_fast import checkpoint, metrics, scoring, trainer
    from prefopt_fast.config import TrainConfig

    places: dict[str, tuple[Any, str]] = {
        "scoring": (scoring, "_score_batch"),
        "step": (torch.optim.AdamW, "step"),
        "weights written": (trainer.torch, "save"),
        "checkpoint written": (trainer.checkpoint, "publish"),
        "checkpoint renamed": (trainer.checkpoint, "prune"),
        "metrics": (metrics.MetricsLog, "sync"),
        "finish": (checkpoint, "mark_finished"),
    }
    if kill_at is not None:
        place, countdown = kill_at
        owner, name = places[place]
        setattr(owner, name, killing(getattr(owner, name), countdown))
    trainer.train(TrainConfig(**options))


def killing(function: Callable, countdown: int) -> Callable:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapper
