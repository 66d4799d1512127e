"""Preference rows → token ids → padded batches that know which positions predict a response token."""

from __future__ import annotations

import json
import math
import re
import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow as pa
import torch
from torch import Tensor

from .config import RESPONSES
from .segments import NO_SEGMENT, shared_segments, token_boundaries

TRUNCATION_SIDES = ("prompt_start", "sequence_start", "sequence_end")
IGNORE_INDEX = -100

_FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_UNREADABLE = (  # what datasets raises for files it can make nothing of; the last also for one without a line
    datasets.exceptions.DatasetGenerationError,
    datasets.data_files.EmptyDatasetError,
    pa.ArrowException,
    ValueError,
    StopIteration,
)
_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_PROBE = "\uffff"  # a text of one character that no real text holds
_TEMPLATE_END = 8  # tokens at a prompt's end that a template may change without a warning
_ENCODE_ROWS = 256  # rows tokenized by one call of the tokenizer, which spreads them over its threads

Message = dict[str, Any]
Text = str | list[Message]


def load_preferences(source: str, split: str | None = None) -> datasets.Dataset:
    """Rows as they are, from a file, a folder or the Hugging Face hub.

    Args:
        source: a .json, .jsonl or .parquet file; a folder written by ``datasets.save_to_disk``; a folder of such files;
            or a hub id, "name" or "name:config".
        split: as ``datasets.load_dataset`` takes it ("test", "train[:100]"); None for "train" or the only one there is.
            A file, or a dataset saved without splits, is "train".

    Raises:
        FileNotFoundError: a local path that does not exist.
        ValueError: an unknown file type, a file that cannot be read, a split that is not there, or no rows.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in _FILE_BUILDERS:
        raise ValueError(f"{source}: a preference file must end in {', '.join(_FILE_BUILDERS)}")
    try:
        dataset = _load(path, source, split)
    except _UNREADABLE as error:
        raise ValueError(f"{source} cannot be read: {str(error.__cause__ or error) or 'it is empty'}") from error
    if isinstance(dataset, datasets.DatasetDict):
        name = split or ("train" if "train" in dataset or len(dataset) != 1 else next(iter(dataset)))
        dataset = dataset[name] if name in dataset else _slices(dataset, name, source)
    if len(dataset) == 0:
        raise ValueError(f"{source} has no rows")
    return dataset


def _load(path: Path, source: str, split: str | None) -> datasets.Dataset | datasets.DatasetDict:
    if path.is_file():
        return datasets.load_dataset(_FILE_BUILDERS[path.suffix], data_files=str(path))
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        return saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)
    if path.is_dir():
        return datasets.load_dataset(str(path))
    hub_id = hub_name(source)
    try:
        return datasets.load_dataset(hub_id["name"], hub_id["config"], split=split)
    except OSError as error:  # also what a connection or a look-up on the hub raises
        raise FileNotFoundError(
            f"{source} is no file or folder here, and could not be read from the Hugging Face hub: {error}"
        ) from error


def _slices(splits: datasets.DatasetDict, slices: str, source: str) -> datasets.Dataset:
    if slices == "all":
        return datasets.concatenate_datasets(list(splits.values()))
    try:
        parts = datasets.ReadInstruction.from_spec(slices).to_absolute({name: len(splits[name]) for name in splits})
    except ValueError as error:
        raise ValueError(f"{source} has the splits {', '.join(splits)}, not {slices!r} ({error})") from error
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def hub_name(source: str) -> Mapping[str, str | None]:
    """A hub id's "name" and "config"; raises FileNotFoundError for what can only be a local path that is not there."""
    match = _HUB_ID.fullmatch(source)
    if match is None or source.startswith(".") or Path(source).suffix in _FILE_BUILDERS:
        raise FileNotFoundError(f"{source} does not exist (and is no hub id, which has the form [owner/]name)")
    return match.groupdict()


