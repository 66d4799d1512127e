"""The sampled gradient keeps its promise: its error, its expectation, its bits, and when it steps aside."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative_error
from prefopt_fast.kernels import sparse_grad, torch_backend
from torch import Tensor

import prefopt_fast as pf

N, V, H = 640, 8192, 64


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    """Several walks, groups and tiles at the sizes of a test."""
    monkeypatch.setattr(torch_backend, "SAMPLED_CHUNK", 256)
    monkeypatch.setitem(torch_backend.TILE_ELEMENTS, "cpu", 1 << 17)


def concentrated(confidence: Tensor, zipf: float = 1.3, noise: float = 1.0, hidden: int = H) -> tuple[Tensor, ...]:
    """hidden, weight and targets with the softmax of a language model: Zipf's law, and one favourite per token.

    The first unit vector carries the prior −zipf · log rank; ``confidence`` (N,) is the favourite's logit above it.
    Targets are drawn from the model itself.
    """
    n = len(confidence)
    weight = torch.randn(V, hidden)
    weight[:, 0] = -zipf * torch.arange(2.0, V + 2).log()
    states = torch.randn(n, hidden) * (noise / hidden**0.5)
    favourite = (torch.rand(n) * math.log(V)).exp().long().clamp(max=V - 1)
    direction = weight[favourite]
    direction[:, 0] = 0
    states += confidence[:, None] * direction / direction.square().sum(1, keepdim=True)
    states[:, 0] = 1.0
    return states, weight, torch.multinomial((states @ weight.T).softmax(-1), 1).squeeze(1)


def text_like() -> tuple[Tensor, ...]:
    return concentrated(torch.rand(N) * 12 + 2)


def mixture() -> tuple[Tensor, ...]:
    """Nine tokens in ten are certain; the others are as flat as Zipf's law leaves them."""
    return concentrated(torch.where(torch.rand(N) < 0.9, 30.0, 0.0))


def flat() -> tuple[Tensor, ...]:
    return torch.randn(N, H) / H**0.5, torch.randn(V, H) * 0.3, torch.randint(0, V, (N,))


def peaked() -> tuple[Tensor, ...]:
    return concentrated(torch.full((N,), 25.0))


INPUTS = {"text": text_like, "flat": flat, "peaked": peaked, "mixture": mixture}


def gradients(
    function, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, bias: Tensor | None = None, **options
) -> tuple[pf.TokenStats, dict[str, Tensor]]:
    head_options = {name: options.pop(name) for name in ("softcap", "logit_scale") if name in options}
    leaves = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    head = pf.LMHead(leaves["weight"], bias=leaves.get("bias"), **head_options)
    stats = function(leaves["hidden"], head, targets, **options)
    grads = torch.autograd.grad((stats.logprobs * upstream).sum(), list(leaves.values()))
    return stats, dict(zip(leaves, grads, strict=True))


def fast(*operands, **options):
    return gradients(pf.token_logprobs, *operands, backend="torch", **options)


def truth(*operands, **options):
    return gradients(pf.reference.token_logprobs, *operands, **options)[1]


def worst_token(value: Tensor, exact: Tensor) -> float:
    """Largest error of a token relative to its gradient's norm, which counts as at least a tenth of the rms."""
    size = exact.double().norm(dim=1)
    return float(
        ((value.double() - exact.double()).norm(dim=1) / size.clamp(min=0.1 * size.square().mean().sqrt())).max()
    )


@pytest.mark.parametrize("upstream", ["equal", "random"])
@pytest.mark.parametrize(
    "source, options",
    [
        ("text", {}),
        ("text", {"softcap": 10.0}),
        ("text", {"logit_scale": 0.5}),
        ("text", {"bias": True}),
        ("flat", {}),
        ("peaked", {}),
        ("mixture", {}),
    ],
    ids=["text", "softcap", "scaled", "biased", "flat", "peaked", "mixture"],
)
@pytest.mark.parametrize("tolerance", [2.0**-4, 2.0**-7], ids=["loose", "tight"])
def test_error_stays_within_the_tolerance(source, options, tolerance, upstream):
    operands = INPUTS[source]()
    factor = torch.ones(N) if upstream == "equal" else torch.randn(N)
    extra = {"bias": torch.randn(V) * 0.5} if options.get("bias") else options
    stats, ours = fast(*operands, factor, grad_tolerance=tolerance, **extra)
    exact = truth(*operands, factor, **extra)
    for name, grad in exact.items():
        assert relative_error(ours[name], grad) <= tolerance, (name, stats.grad_report)
    assert worst_token(ours["hidden"] / factor[:, None], exact["hidden"] / factor[:, None]) <= 6 * tolerance
    assert stats.grad_report.estimated_error <= tolerance
    if source in ("text", "mixture") and not extra and tolerance > 0.05:
        assert stats.grad_report.columns_kept < 0.3, stats.grad_report


