"""The frozen models of an objective as log-probs by row: from stores that exist, or scored and freed one by one."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor

from .batch import ResponseBatch
from .checkpoint import LOGPROBS
from .config import AUTOCAST_DTYPES, TrainConfig
from .policy import load_model
from .scoring import LogprobStore, StoreKey, data_digest, require_key, score
from .segments import spread_over_segments

if TYPE_CHECKING:
    from accelerate import Accelerator

# Stored log-probs of another tokenizer's tokens, their row, and the number N of the policy's tokens → (N,).
Spread = Callable[[Tensor, int, int], Tensor]


def spread_mean(values: Tensor, row: int, length: int) -> Tensor:
    """Every token gets the mean: all that sequence-level WSPO asks of a weak model."""
    return values.mean().expand(length)


class SegmentIds:
    """The segments of the chosen responses' tokens, from :func:`prefopt_fast.batch.align`."""

    def __init__(self, rows: datasets.Dataset):
        self._rows = rows
        self._positions = {row: position for position, row in enumerate(rows["row"])}

    def packed(self, batch: ResponseBatch) -> Tensor:
        """(N,) int64: the segment of each of the batch's chosen tokens, by the policy's tokenizer."""
        return torch.cat([self._of(row, "strong") for row in batch.rows.tolist()])

    def spread(self, values: Tensor, row: int, length: int) -> Tensor:
        """Every segment gets its sum: all that segment-level WSPO asks of a weak model."""
        return spread_over_segments(values, self._of(row, "weak"), self._of(row, "strong"))

    def _of(self, row: int, side: str) -> Tensor:
        return torch.tensor(self._rows[self._positions[row]][side])


class FrozenLogprobs:
    """A frozen model's log-probs of any batch of the rows that its stores hold.

    Args:
        stores: of disjoint rows.
        spread: what makes values of the policy's tokens of stored ones of another tokenizer's.
    """

    def __init__(self, stores: Sequence[LogprobStore], spread: Spread | None = None):
        self._stores = {int(row): store for store in stores for row in store.rows}
        self._spread = spread

    def packed(self, batch: ResponseBatch) -> Tensor:
        """(N,) float32 in the order of the batch's response tokens, on the CPU as the batch is."""
        lengths = batch.cu_seqlens.diff().tolist()
        index = [(row, response) for response in batch.responses for row in batch.rows.tolist()]
        values = [self._stores[row][row, response] for row, response in index]
        if self._spread is not None:
            values = [self._spread(value, row, n) for value, (row, _), n in zip(values, index, lengths, strict=True)]
        for (row, response), value, length in zip(index, values, lengths, strict=True):
            if len(value) != length:
                raise ValueError(f"row {row}, {response}: {len(value)} stored log-probs for {length} tokens")
        return torch.cat(values)


def stored(
    store: LogprobStore, key: StoreKey, name: str, dtype: str = "auto", say: Callable[[str], None] = print
) -> FrozenLogprobs:
    """The store that the user gave for the frozen model ``name``; ``key`` is what it must have, but for its model.

    Another ``dtype`` than the one that this run computes in is said and taken ("auto": any).

    Raises:
        ValueError: a store that does not fit, saying in what.
    """
    if store.key.tokenizer != key.tokenizer:
        raise ValueError(
            f"{name}_logprobs {store.path} was scored on the tokens of another tokenizer: give {name}_model in place "
            "of the store, with level sequence or segment"
        )
    require_key(store.path, asdict(store.key), replace(key, model=store.key.model))
    if name == "ref" and store.key.model != key.model:
        say(f"note: ref_logprobs {store.path} is of another model than the policy begins as")
    if dtype not in ("auto", found := store.settings["dtype"]):
        say(f"note: {name}_logprobs {store.path} was computed in {found}, and this run computes in {dtype}")
    return FrozenLogprobs([store])


def scored(
    source: str,
    encoded: datasets.Dataset,
    key: StoreKey,
    config: TrainConfig,
    tokenizer: Any,
    accelerator: Accelerator,
    spread: Spread | None = None,
) -> FrozenLogprobs:
    """Score the model ``source`` on ``encoded``, every process a share of it, or reuse the stores of an earlier run.

    The model is freed before this returns. Of ``key``, that of all rows, each share has its own data.
    """
    directory = Path(config.logprobs_dir or Path(config.output_dir) / LOGPROBS)
    dtype: str = config.dtype
    if accelerator.is_fsdp2:  # whose mixed precision has the weights themselves in 16 bits: frozen ones round alike
        dtype = AUTOCAST_DTYPES.get(accelerator.mixed_precision, dtype)
    shares, world = [], accelerator.num_processes
    for process in range(min(world, len(encoded))):
        share = encoded.select(range(process, len(encoded), world))
        share_key = replace(key, data=data_digest(share))
        settings = asdict(share_key) | {
            "batch_size": config.per_device_eval_batch_size,
            "dtype": dtype,
            "attn_implementation": config.attn_implementation,
            "backend": config.backend,
            "mixed_precision": accelerator.mixed_precision,
        }
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        shares.append((share, share_key, directory / name))
    if accelerator.process_index < len(shares):
        share, share_key, path = shares[accelerator.process_index]
        if not LogprobStore.finished(path):
            accelerator.print(f"scoring {source} on {len(encoded)} rows")
            model = load_model(source, dtype, config.trust_remote_code, config.attn_implementation)
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
    return FrozenLogprobs([LogprobStore.open(path, share_key) for _, share_key, path in shares], spread)