def normalize(row: Mapping[str, Any], index: int, responses: Sequence[str] = RESPONSES) -> dict[str, Any]:
    """One row as {"prompt": text or messages, each response: text or messages, "template_kwargs": dict}.

    Understood are TRL's formats (an explicit prompt, or one that is the common beginning of the responses; text or
    messages; the columns ``tools`` and ``chat_template_kwargs``) and ShareGPT ranking ("conversations", with chosen and
    rejected as one message each; the columns ``system`` and ``tools``). A message is {"role", "content"} or
    {"from", "value"} with ShareGPT's roles. A prompt of text before messages that begin with the assistant's answer is
    the user's turn.

    Fields that are None are left out, however deep in messages, tools and ``chat_template_kwargs``: Arrow gives all
    rows of a column the union of their fields.

    Args:
        row: a row of the dataset.
        index: its number, for errors.
        responses: the responses wanted; the other may be missing where the prompt is explicit.

    Raises:
        ValueError: naming the row, for a field that is missing or of an unknown form.
    """
    sharegpt = row.get("conversations") is not None
    answered = isinstance(row.get("prompt"), str) and all(_is_answer(row.get(name)) for name in responses)
    # UltraFeedback and others repeat as text a prompt that also begins both lists of messages: TRL's rule is to trust
    # the messages then.
    repeated = isinstance(row.get("prompt"), str) and not answered and not isinstance(row.get(responses[0]), str | None)
    implicit = not sharegpt and (row.get("prompt") is None or repeated)
    names = RESPONSES if implicit else tuple(responses)
    if missing := [name for name in names if row.get(name) is None]:
        found = ", ".join(sorted(name for name, value in row.items() if value is not None))
        raise ValueError(
            f"row {index} has no {' and no '.join(missing)}: expected chosen and rejected, beside prompt or "
            f"conversations or with the prompt as their common beginning; found {found or 'no field'}"
        )
    fields: dict[str, Text] = {name: _text_or_messages(row[name], f"row {index}, {name}") for name in names}
    if implicit:
        fields = _split_prompt(fields["chosen"], fields["rejected"], index, repeated)
    elif sharegpt:
        prompt = _text_or_messages(row["conversations"], f"row {index}, conversations")
        if isinstance(prompt, str):
            raise ValueError(f"row {index}, conversations: expected a list of messages, found text")
        if row.get("system") and prompt[0]["role"] != "system":
            prompt = [_with_text({"role": "system", "content": row["system"]}, f"row {index}, system"), *prompt]
        # The format's responses are messages even where a file has them as bare text.
        fields = {k: [{"role": "assistant", "content": v}] if isinstance(v, str) else v for k, v in fields.items()}
        fields["prompt"] = prompt
    elif answered:
        fields["prompt"] = [{"role": "user", "content": row["prompt"]}]
    else:
        fields["prompt"] = _text_or_messages(row["prompt"], f"row {index}, prompt")
    fields = {name: fields[name] for name in ("prompt", *responses)}
    if len({isinstance(value, str) for value in fields.values()}) > 1:
        kinds = ", ".join(f"{k} {'text' if isinstance(v, str) else 'messages'}" for k, v in fields.items())
        raise ValueError(f"row {index}: prompt and responses must all be text or all messages, found {kinds}")
    template_kwargs = _without_none(row.get("chat_template_kwargs") or {})
    if not isinstance(template_kwargs, dict):
        raise ValueError(f"row {index}, chat_template_kwargs: expected a dictionary, found {template_kwargs!r:.200}")
    if tools := row.get("tools"):  # as text they never were Arrow's: what is null there is meant
        try:
            template_kwargs["tools"] = json.loads(tools) if isinstance(tools, str) else _without_none(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"row {index}, tools: expected a list, or one as JSON text; {error}") from error
        if not isinstance(template_kwargs["tools"], list):
            raise ValueError(f"row {index}, tools: expected a list, or one as JSON text; found {tools!r:.200}")
    if taken := {"tokenize", "add_generation_prompt"} & set(template_kwargs):
        raise ValueError(f"row {index}, chat_template_kwargs: {', '.join(sorted(taken))} are not the data's to set")
    return {**fields, "template_kwargs": template_kwargs}


