"""A language model, a tokenizer and preference pairs of a size that trains in milliseconds, and training on them."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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


def train_in_child(options: dict[str, Any], kill_at: tuple[str, int] | None = None, environment: Any = None) -> None:
    """In a process of its own: ``prefopt_fast.trainer.train``, ended by SIGKILL at the n-th visit of a place."""
    os.environ.update(environment or {})
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
        setattr(owner, name, _killing(getattr(owner, name), countdown))
    trainer.train(TrainConfig(**options))


def _killing(function: Callable, countdown: int) -> Callable:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapper
