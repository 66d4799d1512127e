"""Per-token log-probs of a frozen model: computed once, stored in atomic shards, memory-mapped, reused.

A store is a folder. ``plan.json``, written first, says what is scored, how, and in how many shards; the shards are
``shard-00000.arrow`` and so on; ``store.json``, written last, has the size and digest of every shard. Each is written
under another name and renamed, so what is there is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batch import ResponseBatch, collate, hub_name
from .checkpoint import TEMPORARY, locked, write_bytes
from .config import RESPONSES
from .policy import ResponseModel, is_adapter, require_fit, require_safetensors

_PLAN, _STORE = "plan.json", "store.json"
# A shard is what a killed run loses at most, and one memory map of an open store.
_MIN_SHARD_TOKENS, _MAX_SHARDS = 8192, 128
_CACHED_DIGEST_BYTES = 16 << 20  # files from this size on are hashed once, and again when size or time change


@dataclass(frozen=True)
class StoreKey:
    """What a store's numbers depend on; a store fits where all fields are equal.

    model, tokenizer, data: content digests, see :func:`model_digest`, :func:`tokenizer_digest`, :func:`data_digest`.
    truncation: the limit and what was cut, in words. temperature: divisor of the logits.
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
        truncation_side: str,
        temperature: float = 1.0,
    ) -> StoreKey:
        """The key of scoring ``encoded`` (made by ``tokenizer``) with the model in a folder or of a hub id."""
        truncation = "none" if max_length is None else f"to {max_length} tokens at {truncation_side}"
        return cls(model_digest(model), tokenizer_digest(tokenizer), data_digest(encoded), truncation, temperature)


class LogprobStore:
    """Log-probs by row and response, from :meth:`open`: ``store[row, "chosen"]`` is a float32 (length,) tensor.

    key: the StoreKey. settings: dtype and batch size of the scoring. responses: the names that were scored.
    rows: (R,) int64, sorted, the ``row`` numbers of the encoded dataset.
    """

    def __init__(self, path: Path, plan: dict[str, Any], tables: list[pa.Table]):
        self.path = path
        self.key = StoreKey(**plan["key"])
        self.settings: dict[str, Any] = plan["settings"]
        self.responses = tuple(plan["responses"])
        self._shards = [{name: _ragged(table.column(name).chunk(0)) for name in self.responses} for table in tables]
        rows = [table.column("row").to_numpy() for table in tables]
        shard = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
        position = np.concatenate([np.arange(len(part)) for part in rows])
        order = np.argsort(np.concatenate(rows))
        self.rows: np.ndarray = np.concatenate(rows)[order]
        self._shard, self._position = shard[order], position[order]

    @staticmethod
    def finished(path: str | Path) -> bool:
        """Whether ``path`` holds a finished store, which can be opened without loading the model that made it."""
        return (Path(path) / _STORE).is_file()

    @classmethod
    def open(cls, path: str | Path, expected: StoreKey | None = None) -> LogprobStore:
        """Memory-map a finished store, once its shards' digests are found right.

        Raises:
            FileNotFoundError: no store at ``path``, or a shard is missing.
            ValueError: the store is unfinished, damaged, or differs from ``expected`` (saying in what).
        """
        path = Path(path)
        if not cls.finished(path):
            if (path / _PLAN).is_file():
                shards = json.loads((path / _PLAN).read_text())["shards"]
                there = sum((path / _shard_name(i)).is_file() for i in range(shards))
                raise ValueError(
                    f"{path} is unfinished, {there} of {shards} shards are there: score again with the same settings "
                    "to finish it"
                )
            raise FileNotFoundError(f"{path} holds no log-prob store")
        plan = json.loads((path / _STORE).read_text())
        if expected is not None:
            require_key(path, plan["key"], expected)
        for name, entry in plan["files"].items():
            file = path / name
            again = f"delete it (if there) and {_STORE}, and score again to make that part anew"
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: {again}")
            if file.stat().st_size != entry["bytes"] or _digest(file) != entry["sha256"]:
                raise ValueError(f"{file} is damaged, it differs from what {_STORE} says of it: {again}")
        return cls(path, plan, [_read_shard(path / name) for name in plan["files"]])

    def __getitem__(self, index: tuple[int, str]) -> Tensor:
        """(length,) float32; raises KeyError for a row or response that was not scored."""
        row, response = index
        i = int(np.searchsorted(self.rows, row))
        if i == len(self.rows) or self.rows[i] != row:
            raise KeyError(f"{self.path} has no row {row}: it was dropped when its data was encoded, or never there")
        if response not in self.responses:
            raise KeyError(f"{self.path} has {' and '.join(self.responses)} responses, not {response!r}")
        offsets, values = self._shards[self._shard[i]][response]
        start, end = offsets[self._position[i] : self._position[i] + 2]
        return torch.from_numpy(values[start:end].copy())  # the map itself is read-only


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

    Batches, and the shards they go to, are decided up front from the lengths alone, so a run that was killed at any
    moment and started again leaves the bytes of a run that was not. A finished store that fits is opened as it is.

    Args:
        model: a causal LM on the device to compute on; it is put in evaluation mode.
        encoded: from :func:`prefopt_fast.batch.encode`; every response it has is scored.
        key: from :meth:`StoreKey.of`.
        out: the store's folder, created with its parents.
        batch_size: rows at a time. pad_token_id: any token. backend: as in :func:`prefopt_fast.token_logprobs`.
        progress: whether to draw a bar.

    Raises:
        ValueError: ``out`` holds something else, or a store of another key or settings (saying which); ``key`` is of
            other data than ``encoded``; sequences or tokens beyond the model's tables; log-probs that are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    if key.data != data_digest(encoded):
        raise ValueError("key was made of other data than encoded: make it with StoreKey.of on the same dataset")
    responses = tuple(name for name in RESPONSES if f"{name}_ids" in encoded.column_names)
    shards = _plan_shards(encoded, responses, batch_size)
    plan = {
        "key": asdict(key),
        "settings": {"dtype": _compute_dtype(model), "batch_size": batch_size},
        "responses": list(responses),
        "shards": len(shards),
    }
    out = Path(out)
    if not LogprobStore.finished(out):
        require_fit(model, encoded)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "writing the store", wait=True):
        _begin(out, plan)
        if LogprobStore.finished(out):
            return LogprobStore.open(out, key)
        scorer = ResponseModel(model, 0.0, backend, key.temperature).eval()
        device = next(model.parameters()).device
        total = sum(len(batch) for batches in shards for batch in batches)
        with tqdm(total=total, unit=" rows", desc=f"scoring {out.name}", disable=not progress) as bar:
            for number, batches in enumerate(shards):
                file = out / _shard_name(number)
                if file.is_file():
                    _require_rows(file, [index for batch in batches for index in batch], encoded, responses)
                    bar.update(sum(map(len, batches)))
                    continue
                columns: dict[str, list] = {name: [] for name in ("row", *responses)}
                for batch in batches:
                    _score_batch(
                        scorer, collate([encoded[i] for i in batch], responses, pad_token_id).to(device), columns
                    )
                    bar.update(len(batch))
                write_bytes(file, _shard_bytes(columns))
        files = {_shard_name(number): out / _shard_name(number) for number in range(len(shards))}
        entries = {name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for name, file in files.items()}
        write_bytes(out / _STORE, _json_bytes(plan | {"files": entries}))
    return LogprobStore.open(out, key)


