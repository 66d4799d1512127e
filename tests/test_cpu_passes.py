"""The C passes over a tile against float64, and torch's in their place where there is no compiler."""

from __future__ import annotations

import logging
import tempfile
from itertools import pairwise

import pytest
import torch
from conftest import assert_as_good_as_plain, make_text_like, relative_error
from prefopt_fast.kernels import cpu_passes, torch_backend

import prefopt_fast as pf

MAX_ERROR = 1e-7  # relative, of an exponential: 1.5 times what torch.exp was measured to be wrong by


@pytest.fixture
def compiled():
    if cpu_passes.library() is None:
        pytest.skip("no C compiler")


@pytest.fixture(params=["compiler", "folder"])
def no_compiler(request, monkeypatch, tmp_path):
    """Neither where none works, nor where there is no place for what it makes."""
    if request.param == "compiler":
        monkeypatch.setenv("CC", "false")
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    cpu_passes.library.cache_clear()
    yield
    cpu_passes.library.cache_clear()


def test_exponentials(compiled):
    x = torch.linspace(-87, 88.3, 200_001)
    found = x.clone()[:, None]
    cpu_passes.exp_sums(found, torch.zeros(1), torch.zeros(1, 1))
    truth = x.double().exp()
    assert ((found[:, 0] - truth) / truth).abs().max() < MAX_ERROR


def test_exponentials_at_the_ends(compiled):
    inf = float("inf")
    x = torch.tensor([0.0, -0.0, -1e30, -inf, torch.finfo(torch.float32).min, -104.5, 89.0, 1e30, inf, float("nan")])
    found, sums = x.clone()[None], torch.zeros(3, 10)
    cpu_passes.exp_sums(found, torch.zeros(10), sums)
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0, inf, inf, inf, float("nan")]])
    assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.equal(sums[0].nan_to_num(-1), expected[0].nan_to_num(-1))
    assert torch.equal(sums[2, :6], torch.zeros(6))  # x · eˣ where eˣ is 0


@pytest.mark.parametrize("kinds", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (33, 1), (7, 513), (1000, 130)], ids=str)
def test_sums(kinds, shape, compiled):
    logits, shift = 3 * torch.randn(shape), torch.randn(shape[1])
    before = torch.rand(kinds, shape[1])
    sums, exp = before.clone(), logits.clone()
    cpu_passes.exp_sums(exp, shift, sums)

    def expected(logits, shift):
        shifted = logits - shift
        exp = shifted.exp()
        return exp, torch.stack([exp.sum(0), exp.square().sum(0), (shifted * exp).sum(0)][:kinds])

    plain, truth = expected(logits, shift), expected(logits.double(), shift.double())
    assert_as_good_as_plain(exp, plain[0], truth[0])
    assert_as_good_as_plain(sums, before + plain[1], before.double() + truth[1])


def test_long_sums_keep_their_digits(compiled):
    """Equal terms, each sum rounded the same way: the worst case of a running sum, wrong by 1e-3 here."""
    sums = torch.zeros(1, 2)
    for _ in range(256):
        cpu_passes.exp_sums(torch.full((1024, 2), -1.2), torch.zeros(2), sums)
    truth = 256 * 1024 * torch.tensor(-1.2).double().exp()
    assert ((sums - truth) / truth).abs().max() < 1e-5


@pytest.mark.parametrize("bounds", [[0, 1], [0, 5, 9], [0, 65, 129, 193]], ids=str)
def test_kept_columns(bounds, compiled):
    """What C and torch keep, in memory that has to grow: the same columns, values and averages."""
    vocab, tokens, tile = 300, bounds[-1], 64
    groups = len(bounds) - 1
    exp = torch.randn(vocab, tokens).exp()
    average, weights = torch.rand(tokens), torch.rand(tokens)
    threshold = torch.rand(groups, vocab) * 4 * weights.sum() / groups
    results = []
    for in_c in (True, False):
        kept, mass, square = torch_backend._Kept(exp), torch.empty(groups, vocab), torch.empty(groups, vocab)
        kept.start(bounds, 1)
        for start in range(0, vocab, tile):
            rows = slice(start, min(start + tile, vocab))
            part = exp[rows]
            arguments = part, start, average, weights, threshold[:, rows], mass[:, rows], square[:, rows]
            if in_c:
                kept.reserve(len(part))
                cpu_passes.keep_columns(*arguments, kept.bounds, kept.counts, kept.columns, kept.exp)
            else:
                kept.keep(*arguments)
        results.append((kept, mass, square))
    (in_c, mass, square), (in_torch, plain_mass, plain_square) = results
    assert in_c.counts.tolist() == in_torch.counts.tolist()
    for k, (start, stop) in enumerate(pairwise(bounds)):
        count = int(in_c.counts[k])
        assert 0 < count < vocab
        columns = in_c.columns[k, :count]
        assert torch.equal(columns, in_torch.columns[k, :count])
        for kept in (in_c, in_torch):
            assert torch.equal(kept.exp[k, :count, : stop - start], exp[columns, start:stop])
        part = exp[:, start:stop].double()
        assert_as_good_as_plain(mass[k], plain_mass[k], part @ average[start:stop].double())
        assert_as_good_as_plain(square[k], plain_square[k], part.square() @ weights[start:stop].double())


@pytest.mark.parametrize("tolerance", [0.0, 2.0**-6])
def test_without_a_compiler(tolerance, no_compiler, caplog):
    hidden, weight, targets = make_text_like(200, 2000, 16)
    hidden.requires_grad_(), weight.requires_grad_()
    upstream = torch.randn(200)

    def gradients(function, **options):
        found = function(hidden, pf.LMHead(weight), targets, stats=("log_sum_sq_probs", "entropy"), **options)
        assert not options.get("grad_tolerance") or found.grad_report.dense_chunks == 0
        grads = torch.autograd.grad((found.logprobs * upstream).sum(), (hidden, weight))
        return [found.logprobs, found.log_sum_sq_probs, found.entropy, *grads]

    with caplog.at_level(logging.INFO, cpu_passes.logger.name):
        plain = gradients(pf.token_logprobs, grad_tolerance=tolerance, backend="torch")
    assert cpu_passes.library() is None
    assert "torch's take their place" in caplog.text
    truth = gradients(pf.reference.token_logprobs)
    for found, exact in zip(plain, truth, strict=True):
        assert relative_error(found, exact) < max(tolerance, 1e-5)


def test_a_compiler_that_is_not_there(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O0")
    cpu_passes.library.cache_clear()
    try:
        assert cpu_passes.library() is None
        assert not cpu_passes.usable(torch.empty(1))
    finally:
        cpu_passes.library.cache_clear()


def test_where_compiled_passes_serve(compiled):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(cpu_passes.MAX_THREADS)
        assert cpu_passes.usable(torch.empty(1))
        assert not cpu_passes.usable(torch.empty(1, dtype=torch.float64))
        assert not cpu_passes.usable(torch.empty(1, device="meta"))
        torch.set_num_threads(cpu_passes.MAX_THREADS + 1)
        assert not cpu_passes.usable(torch.empty(1))
    finally:
        torch.set_num_threads(threads)
