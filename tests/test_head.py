"""LMHead: its errors and the one place where scale, cap and temperature meet. Real model families: test_policy.py."""

from __future__ import annotations

import pytest
import torch

import prefopt_fast as pf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(9)}, r"weight must be a floating-point \(V, H\) matrix, found \(9,\)"),
        ({"weight": torch.zeros(9, 3, dtype=torch.int8)}, "found .* torch.int8"),
        (
            {"bias": torch.zeros(3)},
            r"bias must have one entry for each of the 9 rows of weight \(9, 3\), found shape \(3,\)",
        ),
        ({"softcap": 0.0}, "softcap must be positive or None, found 0.0"),
        ({"logit_scale": -1.0}, "logit_scale must be positive, found -1.0"),
        ({"temperature": 0.0}, "temperature must be positive, found 0.0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pf.LMHead(**({"weight": torch.zeros(9, 3)} | arguments))


def test_transform_folds_the_temperature_into_scale_and_cap():
    scale, cap = pf.LMHead(torch.zeros(9, 3), softcap=30.0, logit_scale=0.5, temperature=2.0).transform
    x = torch.linspace(-200, 200, 11, dtype=torch.float64)
    torch.testing.assert_close(cap * torch.tanh(scale * x / cap), 30.0 * torch.tanh(0.5 * x / 30.0) / 2.0)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="Linear has no output embedding"):
        pf.LMHead.from_model(torch.nn.Linear(2, 2))
