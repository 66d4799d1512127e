"""Sums, means and WPO weights: by hand, padded against packed, and their errors."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import make_problem
from prefopt_fast.kernels import sequence_statistics

import prefopt_fast as pf
from prefopt_fast import sequence_stats
from prefopt_fast.sequence_stats import segment_sum


def stats_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    return pf.TokenStats(logprobs, mask, log_sum_sq_probs=-0.5 * mask.float(), max_logprob=-0.25 * mask.float())


def test_sequence_logprobs_by_hand():
    total, mean, length = pf.sequence_logprobs(stats_by_hand())
    assert total.tolist() == [-3.0, -3.0] and mean.tolist() == [-1.5, -3.0] and length.tolist() == [2, 1]


def test_chunks_are_what_length_normalised_losses_take():
    chosen, rejected = pf.sequence_logprobs(stats_by_hand()).chunk(2)
    assert (chosen.sum, chosen.mean, chosen.length, rejected.mean) == (-3.0, -1.5, 2, -3.0)
    ref = torch.tensor([-4.0]), torch.tensor([-5.0])
    loss = pf.preference_loss(chosen, rejected, *ref, loss_type="ipo", beta=1.0)
    assert loss.tolist() == [((-3 + 4) / 2 - (-3 + 5) / 1 - 0.5) ** 2]


@pytest.mark.parametrize(("alignment", "shift"), [("sampled", 0.5), ("greedy", 0.25), ("none", 0.0)])
def test_wpo_weights_by_hand(alignment, shift):
    weights = pf.wpo_weights(stats_by_hand(), alignment)
    expected = torch.tensor([math.exp(-1.5 + shift), math.exp(-3.0 + shift)])
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad


def test_weight_of_a_deterministic_model_is_one():
    """Where the policy puts all mass on the response's tokens, every alignment calls it on-policy."""
    head = pf.LMHead(50.0 * torch.eye(5))
    targets = torch.arange(5).view(1, 5)
    stats = pf.token_logprobs(torch.eye(5)[None], head, targets, stats=("log_sum_sq_probs", "max_logprob"))
    for alignment in pf.ALIGNMENTS:
        torch.testing.assert_close(pf.wpo_weights(stats, alignment), torch.ones(1))


def test_packed_equals_padded():
    lengths = [3, 1, 4]
    hidden, weight, targets = make_problem(sum(lengths), 20, 6)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    padded_hidden, padded_targets = torch.zeros(3, 4, 6), torch.full((3, 4), -100)
    for row, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        padded_hidden[row, : end - start], padded_targets[row, : end - start] = hidden[start:end], targets[start:end]
    extra = ("log_sum_sq_probs", "max_logprob")
    packed = pf.token_logprobs(hidden, pf.LMHead(weight), targets, stats=extra)
    padded = pf.token_logprobs(padded_hidden, pf.LMHead(weight), padded_targets, stats=extra)
    for a, b in zip(pf.sequence_logprobs(packed, cu_seqlens), pf.sequence_logprobs(padded), strict=True):
        torch.testing.assert_close(a, b)
    for alignment in pf.ALIGNMENTS:
        torch.testing.assert_close(pf.wpo_weights(packed, alignment, cu_seqlens), pf.wpo_weights(padded, alignment))


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_that_the_mask_leaves_out_count_nowhere(packed):
    stats = pf.TokenStats(torch.tensor([[-1.0, -2.0, -3.0, -4.0]]), torch.tensor([[True, True, False, False]]))
    if packed:
        stats = pf.TokenStats(stats.logprobs[0], stats.mask[0])
    total, mean, _ = pf.sequence_logprobs(stats, torch.tensor([0, 4]) if packed else None)
    assert (total, mean) == (-3.0, -1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_sums_of_long_sequences_keep_their_digits(packed, dtype):
    values = -torch.rand(1, 4000).to(dtype)
    total = segment_sum(*(values[0], torch.tensor([0, 4000])) if packed else (values, None))
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(float(values.double().sum()), rel=1e-6)


def test_sums_keep_to_the_backend_of_the_statistics(monkeypatch):
    """Where Triton cannot compile, backend="torch" is to be enough."""
    monkeypatch.setattr(sequence_stats, "resolve_backend", lambda backend, device: "triton")
    used = []
    monkeypatch.setattr(sequence_statistics, "sequence_statistics", lambda *_: used.append(1) or (torch.ones(2),) * 4)
    hidden, weight, targets = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randint(5, (2, 3))
    stats = pf.token_logprobs(hidden, pf.LMHead(weight), targets, ("log_sum_sq_probs",), backend="torch")
    for backend, launches in (("torch", 0), ("reference", 0), ("triton", 2), ("auto", 2)):
        used.clear()
        pf.sequence_logprobs(replace(stats, backend=backend))
        pf.wpo_weights(replace(stats, backend=backend))
        assert len(used) == launches, backend
    assert stats.backend == "torch"


def test_gradient_reaches_the_tokens():
    logprobs = torch.randn(2, 3, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    total, mean, _ = pf.sequence_logprobs(pf.TokenStats(logprobs * mask, mask))
    grad = torch.autograd.grad((total * torch.tensor([1.0, 2.0])).sum() + mean.sum(), logprobs)[0]
    torch.testing.assert_close(grad, torch.tensor([[4 / 3] * 3, [2.5, 2.5, 0.0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: pf.wpo_weights(s, "beam"), "alignment must be one of sampled, greedy, none; found 'beam'"),
        (
            lambda s: pf.wpo_weights(pf.TokenStats(s.logprobs, s.mask)),
            r'"sampled" needs .*stats=\("log_sum_sq_probs",\)',
        ),
        (lambda s: pf.sequence_logprobs(pf.TokenStats(s.logprobs[0], s.mask[0])), r"found \(3,\) without cu_seqlens"),
        (
            lambda s: pf.sequence_logprobs(pf.TokenStats(s.logprobs[0], s.mask[0]), torch.tensor([0, 2])),
            r"rise from 0 to the 3 packed tokens, found \[0, 2\]",
        ),
        (
            lambda s: pf.sequence_logprobs(pf.TokenStats(s.logprobs[0], s.mask[0]), torch.tensor([], dtype=torch.long)),
            r"cu_seqlens must be \(B \+ 1,\) integers .*found cu_seqlens \(0,\)",
        ),
        (
            lambda s: pf.sequence_logprobs(pf.TokenStats(s.logprobs, s.mask & torch.tensor([[True], [False]]))),
            r"at least one scored token; sequences \[1\] of 2 have none",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(stats_by_hand())