@pytest.mark.parametrize("seed", range(4))
def test_errors_that_add_up_stay_within_the_tolerance(seed, monkeypatch):
    """Of tokens with one upstream gradient and much of their direction in common, as groups of similar ones have: such
    a group draws again."""
    operands, upstream, tolerance = flat(), torch.ones(N), 2.0**-4
    draws, draw = [], torch_backend._Forward.draw
    monkeypatch.setattr(torch_backend._Forward, "draw", lambda *given: draws.append(None) or draw(*given))
    stats, ours = fast(*operands, upstream, grad_tolerance=tolerance, seed=seed)
    assert len(draws) > stats.grad_report.chunks
    assert relative_error(ours["weight"], truth(*operands, upstream)["weight"]) <= tolerance


def test_groups_are_of_similar_tokens():
    centers = torch.randn(4, 16)
    kinds = torch.randperm(64) % 4
    groups = sparse_grad.alike(centers[kinds] + 0.01 * torch.randn(64, 16), [16] * 4)
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(64))
    assert all(len(kinds[group].unique()) == 1 for group in groups)


def test_groups_of_tokens_that_are_not_numbers():
    features = torch.randn(20, 16)
    features[3], features[4, 1], features[5, 0] = torch.nan, torch.inf, 1e30
    groups = sparse_grad.alike(features, [4, 8, 8])
    assert [len(group) for group in groups] == [4, 8, 8]
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(20))


def test_similar_tokens_need_fewer_columns(monkeypatch):
    """Six topics in turns, each with a direction of its own."""
    hidden, weight, _ = text_like()
    topics = torch.randn(6, H) * (2 / H**0.5)
    topics[:, 0] = 0
    hidden += topics[torch.arange(N) % 6]
    operands = hidden, weight, torch.multinomial((hidden @ weight.T).softmax(-1), 1).squeeze(1)
    upstream, tolerance = torch.ones(N), 2.0**-6
    grouped, _ = fast(*operands, upstream, grad_tolerance=tolerance)
    monkeypatch.setattr(torch_backend, "alike", lambda features, sizes: torch.arange(len(features)).split(sizes))
    in_order, _ = fast(*operands, upstream, grad_tolerance=tolerance)
    assert grouped.grad_report.columns_kept < 0.8 * in_order.grad_report.columns_kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype):
    """With "auto" the whole error, rounding of the result included, stays within two roundings."""
    hidden, weight, targets = (x.to(dtype) if x.is_floating_point() else x for x in text_like())
    upstream = torch.randn(N)
    _, ours = fast(hidden, weight, targets, upstream)
    exact = truth(hidden, weight, targets, upstream)
    for name, grad in ours.items():
        assert grad.dtype == dtype
        assert relative_error(grad, exact[name]) <= torch.finfo(dtype).eps, name


def test_without_compensation_it_fails(monkeypatch):
    """Drop the rank-1 tail and its remainder: what is left breaks the tolerance, and is far from what it was."""
    operands, upstream, tolerance = text_like(), torch.ones(N), 2.0**-5
    exact = truth(*operands, upstream)
    _, compensated = fast(*operands, upstream, grad_tolerance=tolerance)

    def uncompensated(sample, probs, total):
        return probs, torch.zeros_like(total)

    monkeypatch.setattr(torch_backend, "coefficients", uncompensated)
    _, ours = fast(*operands, upstream, grad_tolerance=tolerance)
    assert relative_error(ours["hidden"], exact["hidden"]) > 2 * tolerance
    for name, grad in exact.items():
        assert relative_error(ours[name], grad) > max(tolerance, 2 * relative_error(compensated[name], grad)), name


def test_expectation_is_the_exact_gradient():
    """The mean of n draws is √n times nearer to the truth: a bias would show as a floor."""
    operands, upstream, tolerance = text_like(), torch.randn(N), 2.0**-4
    exact = truth(*operands, upstream)
    draws = [fast(*operands, upstream, grad_tolerance=tolerance, seed=seed)[1] for seed in range(25)]
    for name, grad in exact.items():
        single = math.sqrt(sum(relative_error(draw[name], grad) ** 2 for draw in draws) / len(draws))
        mean = relative_error(sum(draw[name].double() for draw in draws) / len(draws), grad)
        assert mean < 1.35 * single / math.sqrt(len(draws)), (name, single, mean)