def _text_or_messages(value: Any, where: str) -> Text:
    """Text as it is, or messages as {"role", "content", …} dictionaries without empty fields."""
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, Sequence) or not messages or not all(isinstance(item, Mapping) for item in messages):
        raise ValueError(f"{where}: expected text or a list of messages, found {_seen(value)}")
    return [_message(message, where) for message in messages]


def _message(message: Mapping[str, Any], where: str) -> Message:
    message = _without_none(message)
    if "role" in message:
        return _with_text(dict(message), where)
    if message.get("from") not in _SHAREGPT_ROLES or "value" not in message:
        raise ValueError(
            f'{where}: a message must have "role" and "content", or "value" and "from" (one of '
            f"{', '.join(_SHAREGPT_ROLES)}), found {message!r:.200}"
        )
    return _with_text({"role": _SHAREGPT_ROLES[message["from"]], "content": message["value"]}, where)


def _with_text(message: Message, where: str) -> Message:
    """The message, whose content is text, a list of parts, a tool's result, or missing as beside tool calls."""
    if not isinstance(message.get("content"), str | list | Mapping | None):
        raise ValueError(
            f"{where}: a message's content must be text or a list of parts, found {_seen(message['content'])}"
        )
    return message


def _seen(value: Any) -> str:
    hint = " (a column of JSON in which every text is a date is read as dates: give the data as Parquet)"
    return f"{value!r:.200}{hint if isinstance(value, date) else ''}"


def _without_none(value: Any) -> Any:
    """Without the fields that are None; items of lists stay, since Arrow adds none."""
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _is_answer(value: Any) -> bool:
    """Whether this is messages, or a message, of which the assistant's comes first."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, Mapping):
        return False
    return (first.get("role") or _SHAREGPT_ROLES.get(first.get("from", ""))) == "assistant"


def _split_prompt(chosen: Text, rejected: Text, index: int, repeated: bool) -> dict[str, Text]:
    """The common beginning as the prompt, and what follows it: TRL's rule for an implicit prompt.

    repeated: there is a prompt too, as text.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"row {index}: chosen and rejected must both be text or both messages")
    # One unit at least stays a response, also where one of the two begins the other.
    shortest = min(len(chosen), len(rejected)) - 1
    cut = next((i for i in range(shortest) if chosen[i] != rejected[i]), max(shortest, 0))
    if cut <= 0 and not isinstance(chosen, str):
        if repeated:
            raise ValueError(
                f"row {index}: beside a prompt of text, chosen and rejected must be text, or messages that both begin "
                f"with the assistant's answer, or both with the same other message; found first messages "
                f"{chosen[0]!r:.80} and {rejected[0]!r:.80}"
            )
        raise ValueError(f"row {index} has no prompt, and its chosen and rejected begin with different messages")
    if isinstance(chosen, str) and cut > 0 and chosen[cut - 1] == " ":
        cut -= 1  # tokenizers keep a space with the word that follows it
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


@dataclass(frozen=True)
class Divergence:
    """How a row's prompt ends otherwise before its response than alone.

    tokens: at the end of the prompt alone, from where they differ. alone: their text. instead: of as many tokens in
    their place, the first of the response.
    """

    tokens: int
    row: int
    alone: str
    instead: str

    @classmethod
    def of(cls, alone: list[int], responses: list[list[int]], tokenizer: Any, row: int) -> Divergence:
        instead = next(ids for ids in responses if ids[:1] != alone[:1])[: len(alone)]
        return cls(len(alone), row, tokenizer.decode(alone), tokenizer.decode(instead))

    def __str__(self) -> str:
        return (
            f"up to {self.tokens} tokens, in row {self.row}, where the prompt's end is {self.alone!r:.120} alone, and "
            f"the response begins with {self.instead!r:.120}"
        )


