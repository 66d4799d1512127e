"""Segments of two tokenizations: hand-worked, of random splits, through templates and truncation, and trained on."""

from __future__ import annotations

import itertools
import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prefopt_fast as pf
from prefopt_fast import trainer
from prefopt_fast.batch import align, encode
from prefopt_fast.config import TrainConfig
from prefopt_fast.policy import load_model, load_tokenizer

TEXTS = ["The weak model knows why.", "Strong models follow, slowly.", "A naïve café 😀 déjà vu 日本", "why not"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Trims, opens the answer with a mark of its own that is not in the prompt, and ends it without a line break.
TURNS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% if m['role'] == 'assistant' %}{{ '<think></think>' }}"
    "{% endif %}{{ ' ' + m['content'] | trim + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def byte_level(vocabulary: int = 290, nfc: bool = False) -> PreTrainedTokenizerFast:
    """Bytes and some merges of them, as GPT-2 and its heirs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_end|>", "<|im_start|>"]
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        ),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    made.chat_template = CHATML
    return made


def sentence_piece(vocabulary: int = 360) -> PreTrainedTokenizerFast:
    """Spaces as ▁ on the words that follow, one more in front of the text, and bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "</s>", "<think>", "</think>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        ["▁" + text.replace(" ", "▁") for text in TEXTS[:2]],
        trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    made.chat_template = TURNS
    return made


def conversation(answer: str | list[str]) -> dict[str, Any]:
    answers = [answer] if isinstance(answer, str) else answer
    turns = [[{"role": "assistant", "content": text}, {"role": "user", "content": "why"}] for text in answers]
    return {"prompt": [{"role": "user", "content": "why not"}], "chosen": [*itertools.chain(*turns)][:-1]}


def encoded(rows: list[dict], tokenizer: Any, *limits: Any) -> datasets.Dataset:
    return encode(datasets.Dataset.from_list(rows), tokenizer, *limits, responses=("chosen",), boundaries=("chosen",))[
        0
    ]


def pieces(tokenizer: Any, ids: list[int], segments: list[int]) -> list[str]:
    """The tokens of each segment, decoded together."""
    members = [[t for t, segment in zip(ids, segments, strict=True) if segment == k] for k in range(max(segments) + 1)]
    return [tokenizer.decode(tokens) for tokens in members]


def test_by_hand() -> None:
    """ "unhappily": un|happi|ly and un|hap|pily share the ends of "un" and of the word."""
    strong, weak = pf.shared_segments([0, 2, 7, 9], [0, 2, 5, 9])
    assert strong.tolist() == [0, 1, 1] and weak.tolist() == [0, 1, 1]
    # The weak tokens were cut after "hap": of the word's second segment nothing is whole.
    strong, weak = pf.shared_segments([0, 2, 7, 9], [0, 2, 5])
    assert strong.tolist() == [0, -1, -1] and weak.tolist() == [0, -1]
    # The strong side's beginning is cut, up to "happi|ly".
    strong, weak = pf.shared_segments(torch.tensor([2, 7, 9]), torch.tensor([0, 2, 5, 9]))
    assert strong.tolist() == [0, 0] and weak.tolist() == [-1, 0, 0]
    # No common end, and a token that ends inside a character.
    assert [side.tolist() for side in pf.shared_segments([0, 3], [1, 2])] == [[-1], [-1]]
    assert [side.tolist() for side in pf.shared_segments([0, -1, 3], [0, 2, 3])] == [[0, 0], [0, 0]]


def test_spreading_by_hand() -> None:
    weak = torch.tensor([-1.0, -2.0, -3.0, -9.0])
    spread = pf.spread_over_segments(weak, torch.tensor([0, 1, 1, -1]), torch.tensor([-1, 0, 0, 1, -1]))
    assert spread.tolist() == [0.0, -0.5, -0.5, -5.0, 0.0]


