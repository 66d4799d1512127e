"""One adapter per implementation, all for the same work: log-probs of the targets (N,), and their gradients.

An adapter is a function from a :class:`inputs.Problem` with leaf operands to the differentiable log-probs; whatever it
raises is the reason why the peer is absent from a table. What keeps a peer from doing identical work is said in its
``note``, which the reports print.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from inputs import Problem
from torch import Tensor

import prefopt_fast as pf

PRODUCT_CHUNK = 512  # tokens of the bare product's reused buffer
TRL_VOCAB_CHUNK = 32_768  # what TRL 1.16's trainers pass


class Peer(NamedTuple):
    """``forward`` returns the log-probs (N,), or a scalar loss where the implementation has nothing finer, or None."""

    name: str
    forward: Callable[[Problem], Tensor | None]
    note: str = ""
    compiled: bool = False  # by torch.compile, which takes its time at the first call


class Absent(Exception):
    """The peer cannot do this work; the message says why."""


def backward(output: Tensor | None, problem: Problem) -> None:
    """Gradients of Σ_t upstream_t · logp_t, or of a peer's own loss, into the leaves of ``problem``."""
    if output is None:
        return
    output.backward(problem.upstream.to(output.dtype) if output.dim() else None)


def clear_gradients(problem: Problem) -> None:
    problem.hidden.grad = problem.weight.grad = None


def ours(grad_tolerance: float, backend: str = "auto") -> Callable[[Problem], Tensor]:
    def forward(problem: Problem) -> Tensor:
        head = pf.LMHead(problem.weight)
        stats = pf.token_logprobs(
            problem.hidden, head, problem.targets, problem.stats, grad_tolerance=grad_tolerance, backend=backend
        )
        if grad_tolerance and stats.grad_report is None and problem.device.type == "cpu" and backend != "triton":
            raise Absent(f"the {backend} backend computes exact gradients alone")
        return stats.logprobs

    return forward


def _log_sum_sq_probs(problem: Problem) -> bool:
    if unknown := set(problem.stats) - {"log_sum_sq_probs"}:
        raise Absent(f"does not compute {', '.join(unknown)}")
    return bool(problem.stats)


def _without_stats(problem: Problem) -> None:
    if problem.stats:
        raise Absent(f"does not return {', '.join(problem.stats)}")


def _from_logits(hidden: Tensor, weight: Tensor, targets: Tensor, with_squares: bool) -> tuple[Tensor, Tensor | None]:
    logits = (hidden @ weight.T).float()
    logsumexp = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - logsumexp
    if not with_squares:
        return logprobs, None
    return logprobs, torch.logsumexp(2 * logits.detach(), -1) - 2 * logsumexp.detach()


def full_logits(problem: Problem) -> Tensor:
    return _from_logits(problem.hidden, problem.weight, problem.targets, _log_sum_sq_probs(problem))[0]


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(_from_logits, dynamic=False)


def full_logits_compiled(problem: Problem) -> Tensor:
    return _compiled()(problem.hidden, problem.weight, problem.targets, _log_sum_sq_probs(problem))[0]


def linear_cross_entropy(**chunking: Any) -> Callable[[Problem], Tensor]:
    def forward(problem: Problem) -> Tensor:
        _without_stats(problem)
        if not hasattr(F, "linear_cross_entropy"):
            raise Absent(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions(**chunking)
        return -F.linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, reduction="none", options=options
        )

    return forward


@cache
def _trl_function() -> Any:
    """TRL's function. Its backward imports a helper for DeepSpeed from the trainers, whose own imports (datasets, …) a
    GPU machine may lack: there a context that does nothing stands in, which is what the helper does without DeepSpeed.
    """
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    try:
        import_module("trl.trainer.utils")
    except ImportError:
        stand_in = ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *_: nullcontext()  # type: ignore[attr-defined]
        sys.modules["trl.trainer.utils"] = stand_in
    return ChunkedLogProbFunction


def trl(problem: Problem) -> Tensor:
    _log_sum_sq_probs(problem)
    outputs = _trl_function().apply(
        problem.hidden, problem.weight, None, problem.targets, 1.0, TRL_VOCAB_CHUNK, None, 1.0, problem.stats
    )
    return outputs[0]


