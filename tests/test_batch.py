"""Preference rows of every format → token ids → batches, against TRL's tokens where TRL has the same choice."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from conftest import DEVICE
from tokenizers import processors

from prefopt_fast.batch import (
    IGNORE_INDEX,
    TRUNCATION_SIDES,
    add_sample_weights,
    collate,
    encode,
    load_preferences,
    normalize,
)
from prefopt_fast.scoring import data_digest

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'refused' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
MARKS = [f"<{role}>" for role in ("system", "user", "assistant", "tool", "end")]
USER, ANSWER, WORSE = (
    {"role": role, "content": text} for role, text in (("user", "w1"), ("assistant", "w2"), ("assistant", "w3"))
)
PAIR = {"prompt": "w1 w2 w3 w4 ", "chosen": "w5 w6 w7", "rejected": "w8 "}


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = tiny.make_tokenizer([*tiny.WORDS, *MARKS, "<bos>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode_rows(rows: list[dict], tokenizer: Any, *args: Any, **kwargs: Any) -> tuple[list[dict], Any]:
    encoded, report = encode(datasets.Dataset.from_list(rows), tokenizer, *args, **kwargs)
    return list(encoded), report


def words(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"prompt": [USER], "chosen": ANSWER, "rejected": WORSE},
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"prompt": "w1", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"prompt": "w1", "chosen": [ANSWER], "rejected": [WORSE]},
        {"prompt": "w1", "chosen": ANSWER, "rejected": {"from": "gpt", "value": "w3"}},
        {
            "conversations": [{"from": "human", "value": "w1"}],
            "chosen": {"from": "gpt", "value": "w2"},
            "rejected": {"from": "gpt", "value": "w3"},
        },
        {"conversations": [{"from": "human", "value": "w1"}], "chosen": "w2", "rejected": "w3"},
        {"prompt": [USER | {"tool_calls": None}], "chosen": [ANSWER], "rejected": [WORSE], "conversations": None},
    ],
    ids=[
        "messages",
        "one message",
        "implicit",
        "prompt repeated",
        "text prompt",
        "text prompt of one message",
        "sharegpt",
        "sharegpt text",
        "arrow's empty fields",
    ],
)
def test_every_format_of_messages_is_one(row: dict) -> None:
    assert normalize(row, 0) == {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE], "template_kwargs": {}}


def test_a_text_prompt_before_answers_alone_needs_no_rejected() -> None:
    # Also where the answers begin alike: the user's turn is before all of them.
    long = [ANSWER, USER, ANSWER]
    for row in ({"prompt": "w1", "chosen": long}, {"prompt": "w1", "chosen": long, "rejected": [ANSWER, USER, WORSE]}):
        fields = normalize(row, 0, ("chosen",))
        assert fields == {"prompt": [USER], "chosen": long, "template_kwargs": {}}


def test_no_row_has_the_fields_of_others(tmp_path: Path) -> None:
    def row(name: str, arguments: dict, **kwargs: Any) -> dict:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        properties = {key: {"type": "string"} for key in arguments}
        return {
            "prompt": [USER],
            "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
            "rejected": [WORSE],
            "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}],
            "chat_template_kwargs": kwargs,
        }

    rows = [row("weather", {"city": "w1", "days": [1, None]}, think=True), row("add", {"x": "w2"}, effort="low")]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    loaded = load_preferences(str(tmp_path / "rows.parquet"))
    assert loaded[1]["chosen"][0]["tool_calls"][0]["function"]["arguments"]["city"] is None  # or this tests nothing
    for i, expected in enumerate(rows):
        fields = normalize(loaded[i], i)
        assert fields["chosen"] == expected["chosen"] and fields["prompt"] == expected["prompt"]
        assert fields["template_kwargs"] == {"tools": expected["tools"], **expected["chat_template_kwargs"]}
    meant = '[{"name": "t", "default": null}]'
    assert normalize(PAIR | {"tools": meant}, 0)["template_kwargs"]["tools"] == json.loads(meant)


def test_sharegpt_roles_system_and_tools() -> None:
    turns = [("human", "a"), ("function_call", "b"), ("observation", "c")]
    row = {
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "system": "s",
        "tools": '[{"name": "t"}]',
        "chosen": "x",
        "rejected": "y",
    }
    fields = normalize(row, 0)
    assert [message["role"] for message in fields["prompt"]] == ["system", "user", "assistant", "tool"]
    assert fields["template_kwargs"] == {"tools": [{"name": "t"}]}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [("ab c", "ab d", "ab"), ("abc", "abd", "ab"), ("ab", "abcd", "a"), ("x", "y", ""), ("same", "same", "sam")],
)
def test_an_implicit_text_prompt_is_the_common_beginning(chosen: str, rejected: str, prompt: str) -> None:
    fields = normalize({"chosen": chosen, "rejected": rejected}, 0)
    assert fields["prompt"] == prompt
    assert (prompt + fields["chosen"], prompt + fields["rejected"]) == (chosen, rejected)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, "row 7 has no rejected: .* found chosen, prompt"),
        ({"text": "t"}, "row 7 has no chosen and no rejected: .* found text"),
        ({"prompt": [USER], "chosen": "c", "rejected": "r"}, "row 7: .* found prompt messages, chosen text"),
        (
            {"prompt": [USER], "chosen": 3, "rejected": "r"},
            "row 7, chosen: expected text or a list of messages, found 3",
        ),
        ({**PAIR, "tools": "[{"}, "row 7, tools: expected a list, or one as JSON text; Expecting"),
        ({**PAIR, "tools": '{"name": "f"}'}, "row 7, tools: expected a list, or one as JSON text; found"),
        ({**PAIR, "chat_template_kwargs": {"tokenize": True}}, "row 7, .*: tokenize are not the data's to set"),
        (
            {"prompt": [USER], "chosen": [ANSWER | {"content": datetime(2024, 1, 1)}], "rejected": [WORSE]},
            r"row 7, chosen: a message's content must be text .* found datetime.* \(a column of JSON in which every",
        ),
        (
            {"system": 3, "conversations": [{"from": "human", "value": "v"}], "chosen": "c", "rejected": "r"},
            "row 7, system: a message's content must be text or a list of parts, found 3",
        ),
        (
            {**PAIR, "chat_template_kwargs": "thinking"},
            "row 7, chat_template_kwargs: expected a dictionary, found 'thinking'",
        ),
        ({"prompt": [], "chosen": "c", "rejected": "r"}, r"row 7, prompt: .* found \[\]"),
        ({"conversations": [{"from": "alien", "value": "v"}], "chosen": "c", "rejected": "r"}, "row 7, .*'alien'"),
        ({"conversations": "text", "chosen": "c", "rejected": "r"}, "row 7, conversations: .* found text"),
        ({"chosen": [ANSWER], "rejected": [WORSE]}, "row 7 has no prompt"),
        (
            {"prompt": "p", "chosen": [USER, ANSWER], "rejected": [WORSE]},
            "row 7: beside a prompt of text, .* found first messages .*'user'.* and .*'assistant'",
        ),
        ({"chosen": [ANSWER], "rejected": "r"}, "row 7: chosen and rejected must both be text or both messages"),
    ],
)
def test_bad_rows_are_named(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize(row, 7)


def test_chosen_alone_needs_no_rejected(tokenizer: Any) -> None:
    encoded, _ = encode_rows([{"prompt": "w1", "chosen": " w2"}], tokenizer, responses=("chosen",))
    assert set(encoded[0]) == {"row", "prompt_ids", "chosen_ids"}


def test_messages_go_through_the_template(tokenizer: Any) -> None:
    encoded, report = encode_rows([{"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}], tokenizer)
    assert words(tokenizer, encoded[0]["prompt_ids"]) == "<user> w1 <end> <assistant>"
    assert words(tokenizer, encoded[0]["chosen_ids"]) == "w2 <end>"
    assert words(tokenizer, encoded[0]["rejected_ids"]) == "w3 <end>"
    assert (report.kept, report.diverged, report.longest, report.tokens) == (1, 0, 6, 4)


def test_text_ends_in_one_eos(tokenizer: Any) -> None:
    rows = [{"prompt": "w1 ", "chosen": "w2 ", "rejected": "w3 <eos>"}]
    encoded, _ = encode_rows(rows, tokenizer)
    assert [words(tokenizer, encoded[0][f"{name}_ids"]) for name in ("chosen", "rejected")] == ["w2 <eos>", "w3 <eos>"]
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<bos>", "<eos>")}
    template = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=list(ids.items()))
    tokenizer.backend_tokenizer.post_processor = template  # Llama's add_eos_token
    again, report = encode_rows(rows, tokenizer)
    assert again[0] == encoded[0] | {"prompt_ids": [ids["<bos>"], *encoded[0]["prompt_ids"]]} and not report.diverged


def test_many_rows_keep_their_order(tokenizer: Any) -> None:
    # More rows than one call of the tokenizer takes.
    rows = [{"prompt": f"w{i % 30} ", "chosen": "w2 ", "rejected": "w3 "} for i in range(300)]
    encoded, _ = encode_rows(rows, tokenizer)
    assert [row["row"] for row in encoded] == list(range(300))
    assert all(words(tokenizer, row["prompt_ids"]) == f"w{i % 30}" for i, row in enumerate(encoded))


def test_a_prompt_that_changes_before_its_response_is_cut_and_counted(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("'<assistant> '", "'<assistant> <tool>'")  # in the prompt alone
    encoded, report = encode_rows([{"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}], tokenizer)
    assert words(tokenizer, encoded[0]["prompt_ids"]) == "<user> w1 <end> <assistant>"
    assert report.diverged == 1 and report.furthest.tokens == 1
    assert "1 prompts tokenize differently" in str(report)
    assert (
        "up to 1 tokens, in row 0, where the prompt's end is '<tool>' alone, and the response begins with 'w2'"
        in str(report)
    )


@pytest.mark.parametrize("pairs", [1, 300])
def test_a_long_end_of_the_templates_is_warned_of(pairs: int, tokenizer: Any, recwarn: Any) -> None:
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}
    for tokens in (8, 9):
        tokenizer.chat_template = TEMPLATE.replace("'<assistant> '", repr("<assistant> " + "<tool> " * tokens))
        recwarn.clear()
        _, report = encode_rows([row] * pairs, tokenizer)
        assert report.furthest.tokens == tokens and report.diverged == pairs
        warned = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
        assert len(warned) == (tokens > 8)
    assert f"{pairs} prompts" in warned[0] and "in row 0" in warned[0] and "<tool> <tool>" in warned[0]


# What a prompt ends with alone, or that only a last turn of the user shows the system message, as in Mistral's.
LAST_TURN_SHOWS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> "
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% endif %}"
    "{{ m['content'] }} <end> {% elif m['role'] == 'assistant' %}{{ m['content'] + ' <end> ' }}{% endif %}{% endfor %}"
)


def test_words_of_a_prompt_never_become_response(tokenizer: Any) -> None:
    tokenizer.chat_template = LAST_TURN_SHOWS_SYSTEM
    good = {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}
    assert encode_rows([good], tokenizer)[1].diverged == 0
    bad = good | {"prompt": [{"role": "system", "content": "w9"}, USER]}
    with pytest.raises(ValueError, match=r"row 1: 3 tokens of .*'w9 w1 <end>' alone, .* with 'w1 <end> w2'"):
        encode_rows([good, bad], tokenizer)
    # And in parts, as multimodal templates have it.
    tokenizer.chat_template = LAST_TURN_SHOWS_SYSTEM.replace("['content']", "['content'][0]['text']")
    bad, good = (
        {k: [m | {"content": [{"type": "text", "text": m["content"]}]} for m in v] for k, v in row.items()}
        for row in (bad, good)
    )
    with pytest.raises(ValueError, match="row 1: 3 tokens of the prompt"):
        encode_rows([good, bad], tokenizer)


def test_a_template_that_takes_no_other_text_may_change_a_few_tokens(tokenizer: Any) -> None:
    """Nothing tells then where the prompt's words end."""
    for tokens in (8, 9):
        tokenizer.chat_template = TEMPLATE.replace("'<assistant> '", repr("<assistant> " + "<tool> " * tokens)).replace(
            "m['role'] == 'refused'", "m['content'] not in ('w1', 'w2', 'w3')"
        )
        rows = [{"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}]
        if tokens == 8:
            assert encode_rows(rows, tokenizer)[1].furthest.tokens == 8
        else:
            with pytest.raises(ValueError, match="row 0: 9 tokens of the prompt"):
                encode_rows(rows, tokenizer)


@pytest.mark.parametrize(
    ("side", "max_length", "prompt", "chosen", "rejected"),
    [
        # Whole: prompt w1 w2 w3 w4, chosen w5 w6 w7 <eos>, rejected w8 <eos>.
        ("prompt_start", 8, "w1 w2 w3 w4", "w5 w6 w7 <eos>", "w8 <eos>"),
        ("prompt_start", 6, "w3 w4", "w5 w6 w7 <eos>", "w8 <eos>"),
        ("prompt_start", 4, "w4", "w5 w6 w7", "w8 <eos>"),
        ("sequence_start", 6, "w3 w4", "w5 w6 w7 <eos>", "w8 <eos>"),
        ("sequence_start", 4, "w4", "w6 w7 <eos>", "w8 <eos>"),
        ("sequence_end", 5, "w1 w2 w3 w4", "w5", "w8"),
    ],
)
def test_truncation(side: str, max_length: int, prompt: str, chosen: str, rejected: str, tokenizer: Any) -> None:
    encoded, report = encode_rows([PAIR], tokenizer, max_length, side)
    row = encoded[0]
    assert [words(tokenizer, row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")] == [
        prompt,
        chosen,
        rejected,
    ]
    assert report.prompts_cut == (prompt != "w1 w2 w3 w4")
    assert report.responses_cut == (len(chosen + rejected) < len("w5 w6 w7 <eos>w8 <eos>"))
    assert report.longest <= max_length


def test_a_row_without_room_is_dropped_and_counted(tokenizer: Any) -> None:
    encoded, report = encode_rows([PAIR, PAIR | {"prompt": "w1 "}], tokenizer, 4, "sequence_end")
    assert [row["row"] for row in encoded] == [1]
    assert (report.rows, report.kept, report.dropped) == (2, 1, 1) and "1 rows dropped" in str(report)
    with pytest.raises(ValueError, match="no row keeps a response token"):
        encode_rows([PAIR], tokenizer, 4, "sequence_end")


def test_a_leading_bos_survives_and_stands_for_an_empty_prompt(tokenizer: Any) -> None:
    tokenizer.bos_token = "<bos>"
    encoded, report = encode_rows([PAIR | {"prompt": "<bos> w1 w2 w3 "}, PAIR | {"prompt": ""}], tokenizer, 6)
    assert [words(tokenizer, row["prompt_ids"]) for row in encoded] == ["<bos> w3", "<bos>"]
    assert report.prompts_cut == 1


def test_trl_encodes_and_truncates_alike(tokenizer: Any) -> None:
    pytest.importorskip("trl")
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    messages = [{"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}]
    for rows, max_length in (([PAIR, PAIR | {"prompt": "w1 w2 w3 w4 w9 "}], 6), (messages, None), (messages, 5)):
        encoded, _ = encode_rows(rows, tokenizer, max_length, "sequence_end")
        config = DPOConfig(output_dir="unused", max_length=max_length, use_cpu=True, bf16=False)
        prepare = DPOTrainer._prepare_dataset
        holder = type("Holder", (), {"_tokenizer": tokenizer})()
        theirs = prepare(holder, datasets.Dataset.from_list(rows), tokenizer, config, "train")
        batch = DataCollatorForPreference(0, max_length, "keep_start")(list(theirs))
        ours = collate(encoded, pad_token_id=0)
        torch.testing.assert_close(ours.input_ids, batch["input_ids"])
        torch.testing.assert_close(ours.targets[:, :-1] != IGNORE_INDEX, batch["completion_mask"][:, 1:].bool())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truncation_side": "left"}, f"truncation_side must be one of {', '.join(TRUNCATION_SIDES)}; found 'left'"),
        ({"max_length": 1}, "max_length must hold a prompt token and a response token, found 1"),
        ({"responses": ("chosen", "chosen")}, "responses must be some of .*; found .'chosen', 'chosen'"),
        ({"responses": ("better",)}, "responses must be some of chosen, rejected, each once; found .'better'"),
    ],
)
def test_bad_arguments_of_encode(change: dict, message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        encode_rows([PAIR], tokenizer, **change)


def test_templates_and_special_tokens_that_are_missing(tokenizer: Any) -> None:
    row = {"prompt": [USER | {"role": "refused"}], "chosen": [ANSWER], "rejected": [WORSE]}
    with pytest.raises(ValueError, match="row 0: the chat template does not take these messages: no such role"):
        encode_rows([row], tokenizer)
    row["prompt"] = [{"role": "user", "content": [{"type": "text", "text": "w1"}]}]
    with pytest.raises(ValueError, match="row 0: the chat template does not take these messages: can only concatenate"):
        encode_rows([row], tokenizer)
    tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="row 0 holds messages, and the tokenizer has no chat template"):
        encode_rows([row], tokenizer)
    with pytest.raises(ValueError, match="EOS token, and this tokenizer has none"):
        encode_rows([PAIR], tokenizer)


def test_collate_shifts_targets_and_packs_positions() -> None:
    rows = [
        {"row": 4, "prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]},
        {"row": 9, "prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10]},
    ]
    batch = collate(rows, pad_token_id=99).to(DEVICE).to("cpu")
    x = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [7, 8, 99, 99, 99], [1, 2, 6, 99, 99], [7, 9, 10, 99, 99]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert batch.targets.tolist() == [[x, 3, 4, 5, x], [8, x, x, x, x], [x, 6, x, x, x], [9, 10, x, x, x]]
    assert batch.targets.flatten()[batch.positions].tolist() == [3, 4, 5, 8, 6, 9, 10]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 5, 7]
    assert batch.rows.tolist() == [4, 9] and batch.responses == ("chosen", "rejected")
    assert collate(rows, ("chosen",)).input_ids.shape == (2, 5)
    formatted = collate(list(datasets.Dataset.from_list(rows).with_format("torch")), pad_token_id=99)
    assert torch.equal(formatted.input_ids, batch.input_ids) and torch.equal(formatted.targets, batch.targets)


def test_collate_refuses_empty_responses_and_batches() -> None:
    with pytest.raises(ValueError, match="row 3 has no token in rejected_ids"):
        collate([{"row": 3, "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []}])
    with pytest.raises(ValueError, match="at least one row"):
        collate([])


def test_load_every_kind_of_local_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets.Dataset.from_list([PAIR, PAIR])
    (tmp_path / "a.json").write_text(json.dumps(list(dataset)))
    (tmp_path / "folder").mkdir()
    dataset.to_json(str(tmp_path / "b.jsonl"))
    dataset.to_parquet(str(tmp_path / "c.parquet"))
    dataset.to_json(str(tmp_path / "folder" / "train.jsonl"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(str(tmp_path / "splits"))
    for name in ("a.json", "b.jsonl", "c.parquet", "folder", "saved", "splits"):
        assert list(load_preferences(str(tmp_path / name))) == list(dataset), name
    assert len(load_preferences(str(tmp_path / "splits"), "test")) == 1
    for name in ("a.json", "saved", "splits"):
        assert len(load_preferences(str(tmp_path / name), "train[:1]")) == 1, name
    assert len(load_preferences(str(tmp_path / "splits"), "train[50%:]+test")) == 2
    assert len(load_preferences(str(tmp_path / "splits"), "all")) == 3
    for name, split, splits in (
        ("splits", "validation", "train, test"),
        ("splits", "train[:x]", "train, test"),
        ("saved", "test", "train"),
        ("a.json", "test", "train"),
    ):
        with pytest.raises(ValueError, match=f"has the splits {splits}, not {re.escape(repr(split))}"):
            load_preferences(str(tmp_path / name), split)


def test_hub_ids_and_missing_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([PAIR])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_preferences("owner/name:config", "test")
    load_preferences("owner/name")
    assert asked == [(("owner/name", "config"), {"split": "test"}), (("owner/name", None), {"split": None})]
    for missing in (str(tmp_path / "none"), "none.json", "./none", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_preferences(missing)

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no connection")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"nowhere is no file or folder here, .* no connection"):
        load_preferences("nowhere")
    monkeypatch.undo()
    (tmp_path / "cut.jsonl").write_text(json.dumps(PAIR) + '\n{"prompt": ')
    with pytest.raises(ValueError, match=r"cut.jsonl cannot be read: JSON parse error: .* in row 1"):
        load_preferences(str(tmp_path / "cut.jsonl"))
    (tmp_path / "broken" / "folder").mkdir(parents=True)
    (tmp_path / "broken" / "folder" / "train.json").write_text("{")
    (tmp_path / "broken" / "empty").mkdir()
    for name, content in (("a.json", ""), ("b.json", "[]"), ("c.jsonl", "\n\n"), ("d.parquet", "PAR")):
        (tmp_path / "broken" / name).write_text(content)
    for path in (tmp_path / "broken").iterdir():
        with pytest.raises(ValueError, match=f"{path.name} cannot be read: ."):
            load_preferences(str(path))
    (tmp_path / "pairs.csv").write_text("a")
    with pytest.raises(ValueError, match=r"must end in .json, .jsonl, .parquet"):
        load_preferences(str(tmp_path / "pairs.csv"))


def test_sample_weights_follow_their_rows(tokenizer: Any) -> None:
    rows = datasets.Dataset.from_list([PAIR | {"w": 0.5}, PAIR | {"prompt": "w1 " * 30, "w": 1.0}, PAIR | {"w": 3.0}])
    encoded, report = encode(rows, tokenizer, max_length=20, truncation_side="sequence_end")
    weighted = add_sample_weights(encoded, rows, "w")
    assert report.dropped == 1 and weighted["sample_weight"][:] == [0.5, 3.0]
    assert data_digest(weighted) == data_digest(encoded)  # stores serve weighted and unweighted runs
    batch = collate(list(weighted))
    assert batch.sample_weight.tolist() == [0.5, 3.0] and collate(list(encoded)).sample_weight is None


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0, None, "high"])
def test_bad_sample_weights_name_their_row(tokenizer: Any, weight: Any) -> None:
    rows = datasets.Dataset.from_dict({name: [text] for name, text in PAIR.items()} | {"w": [weight]})
    encoded, _ = encode(rows, tokenizer)
    with pytest.raises(ValueError, match=f"row 0: w must be a finite number of at least 0, found {weight!r}"):
        add_sample_weights(encoded, rows, "w")