def test_random_splits() -> None:
    """Segments tile what both sides have, on the same text, and are as many as there are common boundaries."""
    rng = random.Random(0)
    for _ in range(300):
        length = rng.randrange(2, 30)
        sides = []
        for _ in range(2):
            boundaries = sorted({0, length, *rng.sample(range(length), rng.randrange(length))})
            first, last = sorted(rng.sample(range(len(boundaries)), 2))
            cut = boundaries[first : last + 1]
            sides.append([-1 if 0 < i < len(cut) - 1 and rng.random() < 0.2 else b for i, b in enumerate(cut)])
        common = sorted(set(sides[0]) & set(sides[1]) - {-1})
        for boundaries, segments in zip(sides, pf.shared_segments(*sides), strict=True):
            segments = segments.tolist()
            assert len(segments) == len(boundaries) - 1
            for k, (start, end) in enumerate(itertools.pairwise(common)):
                tokens = [t for t, segment in enumerate(segments) if segment == k]
                assert tokens == list(range(tokens[0], tokens[-1] + 1))
                assert (boundaries[tokens[0]], boundaries[tokens[-1] + 1]) == (start, end)
            assert max(segments) == max(len(common) - 2, -1)


def loss(level: str, tensors: list[torch.Tensor], segments: torch.Tensor | None = None) -> torch.Tensor:
    return pf.wspo_loss(*tensors, torch.ones_like(tensors[0]), gamma=0.3, level=level, segments=segments)


def test_levels_meet() -> None:
    tensors = [-torch.rand(2, 6) for _ in range(4)]
    tensors[0].requires_grad_()
    each = torch.arange(6).expand(2, 6)
    token, segment = loss("token", tensors), loss("segment", tensors, each)
    assert torch.equal(segment, token)
    assert torch.equal(*(torch.autograd.grad(value.sum(), tensors[0])[0] for value in (segment, token)))
    torch.testing.assert_close(loss("segment", tensors, 0 * each), loss("sequence", tensors))
    between = loss("segment", tensors, torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 2, 2]]))
    assert bool((loss("sequence", tensors) <= between).all()) and bool((between <= token).all())


def test_the_loss_is_the_token_level_of_the_targets_that_fit_best() -> None:
    """Log-ratios s = (1, 2, 4) against sums R = (3, 1) of segments {1, 2} and {3}, γ = 1 and N = 3."""
    policy, zero = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    segments, mask = torch.tensor([[0, 0, 1, -1]]), torch.ones(1, 4)

    def level(name: str, targets: list[float], **kwargs: Any) -> float:
        target = torch.tensor([targets], dtype=torch.float64)
        return float(pf.wspo_loss(policy, zero, target, zero, mask, gamma=1.0, level=name, **kwargs))

    expected = ((1 + 2 - 3) ** 2 / 2 + (4 - 1) ** 2) / 3
    for first in (0.0, 1.5, 3.0):  # however the sum of the first segment is spread
        assert level("segment", [first, 3 - first, 1.0, 0.0], segments=segments) == pytest.approx(expected)
    fits = [(1 - r) ** 2 + (2 - (3 - r)) ** 2 + (4 - 1) ** 2 for r in torch.linspace(-2, 4, 61).tolist()]
    assert min(fits) / 3 == pytest.approx(expected)


def test_gradient() -> None:
    others = [torch.randn(2, 5, dtype=torch.float64) for _ in range(3)]
    policy = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0, 0, 1, 2, 2], [-1, 0, 0, 0, -1]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])

    def of(policy: torch.Tensor) -> torch.Tensor:
        return pf.wspo_loss(policy, *others, mask, gamma=0.5, level="segment", segments=segments)

    assert torch.autograd.gradcheck(of, policy)
    grad = torch.autograd.grad(of(policy)[0], policy)[0]
    ratio, target = 0.5 * (policy - others[0]), others[1] - others[2]
    # Of the third segment one token is masked: 2γ (γ S_k − R_k) / (n_k N), n_k = 2, 1, 1 and N = 4
    residual = (ratio - target).detach()[0]
    expected = [residual[:2].sum() / 2, residual[:2].sum() / 2, residual[2], residual[3], torch.tensor(0.0)]
    torch.testing.assert_close(grad[0], torch.stack([r.double() for r in expected]) / 4)
    assert not grad[1].any()


def test_bytes_of_a_character_are_one_segment() -> None:
    """a é 😀 b in bytes: 1 + 2 + 4 + 1 tokens; by characters: one each."""
    text = "aé😀b"
    by_byte = byte_level(258)(text, return_offsets_mapping=True)["offset_mapping"]
    boundaries = pf.token_boundaries(text, by_byte, [(0, 4)])
    assert boundaries == [0, 1, -1, 2, -1, -1, -1, 3, 4]
    strong, weak = pf.shared_segments(boundaries, range_boundaries(4))
    assert strong.tolist() == [0, 1, 1, 2, 2, 2, 2, 3] and weak.tolist() == [0, 1, 2, 3]
    # " " and the first byte of é, then its second byte and "b": no boundary is inside é, and none before it.
    assert pf.token_boundaries(" éb", [(0, 2), (1, 3)], [(0, 3)]) == [0, -1, 3]


