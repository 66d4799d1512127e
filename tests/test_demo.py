"""The demo's task and judge by hand, its preference pairs, and a short run from end to end."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch

from prefopt_fast import demo, demo_report
from prefopt_fast.demo_loop import PairData, dpo_objective, effective_share, make_model, score
from prefopt_fast.demo_task import (
    CORPUS_SLIPS,
    FILLERS,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    SYMBOLS,
    VOCABULARY,
    Prompt,
    corpus_response,
    decode,
    encode,
    far_response,
    flip_by_coin,
    judge,
    preference_pairs,
    sample_prompts,
)

KCAOF = tuple("kcaof")


def corpus_pairs(n: int, seed: int = 0, candidates: int = 8) -> list:
    rng = random.Random(seed)
    return preference_pairs(n, candidates, lambda prompts: [corpus_response(prompt, rng) for prompt in prompts], rng)


@pytest.mark.parametrize(
    ("operation", "answer"), [("copy", "k c a o f"), ("sort", "a c f k o"), ("reverse", "f o a c k")]
)
def test_answers(operation: str, answer: str) -> None:
    prompt = Prompt("formal", operation, KCAOF)
    assert prompt.words == ("<bos>", "formal", operation, "k", "c", "a", "o", "f", "<answer>")
    assert prompt.answer == tuple(answer.split())


@pytest.mark.parametrize(
    ("register", "response", "style", "correct"),
    [
        ("formal", "certainly a c f k o welcome <end>", 1, True),
        ("casual", "sure a c f k o welcome <end>", 1, True),
        ("casual", "certainly a c f k o welcome <end>", 2 / 3, True),  # the other register's opener
        ("formal", "certainly a c f k o um welcome <end>", 2 / 3, True),  # a filler
        ("formal", "certainly a c f k o whatever <end>", 2 / 3, True),  # an impolite closer
        ("formal", "hmm a c f k o so well whatever <end>", 0, True),
        ("formal", "certainly a c f k o welcome", 2 / 3, True),  # never ends
        ("formal", "certainly c a f k o welcome <end>", 1, False),
        ("formal", "certainly a c f k welcome <end>", 1, False),
        ("formal", "certainly a c f k o o welcome <end>", 1, False),
        ("formal", "<end>", 1 / 3, False),
    ],
)
def test_judge(register: str, response: str, style: float, correct: bool) -> None:
    judgement = judge(Prompt(register, "sort", KCAOF), tuple(response.split()))
    assert judgement == (pytest.approx(style), correct)
    assert judgement.reward == pytest.approx(style + correct)
    assert judgement.perfect == (style == 1 and correct)


def test_corpus_slips_and_styles() -> None:
    """Rates of 5,000 responses lie within four standard errors of what the corpus is defined to have."""
    rng = random.Random(0)
    prompts = sample_prompts(5000, rng)
    responses = [corpus_response(prompt, rng) for prompt in prompts]
    judged = [judge(p, r) for p, r in zip(prompts, responses, strict=True)]

    def close(flags: list[bool], rate: float) -> bool:
        return abs(sum(flags) / len(flags) - rate) < 4 * (rate * (1 - rate) / len(flags)) ** 0.5

    assert close([not j.correct for j in judged], CORPUS_SLIPS)
    assert close([r[-2] == "welcome" for r in responses], 1 / 2)
    assert close([not set(FILLERS) & set(r) for r in responses], 1 / 4)
    assert close([j.style == 1 for j in judged], 1 / 3 * 1 / 2 * 1 / 4)
    for prompt, response in zip(prompts, responses, strict=True):
        said = [word for word in response if word in SYMBOLS]
        assert sum(a != b for a, b in zip(said, prompt.answer, strict=True)) <= 1  # a slip is one wrong symbol
        assert response[-1] == "<end>" and len(response) <= RESPONSE_LENGTH
    far = [judge(prompt, far_response(prompt, rng)).correct for prompt in prompts]
    assert close(far, 0.2)


def test_encoding_round_trip() -> None:
    rng = random.Random(0)
    prompts = sample_prompts(50, rng)
    responses = [corpus_response(prompt, rng) for prompt in prompts]
    batch = encode(prompts, responses)
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 19 + 16
    assert batch.input_ids.shape == (50, PROMPT_LENGTH + RESPONSE_LENGTH)
    assert decode(batch.input_ids[:, PROMPT_LENGTH:]) == responses
    assert ((batch.targets != -100).sum(-1) == torch.tensor([len(r) for r in responses])).all()
    assert decode(torch.tensor([[20, 21]])) == [(VOCABULARY[20], VOCABULARY[21])]  # never ends


def test_pairs_are_best_against_worst() -> None:
    seen: list = []
    rng = random.Random(0)

    def respond(prompts: list[Prompt]) -> list:
        seen.append([(prompt, corpus_response(prompt, rng)) for prompt in prompts])
        return [response for _, response in seen[-1]]

    pairs = preference_pairs(40, 4, respond, rng)
    candidates: dict = {}
    for prompt, response in (item for call in seen for item in call):
        candidates.setdefault(prompt, []).append(response)
    assert len(pairs) == 40
    for prompt, chosen, rejected in pairs:
        rewards = [judge(prompt, response).reward for response in candidates[prompt]]
        assert judge(prompt, chosen).reward == max(rewards) > judge(prompt, rejected).reward == min(rewards)
        assert {chosen, rejected} <= set(candidates[prompt])


def test_coin_flips_half_the_labels() -> None:
    pairs = corpus_pairs(400)
    flipped = flip_by_coin(pairs, random.Random(0))
    exchanged = [a.chosen == b.rejected and a.rejected == b.chosen for a, b in zip(pairs, flipped, strict=True)]
    kept = [a == b for a, b in zip(pairs, flipped, strict=True)]
    assert all(x != k for x, k in zip(exchanged, kept, strict=True))
    assert 160 < sum(exchanged) < 240


def test_objectives_see_responses_alone() -> None:
    """Log-probs and the DPO loss of the loop equal those from the model's own logits."""
    pairs = corpus_pairs(6)
    torch.manual_seed(0)
    model, ref = make_model(16, 1, 2, 32), make_model(16, 1, 2, 32)
    data = PairData(pairs, ref)
    batch, *_ = data.rows(slice(0, 6))
    logits = model(batch.input_ids[:, :-1]).logits[:, PROMPT_LENGTH - 1 :].double()
    expected = logits.log_softmax(-1).gather(-1, batch.targets.clamp(min=0)[..., None]).squeeze(-1)
    expected = expected.masked_fill(batch.targets == -100, 0)
    torch.testing.assert_close(score(model, batch).double(), expected, rtol=0, atol=1e-5)

    chosen, rejected = expected.sum(-1).chunk(2)
    margin = 0.1 * ((chosen - data.ref_chosen) - (rejected - data.ref_rejected))
    mean = expected.sum(-1)[:6] / (batch.targets[:6] != -100).sum(-1)
    loss = dpo_objective(data, beta=0.1, nll=1.0)(model, slice(0, 6))
    torch.testing.assert_close(loss.double(), -torch.nn.functional.logsigmoid(margin) - mean, rtol=1e-5, atol=1e-5)


