"""Stores of log-probs: right numbers, the same bytes after any interruption, and a refusal of whatever does not fit."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import tiny
import torch

from prefopt_fast import checkpoint, policy, scoring
from prefopt_fast.batch import collate, encode, load_preferences
from prefopt_fast.policy import load_model, load_tokenizer
from prefopt_fast.scoring import LogprobStore, StoreKey, data_digest, model_digest, score, tokenizer_digest

SHARD_TOKENS = 30  # some ten shards of the pairs below


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scoring, "_MIN_SHARD_TOKENS", SHARD_TOKENS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny.make_model(folder / "model")
    return {"model": model, "pairs": tiny.make_pairs(folder / "pairs.json", 24)}


def prepare(inputs: dict[str, str]) -> dict[str, Any]:
    """The arguments of score, but for ``out``."""
    tokenizer = load_tokenizer(inputs["model"])
    encoded, _ = encode(load_preferences(inputs["pairs"]), tokenizer, 12)
    key = StoreKey.of(inputs["model"], tokenizer, encoded, 12, "prompt_start")
    return {"model": load_model(inputs["model"]), "encoded": encoded, "key": key, "batch_size": 2, "progress": False}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_store_holds_the_model_s_logprobs(inputs: dict, tmp_path: Path) -> None:
    arguments = prepare(inputs)
    # Rows keep the numbers they had in the whole dataset.
    part = arguments["encoded"].select([17, 3, 5])
    key = replace(arguments["key"], data=data_digest(part), temperature=2.0)
    store = score(**arguments | {"encoded": part, "key": key}, out=tmp_path / "deep" / "store")
    assert store.rows.tolist() == [3, 5, 17] and store.responses == ("chosen", "rejected")
    assert store.key == key and store.settings == {"dtype": "float32", "batch_size": 2}
    model = load_model(inputs["model"]).double()
    for row in part:
        for response in store.responses:
            ids = torch.tensor(row["prompt_ids"] + row[f"{response}_ids"])
            start = len(row["prompt_ids"])
            with torch.no_grad():
                log_probs = (model(ids[None]).logits[0, start - 1 : -1] / 2.0).log_softmax(-1)
            expected = log_probs.gather(-1, ids[start:, None])[:, 0].float()
            torch.testing.assert_close(store[row["row"], response], expected)
    with pytest.raises(KeyError, match="no row 4: it was dropped"):
        store[4, "chosen"]
    with pytest.raises(KeyError, match="chosen and rejected responses, not 'best'"):
        store[3, "best"]


def test_reading_is_mapped_and_independent(inputs: dict, tmp_path: Path) -> None:
    arguments = prepare(inputs)
    store = score(**arguments, out=tmp_path / "store")
    before = contents(tmp_path / "store")
    store[3, "chosen"].zero_()
    assert store[3, "chosen"].all() and contents(tmp_path / "store") == before
    assert len(list((tmp_path / "store").glob("shard-*"))) > 5
    # What is finished is opened and not computed: this model could not be run.
    again = score(**arguments | {"model": torch.nn.Linear(2, 2)}, out=tmp_path / "store")
    assert torch.equal(again[3, "chosen"], store[3, "chosen"])


def test_batches_are_of_like_length_the_longest_first(inputs: dict) -> None:
    encoded = prepare(inputs)["encoded"]
    shards = scoring._plan_shards(encoded, ("chosen", "rejected"), 4)
    order = [index for batches in shards for batch in batches for index in batch]
    assert sorted(order) == list(range(24))
    longest = [collate([encoded[index]]).input_ids.shape[1] for index in order]
    assert longest == sorted(longest, reverse=True)


# An atomic write calls fsync on the file, renames it, and calls fsync on the folder; the first write is the plan.
KILLS = {
    "before the plan's rename": [(os, "fsync", 1)],
    "after the plan": [(os, "fsync", 2)],
    "in the first batch": [(scoring, "_score_batch", 1)],
    "before a shard's rename": [(os, "fsync", 5)],
    "after a shard's rename": [(os, "fsync", 6)],
    "again and again": [(scoring, "_score_batch", 4), (scoring, "_score_batch", 4), (os, "fsync", 3)],
    "at the end, before store.json": [(scoring, "_digest", 6)],
}


def interrupted_runs(inputs: dict[str, str], folder: Path) -> None:
    """In a process that computes nothing itself: one fork for every run, so that libraries are imported once."""
    torch.set_num_threads(1)
    load_model(inputs["model"])  # for what it imports
    scoring._MIN_SHARD_TOKENS = SHARD_TOKENS

    def run(out: Path, kill: tuple[Any, str, int] | None = None) -> int:
        if (child := os.fork()) == 0:
            status = 1
            try:
                arguments = prepare(inputs)
                if kill is not None:
                    owner, name, countdown = kill
                    setattr(owner, name, tiny.killing(getattr(owner, name), countdown))
                score(**arguments, out=out)
                status = 0
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    statuses = {"whole": [run(folder / "whole")]}
    for number, (name, kills) in enumerate(KILLS.items()):
        out = folder / str(number)
        statuses[name] = [run(out, kill) for kill in kills] + [run(out)]
    (folder / "statuses.json").write_text(json.dumps(statuses))


def test_killed_anywhere_and_resumed_the_bytes_are_the_same(inputs: dict, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=interrupted_runs, args=(inputs, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0
    statuses = json.loads((tmp_path / "statuses.json").read_text())
    assert statuses == {"whole": [0]} | {name: [-signal.SIGKILL] * len(kills) + [0] for name, kills in KILLS.items()}
    whole = contents(tmp_path / "whole")
    assert "store.json" in whole and len(whole) > 7
    for number, name in enumerate(KILLS):
        assert contents(tmp_path / str(number)) == whole, name


def test_a_store_of_something_else_is_refused_with_the_reason(inputs: dict, tmp_path: Path) -> None:
    arguments = prepare(inputs)
    score(**arguments, out=tmp_path / "store")
    for field in ("model", "tokenizer", "data", "truncation"):
        other = replace(arguments["key"], **{field: "something else"})
        with pytest.raises(ValueError, match=rf"differs in {field} \(stored .*, expected something else\)$"):
            LogprobStore.open(tmp_path / "store", other)
    other = replace(arguments["key"], temperature=2.0, truncation="none")
    with pytest.raises(ValueError, match=r"differs in truncation \(.*\), temperature \(stored 1.0, expected 2.0\)"):
        score(**arguments | {"key": other}, out=tmp_path / "store")
    with pytest.raises(ValueError, match="key was made of other data"):
        score(**arguments | {"encoded": arguments["encoded"].select([0])}, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_unfinished_store_wants_its_own_settings(inputs: dict, tmp_path: Path) -> None:
    arguments, out = prepare(inputs), tmp_path / "store"
    score(**arguments, out=out)
    (out / "store.json").unlink()
    (out / "shard-00003.arrow").unlink()
    with pytest.raises(ValueError, match=r"unfinished, \d+ of \d+ shards are there"):
        LogprobStore.open(out)
    with pytest.raises(ValueError, match=r"begun with \{.*'batch_size': 2.*\}, found \{.*'batch_size': 3.*\}"):
        score(**arguments | {"batch_size": 3}, out=out)
    with pytest.raises(ValueError, match=r"'float32'.*'bfloat16'"), torch.autocast("cpu", torch.bfloat16):
        score(**arguments, out=out)
    score(**arguments, out=out)
    with pytest.raises(ValueError, match=r"'float32'.*'bfloat16'"):
        score(**arguments | {"model": arguments["model"].bfloat16()}, out=out)


def test_damage_is_named_and_repaired_by_the_same_call(inputs: dict, tmp_path: Path) -> None:
    arguments, out = prepare(inputs), tmp_path / "store"
    score(**arguments, out=out)
    whole, shard = contents(out), out / "shard-00002.arrow"

    damaged = bytearray(whole[shard.name])
    damaged[len(damaged) // 2] ^= 1
    for content in (bytes(damaged), whole[shard.name][:-10], b""):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"shard-00002.arrow is damaged, .* delete it .* and store.json"):
            LogprobStore.open(out)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00002.arrow is missing: delete .* store.json, and score again"):
        LogprobStore.open(out)
    (out / "store.json").unlink()
    for content, message in ((b"not arrow", "is damaged: delete it"), (whole["shard-00001.arrow"], "belong there")):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=rf"shard-00002.arrow .*{message}"):
            score(**arguments, out=out)
    shard.unlink()
    score(**arguments, out=out)
    assert contents(out) == whole


def test_folders_that_are_no_store(inputs: dict, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match="holds no log-prob store"):
        LogprobStore.open(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds other files \(.*notes.txt.*\)"):
        score(**prepare(inputs), out=tmp_path)
    assert not (tmp_path / "plan.json").exists()


def test_the_second_of_two_writers_waits(inputs: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As runs that share logprobs_dir do; it then finds what the first wrote."""
    arguments, out = prepare(inputs), tmp_path / "store"
    out.mkdir()
    with ThreadPoolExecutor(1) as executor:
        with checkpoint.locked(out, "writing the store"):
            second = executor.submit(score, **arguments, out=out)
            with pytest.raises(TimeoutError):
                second.result(1.0)
            assert not list(out.iterdir())
        assert second.result(60).rows.tolist() == LogprobStore.open(out).rows.tolist()
    assert f"another process is writing the store {out}: waiting for it" in capsys.readouterr().err