def range_boundaries(length: int) -> list[int]:
    return list(range(length + 1))


def test_normalization_keeps_the_offsets_of_the_text() -> None:
    """ "cafe" + combining accent: NFC makes é of two characters, and reports the first alone as the token's."""
    text = "cafe\u0301 x"
    strong, weak = (
        pf.token_boundaries(text, tokenizer(text, return_offsets_mapping=True)["offset_mapping"], [(0, len(text))])
        for tokenizer in (byte_level(258, nfc=True), byte_level(258))
    )
    assert strong == [0, 1, 2, 3, -1, 5, 6, 7]
    assert weak == [0, 1, 2, 3, 4, -1, 5, 6, 7]
    assert [ids.tolist() for ids in pf.shared_segments(strong, weak)] == [
        [0, 1, 2, 3, 3, 4, 5],
        [0, 1, 2, 3, 3, 3, 4, 5],
    ]


def test_tokens_of_no_width_and_skipped_space() -> None:
    # A zero-width token goes with what precedes it; an EOS without characters ends the turn, wherever it points.
    assert pf.token_boundaries("ab", [(0, 1), (1, 1), (1, 2), (0, 0)], [(0, 2)]) == [0, -1, 1, 2, 3]
    assert pf.token_boundaries("ab", [(0, 0), (0, 1), (1, 2)], [(0, 2)]) == [-1, 0, 1, 2]
    # Words without their spaces, against words with the space before them.
    assert pf.token_boundaries("ab cd ef", [(0, 2), (3, 5), (6, 8)], [(0, 8)]) == [0, 2, 5, 8]
    assert pf.token_boundaries("ab cd ef", [(0, 2), (2, 5), (5, 8)], [(0, 8)]) == [0, 2, 5, 8]


def test_templates_stay_outside() -> None:
    """Opening marks are in no segment; each side's end of the turn is the last one, whatever its tokens."""
    strong, weak = byte_level(), sentence_piece()
    rows = [conversation("  Strong models 😀 why. \n")]
    left, right = encoded(rows, strong), encoded(rows, weak)
    assert right[0]["chosen_ids"][:2] == weak.convert_tokens_to_ids(["<think>", "</think>"])
    segments, report = align(left, right)
    found = [
        pieces(tokenizer, side[0]["chosen_ids"], segments[0][name])
        for tokenizer, side, name in ((strong, left, "strong"), (weak, right, "weak"))
    ]
    # Space around the text is the template's: the strong model's at the end goes with the end of the turn.
    assert found[0][-1] == " \n<|im_end|>\n" and found[1][-1] == "</s>"
    assert [text.strip() for text in found[0][:-1]] == [text.strip() for text in found[1][:-1]]
    assert "".join(found[0][:-1]).strip() == "Strong models 😀 why." and "😀" in [text.strip() for text in found[0]]
    assert segments[0]["weak"][:2] == [-1, -1] and right[0]["chosen_boundaries"][2] == 0
    assert report.kept == 1 and report.outside == segments[0]["strong"].count(-1)
    assert str(report).startswith(f"{len(found[0])} segments of ")


def test_several_messages() -> None:
    strong, weak = byte_level(), sentence_piece()
    rows = [conversation(["why", "Strong models"])]
    left, right = encoded(rows, strong), encoded(rows, weak)
    segments = align(left, right)[0][0]
    found = pieces(strong, left[0]["chosen_ids"], segments["strong"])
    other = pieces(weak, right[0]["chosen_ids"], segments["weak"])
    between = found.index("<|im_end|>\n<|im_start|>user\n")
    assert other[between] == "</s> [user] " and found[between + 1].strip() == other[between + 1].strip() != ""
    assert found[-1] == "<|im_end|>\n" and other[-1] == "</s>"


