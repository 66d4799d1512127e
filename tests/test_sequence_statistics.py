"""The per-sequence launch against the plain functions it stands in for."""

from __future__ import annotations

import pytest
import torch

import prefopt_fast as pf


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("alignment", ["sampled", "none"])
def test_statistics_and_gradient(packed: bool, alignment: str, device: str) -> None:
    from prefopt_fast.kernels import sequence_statistics as kernels

    shape = (2100,) if packed else (3, 70)
    offsets = torch.tensor([0, 7, 1100, 2100], device=device, dtype=torch.int32) if packed else None
    logprobs = -torch.rand(shape, device=device)
    mask = torch.rand(shape, device=device) < 0.6
    logprobs = (logprobs * mask).requires_grad_()
    sq = -torch.rand(shape, device=device) * mask if alignment == "sampled" else None
    sums, means, lengths, weights = kernels.sequence_statistics(logprobs, mask, sq, offsets)

    exact = logprobs.detach().double().requires_grad_()
    stats = pf.TokenStats(exact, mask, log_sum_sq_probs=None if sq is None else sq.double())
    expected = pf.sequence_logprobs(stats, offsets)
    assert torch.equal(lengths, expected.length)
    torch.testing.assert_close(sums.double(), expected.sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(means.double(), expected.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights.double(), pf.wpo_weights(stats, alignment, offsets), rtol=1e-6, atol=0)

    ours = torch.autograd.grad((sums * 2 + means * means).sum(), logprobs)[0]
    theirs = torch.autograd.grad((expected.sum * 2 + expected.mean**2).sum(), exact)[0]
    torch.testing.assert_close(ours.double(), theirs * mask, rtol=1e-6, atol=1e-9)


def test_strided_offsets(device: str) -> None:
    from prefopt_fast.kernels import sequence_statistics as kernels

    logprobs, mask = -torch.rand(30, device=device), torch.ones(30, dtype=torch.bool, device=device)
    offsets = torch.tensor([[0, 0], [12, 5], [30, 7]], device=device)[:, 0]
    found, expected = (kernels.sequence_statistics(logprobs, mask, None, x) for x in (offsets, offsets.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_operator(device: str) -> None:
    from prefopt_fast.kernels import sequence_statistics as _  # noqa: F401  (registers the operator)

    logprobs = (-torch.rand(3, 20, device=device)).requires_grad_()
    mask = torch.ones(3, 20, device=device, dtype=torch.bool)
    torch.library.opcheck(torch.ops.prefopt_fast.sequence_statistics.default, (logprobs, mask, None, None))


def test_sequence_without_tokens(device: str) -> None:
    """Its mean is NaN, its gradient 0, and the others' are their own."""
    from prefopt_fast.kernels import sequence_statistics as kernels

    logprobs = (-torch.rand(2, 8, device=device)).requires_grad_()
    mask = torch.tensor([[False] * 8, [True] * 8], device=device)
    _, means, lengths, _ = kernels.sequence_statistics(logprobs, mask, None, None)
    assert means[0].isnan() and lengths.tolist() == [0, 8]
    assert torch.autograd.grad(means[1], logprobs)[0].isfinite().all()
