"""WSPO's target against the reference, on every backend."""

from __future__ import annotations

import importlib

import pytest
import torch
from conftest import make_problem, relative_error

import prefopt_fast as pf
from prefopt_fast.log_ratio import token_log_ratio


def truth(aligned_hidden, aligned_head, ref_hidden, ref_head, targets):
    aligned = pf.reference.token_logprobs(aligned_hidden, aligned_head, targets)
    return aligned.logprobs - pf.reference.token_logprobs(ref_hidden, ref_head, targets).logprobs


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_two_heads_of_different_size(backend: str, device: str) -> None:
    hidden, weight, targets = make_problem(24, 70, 32, device=device)
    ref_hidden, ref_weight, _ = make_problem(24, 75, 16, device=device)
    targets[5:9] = -100
    heads = pf.LMHead(weight, softcap=8.0), pf.LMHead(ref_weight, torch.randn(75, device=device), logit_scale=0.5)
    operands = (hidden, heads[0], ref_hidden, heads[1], targets)
    result = token_log_ratio(*operands, backend=backend, cu_seqlens=torch.tensor([0, 10, 24], device=device))
    expected = truth(*operands)
    assert relative_error(result.ratio, expected) < 1e-6
    means = torch.stack([expected[:10].sum() / 6, expected[10:].mean()])
    assert relative_error(result.mean, means) < 1e-6
    assert (result.ratio[5:9] == 0).all() and not result.ratio.requires_grad


def test_padded_layout_and_bf16(device: str) -> None:
    hidden, weight, targets = make_problem(12, 40, 16, torch.bfloat16, device=device)
    ref_hidden, ref_weight, _ = make_problem(12, 40, 16, torch.bfloat16, device=device)
    operands = (hidden.view(2, 6, 16), pf.LMHead(weight), ref_hidden.view(2, 6, 16), pf.LMHead(ref_weight))
    result = token_log_ratio(*operands, targets.view(2, 6), backend="triton")
    assert relative_error(result.ratio, truth(*operands, targets.view(2, 6))) < 1e-5
    assert result.mean.shape == (2,)


def test_all_ignored_packed_without_offsets(device: str) -> None:
    hidden, weight, targets = make_problem(5, 40, 16, device=device)
    head = pf.LMHead(weight)
    result = token_log_ratio(hidden, head, hidden, head, torch.full_like(targets, -100), backend="triton")
    assert (result.ratio == 0).all() and result.mean is None


def test_bad_input(device: str) -> None:
    hidden, weight, targets = make_problem(5, 40, 16, torch.float64, device=device)
    head = pf.LMHead(weight)
    with pytest.raises(NotImplementedError, match='backend="torch"'):
        token_log_ratio(hidden, head, hidden, head, targets, backend="triton")
    with pytest.raises(ValueError, match="hidden"):
        token_log_ratio(hidden, head, hidden[:3], head, targets, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_input_comes_before_any_work(backend: str, monkeypatch) -> None:
    hidden, weight, targets = make_problem(6, 40, 16)
    head, module = pf.LMHead(weight), importlib.import_module("prefopt_fast.log_ratio")
    monkeypatch.setattr(module, "token_logprobs", None)
    monkeypatch.setattr(module, "resolve_backend", None)
    with pytest.raises(ValueError, match="hidden"):
        token_log_ratio(hidden, head, hidden[:3], head, targets, backend=backend)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        token_log_ratio(hidden, head, hidden, head, targets, torch.tensor([0, 4]), backend)


def test_dtypes_as_in_token_logprobs(device: str) -> None:
    hidden, weight, targets = make_problem(12, 40, 16, device=device)
    head, half = pf.LMHead(weight), pf.LMHead(weight.bfloat16())
    with pytest.raises(ValueError, match=r"hidden and head\.weight must have one dtype"):
        token_log_ratio(hidden, head, hidden, half, targets, backend="triton")
    with torch.autocast(device, torch.bfloat16):
        found = token_log_ratio(hidden, half, 2 * hidden, head, targets, backend="triton").ratio
    expected = token_log_ratio(hidden.bfloat16(), half, (2 * hidden).bfloat16(), half, targets, backend="triton").ratio
    assert torch.equal(found, expected)


def test_operator(device: str) -> None:
    hidden, weight, targets = make_problem(5, 40, 16, device=device)
    args = (hidden, weight, None, hidden, weight, None, targets, 1.0, None, 2.0, 5.0, -100)
    import prefopt_fast.kernels.log_ratio  # noqa: F401  (registers the operator)

    torch.library.opcheck(torch.ops.prefopt_fast.log_ratio.default, args)