def test_expectation_where_a_single_draw_is_much():
    """Tokens with a tail of their own, of which hardly anything is drawn at a loose tolerance: what little is must not
    be computed exactly instead of weighing for all that is not."""
    tokens, tail = 96, 30
    logits = torch.full((tokens, tokens * (2 + tail)), 1e-12)
    logits[:, :tokens].fill_diagonal_(0.5)  # targets
    logits[:, tokens : 2 * tokens].fill_diagonal_(0.498)
    own = torch.arange(tokens)[:, None], 2 * tokens + torch.arange(tokens * tail).view(tokens, tail)
    logits[own] = 0.002 / tail
    # Features of which these tokens have nothing give all rows of the weight about one length.
    weight = torch.cat([logits.log().T, 10 * torch.randn(logits.shape[1], 64)], 1)
    operands = torch.eye(tokens, tokens + 64), weight, torch.arange(tokens), torch.ones(tokens)
    exact = truth(*operands)["weight"].T[own].sum()
    draws = []
    for seed in range(200):
        stats, ours = fast(*operands, grad_tolerance=2.0**-4, seed=seed)
        draws.append(ours["weight"].T[own].sum())
    assert stats.grad_report.dense_chunks == 0
    draws = torch.stack(draws)
    assert draws.std() > 0.3 * draws.mean().abs(), "a draw has few of the tails"
    assert abs(draws.mean() - exact) < 0.15 * abs(exact)


def test_a_seed_gives_the_same_bits():
    operands, upstream = text_like(), torch.randn(N)
    first, again, other = (fast(*operands, upstream, grad_tolerance=2.0**-5, seed=seed)[1] for seed in (3, 3, 4))
    for name, grad in first.items():
        assert torch.equal(grad, again[name])
        assert not torch.equal(grad, other[name])
    state = torch.get_rng_state()
    fast(*operands, upstream, grad_tolerance=2.0**-5, seed=3)
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator was used"


def test_statistics_are_exact_whatever_the_tolerance():
    hidden, weight, targets = text_like()
    head = pf.LMHead(weight, softcap=20.0)
    hidden.requires_grad_()
    ours = pf.token_logprobs(hidden, head, targets, stats=pf.STATS, grad_tolerance=2.0**-4, backend="torch")
    exact = pf.reference.token_logprobs(hidden, head, targets, stats=pf.STATS)
    for name in ("logprobs", *pf.STATS):
        if name == "is_top1":
            assert torch.equal(ours.is_top1, exact.is_top1)
        else:
            assert relative_error(getattr(ours, name), getattr(exact, name)) < 1e-5, name


def test_a_flat_softmax_over_few_words_runs_dense():
    hidden, weight, targets = torch.randn(N, H), torch.randn(60, H) * 0.01, torch.randint(0, 60, (N,))
    upstream = torch.randn(N)
    stats, ours = fast(hidden, weight, targets, upstream, grad_tolerance=2.0**-10)
    report = stats.grad_report
    assert report.dense_chunks == report.chunks and report.columns_kept == 1.0
    for name, grad in truth(hidden, weight, targets, upstream).items():
        assert relative_error(ours[name], grad) < 1e-5


def test_dense_chunks_are_soon_not_tried():
    """After failures in a row, walks that would be thrown away become rare."""
    steering = sparse_grad.Steering(2.0**-8, groups=200)
    tried = 0
    for _ in range(200):
        if not steering.wants_dense(1):
            tried += 1
            steering.record_dense(1, in_vain=True)
    assert steering.dense_chunks == steering.chunks == 200
    assert tried <= 9