@dataclass(frozen=True)
class EncodeReport:
    """What :func:`encode` did to a dataset; printed, it is one line.

    rows: rows given; kept: rows encoded; dropped: rows left without a response token.
    prompts_cut, responses_cut: kept rows whose prompt, or either response, lost tokens to ``max_length``.
    diverged: rows whose tokenized prompt does not begin the tokenized conversation (see encode); furthest: of how many
    tokens most, and in which row, with their text and that of as many tokens in their place, which begin its response.
    max_length, truncation_side: as given. longest: tokens of the longest kept sequence. tokens: response tokens kept.
    """

    rows: int
    kept: int
    dropped: int
    prompts_cut: int
    responses_cut: int
    diverged: int
    max_length: int | None
    truncation_side: str
    longest: int
    tokens: int
    furthest: Divergence | None = None

    def __str__(self) -> str:
        line = f"{self.kept} of {self.rows} rows, {self.tokens:,} response tokens, longest sequence {self.longest}"
        if self.max_length is not None:
            line += (
                f"; cut to {self.max_length} at {self.truncation_side}: {self.prompts_cut} prompts, "
                f"{self.responses_cut} rows' responses, {self.dropped} rows dropped"
            )
        elif self.dropped:
            line += f"; {self.dropped} rows dropped without a response token"
        if self.furthest:
            line += f"; {self.diverged} prompts tokenize differently alone than before their response: {self.furthest}"
        return line