def test_text_rows_and_a_foreign_eos() -> None:
    """Text of a row is text to both: an EOS that only one tokenizer has is characters, and its own is left out."""
    strong, weak = byte_level(), sentence_piece()
    rows = [{"prompt": "why not", "chosen": " why</s>"}, {"prompt": "why not", "chosen": " Strong models"}]
    left, right = encoded(rows, strong), encoded(rows, weak)
    segments = align(left, right)[0]
    assert pieces(strong, left[0]["chosen_ids"], segments[0]["strong"])[-1] == "</s>"
    assert left[0]["chosen_boundaries"][-1] == 9 and segments[0]["strong"][-1] == -1
    assert pieces(weak, right[0]["chosen_ids"], segments[0]["weak"])[-1] == "</s>"
    assert pieces(strong, left[1]["chosen_ids"], segments[1]["strong"])[-1] == "<|im_end|>"
    assert pieces(weak, right[1]["chosen_ids"], segments[1]["weak"])[-1] == "</s>"


@pytest.mark.parametrize("side", ["prompt_start", "sequence_start"])
def test_truncation_leaves_what_both_have_whole(side: str) -> None:
    """What is left is a slice of the whole rows' segments, without a segment that either side lacks a token of."""
    strong, weak = byte_level(), sentence_piece()
    rows = [conversation("The weak model knows 😀 why. Strong models follow, slowly.")]
    whole = align(encoded(rows, strong), encoded(rows, weak))[0][0]
    count = max(whole["strong"]) + 1
    for limits in ((21, 9), (21, None), (None, 9)):
        left, right = (encoded(rows, t, n, side) for t, n in zip((strong, weak), limits, strict=True))
        segments = align(left, right)[0][0]
        kept = max(segments["strong"]) + 1
        assert 0 < kept < count
        shift = 0 if side == "prompt_start" else count - kept
        for name, dataset in (("strong", left), ("weak", right)):
            tokens = whole[name]
            cut = len(dataset[0]["chosen_ids"])
            tokens = tokens[:cut] if side == "prompt_start" else tokens[-cut:]
            assert segments[name] == [k - shift if shift <= k < shift + kept else -1 for k in tokens]
            assert all(segments[name].count(k) == whole[name].count(k + shift) for k in range(kept))


def test_one_tokenizer_on_both_sides_is_the_token_level() -> None:
    tokenizer = sentence_piece()
    rows = encoded([conversation("Strong models follow")], tokenizer)
    segments = align(rows, rows)[0][0]
    text = [k for k in segments["strong"] if k >= 0]
    assert text == list(range(len(text))) and segments["strong"] == segments["weak"]


