"""The loss modules against float64 full logits, padded and packed, with weights and in every mixture of arguments."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import make_problem, relative_error
from torch import Tensor

import prefopt_fast as pf

VOCAB, HIDDEN, T = 37, 12, 7
LENGTHS = (7, 3, 1, 5, 2, 7)  # of three chosen and three rejected responses


def problem(sequences: int = 6) -> tuple[Tensor, pf.LMHead, Tensor]:
    """hidden (S, T, H) and weight that want gradients, and targets (S, T) with responses of LENGTHS at their ends."""
    hidden, weight, targets = make_problem(sequences * T, VOCAB, HIDDEN)
    targets = targets.view(sequences, T)
    for row, length in zip(targets, LENGTHS, strict=False):
        row[: T - length] = -100
    return (
        hidden.view(sequences, T, HIDDEN).requires_grad_(),
        pf.LMHead(weight.requires_grad_(), torch.randn(VOCAB)),
        targets,
    )


def plain(hidden: Tensor, head: pf.LMHead, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probs, log Σp² and mask from full logits, at the dtype given."""
    log_probs = (hidden @ head.weight.T + head.bias).log_softmax(-1)
    mask = targets != -100
    logprobs = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(mask, logprobs, 0.0), (2 * log_probs).logsumexp(-1), mask


def pair_loss(loss: str, hidden: Tensor, head: pf.LMHead, targets: Tensor, ref: Tensor, weight: Tensor) -> Tensor:
    logprobs, log_sum_sq, mask = plain(hidden, head, targets)
    total, length = logprobs.sum(-1), mask.sum(-1)
    pairs = [pf.SequenceLogprobs(*item) for item in zip(*(x.chunk(2) for x in (total, total / length, length)))]  # noqa: B905
    refs = () if loss == "simpo" else ref.to(total.dtype).chunk(2)
    losses = pf.preference_loss(*pairs, *refs, loss_type=loss, beta=0.3)
    if loss == "ipo":  # under WPO, with the alignment of the paper
        aligned = torch.where(mask, logprobs - log_sum_sq, 0.0).sum(-1) / length
        losses = aligned.exp().chunk(2)[0].mul(aligned.exp().chunk(2)[1]).clamp(max=1).detach() * losses
    return (weight.to(losses.dtype) * losses).mean()


def assert_errors(ours: tuple, truths: tuple, naives: tuple) -> None:
    """Loss and gradients as near to the truth as plain fp32 ones, whose scalar loss may be nearer by luck."""
    worst = max(relative_error(naive, truth) for naive, truth in zip(naives, truths, strict=True))
    for name, value, truth in zip(("loss", "dhidden", "dweight"), ours, truths, strict=True):
        assert relative_error(value, truth) <= 4 * max(worst, torch.finfo(torch.float32).eps), name


def module_of(loss: str) -> torch.nn.Module:
    return pf.WPOLoss("ipo", beta=0.3) if loss == "ipo" else pf.PreferenceLoss(loss, beta=0.3)


def pack(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    keep = targets != -100
    return values[keep], torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", ["sigmoid", "simpo", "ipo"])
def test_against_full_logits(loss: str, packed: bool) -> None:
    hidden, head, targets = problem()
    ref, weight = -5 * torch.rand(6), torch.tensor([1.0, 0.0, 2.5])
    results = []
    for dtype in (torch.float64, torch.float32):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, head.weight)]
        value = pair_loss(loss, inputs[0], pf.LMHead(inputs[1], head.bias.to(dtype)), targets, ref, weight)
        results.append((value, *torch.autograd.grad(value, inputs)))
    refs = {} if loss == "simpo" else {"ref_logps": ref}
    if packed:
        states, cu_seqlens = pack(hidden, targets)
        arguments: tuple[Any, ...] = (states, head, pack(targets, targets)[0])
        value, metrics = module_of(loss)(*arguments, **refs, cu_seqlens=cu_seqlens, sample_weight=weight)
    else:
        value, metrics = module_of(loss)(hidden, head, targets, **refs, sample_weight=weight)
    ours = (value, *torch.autograd.grad(value, (hidden, head.weight)))
    assert_errors(ours, *results)
    assert metrics["rewards/margins"].shape == (3,) and not metrics["rewards/margins"].requires_grad
    assert ("wpo/weight" in metrics) == (loss == "ipo")


def test_the_reference_may_come_by_token() -> None:
    hidden, head, targets = problem()
    by_token = torch.where(targets == -100, torch.nan, -torch.rand(6, T))  # what is ignored is not read
    by_sequence = by_token.nansum(-1)
    expected, _ = pf.PreferenceLoss()(hidden, head, targets, by_sequence)
    torch.testing.assert_close(pf.PreferenceLoss()(hidden, head, targets, by_token)[0], expected)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_wspo_against_full_logits(level: str) -> None:
    hidden, head, targets = problem()
    frozen = [-torch.rand(6, T) for _ in range(3)]
    criterion = pf.WSPOLoss(0.4, level, sft_weight=0.5)
    value, metrics = criterion(hidden, head, targets, *frozen)
    ours = (value, *torch.autograd.grad(value, (hidden, head.weight)))
    results = []
    for dtype in (torch.float64, torch.float32):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, head.weight)]
        logprobs, _, mask = plain(inputs[0], pf.LMHead(inputs[1], head.bias.to(dtype)), targets)
        losses = pf.wspo_loss(logprobs, *(x.to(dtype) for x in frozen), mask, 0.4, level)
        value = (losses - 0.5 * logprobs.sum(-1) / mask.sum(-1)).mean()
        results.append((value, *torch.autograd.grad(value, inputs)))
    assert_errors(ours, *results)
    assert metrics["wspo/target"].shape == (6,)
    packed, cu_seqlens = pack(hidden, targets)
    arguments = [pack(x, targets)[0] for x in (targets, *frozen)]
    again, _ = criterion(packed, head, arguments[0], *arguments[1:], cu_seqlens=cu_seqlens)
    torch.testing.assert_close(again, ours[0])
    if level == "token":  # a segment for each token
        each = torch.arange(T).expand(6, T)
        again, _ = pf.WSPOLoss(0.4, "segment", sft_weight=0.5)(hidden, head, targets, *frozen, segments=each)
        torch.testing.assert_close(again, ours[0])


