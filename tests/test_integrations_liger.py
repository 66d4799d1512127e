"""Code written for Liger's chunked losses, run with both: loss, gradients and auxiliary outputs."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import assert_as_good_as_plain, make_problem
from torch import Tensor

import prefopt_fast.integrations.liger as ours

theirs = pytest.importorskip("liger_kernel.chunked_loss")

VOCAB, HIDDEN, T, PAIRS = 41, 12, 6, 4


def inputs(with_bias: bool = True) -> dict[str, Tensor]:
    hidden, weight, target = make_problem(2 * PAIRS * T, VOCAB, HIDDEN)
    ref_hidden, ref_weight, _ = make_problem(2 * PAIRS * T, VOCAB, HIDDEN)
    target = target.view(2 * PAIRS, T)
    nll_target = target.clone()
    for i, row in enumerate(target):
        row[: i % 4] = -100
    biases = {"bias": torch.randn(VOCAB), "ref_bias": torch.randn(VOCAB)} if with_bias else {}
    return {
        "lin_weight": weight,
        "_input": hidden.view(2 * PAIRS, T, HIDDEN),
        "target": target,
        "nll_target": nll_target,
        "ref_input": ref_hidden.view(2 * PAIRS, T, HIDDEN),
        "ref_weight": ref_weight,
        **biases,
    }


def run(module: torch.nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The call as Liger's users write it, and all that comes of it; twice the loss goes backward."""
    cast = {k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    trained = {name: cast[name].requires_grad_() for name in ("lin_weight", "_input", "bias") if name in cast}
    loss, aux = module(**cast)
    (2 * loss).backward()
    grads = {f"d{name}": tensor.grad for name, tensor in trained.items()}
    return {"loss": loss} | {f"aux{i}": value for i, value in enumerate(aux)} | grads


REF = ("ref_input", "ref_weight", "ref_bias")
CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    *(("DPO", {"loss_type": name}, REF) for name in ("sigmoid", "hinge", "nca_pair", "bco_pair", "apo_zero")),
    *(("DPO", {"loss_type": name}, REF) for name in ("sppo_hard", "apo_down")),
    ("DPO", {"loss_type": "robust", "label_smoothing": 0.1, "beta": 0.3}, REF),
    ("DPO", {"loss_type": "exo_pair", "label_smoothing": 1e-3}, REF),
    ("DPO", {"loss_type": "discopop", "discopop_tau": 0.1}, REF),
    ("DPO", {"compute_nll_loss": True, "alpha": 0.7, "average_log_prob": True, "chunk_size": 3}, REF),
    ("DPO", {"use_ref_model": False}, ()),
    ("SimPO", {"gamma": 0.3, "label_smoothing": 0.1, "beta": 2.0}, ()),
    ("CPO", {"label_smoothing": 0.1, "alpha": 0.5}, ()),
    ("CPO", {"compute_nll_loss": False, "average_log_prob": True}, ()),
    ("ORPO", {"chunk_size": 2}, ()),
    ("ORPO", {}, ("nll_target",)),
]


@pytest.mark.parametrize(("name", "options", "extra"), CASES)
def test_paired(name: str, options: dict[str, Any], extra: tuple[str, ...]) -> None:
    tensors = inputs(with_bias=options.get("loss_type") != "hinge")
    wanted = ("lin_weight", "_input", "target", "bias", *extra)
    compare(name, options, {k: v for k, v in tensors.items() if k in wanted})


def test_bf16() -> None:
    tensors = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs().items() if k != "nll_target"}
    truth = run(ours.LigerFusedLinearDPOLoss(), tensors, torch.float64)
    mine = run(ours.LigerFusedLinearDPOLoss(), tensors, torch.bfloat16)
    liger = run(theirs.LigerFusedLinearDPOLoss(compiled=False), tensors, torch.bfloat16)
    for part, value in mine.items():
        assert value.dtype == liger[part].dtype, part
        assert_as_good_as_plain(value, liger[part], truth[part], name=part)


@pytest.mark.parametrize("kl", [None, 1.5, -2.0])
def test_kto(kl: float | None) -> None:
    tensors = inputs()
    del tensors["nll_target"]
    tensors["preference_labels"] = torch.tensor([True, False] * PAIRS)
    if kl is not None:
        tensors["kl"] = torch.tensor(kl)
    compare("KTO", {"use_ref_model": True}, tensors)
    tensors["preference_labels"] = torch.ones(2 * PAIRS, dtype=torch.bool)
    compare("KTO", {"beta": 0.3, "average_log_prob": True}, {k: v for k, v in tensors.items() if k not in REF})


def compare(name: str, options: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Ours in fp32 is as near to ours in float64 as Liger's, which always rounds its log-softmax to fp32."""
    cls = f"LigerFusedLinear{name}Loss"
    module = getattr(ours, cls)(**options)
    truth, mine = (run(module, tensors, dtype) for dtype in (torch.float64, torch.float32))
    liger = run(getattr(theirs, cls)(**options, compiled=False), tensors, torch.float32)
    assert list(mine) == list(liger)
    for part, value in mine.items():
        assert value.shape == liger[part].shape and value.requires_grad == (part == "loss"), part
        # Liger's own distance from the truth also says that both compute the same thing.
        torch.testing.assert_close(liger[part].double(), truth[part].double(), rtol=1e-4, atol=1e-5, msg=part)
        assert_as_good_as_plain(value, liger[part], truth[part], factor=4.0, name=part)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ours.LigerFusedLinearDPOLoss(loss_type="ipo"), "loss_type must be one of sigmoid, .*found 'ipo'"),
        (lambda: ours.LigerFusedLinearDPOLoss(label_smoothing=0.1), "label_smoothing has no effect on .*'sigmoid'"),
        (lambda: ours.LigerFusedLinearDPOLoss(discopop_tau=0.1), "discopop_tau has no effect"),
        (lambda: ours.LigerFusedLinearDPOLoss(loss_type="exo_pair"), r"label_smoothing must be in \(0"),
        (lambda: ours.LigerFusedLinearSimPOLoss(label_smoothing=0.5), r"label_smoothing must be in \[0"),
    ],
)
def test_bad_options(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_input() -> None:
    tensors = inputs()
    call = (tensors["lin_weight"], tensors["_input"], tensors["target"])
    with pytest.raises(ValueError, match="use_ref_model=True needs ref_input and ref_weight"):
        ours.LigerFusedLinearDPOLoss()(*call)
    with pytest.raises(ValueError, match="as many rejected sequences, found 7"):
        ours.LigerFusedLinearCPOLoss()(call[0], call[1][:7], call[2][:7])
    with pytest.raises(ValueError, match="preference_labels must be a boolean tensor"):
        ours.LigerFusedLinearKTOLoss()(call[1], call[0], call[2], preference_labels=torch.ones(8))
    with pytest.raises(ValueError, match=r"target must be \(sequences, T\), found \(48,\)"):
        ours.LigerFusedLinearCPOLoss()(call[0], call[1].flatten(0, 1), call[2].flatten())


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, pairs = tiny.make_model(tmp_path / "model"), tiny.make_pairs(tmp_path / "pairs.json", 8)
    monkeypatch.setattr(sys, "argv", ["liger_dpo.py", "--model", model, "--data", pairs, "--learning-rate", "1e-2"])
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "liger_dpo.py"), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert len(lines) == 4 and abs(float(lines[0][-1]) - math.log(2)) < 1e-3 and float(lines[-1][3]) != 0