def test_effective_share() -> None:
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert effective_share(weights).tolist() == [1.0, 0.25, 0.5]
    assert demo_report.effective([0.5, 0.5, 0.0, 0.0]) == 0.5


def test_verdicts_come_from_the_numbers() -> None:
    assert demo_report.Claim("x", [0.1, 0.2, 0.3]).row == ["holds", "3 of 3", "+0.20±0.10", "x"]
    assert demo_report.Claim("x", [0.1, -0.2, 0.0]).row[:2] == ["mixed", "1 of 3"]
    assert demo_report.Claim("x", [-0.1, 0.0]).row[:2] == ["does not hold", "0 of 2"]
    assert demo_report.Claim("x", [-0.04], threshold=-0.05).row == ["holds", "1 of 1", "-0.04", "x"]


def test_tables_are_aligned() -> None:
    rows = [["model", "reward", "claim"], ["a", "1.25±0.10", "long words"], ["bc", "0.5", "x"]]
    lines = demo_report.as_text(rows).splitlines()
    assert lines == ["model     reward  claim", "─" * 28, "a      1.25±0.10  long words", "bc           0.5  x"]
    assert demo_report.as_markdown(rows).splitlines()[1] == "| --- | ---: | --- |"


def test_quick_run_writes_everything_and_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert demo.main(["--quick", "--seeds", "3", "--processes", "2", "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= max(100, len(f"  {out}/wpo_weights.png"))
    results = json.loads((out / "results.json").read_text())
    for name, rows in results["tables"].items():
        assert name in printed and all(cell in printed for row in rows for cell in row), name
    for name in ("comparison.png", "curves.png", "wpo_weights.png"):
        assert (out / name).stat().st_size > 20_000
        assert f"![{name}]({name})" in (out / "results.md").read_text() and str(out / name) in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.png",
        "curves.png",
        "results.json",
        "results.md",
        "wpo_weights.png",
    ]

    # The stages draw from generators of their own: side by side and one after the other they give the same.
    again = demo.run_stages([demo.Run(3, demo.QUICK, tmp_path, time.time())], 1)
    assert json.loads(json.dumps(again)) == results["seeds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1", "1"], "seeds must be"),
        (["--processes", "0"], "processes must be"),
        (["--output-dir", __file__], "is a file"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.main(arguments)