def test_segments_of_responses_whose_first_tokens_are_ignored() -> None:
    """What is left of a row is shorter than its segments' numbers."""
    hidden, head, targets = problem(2)
    targets[0, :4], segments = -100, torch.tensor([[0, 0, 1, 2, 5, 6, 6]] * 2)
    frozen = [-torch.rand(2, T) for _ in range(3)]
    value, _ = pf.WSPOLoss(0.4, "segment")(hidden, head, targets, *frozen, segments=segments)
    logprobs, _, mask = plain(hidden, head, targets)
    expected = pf.wspo_loss(logprobs, *frozen, mask, 0.4, "segment", segments)
    torch.testing.assert_close(value, expected.mean())


@pytest.mark.parametrize("criterion", [pf.PreferenceLoss, pf.WPOLoss, pf.WSPOLoss])
def test_modules_are_made_under_another_default_device(criterion: type[torch.nn.Module]) -> None:
    with torch.device("meta"):
        criterion()


def test_an_inexact_gradient_draws_its_columns_with_torch() -> None:
    hidden, head, targets = problem()
    hidden, head = hidden.bfloat16().detach().requires_grad_(), pf.LMHead(head.weight.bfloat16())

    def gradient(criterion: torch.nn.Module) -> Tensor:
        return torch.autograd.grad(criterion(hidden, head, targets, torch.zeros(6))[0], hidden)[0]

    def state_moves(criterion: torch.nn.Module) -> bool:
        before = torch.get_rng_state()
        gradient(criterion)
        return not torch.equal(before, torch.get_rng_state())

    assert state_moves(pf.PreferenceLoss()) and not state_moves(pf.PreferenceLoss(grad_tolerance=0.0))
    torch.manual_seed(3)
    first = gradient(pf.PreferenceLoss(grad_tolerance=0.3))
    torch.manual_seed(3)
    assert torch.equal(first, gradient(pf.PreferenceLoss(grad_tolerance=0.3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, w, t: pf.PreferenceLoss("dpo"), "loss_type must be one of"),
        (lambda h, w, t: pf.PreferenceLoss(gamma=1.0), r"sigmoid takes label_smoothing; found \['gamma'\]"),
        (lambda h, w, t: pf.PreferenceLoss(label_smoothing=0.7), "label_smoothing must be in"),
        (lambda h, w, t: pf.WPOLoss(alignment="best"), "alignment must be one of"),
        (lambda h, w, t: pf.PreferenceLoss(sft_weight=float("nan")), "sft_weight must be in"),
        (lambda h, w, t: pf.WSPOLoss(level="word"), "level must be"),
        (lambda h, w, t: pf.PreferenceLoss()(h, w, t * 0 - 100, torch.zeros(6)), "at least one scored token"),
        (lambda h, w, t: pf.WPOLoss()(h, w, t), "WPOLoss needs ref_logps"),
        (lambda h, w, t: pf.PreferenceLoss("orpo")(h, w, t, torch.zeros(6)), "is reference-free"),
        (lambda h, w, t: pf.PreferenceLoss()(h, w, t, torch.zeros(3)), r"ref_logps must be \(6,\), .*found \(3,\)"),
        (lambda h, w, t: pf.PreferenceLoss()(h[:5], w, t[:5], torch.zeros(5)), "found 5 sequences"),
        (lambda h, w, t: pf.PreferenceLoss()(h, w, t[:4], torch.zeros(4)), r"hidden \(6, 7, 12\) must be targets"),
        (lambda h, w, t: pf.PreferenceLoss("simpo")(h, w, t, sample_weight=torch.ones(6)), r"sample_weight .*\(3,\)"),
        (lambda h, w, t: pf.WSPOLoss()(h, w, t, t * 0.0, t * 0.0, torch.zeros(6)), r"\(6, 7\), found weak_ref \(6,\)"),
        (lambda h, w, t: pf.WSPOLoss()(h, w, t, *[t * 0.0] * 3, segments=t), 'segments go with level "segment"'),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*problem())


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.make_model(tmp_path / "model")
    pairs = tiny.make_pairs(tmp_path / "pairs.json", 8)
    arguments = ["--model", model, "--data", pairs, "--steps", "12", "--learning-rate", "1e-2"]
    monkeypatch.setattr(sys, "argv", ["plain_pytorch.py", *arguments])
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "plain_pytorch.py"), run_name="__main__")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert len(losses) == 12 and losses[-1] < losses[0]
