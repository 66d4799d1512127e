"""Per-token log-probs of a frozen model: computed once, stored in atomic shards, memory-mapped, reused.

A store is a folder: ``plan.json`` (what is being scored, written first), ``shard-00000.arrow`` …, and ``store.json``
(the plan with every shard's size and digest, written last: without it the store is unfinished).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from .batch import RESPONSES, ResponseBatch, collate
from .policy import ResponseModel


@dataclass(frozen=True)
class StoreKey:
    """What a store's numbers depend on; two stores fit each other where all fields are equal.

    model, tokenizer, data: content digests, see :func:`model_digest`, :func:`tokenizer_digest`, :func:`data_digest`.
    truncation: "max_length=1024, truncation_side=prompt_start". temperature: divisor of the logits.
    """

    model: str
    tokenizer: str
    data: str
    truncation: str
    temperature: float = 1.0

    @classmethod
    def of(
        cls,
        model: str,
        tokenizer: Any,
        encoded: datasets.Dataset,
        max_length: int | None,
        truncation_side: str = "prompt_start",
        temperature: float = 1.0,
    ) -> StoreKey:
        """The key of scoring the model at path or hub id ``model`` on ``encoded``, made by ``tokenizer``."""


class LogprobStore:
    """Log-probs by row and response: ``store[row, "chosen"]`` is float32 (length,), ``row`` as in ``encode``'s column.

    Attributes: ``key`` (StoreKey), ``responses`` (names), ``rows`` (int64, sorted), ``settings`` (dtype, batch size).
    """

    @staticmethod
    def finished(path: str | Path) -> bool:
        """Whether a complete store lies at ``path``: it can be opened without loading the model that made it."""

    @classmethod
    def open(cls, path: str | Path, expected: StoreKey | None = None) -> LogprobStore:
        """Memory-map a finished store.

        Raises:
            FileNotFoundError: no store at ``path``, or a shard is missing.
            ValueError: the store is unfinished, damaged, or differs from ``expected`` (saying in what).
        """

    def __getitem__(self, index: tuple[int, str]) -> Tensor:
        """(length,) float32 log-probs; raises KeyError for a row or response that was not scored."""

    def packed(self, batch: ResponseBatch) -> Tensor:
        """(N,) float32 log-probs of a batch's response tokens, in the order of its targets, on its device.

        Raises:
            KeyError: a row that was not scored.
            ValueError: a response of another length than was scored.
        """


def score(
    model: nn.Module,
    encoded: datasets.Dataset,
    key: StoreKey,
    out: str | Path,
    batch_size: int = 8,
    pad_token_id: int = 0,
    backend: str = "auto",
    progress: bool = True,
) -> LogprobStore:
    """Write the log-probs of every response of ``encoded`` under ``model`` to the store ``out``, or finish writing it.

    Batches are formed up front by length and belong to shards up front, so a run that was killed at any moment and
    started again writes the bytes that one run would have written. A finished store that fits is opened and returned.

    Args:
        model: a causal LM on the device to compute on; it is put in evaluation mode.
        encoded: from ``batch.encode``; which responses it has, decides what is scored.
        key: from ``StoreKey.of``.
        out: the store's folder, created with its parents.
        batch_size: rows at a time.

    Raises:
        ValueError: ``out`` holds something else, or a store of another key or of other settings (saying in what).
        RuntimeError: another process is writing to ``out``.
    """


def model_digest(source: str) -> str:
    """Digest of a model's configuration, its safetensors files and, for an adapter, its base model's digest."""


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's vocabulary, special tokens and chat template."""


def data_digest(encoded: datasets.Dataset) -> str:
    """Digest of the token ids and row numbers of an encoded dataset."""