def encode(
    dataset: datasets.Dataset,
    tokenizer: Any,
    max_length: int | None = None,
    truncation_side: str = "prompt_start",
    responses: Sequence[str] = RESPONSES,
    boundaries: Sequence[str] = (),
) -> tuple[datasets.Dataset, EncodeReport]:
    """Token ids of every row: int32 lists ``prompt_ids`` and, for each response, ``chosen_ids``, ``rejected_ids``; and
    int64 ``row``, the row's index in ``dataset`` (rows without a response token are left out).

    Messages go through the tokenizer's chat template, text is followed by the EOS token. As in TRL, prompt and response
    are tokenized together and the response begins where the result leaves the tokenized prompt: usually right after
    it, earlier where the template or a merge across the boundary changes the prompt's end (``diverged`` counts these
    rows; that end of the prompt is then no part of the sequence). A template may change its own end of a prompt, with a
    warning if it is long; a row in which it changes what precedes the end of the prompt's last message is refused,
    since the words from there on would be trained as response. A leading BOS survives every cut, and stands for an
    empty prompt (EOS where there is no BOS): a response's first token needs a position that predicts it.

    Args:
        dataset: rows that :func:`normalize` understands.
        tokenizer: of transformers.
        max_length: tokens of prompt plus response; None for no limit.
        truncation_side: what goes when a row is longer. The prompt stays one for all responses of a row, as the losses
            assume.
            "prompt_start": the prompt's beginning; then the end of a response that is too long by itself.
            "sequence_start": the prompt's beginning; then a response's beginning. TRL's ``keep_end``, but for the
            prompt, which TRL cuts differently for the two responses.
            "sequence_end": the response's end; a row whose prompt leaves no room is dropped. TRL's ``keep_start``.
        responses: ("chosen", "rejected"), or ("chosen",) for WSPO.
        boundaries: those of ``responses`` that get an int32 list beside their ids, such as ``chosen_boundaries``, from
            :func:`token_boundaries` and for :func:`align`. Their text is what the messages hold, less white space
            around it.

    Raises:
        ValueError: an argument or a row that does not fit, or no row left; a chat template under which words of a
            prompt become response; for ``boundaries``, a tokenizer without character offsets or a template that changes
            the text of a response.
    """
    if truncation_side not in TRUNCATION_SIDES:
        raise ValueError(f"truncation_side must be one of {', '.join(TRUNCATION_SIDES)}; found {truncation_side!r}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must hold a prompt token and a response token, found {max_length}")
    distinct = set(responses)
    if not 0 < len(responses) == len(distinct) or not set(boundaries) <= distinct <= set(RESPONSES):
        found = f"{responses!r} and boundaries {boundaries!r}" if boundaries else repr(responses)
        raise ValueError(f"responses must be some of {', '.join(RESPONSES)}, each once; found {found}")
    if boundaries and not tokenizer.is_fast:
        raise ValueError(f"boundaries need the character offsets of a fast tokenizer; found {type(tokenizer).__name__}")
    columns = ["row", "prompt_ids", *(f"{name}_ids" for name in responses)]
    lists = [*columns[1:], *(f"{name}_boundaries" for name in boundaries)]
    schema = pa.schema([("row", pa.int64()), *((name, pa.list_(pa.int32())) for name in lists)])
    furthest: Divergence | None = None
    tables, counts = [], dict.fromkeys(("dropped", "prompts_cut", "responses_cut", "diverged", "longest", "tokens"), 0)
    for start in range(0, len(dataset), _ENCODE_ROWS):
        rows = range(start, min(start + _ENCODE_ROWS, len(dataset)))
        fields = [normalize(dataset[row], row, responses) for row in rows]
        rendered = [_render(fields[i], tokenizer, row) for i, row in enumerate(rows)]
        encoded = []
        for i, (ids, offsets) in enumerate(_tokenize(rendered, tokenizer, bool(boundaries))):
            row, prompt = rows[i], ids[0]
            ids = _split_sequences(prompt, ids[1:])
            shared = len(ids[0])
            if shared < len(prompt):
                counts["diverged"] += 1
                divergence = Divergence.of(prompt[shared:], ids[1:], tokenizer, row)
                if _changes_words(fields[i], rendered[i][1], divergence.tokens, tokenizer):
                    raise ValueError(
                        f"row {row}: {divergence.tokens} tokens of the prompt change before a response, so that words "
                        f"of its messages would be trained as response: the chat template ends the prompt with "
                        f"{divergence.alone!r:.200} alone, and goes on with {divergence.instead!r:.200} before a "
                        "response; expected a template that changes at most what follows the prompt's last message "
                        "(one that shows the system message in a last user turn alone needs its text in that turn)"
                    )
                furthest = max(furthest or divergence, divergence, key=lambda found: found.tokens)
            ids = _nonempty_prompt(ids, tokenizer, row)
            kept = ids if max_length is None else _truncate(ids, max_length, truncation_side, tokenizer.bos_token_id)
            if not all(kept):
                counts["dropped"] += 1
                continue
            counts["prompts_cut"] += len(kept[0]) < len(ids[0])
            counts["responses_cut"] += any(len(cut) < len(whole) for cut, whole in zip(kept[1:], ids[1:], strict=True))
            counts["longest"] = max(counts["longest"], len(kept[0]) + max(map(len, kept[1:])))
            counts["tokens"] += sum(map(len, kept[1:]))
            encoded.append(dict(zip(columns, (row, *kept), strict=True)))
            for name in boundaries:
                k = columns.index(f"{name}_ids") - 1
                text = rendered[i][1][k]
                spans = _text_spans(fields[i], name, text, tokenizer, row)
                first = len(ids[k]) - len(kept[k]) if truncation_side == "sequence_start" else 0
                of_whole = token_boundaries(text, offsets[k][shared:], spans)
                encoded[-1][f"{name}_boundaries"] = of_whole[first : first + len(kept[k]) + 1]
        tables.append(pa.Table.from_pylist(encoded, schema=schema))
    report = EncodeReport(
        rows=len(dataset),
        kept=len(dataset) - counts["dropped"],
        max_length=max_length,
        truncation_side=truncation_side,
        furthest=furthest,
        **counts,
    )
    if not report.kept:
        raise ValueError(f"no row keeps a response token ({report})")
    if furthest is not None and furthest.tokens > _TEMPLATE_END:
        warnings.warn(
            f"{counts['diverged']} prompts tokenize differently alone than before their response: {furthest}. What "
            "the response begins with is trained: is it the template's?",
            stacklevel=2,
        )
    return datasets.Dataset(pa.concat_tables(tables)), report