def make_model(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run_options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two models of bytes, two of word pieces, each pair with a template of its own, and conversations."""
    folder = tmp_path_factory.mktemp("inputs")
    strong, weak = byte_level(), sentence_piece()
    rng = random.Random(0)
    rows = [conversation(" ".join(rng.sample(TEXTS, 2))) for _ in range(6)]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return {
        "model": make_model(folder / "strong", strong, 0),
        "ref_model": make_model(folder / "ref", strong, 1),
        "weak_aligned_model": make_model(folder / "aligned", weak, 2),
        "weak_ref_model": make_model(folder / "weak", weak, 3),
        "dataset": str(folder / "pairs.json"),
        "objective": "wspo",
        "gamma": 0.5,
        "save_steps": 0,
        "learning_rate": 1e-3,
        "max_length": 70,
    }


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "draw_curves", lambda output_dir, title: output_dir / "curves.png")


@torch.no_grad()
def logprobs(source: str, row: dict[str, Any]) -> torch.Tensor:
    """Float64, from full logits of the unpadded row."""
    ids = torch.tensor(row["prompt_ids"] + row["chosen_ids"])
    logits = load_model(source).double().eval()(ids[None]).logits[0, len(row["prompt_ids"]) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[len(row["prompt_ids"]) :, None])[:, 0]


def log_ratio(options: dict[str, Any], row: dict[str, Any], policy: str, reference: str) -> torch.Tensor:
    return logprobs(options[policy], row) - logprobs(options[reference], row)


@pytest.mark.parametrize("level", ["segment", "sequence"])
def test_training_with_two_tokenizers(run_options: dict[str, Any], tmp_path: Path, level: str) -> None:
    """The first loss against float64 on each model's own tokens and template; then some steps, which lower it."""
    options = run_options | {"level": level, "per_device_train_batch_size": 6, "num_train_epochs": 4.0}
    trainer.train(TrainConfig(**options, output_dir=str(tmp_path / "out")))
    metrics = tiny.read_metrics(tmp_path / "out")
    rows = datasets.Dataset.from_list(json.loads(Path(options["dataset"]).read_text()))
    strong, weak = (
        encode(rows, load_tokenizer(options[name]), 70, responses=("chosen",), boundaries=("chosen",))[0]
        for name in ("model", "weak_aligned_model")
    )
    assert load_tokenizer(options["weak_ref_model"]).decode(weak[0]["prompt_ids"]) == " [user] why not</s> [assistant]"
    assert load_tokenizer(options["model"]).decode(strong[0]["prompt_ids"]).startswith("<|im_start|>user\nwhy not<|im")
    segments, losses = align(strong, weak)[0], []
    for i in range(len(rows)):
        s = 0.5 * log_ratio(options, strong[i], "model", "ref_model")
        r = log_ratio(options, weak[i], "weak_aligned_model", "weak_ref_model")
        if level == "sequence":
            losses.append(float((s.mean() - r.mean()) ** 2))
            continue
        mine, theirs = (torch.tensor(segments[i][name]) for name in ("strong", "weak"))
        squares = [
            (s[mine == k].sum() - r[theirs == k].sum()) ** 2 / (mine == k).sum() for k in range(int(mine.max()) + 1)
        ]
        losses.append(float(sum(squares) / (mine >= 0).sum()))
    assert metrics[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_an_interrupted_run_goes_on_and_another_tokenizer_is_another_run(
    run_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = run_options | {"level": "segment", "per_device_train_batch_size": 3, "test_split_size": 0.3}
    trainer.train(TrainConfig(**options | {"max_steps": 4}, output_dir=str(tmp_path / "whole")))
    step = trainer.Loop._train_step

    def stop(loop: trainer.Loop, batch: list[int]) -> torch.Tensor:
        if loop.step == 2:
            raise KeyboardInterrupt
        return step(loop, batch)

    options |= {"max_steps": 4, "save_steps": 2, "logprobs_dir": str(tmp_path / "logprobs")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Loop, "_train_step", stop)
        trainer.train(TrainConfig(**options, output_dir=str(tmp_path / "out")))
    trainer.train(TrainConfig(**options, output_dir=str(tmp_path / "out")))
    assert tiny.read_metrics(tmp_path / "out") == tiny.read_metrics(tmp_path / "whole")
    stores = {store.name for store in (tmp_path / "logprobs").iterdir()}

    # Stores are of tokens: another level finds them there.
    trainer.train(TrainConfig(**options | {"level": "sequence"}, output_dir=str(tmp_path / "sequence")))
    assert stores == {store.name for store in (tmp_path / "logprobs").iterdir()}

    # The same weights with another template: other tokens of the same texts, another store, another run.
    weak = load_tokenizer(options["weak_aligned_model"])
    weak.chat_template = TURNS.replace("'['", "'('")
    copy = str(tmp_path / "copy")
    load_model(options["weak_aligned_model"]).save_pretrained(copy)
    weak.save_pretrained(copy)
    with pytest.raises(ValueError, match=r"holds another run, which differs in\n  segments_data: .*\n  weak_data: "):
        trainer.train(TrainConfig(**options | {"weak_aligned_model": copy}, output_dir=str(tmp_path / "out")))
    options |= {"weak_aligned_model": copy, "output_dir": str(tmp_path / "other")}
    trainer.train(TrainConfig(**options))
    assert stores < {store.name for store in (tmp_path / "logprobs").iterdir()}


def test_a_template_of_its_own_is_used_where_the_vocabulary_is_the_policy_s(
    run_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """At sequence and segment level; at token level, and without a template, the policy's tokens are scored."""
    tokenizer = byte_level()
    for name, template in (("other", CHATML.replace("im_start", "start")), ("none", None)):
        tokenizer.chat_template = template
        make_model(tmp_path / name, tokenizer, 2)
    for name, level, own in (
        ("other", "segment", True),
        ("other", "sequence", True),
        ("other", "token", False),
        ("none", "segment", False),
    ):
        weak = {f"weak_{kind}_model": str(tmp_path / name) for kind in ("aligned", "ref")}
        out = tmp_path / f"{name}-{level}"
        trainer.train(TrainConfig(**run_options | weak | {"level": level, "max_steps": 1}, output_dir=str(out)))
        assert ("in the weak models' tokens" in capsys.readouterr().out) == own


def test_segment_level_with_one_tokenizer_is_the_token_level(run_options: dict[str, Any], tmp_path: Path) -> None:
    options = run_options | {"weak_aligned_model": run_options["ref_model"], "weak_ref_model": run_options["model"]}
    for level in ("token", "segment"):
        trainer.train(TrainConfig(**options | {"level": level}, output_dir=str(tmp_path / level)))
    assert tiny.read_metrics(tmp_path / "token") == tiny.read_metrics(tmp_path / "segment")


def test_the_example_computes_what_train_does(
    run_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its first loss, on the first row, is that of a run on that row."""
    names = ("model", "weak_aligned_model", "weak_ref_model", "max_length", "gamma")
    rows = json.loads(Path(run_options["dataset"]).read_text())[:2]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "row.json").write_text(json.dumps(rows[:1]))
    options = {name: run_options[name] for name in names} | {"dataset": str(tmp_path / "rows.json")}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["example", *flags, f"--output-dir={tmp_path / 'out'}"])
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "wspo_across_tokenizers.py"), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert "segments of" in printed[0] and len(printed) == 3
    assert (tmp_path / "out" / "model.safetensors").is_file()

    options |= {"dataset": str(tmp_path / "row.json"), "objective": "wspo", "level": "segment", "max_steps": 1}
    trainer.train(TrainConfig(**options, output_dir=str(tmp_path / "train")))
    assert float(printed[1].split()[-1]) == pytest.approx(tiny.read_metrics(tmp_path / "train")[0]["loss"], abs=1e-4)


def test_models_that_do_not_fit_are_refused_before_any_work(run_options: dict[str, Any], tmp_path: Path) -> None:
    def attempt(**changes: Any) -> None:
        trainer.train(TrainConfig(**run_options | changes, output_dir=str(tmp_path / "out")))

    with pytest.raises(ValueError, match=r"level token .*another tokenizer.*: use level sequence, .*or level segment"):
        attempt(level="token")
    with pytest.raises(ValueError, match="must have one tokenizer, and both be given as models"):
        attempt(level="segment", weak_ref_model=run_options["model"])
    assert not (tmp_path / "out").exists()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"weak_boundaries must be integers .* found torch.float32 \(2,\)"):
        pf.shared_segments([0, 1], torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"strong_boundaries must be positions that rise, or -1; found \[0, 2, 2\]"):
        pf.shared_segments([0, 2, 2], [0, 1])
    with pytest.raises(ValueError, match="strong_segments has 2 segments, weak_segments 1"):
        pf.spread_over_segments(torch.ones(2), torch.tensor([0, 0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"found \(3,\) weak values for \(2,\) weak tokens"):
        pf.spread_over_segments(torch.ones(3), torch.tensor([0, 0]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"expected tokens, and spans that rise within 2 characters; found 0 tokens"):
        pf.token_boundaries("ab", [], [(0, 2)])
    zeros = [torch.zeros(1, 2)] * 4
    for level, segments in (("segment", None), ("token", torch.zeros(1, 2))):
        with pytest.raises(ValueError, match='level "segment" needs segments, and no other level takes them; found "'):
            pf.wspo_loss(*zeros, torch.ones(1, 2), level=level, segments=segments)
    with pytest.raises(ValueError, match=r"segments \(1, 3\)"):
        pf.wspo_loss(*zeros, torch.ones(1, 2), level="segment", segments=torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"sequences \[0\] of 1 have none"):
        pf.wspo_loss(*zeros, torch.ones(1, 2), level="segment", segments=torch.tensor([[-1, -1]]))


def test_rows_that_cannot_be_aligned() -> None:
    tokenizer = byte_level()
    with pytest.raises(ValueError, match=r"responses must be some of .* and boundaries \('rejected',\)"):
        encode(
            datasets.Dataset.from_list([conversation("why")]),
            tokenizer,
            None,
            "prompt_start",
            ("chosen",),
            ("rejected",),
        )
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | upper")
    with pytest.raises(ValueError, match=r"row 0: the chat template makes 'WHY' of the response's text 'why'"):
        encoded([conversation("why")], tokenizer)
    # One token of either side is no common boundary: the first row goes, and with it alone nothing is left.
    rows = [conversation("😀😀"), conversation("why")]
    left, right = encoded(rows, byte_level(), 2), encoded(rows, sentence_piece())
    segments, report = align(left, right)
    assert segments["row"] == [1] and "1 rows dropped without a segment" in str(report)
    with pytest.raises(ValueError, match="no row has a segment that both tokenizers have whole"):
        align(left.select([0]), right.select([0]))
