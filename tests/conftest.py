"""Shapes, seeds and the tolerance helper shared by all tests.

Truth is float64 (the reference backend). A result may be wrong by a small multiple of what the same mathematics costs
in plain torch at the same dtype, which each test measures on its own inputs: see :func:`assert_as_good_as_plain`.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import prefopt_fast as pf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU, or the CPU with Triton's interpreter."""
    return DEVICE


@pytest.fixture(scope="session")
def real_model() -> str:
    """Folder of a real language model, for the tests that want one."""
    return _from_environment("PREFOPT_FAST_MODEL")


@pytest.fixture(scope="session")
def real_data() -> str:
    """File of real preference pairs, for the tests that want one."""
    return _from_environment("PREFOPT_FAST_DATA")


def _from_environment(name: str) -> str:
    path = os.environ.get(name)
    if not path or not os.path.exists(path):
        pytest.skip(f"set {name} to run this")
    return path


def make_problem(
    n: int, vocab: int, hidden: int, dtype: torch.dtype = torch.float32, device: str = "cpu", scale: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, H), weight (V, H) and targets (N,) with logits of standard deviation ``scale``."""
    states = torch.randn(n, hidden, device=device, dtype=torch.float64) * (scale / hidden**0.5)
    weight = torch.randn(vocab, hidden, device=device, dtype=torch.float64)
    targets = torch.randint(0, vocab, (n,), device=device)
    return states.to(dtype), weight.to(dtype), targets


def make_text_like(n: int, vocab: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same with Zipf's law over the vocabulary and targets from the softmax: here gradients can be sampled."""
    states, weight, _ = make_problem(n, vocab, hidden, scale=1.0)
    weight[:, 0] = -2.0 * torch.arange(2.0, vocab + 2).log()
    states[:, 0] = 1.0
    return states, weight, torch.multinomial((states @ weight.T).softmax(-1), 1).squeeze(1)


def plain_stats(hidden: Tensor, head: pf.LMHead, targets: Tensor, ignore_index: int = -100) -> dict[str, Tensor]:
    """What a user would write: full logits and log_softmax at the inputs' dtype, upcast to fp32 after the product."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits / head.temperature
    log_probs = logits.log_softmax(-1)
    ignored = targets == ignore_index
    index = targets.masked_fill(ignored, 0)[..., None]
    values = {
        "logprobs": log_probs.gather(-1, index).squeeze(-1),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
        "max_logprob": log_probs.amax(-1),
        "entropy": torch.special.entr(log_probs.exp()).sum(-1),
        "mean_logit": logits.mean(-1),
        "logsumexp": logits.logsumexp(-1),
    }
    return {name: value.masked_fill(ignored, 0) for name, value in values.items()}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in float64 (Frobenius); NaN anywhere gives NaN, which no bound passes."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    return float((value - truth).norm() / truth.norm().clamp(min=torch.finfo(torch.float64).tiny))


def assert_as_good_as_plain(value: Tensor, plain: Tensor, truth: Tensor, factor: float = 2.0, name: str = "") -> None:
    """The relative error is at most ``factor`` times plain torch's, or a rounding of the result's own dtype."""
    ours, theirs = relative_error(value, truth), relative_error(plain, truth)
    floor = torch.finfo(value.dtype).eps
    assert ours <= factor * max(theirs, floor), (
        f"{name}: error {ours:.2e}, plain torch {theirs:.2e}, rounding {floor:.0e}"
    )