def _render(fields: dict[str, Any], tokenizer: Any, row: int) -> tuple[bool, list[str]]:
    """Whether the texts hold their special tokens already, and the texts: the prompt, then prompt + each response."""
    prompt, *responses = (value for name, value in fields.items() if name != "template_kwargs")
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        if not eos:
            raise ValueError("text rows end in the tokenizer's EOS token, and this tokenizer has none")
        return False, [prompt, *(prompt + (text if text.endswith(eos) else text + eos) for text in responses)]
    if tokenizer.chat_template is None:
        raise ValueError(
            f"row {row} holds messages, and the tokenizer has no chat template: give it one, or use rows of text"
        )
    conversations = [(prompt, True), *((prompt + response, False) for response in responses)]
    try:
        return True, [_apply_template(tokenizer, fields, *conversation) for conversation in conversations]
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"row {row}: the chat template does not take these messages: {error}") from error


def _apply_template(tokenizer: Any, fields: dict[str, Any], messages: list[Message], opening: bool = False) -> str:
    kwargs = fields["template_kwargs"]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening, **kwargs)


def _changes_words(fields: dict[str, Any], texts: list[str], tokens: int, tokenizer: Any) -> bool:
    """Whether the prompt alone leaves a conversation before the end of its last message's text.

    What follows that text is the template's, which may end a prompt in its own way (with "<think>", say). What precedes
    it are somebody's words, and would be trained as response.

    tokens: at the end of the prompt alone, which the conversation does not have.
    """
    prompt, alone = fields["prompt"], texts[0]
    if isinstance(prompt, str) or all(text.startswith(alone) for text in texts):
        return False  # tokens merged across the boundary, of a text that is the same
    start = bisect_left(
        range(len(alone)), True, key=lambda i: not all(text.startswith(alone[: i + 1]) for text in texts)
    )
    content = prompt[-1].get("content")
    probe = _PROBE if isinstance(content, str) else [{"type": "text", "text": _PROBE}]
    try:
        other = _apply_template(tokenizer, fields, [*prompt[:-1], prompt[-1] | {"content": probe}], opening=True)
    except (jinja2.TemplateError, TypeError):  # nothing tells the template's end from the words
        return tokens > _TEMPLATE_END
    end = len(alone) - _common_length(alone[::-1], other[::-1])
    return bool(alone[start:end].strip())


def _text_spans(fields: dict[str, Any], response: str, text: str, tokenizer: Any, row: int) -> list[tuple[int, int]]:
    """(start, end) in the rendered conversation ``text`` of the text of each message of its response."""
    prompt, messages = fields["prompt"], fields[response]
    if isinstance(prompt, str):
        return [(len(prompt), len(prompt) + len(messages))]
    spans = []
    for i, message in enumerate(messages):
        if not isinstance(message.get("content"), str):
            continue
        # What stays the same with another text in its place is the template's.
        probe = _apply_template(
            tokenizer, fields, [*prompt, *messages[:i], message | {"content": _PROBE}, *messages[i + 1 :]]
        )
        start = _common_length(text, probe)
        end = len(text) - _common_length(text[start:][::-1], probe[start:][::-1])
        found, content = text[start:end].strip(), message["content"].strip()
        if found != content:
            raise ValueError(
                f"row {row}: the chat template makes {found!r:.80} of the response's text {content!r:.80}, whose "
                "characters then cannot be matched between tokenizers: use level sequence"
            )
        start += text[start:end].index(found)
        spans.append((start, start + len(found)))
    return spans


def _tokenize(
    rendered: list[tuple[bool, list[str]]], tokenizer: Any, offsets: bool
) -> list[tuple[list[list[int]], list[list[tuple[int, int]]]]]:
    """Ids of each row's texts and, where asked for, each token's place in its text.

    Rows of text get the special tokens that the tokenizer adds at their beginning; their EOS is in the text.
    """
    tokenized = []
    for templated, run in groupby(rendered, key=lambda item: item[0]):
        rows = [texts for _, texts in run]
        flat = [text for texts in rows for text in texts]
        encoding = tokenizer(
            flat, add_special_tokens=not templated, return_attention_mask=False, return_offsets_mapping=offsets
        )
        columns = [encoding["input_ids"], encoding["offset_mapping"] if offsets else ()]
        if not templated and (at_end := _tokens_added_at_end(tokenizer)):
            columns = [[values[:-at_end] for values in column] for column in columns]
        ids, places = map(iter, columns)
        tokenized += [(list(islice(ids, len(texts))), list(islice(places, len(texts)))) for texts in rows]
    return tokenized