def test_one_bad_token_keeps_no_other_chunk_from_being_sampled(monkeypatch):
    """Its exponentials overflow, which says nothing of the columns that later chunks need."""
    vocab = 4096
    weight = torch.randn(vocab, 16)
    weight[:, 0] = -1.3 * torch.arange(2.0, vocab + 2).log()
    hidden = torch.randn(3000, 16) / 4
    hidden[:, 0] = 1
    targets = torch.multinomial((hidden @ weight.T).softmax(-1), 1).squeeze(1)
    hidden[700], targets[700] = 40 * hidden[700], vocab - 1
    stats = pf.token_logprobs(hidden.requires_grad_(), pf.LMHead(weight), targets, grad_tolerance=2.0**-6)
    assert stats.logprobs.isfinite().all()
    chunk = round(torch_backend.SAMPLED_CHUNK / torch_backend.SAMPLED_GROUP)
    assert 0 < stats.grad_report.dense_chunks <= chunk


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30], ids=["recomputed", "kept"])
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "weight bias", "hidden bias"])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_each_gradient_alone(wanted, kept_bytes, softcap, monkeypatch):
    """A gradient is within its tolerance whichever others are asked for, kept coefficients or not."""
    monkeypatch.setattr(torch_backend, "SAMPLE_BYTES", kept_bytes)
    hidden, weight, targets = text_like()
    targets[::7] = -100
    tensors = {"hidden": hidden, "weight": weight, "bias": torch.randn(V) * 0.1}
    upstream, tolerance = torch.randn(N), 2.0**-5
    exact = truth(hidden, weight, targets, upstream, bias=tensors["bias"], softcap=softcap)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted)
    head = pf.LMHead(weight, bias=tensors["bias"], softcap=softcap)
    stats = pf.token_logprobs(hidden, head, targets, grad_tolerance=tolerance, backend="torch")
    (stats.logprobs * upstream).sum().backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == (name in wanted)
        if name in wanted:
            assert relative_error(tensor.grad, exact[name]) <= tolerance, name
    if "hidden" in wanted:
        assert not hidden.grad[::7].any()


def test_a_pair_of_tolerances():
    operands, upstream = text_like(), torch.ones(N)
    exact = truth(*operands, upstream)
    for pair in ((2.0**-4, 2.0**-7), (2.0**-7, 2.0**-4)):
        _, ours = fast(*operands, upstream, grad_tolerance=pair)
        for (name, grad), tolerance in zip(exact.items(), pair, strict=True):
            assert relative_error(ours[name], grad) <= tolerance, (name, pair)
    stats, ours = fast(*operands, upstream, grad_tolerance=(2.0**-4, 0.0))
    assert stats.grad_report is None, "where one must be exact, both are"
    assert relative_error(ours["weight"], exact["weight"]) < 1e-5


def test_nan_goes_through():
    hidden, weight, targets = INPUTS["text"]()
    hidden[::3] = torch.nan
    _, ours = fast(hidden, weight, targets, torch.ones(N), grad_tolerance=2.0**-4)
    assert ours["hidden"][::3].isnan().all() and ours["weight"].isnan().any()


def test_one_nan_stays_one():
    """A token's NaN reaches no other token's gradient, and keeps no other group from being sampled."""
    hidden, weight, targets = INPUTS["text"]()
    exact = truth(hidden, weight, targets, torch.ones(N))
    hidden[5] = torch.nan
    stats, ours = fast(hidden, weight, targets, torch.ones(N), grad_tolerance=2.0**-4)
    assert stats.grad_report.dense_chunks == 1 < stats.grad_report.chunks
    assert math.isfinite(stats.grad_report.estimated_error)
    assert ours["hidden"][5].isnan().all()
    others = torch.arange(N) != 5
    assert relative_error(ours["hidden"][others], exact["hidden"][others]) < 2.0**-4


def test_logits_far_above_the_target_run_dense():
    """The target's logit is the shift of exp; logits 200 above it overflow, and are computed from their maximum."""
    hidden, weight, targets = text_like()
    weight[5] += 400 * torch.nn.functional.one_hot(torch.tensor(0), H)
    stats, ours = fast(hidden, weight, targets, torch.ones(N), grad_tolerance=2.0**-5)
    exact = truth(hidden, weight, targets, torch.ones(N))
    assert stats.logprobs.isfinite().all()
    for name, grad in exact.items():
        assert relative_error(ours[name], grad) < 2.0**-5


