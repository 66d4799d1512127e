"""The demo's world: a toy assistant whose every answer a program can judge.

A prompt names a register, an operation and five distinct symbols, "<bos> formal sort k c a o f <answer>"; a response is
an opener, the answer, up to three fillers, a closer and the end: "certainly a c f k o um welcome <end>". What to answer
and how to say it are separate skills: the corpus teaches the first and leaves the second to chance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PAD, BOS, ANSWER, END = SPECIALS = ("<pad>", "<bos>", "<answer>", "<end>")
OPERATIONS = ("copy", "sort", "reverse")
RIGHT_OPENER = {"formal": "certainly", "casual": "sure"}  # by register
OPENERS = (*RIGHT_OPENER.values(), "hmm")
POLITE = "welcome"
CLOSERS = (POLITE, "whatever")
FILLERS = ("um", "well", "like", "so", "anyway")
SYMBOLS = tuple("abcdefghijklmnop")
VOCABULARY = (*SPECIALS, *RIGHT_OPENER, *OPERATIONS, *OPENERS, *CLOSERS, *FILLERS, *SYMBOLS)
TOKEN_IDS = {word: i for i, word in enumerate(VOCABULARY)}

N_SYMBOLS = 5
PROMPT_LENGTH = N_SYMBOLS + 4
MAX_FILLERS = 3
RESPONSE_LENGTH = N_SYMBOLS + MAX_FILLERS + 3  # at most
CORPUS_SLIPS = 0.1
FAR_SLIPS = 0.8

Response = tuple[str, ...]  # all words after the prompt, "<end>" included


class Prompt(NamedTuple):
    register: str
    operation: str
    symbols: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        return (BOS, self.register, self.operation, *self.symbols, ANSWER)

    @property
    def answer(self) -> tuple[str, ...]:
        match self.operation:
            case "sort":
                return tuple(sorted(self.symbols))
            case "reverse":
                return self.symbols[::-1]
        return self.symbols


class Judgement(NamedTuple):
    style: float  # in [0, 1]
    correct: bool

    @property
    def reward(self) -> float:
        return self.style + self.correct

    @property
    def perfect(self) -> bool:
        return self.style == 1.0 and self.correct


class Pair(NamedTuple):
    prompt: Prompt
    chosen: Response
    rejected: Response


def judge(prompt: Prompt, response: Response) -> Judgement:
    """Style: a third each for the register's opener, a polite closer before the end, and no filler. The answer is the
    symbols said, in order."""
    style = (
        response[0] == RIGHT_OPENER[prompt.register],
        response[-2:] == (POLITE, END),
        not any(word in FILLERS for word in response),
    )
    said = tuple(word for word in response if word in SYMBOLS)
    return Judgement(sum(style) / 3, said == prompt.answer)


def sample_prompts(n: int, rng: random.Random) -> list[Prompt]:
    registers = tuple(RIGHT_OPENER)
    return [
        Prompt(rng.choice(registers), rng.choice(OPERATIONS), tuple(rng.sample(SYMBOLS, N_SYMBOLS))) for _ in range(n)
    ]


def corpus_response(prompt: Prompt, rng: random.Random) -> Response:
    """The answer, in one of ten cases with one wrong symbol; opener, fillers and closer whatever the prompt says."""
    answer = list(prompt.answer)
    if rng.random() < CORPUS_SLIPS:
        position = rng.randrange(N_SYMBOLS)
        answer[position] = rng.choice([symbol for symbol in SYMBOLS if symbol != answer[position]])
    return _with_style(answer, rng)


def far_response(prompt: Prompt, rng: random.Random) -> Response:
    """Of a policy far from the corpus: four answers in five are any five symbols."""
    answer = rng.sample(SYMBOLS, N_SYMBOLS) if rng.random() < FAR_SLIPS else list(prompt.answer)
    return _with_style(answer, rng)


def _with_style(answer: list[str], rng: random.Random) -> Response:
    fillers = rng.choices(FILLERS, k=rng.randint(0, MAX_FILLERS))
    return (rng.choice(OPENERS), *answer, *fillers, rng.choice(CLOSERS), END)


def preference_pairs(
    n: int, candidates: int, respond: Callable[[list[Prompt]], list[Response]], rng: random.Random
) -> list[Pair]:
    """n pairs, each the judge's best against its worst of a prompt's candidates; the first such on a tie. Prompts whose
    candidates all score alike give no pair and are replaced."""
    pairs: list[Pair] = []
    while len(pairs) < n:
        prompts = sample_prompts(n - len(pairs), rng)
        responses = respond([prompt for prompt in prompts for _ in range(candidates)])
        for i, prompt in enumerate(prompts):
            rewards = {r: judge(prompt, r).reward for r in responses[i * candidates : (i + 1) * candidates]}
            chosen, rejected = max(rewards, key=rewards.__getitem__), min(rewards, key=rewards.__getitem__)
            if rewards[chosen] > rewards[rejected]:
                pairs.append(Pair(prompt, chosen, rejected))
    return pairs


def flip_by_coin(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """The same pairs, half of them by chance with chosen and rejected exchanged: labels that say nothing."""
    return [Pair(p.prompt, p.rejected, p.chosen) if rng.random() < 0.5 else p for p in pairs]


class Batch(NamedTuple):
    """Prompts have one length, so that all responses start in one column."""

    input_ids: Tensor  # (B, PROMPT_LENGTH + RESPONSE_LENGTH), padded on the right
    targets: Tensor  # (B, RESPONSE_LENGTH), -100 where padded

    def rows(self, rows: slice) -> Batch:
        return Batch(self.input_ids[rows], self.targets[rows])


def encode(prompts: Sequence[Prompt], responses: Sequence[Response]) -> Batch:
    width = PROMPT_LENGTH + RESPONSE_LENGTH
    rows = [[TOKEN_IDS[word] for word in (*p.words, *r)] for p, r in zip(prompts, responses, strict=True)]
    input_ids = torch.tensor([row + [TOKEN_IDS[PAD]] * (width - len(row)) for row in rows])
    targets = input_ids[:, PROMPT_LENGTH:]
    return Batch(input_ids, targets.masked_fill(targets == TOKEN_IDS[PAD], -100))


def encode_prompts(prompts: Sequence[Prompt]) -> Tensor:
    """(B, PROMPT_LENGTH) token ids."""
    return torch.tensor([[TOKEN_IDS[word] for word in prompt.words] for prompt in prompts])


def decode(tokens: Tensor) -> list[Response]:
    """Each row's words up to and with the first "<end>", or all of them where it never ends."""
    rows = [tuple(VOCABULARY[token] for token in row) for row in tokens.tolist()]
    return [row[: row.index(END) + 1] if END in row else row for row in rows]