def liger_dpo(problem: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    _without_stats(problem)
    length = problem.sequence_length
    if problem.tokens % (2 * length):
        raise Absent(f"takes whole pairs of sequences; {problem.tokens} tokens are none of length {length}")
    loss = LigerFusedLinearDPOLoss(use_ref_model=False)
    hidden = problem.hidden.view(-1, length, problem.hidden_size)
    return loss(problem.weight, hidden, problem.targets.view(-1, length))[0]


def cce_torch_compile(problem: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cce

    _without_stats(problem)
    return -cce(problem.hidden, problem.weight, problem.targets, reduction="none", impl="torch_compile")


def cce_triton(filter_eps: str | None) -> Callable[[Problem], Tensor]:
    def forward(problem: Problem) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy as cce

        _without_stats(problem)
        if problem.device.type == "cpu":
            raise Absent("its Triton kernels need a GPU")
        return -cce(
            problem.hidden, problem.weight, problem.targets, reduction="none", impl="cce", filter_eps=filter_eps
        )

    return forward


def product(problem: Problem) -> None:
    """The one product nobody can avoid, in chunks of tokens into a reused buffer."""
    with torch.no_grad():
        size = min(PRODUCT_CHUNK, problem.tokens)
        buffer = torch.empty(size, problem.vocab, dtype=problem.hidden.dtype, device=problem.device)
        for chunk in problem.hidden.split(size):
            torch.mm(chunk, problem.weight.T, out=buffer[: len(chunk)])


def product_and_gradients(problem: Problem) -> None:
    """The product, and memory for the gradients written once, as whoever returns new ones must."""
    product(problem)
    for leaf in (problem.hidden, problem.weight):
        if leaf.requires_grad:
            leaf.grad = torch.zeros_like(leaf)


PRODUCT = Peer("bare product", product, "forward only: the floor")
WRITTEN = Peer("bare product, zero gradients", product_and_gradients, "and gradients' memory written once")
FLOORS = (PRODUCT, WRITTEN)
FAST_TOLERANCE = 2.0**-8
_COMPILED = "compiled for these shapes"
OTHERS = (
    Peer("full logits", full_logits, "autograd"),
    Peer("full logits, torch.compile", full_logits_compiled, _COMPILED, compiled=True),
    Peer(
        "F.linear_cross_entropy",
        linear_cross_entropy(batch_chunk_size=PRODUCT_CHUNK, chunking_method=None),
        f'reduction="none", chunks of {PRODUCT_CHUNK} tokens',
    ),
    Peer(
        "F.linear_cross_entropy, defaults",
        linear_cross_entropy(),
        'reduction="none", LinearCrossEntropyOptions() sizes its chunks by the aspect ratio',
    ),
    Peer("TRL ChunkedLogProb", trl, f"vocabulary chunks of {TRL_VOCAB_CHUNK:,}, as its trainers call it"),
    Peer(
        "Liger chunked DPO", liger_dpo, "whole pairs, one per chunk; returns a loss, weighs tokens by it", compiled=True
    ),
    Peer("CCE torch_compile", cce_torch_compile, "compiled with dynamic shapes, as shipped", compiled=True),
    Peer("CCE, exact", cce_triton(None), "Triton, no gradient filter"),
    Peer("CCE, filtered", cce_triton("high"), "Triton, its default gradient filter"),
)


def our_peers(device: str | torch.device, tolerance: float = FAST_TOLERANCE) -> list[Peer]:
    """Ours, fast and exact, on every backend that is meant for ``device``."""
    backends = ("triton", "torch") if torch.device(device).type in ("cuda", "xpu") else ("torch",)
    return [
        Peer(f"prefopt_fast {kind} ({backend})", ours(value, backend), note)
        for backend in backends
        for kind, value, note in (
            ("fast", tolerance, f"grad_tolerance = {format_tolerance(tolerance)}"),
            ("exact", 0.0, "grad_tolerance = 0"),
        )
    ]


def all_peers(device: str | torch.device) -> list[Peer]:
    """Ours, everybody else's, and the floors."""
    return [*our_peers(device), *OTHERS, *FLOORS]


def format_tolerance(tolerance: float) -> str:
    """2⁻⁸ for 2.0**-8; other numbers as they are."""
    exponent = torch.tensor(tolerance).log2().item() if tolerance > 0 else 0.5
    if exponent != int(exponent):
        return f"{tolerance:g}"
    return "2" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
