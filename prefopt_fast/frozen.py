"""The frozen models of an objective as log-probs by row: from stores that exist, or scored and freed one by one."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor

from .batch import ResponseBatch
from .config import TrainConfig
from .policy import load_model
from .scoring import LogprobStore, StoreKey, data_digest, model_digest, require_key, score

if TYPE_CHECKING:
    from accelerate import Accelerator


class FrozenLogprobs:
    """A frozen model's log-probs of any batch of the rows that its stores hold.

    Args:
        stores: of disjoint rows.
        spread_mean: give every token of a response the mean of the stored log-probs, which may be those of another
            tokenizer's tokens: all that sequence-level WSPO asks of a weak model.
    """

    def __init__(self, stores: Sequence[LogprobStore], spread_mean: bool = False):
        self._stores = {int(row): store for store in stores for row in store.rows}
        self._spread_mean = spread_mean

    def packed(self, batch: ResponseBatch) -> Tensor:
        """(N,) float32 in the order of the batch's response tokens, on the CPU as the batch is."""
        lengths = batch.cu_seqlens.diff().tolist()
        index = [(row, response) for response in batch.responses for row in batch.rows.tolist()]
        values = [self._stores[row][row, response] for row, response in index]
        if self._spread_mean:
            values = [value.mean().expand(length) for value, length in zip(values, lengths, strict=True)]
        for (row, response), value, length in zip(index, values, lengths, strict=True):
            if len(value) != length:
                raise ValueError(f"row {row}, {response}: {len(value)} stored log-probs for {length} tokens")
        return torch.cat(values)


def stored(store: LogprobStore, key: StoreKey, name: str) -> FrozenLogprobs:
    """The store that the user gave for the frozen model ``name``; ``key`` is what it must have, but for its model.

    Raises:
        ValueError: a store that does not fit, saying in what.
    """
    if store.key.tokenizer != key.tokenizer:
        raise ValueError(
            f"{name}_logprobs {store.path} was scored on the tokens of another tokenizer: give {name}_model in place "
            "of the store, with level sequence"
        )
    require_key(store.path, asdict(store.key), replace(key, model=store.key.model))
    return FrozenLogprobs([store])


def scored(
    source: str,
    encoded: datasets.Dataset,
    key: StoreKey,
    config: TrainConfig,
    tokenizer: Any,
    accelerator: Accelerator,
    spread_mean: bool = False,
) -> FrozenLogprobs:
    """Score the model ``source`` on ``encoded``, every process a share of it, or reuse the stores of an earlier run.

    The model is freed before this returns. ``key`` is that of the policy's model on some data: its tokenizer and
    truncation hold here too.
    """
    directory = Path(config.logprobs_dir or Path(config.output_dir) / "logprobs")
    shares, world = [], accelerator.num_processes
    for process in range(min(world, len(encoded))):
        share = encoded.select(range(process, len(encoded), world))
        share_key = replace(key, model=model_digest(source), data=data_digest(share))
        settings = asdict(share_key) | {
            "batch_size": config.per_device_eval_batch_size,
            "dtype": config.dtype,
            "mixed_precision": accelerator.mixed_precision,
        }
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        shares.append((share, share_key, directory / name))
    if accelerator.process_index < len(shares):
        share, share_key, path = shares[accelerator.process_index]
        if not LogprobStore.finished(path):
            accelerator.print(f"scoring {source} on {len(encoded)} rows")
            model = load_model(source, config.dtype, config.trust_remote_code, config.attn_implementation)
            with accelerator.autocast():
                score(
                    model.to(accelerator.device),
                    share,
                    share_key,
                    path,
                    batch_size=config.per_device_eval_batch_size,
                    pad_token_id=tokenizer.pad_token_id,
                    backend=config.backend,
                    progress=accelerator.is_main_process,
                )
            del model
            gc.collect()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
    accelerator.wait_for_everyone()
    return FrozenLogprobs([LogprobStore.open(path, share_key) for _, share_key, path in shares], spread_mean)