def _plan_shards(encoded: datasets.Dataset, responses: tuple[str, ...], batch_size: int) -> list[list[list[int]]]:
    """Shards of batches of indices into ``encoded``: the longest first, so that too little memory shows at once."""
    lengths = {name: _lengths(encoded, f"{name}_ids") for name in ("prompt", *responses)}
    longest = lengths["prompt"] + np.max([lengths[name] for name in responses], axis=0)
    tokens = np.sum([lengths[name] for name in responses], axis=0)
    order = np.argsort(-longest, kind="stable")
    shard_tokens = max(_MIN_SHARD_TOKENS, int(tokens.sum()) // _MAX_SHARDS)
    shards: list[list[list[int]]] = []
    room = 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        if room <= 0:
            shards.append([])
            room = shard_tokens
        shards[-1].append(batch.tolist())
        room -= int(tokens[batch].sum())
    return shards


@torch.no_grad()
def _score_batch(scorer: ResponseModel, batch: ResponseBatch, columns: dict[str, list]) -> None:
    """Append the batch's rows and their log-probs to ``columns``."""
    stats, cu_seqlens = scorer(batch)
    rows = batch.rows.tolist()
    sequences = [part.numpy() for part in stats.logprobs.float().cpu().split(cu_seqlens.diff().tolist())]
    for i, sequence in enumerate(sequences):
        if not np.isfinite(sequence).all():
            raise ValueError(f"row {rows[i % len(rows)]} has log-probs under this model that are not finite")
    columns["row"] += rows
    for k, name in enumerate(batch.responses):
        columns[name] += sequences[k * len(rows) : (k + 1) * len(rows)]


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan of a new store, or compare it with the plan of the store that is there."""
    if (out / _PLAN).is_file():
        there = json.loads((out / _PLAN).read_text())
        require_key(out, there["key"], StoreKey(**plan["key"]))
        if there != plan:
            raise ValueError(
                f"{out} was begun with {there['settings']}, found {plan['settings']}: use the same, or another folder"
            )
        return
    if foreign := sorted(file.name for file in out.iterdir() if file.name != _PLAN + TEMPORARY):
        raise ValueError(f"{out} holds other files ({', '.join(foreign[:5])}): give the store a folder of its own")
    write_bytes(out / _PLAN, _json_bytes(plan))


def require_key(path: Path, found: Mapping[str, Any], expected: StoreKey) -> None:
    """Raise ValueError where a store's key is not ``expected``, saying in what."""
    differing = [
        f"{name} (stored {_short(found.get(name))}, expected {_short(value)})"
        for name, value in asdict(expected).items()
        if found.get(name) != value
    ]
    if differing:
        raise ValueError(f"{path} was made from something else, it differs in {', '.join(differing)}")


def _require_rows(file: Path, indices: list[int], encoded: datasets.Dataset, responses: tuple[str, ...]) -> None:
    """Raise ValueError where a shard does not hold what the plan puts into it."""
    table = _read_shard(file)
    rows = encoded.select(indices)
    same = table.column("row").to_pylist() == rows["row"][:] and all(
        np.array_equal(np.diff(_ragged(table.column(name).chunk(0))[0]), _lengths(rows, f"{name}_ids"))
        for name in responses
    )
    if not same:
        raise ValueError(f"{file} does not hold the rows that belong there: delete it and score again")


def _compute_dtype(model: nn.Module) -> str:
    parameter = next(model.parameters())
    autocast = torch.is_autocast_enabled(parameter.device.type)
    dtype = torch.get_autocast_dtype(parameter.device.type) if autocast else parameter.dtype
    return str(dtype).removeprefix("torch.")


def _shard_name(number: int) -> str:
    return f"shard-{number:05}.arrow"


def _shard_bytes(columns: dict[str, list]) -> bytes:
    arrays = [pa.array(columns["row"], pa.int64())]
    for name in list(columns)[1:]:
        offsets = np.cumsum([0, *map(len, columns[name])], dtype=np.int32)
        arrays.append(pa.ListArray.from_arrays(offsets, np.concatenate(columns[name])))
    batch = pa.record_batch(arrays, names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _read_shard(file: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is damaged: delete it and score again ({error})") from error


def _ragged(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a list column without nulls, as views."""
    return column.offsets.to_numpy(), column.values.to_numpy()


def _lengths(encoded: datasets.Dataset, column: str) -> np.ndarray:
    """(rows,) int64 token counts."""
    batches = encoded.select_columns(column).with_format("arrow").iter(1000)
    return np.concatenate([pa.compute.list_value_length(table[column]).to_numpy() for table in batches]).astype(
        np.int64
    )


def model_digest(source: str) -> str:
    """SHA-256 of the configuration and safetensors files in a folder or of a hub id; with an adapter, of its base too.

    Raises:
        FileNotFoundError: a path that does not exist. ValueError: a folder without safetensors weights.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        hub_name(source)
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=["*/*"]))
    parts = {file.name: _cached_digest(file) for file in require_safetensors(folder)}
    name = "adapter_config.json" if is_adapter(str(folder)) else "config.json"
    config = json.loads((folder / name).read_text())
    if is_adapter(str(folder)):
        parts["base"] = model_digest(config.pop("base_model_name_or_path"))
    # What saving adds and computing does not use.
    config = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version", "peft_version")}
    return hashlib.sha256(_json_bytes({"config": config, "files": parts})).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary, special tokens and chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = {"vocabulary": tokenizer.get_vocab(), "special": special, "template": tokenizer.chat_template}
    return hashlib.sha256(_json_bytes(parts)).hexdigest()


def data_digest(encoded: datasets.Dataset) -> str:
    """SHA-256 of the token ids and row numbers of an encoded dataset, however it lies in memory."""
    hashes = {name: hashlib.sha256() for name in sorted(encoded.column_names) if name != "sample_weight"}
    for table in encoded.with_format("arrow").iter(1000):
        for name, column in hashes.items():
            values = table[name].combine_chunks()
            if pa.types.is_list(values.type):
                # Lengths go between the values, so that no other split of the same tokens hashes alike.
                column.update(pa.compute.list_value_length(values).to_numpy().astype("<i8"))
                values = values.flatten()
            column.update(values.to_numpy().astype("<i8"))
    return hashlib.sha256(_json_bytes({name: column.hexdigest() for name, column in hashes.items()})).hexdigest()


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:  # hashlib.file_digest came with Python 3.11
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _cached_digest(file: Path) -> str:
    """A file's digest, kept in the user's cache under its path, size and time where hashing takes long."""
    status = file.stat()
    if status.st_size < _CACHED_DIGEST_BYTES:
        return _digest(file)
    identity = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefopt_fast" / "digests"
    entry = cache / hashlib.sha256(identity.encode()).hexdigest()
    if entry.is_file():
        return entry.read_text()
    digest = _digest(file)
    with contextlib.suppress(OSError):  # a home that cannot be written costs time alone
        cache.mkdir(parents=True, exist_ok=True)
        write_bytes(entry, digest.encode())
    return digest


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