def _tokens_added_at_end(tokenizer: Any) -> int:
    probe, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    starts = [i for i in range(len(whole)) if probe and whole[i : i + len(probe)] == probe]
    return len(whole) - starts[0] - len(probe) if starts else 0


def _split_sequences(prompt: list[int], sequences: list[list[int]]) -> list[list[int]]:
    """The prompt shared by all sequences, and each sequence's remainder."""
    length = _common_length(prompt, *sequences)
    return [prompt[:length], *(ids[length:] for ids in sequences)]


def _common_length(*sequences: Sequence) -> int:
    """Of the common beginning."""
    together = enumerate(zip(*sequences, strict=False))
    return next((i for i, items in together if len(set(items)) > 1), min(map(len, sequences)))


def _nonempty_prompt(ids: list[list[int]], tokenizer: Any, row: int) -> list[list[int]]:
    if ids[0]:
        return ids
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ValueError(f"row {row} has an empty prompt, and the tokenizer no BOS or EOS token to stand for it")
    return [[first], *ids[1:]]


def _truncate(ids: list[list[int]], max_length: int, side: str, bos: int | None) -> list[list[int]]:
    """Prompt and responses cut to ``max_length``; a response may become empty ("sequence_end")."""
    prompt, *responses = ids
    if side == "sequence_end":
        room = max(0, max_length - len(prompt))
        return [prompt, *(response[:room] for response in responses)]
    room = max_length - 1  # for a response: one prompt token predicts its first token
    responses = [response[:room] if side == "prompt_start" else response[-room:] for response in responses]
    room = max_length - max(map(len, responses))
    if len(prompt) > room:
        prompt = [bos, *prompt[1:][len(prompt) - room :]] if prompt[0] == bos else prompt[-room:]
    return [prompt, *responses]


@dataclass(frozen=True)
class AlignReport:
    """What :func:`align` found; printed, it is one line.

    rows: rows of either side; kept: rows with a segment. segments: their number in the kept rows, and how many
    strong_tokens and weak_tokens they hold. outside: strong tokens of the kept rows that are in none.
    """

    rows: int
    kept: int
    segments: int
    strong_tokens: int
    weak_tokens: int
    outside: int

    def __str__(self) -> str:
        line = (
            f"{self.segments:,} segments of {self.strong_tokens / max(self.segments, 1):.2f} policy tokens and "
            f"{self.weak_tokens / max(self.segments, 1):.2f} weak tokens; {self.outside:,} policy tokens in none"
        )
        return line + (f"; {self.rows - self.kept} rows dropped without a segment" if self.kept < self.rows else "")


def align(
    strong: datasets.Dataset, weak: datasets.Dataset, response: str = "chosen"
) -> tuple[datasets.Dataset, AlignReport]:
    """Segments of one response of all rows that two tokenizers encoded: int64 ``row`` and the int32 lists ``strong``
    and ``weak``, the segment of each token as :func:`shared_segments` numbers them.

    Rows that either side lacks, or that share no segment, are left out.

    Args:
        strong, weak: the same dataset from :func:`encode` with ``boundaries``, by either tokenizer.

    Raises:
        ValueError: no row left.
    """
    column = f"{response}_boundaries"
    other = dict(zip(weak["row"], weak[column], strict=True))
    segments: dict[str, list] = {"row": [], "strong": [], "weak": []}
    counts = dict.fromkeys(("segments", "strong_tokens", "weak_tokens", "outside"), 0)
    for row, boundaries in zip(strong["row"], strong[column], strict=True):
        if row not in other:
            continue
        sides = shared_segments(boundaries, other[row])
        if not (found := int(sides[0].max()) + 1):
            continue
        inside = [int((side != NO_SEGMENT).sum()) for side in sides]
        counts["segments"] += found
        counts["strong_tokens"] += inside[0]
        counts["weak_tokens"] += inside[1]
        counts["outside"] += len(sides[0]) - inside[0]
        for name, value in zip(segments, (row, sides[0].tolist(), sides[1].tolist()), strict=True):
            segments[name].append(value)
    report = AlignReport(rows=len({*strong["row"], *weak["row"]}), kept=len(segments["row"]), **counts)
    if not report.kept:
        raise ValueError("no row has a segment that both tokenizers have whole: is max_length too short?")
    schema = pa.schema([("row", pa.int64()), *((side, pa.list_(pa.int32())) for side in ("strong", "weak"))])
    return datasets.Dataset(pa.table(segments, schema)), report