@pytest.mark.parametrize("budget", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_choose_epsilon(groups, budget):
    scores = torch.rand(groups, 5000) ** 8
    epsilon, error = sparse_grad.choose_epsilon(scores.square(), 1e-4, 1e9, budget)

    def expected(epsilon):
        return float((scores * (epsilon - scores).clamp(min=0)).sum(dtype=torch.float64))

    assert error == pytest.approx(budget, rel=1e-3)
    assert expected(epsilon) == pytest.approx(budget, rel=0.05)
    lowest, error = sparse_grad.choose_epsilon(scores.square(), 2 * epsilon, 1e9, budget)
    assert lowest == 2 * epsilon, "no less than what columns were kept for"
    assert error == pytest.approx(expected(lowest), rel=1e-3)


def test_choose_epsilon_where_nothing_is_left():
    epsilon, error = sparse_grad.choose_epsilon(torch.zeros(2, 10), 1e-3, 1e9, 1.0)
    assert epsilon > 1e3 and math.isfinite(error)


@pytest.mark.parametrize("source", ["text", "mixture"])
@pytest.mark.parametrize("tolerance", [2.0**-4, 2.0**-6, 2.0**-8], ids=str)
def test_the_first_walk_is_as_good_as_any(source, tolerance, monkeypatch):
    """ε comes from what a chunk's own scores foresee: one walk alone, which learned from none, comes near the aim."""
    monkeypatch.setattr(torch_backend, "SAMPLED_CHUNK", N)
    monkeypatch.setattr(torch_backend, "MAX_WORKERS", 1)
    stats, _ = fast(*INPUTS[source](), torch.ones(N), grad_tolerance=tolerance)
    assert 0.45 * tolerance < stats.grad_report.estimated_error < 0.95 * tolerance


def test_the_worst_tokens_make_room():
    """Of a group whose errors exceed the tolerance, unless groups to come are expected to leave room for them."""
    tolerance, error = 2.0**-6, torch.tensor([1.0, 5.0, 1.0, 9.0])
    size = float(error.sum()) / (2 * tolerance) ** 2  # twice as wrong as allowed
    estimate = sparse_grad.Estimate([sparse_grad.Errors(tolerance, size, error)], 4, 0.1, 0.1, 1.0, 1.0)
    steering = sparse_grad.Steering(tolerance, groups=1)
    assert steering.record(estimate).tolist() == [False, True, False, True]
    assert steering.report().columns_kept == pytest.approx(0.5 + 0.5 * 0.1)  # columns: all for half of the tokens
    assert steering.report().estimated_error <= sparse_grad.CEILING * tolerance
    assert not sparse_grad.Steering(tolerance, groups=100).record(estimate).any()


@pytest.mark.parametrize("error", [1e6, math.nan])
def test_one_group_far_off_does_not_steer_all_others(error):
    """Tokens predicted with certainty, say, whose gradient is nearly nothing."""
    steering = sparse_grad.Steering(2.0**-6, groups=100)
    before = steering.budget()
    for wrong in (error, *[1e-4] * 9):
        errors = [sparse_grad.Errors(2.0**-6, 1.0, torch.tensor([wrong]))]
        steering.record(sparse_grad.Estimate(errors, 1, 0.1, 0.1, 1.0, 0.5))
    steering.adapt()
    assert 0.3 * before < steering.budget() < before


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 30.0])
def test_select_columns(epsilon):
    score, uniform = torch.rand(5000) ** 4, torch.rand(5000)
    columns, keep = sparse_grad.select_columns(score, epsilon, uniform)
    assert columns.dtype == torch.int64 and (columns.diff() > 0).all()
    assert torch.equal(keep, (score / epsilon).clamp(max=1)[columns])
    # The 1/keep-weighted sum of anything is right in expectation.
    value = score * torch.rand(5000)
    draws = []
    for _ in range(400):
        columns, keep = sparse_grad.select_columns(score, epsilon, torch.rand(5000))
        draws.append((value[columns] / keep).sum())
    draws = torch.stack(draws)
    assert abs(draws.mean() - value.sum()) <= 4 * draws.std() / 20 + 1e-3


def test_real_text(real_model):
    """The figures of the promise on hidden states of a real model, head trainable."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_model)
    text = (pf.losses.__doc__ or "") + " ".join(filter(None, (getattr(pf, name).__doc__ for name in pf.__all__)))
    tokens = torch.tensor([tokenizer(text).input_ids[:600]])
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state[0, :-1]
    weight, targets = model.lm_head.weight.detach(), tokens[0, 1:]
    upstream = torch.ones(len(targets))
    _, exact = fast(hidden, weight, targets, upstream, grad_tolerance=0.0)
    for tolerance in (2.0**-6, 2.0**-8):
        stats, ours = fast(hidden, weight, targets, upstream, grad_tolerance=tolerance)
        for name, grad in exact.items():
            assert relative_error(ours[name], grad) <= tolerance, (name, stats.grad_report)
        assert worst_token(ours["hidden"], exact["hidden"]) <= 6 * tolerance
        assert stats.grad_report.columns_kept < 0.2