def test_logprobs_that_are_not_finite_are_refused(
    inputs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = prepare(inputs)
    with torch.no_grad():
        arguments["model"].model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="LlamaForCausalLM computes logits that are not finite"):
        score(**arguments, out=tmp_path / "store")
    monkeypatch.setattr(policy, "verify_head", lambda *_: None)  # as if it came later, with some rare token
    with pytest.raises(ValueError, match=r"row \d+ has log-probs under this model that are not finite"):
        score(**arguments, out=tmp_path / "store")
    assert not LogprobStore.finished(tmp_path / "store")


def test_model_digest_is_of_weights_configuration_and_adapter(inputs: dict, tmp_path: Path) -> None:
    source = inputs["model"]
    copy = tmp_path / "copy"
    load_model(source).save_pretrained(copy)  # no tokenizer, other times: what is computed is the same
    assert model_digest(str(copy)) == model_digest(source)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    changed = model_digest(str(copy))
    model = load_model(str(copy))
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(copy)
    adapter = peft.get_peft_model(load_model(source), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    digests = {model_digest(source), changed, model_digest(str(copy))}
    for name, base in (("a", source), ("b", str(copy))):
        adapter.peft_config["default"].base_model_name_or_path = base
        adapter.save_pretrained(tmp_path / name)
        digests.add(model_digest(str(tmp_path / name)))
    assert len(digests) == 5
    shutil.copytree(source, tmp_path / "moved")
    assert model_digest(str(tmp_path / "moved")) == model_digest(source)
    with pytest.raises(FileNotFoundError, match="nowhere/at/all does not exist"):
        model_digest("nowhere/at/all")


def test_large_files_are_hashed_once(inputs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_CACHED_DIGEST_BYTES", 1)
    hashed = []
    digest = scoring._digest
    monkeypatch.setattr(scoring, "_digest", lambda file: hashed.append(file.name) or digest(file))
    source = tmp_path / "model"
    shutil.copytree(inputs["model"], source)
    first = model_digest(str(source))
    assert model_digest(str(source)) == first and hashed == ["model.safetensors"]
    weights = source / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(0, 0))
    assert model_digest(str(source)) != first and len(hashed) == 2


def test_tokenizer_digest_sees_vocabulary_special_tokens_and_template(inputs: dict) -> None:
    tokenizers = [load_tokenizer(inputs["model"]) for _ in range(4)]
    assert len({tokenizer_digest(tokenizer) for tokenizer in tokenizers}) == 1
    tokenizers[1].add_tokens(["new"])
    tokenizers[2].pad_token = "<unk>"
    tokenizers[3].chat_template = "{{ messages }}"
    assert len({tokenizer_digest(tokenizer) for tokenizer in tokenizers}) == 4


def test_data_digest_is_of_content_alone() -> None:
    rows = [{"row": i, "prompt_ids": [1, i], "chosen_ids": [2] * (i % 5 + 1)} for i in range(2500)]
    whole = datasets.Dataset.from_list(rows)
    parts = datasets.concatenate_datasets([datasets.Dataset.from_list(rows[:7]), datasets.Dataset.from_list(rows[7:])])
    shuffled_back = whole.select(list(reversed(range(2500)))).select(list(reversed(range(2500))))
    assert data_digest(whole) == data_digest(parts) == data_digest(shuffled_back)
    rows[0], rows[1] = rows[0] | {"prompt_ids": [1]}, rows[1] | {"prompt_ids": [0, 1, 1]}  # split elsewhere
    assert data_digest(datasets.Dataset.from_list(rows)) != data_digest(whole)


def test_a_real_model_on_real_pairs(real_model: str, real_data: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(real_model)
    encoded, _ = encode(load_preferences(real_data, "train[:2]"), tokenizer, 128)
    key = StoreKey.of(real_model, tokenizer, encoded, 128, "prompt_start")
    model = load_model(real_model, torch.float32)
    store = score(model, encoded, key, tmp_path / "store", 2, tokenizer.pad_token_id, progress=False)
    model = model.double()
    for row in encoded:
        for response in store.responses:
            ids, start = torch.tensor(row["prompt_ids"] + row[f"{response}_ids"]), len(row["prompt_ids"])
            with torch.no_grad():
                log_probs = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
            expected = log_probs.gather(-1, ids[start:, None])[:, 0]
            # float32 through 30 layers; the largest difference measured at 1,024 tokens is 3e-5.
            torch.testing.assert_close(store[row["row"], response].double(), expected, rtol=0, atol=2e-4)