def add_sample_weights(encoded: datasets.Dataset, dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """``encoded`` with the float column ``sample_weight``: what ``column`` of ``dataset`` holds for each row.

    A pair's loss is multiplied by its weight, and the mean stays over the number of pairs, Σ_i w_i ℓ_i / B: weights of
    1 change nothing, and a pair counts the same in whatever batch it is. Divide the column by its mean to keep the
    gradient's scale.

    Raises:
        ValueError: no such column, or a weight that is missing, no number, negative or not finite, naming its row.
    """
    if column not in dataset.column_names:
        raise ValueError(f"sample_weight_column: no column {column!r}; found {', '.join(dataset.column_names)}")
    weights = dataset[column][:]
    for row, weight in enumerate(weights):
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"row {row}: {column} must be a finite number of at least 0, found {weight!r}")
    return encoded.add_column("sample_weight", [float(weights[row]) for row in encoded["row"]])


@dataclass(frozen=True)
class ResponseBatch:
    """S = len(responses) · B sequences, padded on the right: all chosen first, then all rejected.

    input_ids: (S, T) int64. attention_mask: (S, T) int64.
    targets: (S, T) int64, the token predicted *at* each position if that is a response token, else IGNORE_INDEX.
    positions: (N,) int64, indices of the scored positions in the flattened (S · T) layout, by sequence and time.
    cu_seqlens: (S + 1,) int64, offsets of the sequences in the N scored tokens.
    rows: (B,) int64, the ``row`` of each pair. responses: names, in the order of the sequences.
    sample_weight: (B,) float32, factor of each pair's loss, or None; see :func:`add_sample_weights`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    rows: Tensor
    responses: tuple[str, ...]
    sample_weight: Tensor | None = None

    @property
    def scored(self) -> Tensor:
        """(N,) int64, the targets at ``positions``."""
        return self.targets.flatten()[self.positions]

    def to(self, device: torch.device | str) -> ResponseBatch:
        fields = vars(self).items()
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in fields if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(rows: list[dict[str, Any]], responses: Sequence[str] = RESPONSES, pad_token_id: int = 0) -> ResponseBatch:
    """A batch of rows as :func:`encode` makes them.

    Raises:
        ValueError: no rows, a row without one of the responses, or with an empty prompt or response.
    """
    if not rows:
        raise ValueError("collate needs at least one row")
    for row in rows:
        for column in ("prompt_ids", *(f"{name}_ids" for name in responses)):
            if row.get(column) is None or not len(row[column]):
                raise ValueError(
                    f"row {row.get('row')} has no token in {column}: rows come from prefopt_fast.batch.encode; found "
                    f"{sorted(row)}"
                )
    pairs = [(list(row["prompt_ids"]), list(row[f"{name}_ids"])) for name in responses for row in rows]
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids = torch.full((len(pairs), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    for s, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        input_ids[s, :end] = torch.tensor(prompt + response)
        attention_mask[s, :end] = 1
        targets[s, len(prompt) - 1 : end - 1] = torch.tensor(response)
    lengths = torch.tensor([0, *(len(response) for _, response in pairs)])
    weighted = "sample_weight" in rows[0]
    return ResponseBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        targets=targets,
        positions=(targets.flatten() != IGNORE_INDEX).nonzero().squeeze(-1),
        cu_seqlens=lengths.cumsum(0),
        rows=torch.tensor([row["row"] for row in rows]),
        responses=tuple(responses),
        sample_weight=torch.tensor([row["sample_weight"] for row in rows]) if weighted else None,
    )
