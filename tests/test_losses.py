"""Every loss by hand, against TRL's formula, and by gradcheck; WPO's and WSPO's gradients; errors."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap

import pytest
import torch

import prefopt_fast as pf
from prefopt_fast.losses import wpo_pair_weight


def sequences(*sums: float, length: int = 2) -> pf.SequenceLogprobs:
    total = torch.tensor(sums, dtype=torch.float64)
    return pf.SequenceLogprobs(total, total / length, torch.full(total.shape, length))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# One pair: log π_θ = (−4, −9), log π_ref = (−5, −7), two tokens each; so log-ratios w = 1, l = −2 and β = 0.5.
W, L, BETA = 1.0, -2.0, 0.5
MARGIN = BETA * (W - L)
BY_HAND = {
    "sigmoid": -math.log(sigma(MARGIN)),
    "hinge": 0.0,
    "ipo": ((W - L) / 2 - 1 / (2 * BETA)) ** 2,
    "robust": (-0.9 * math.log(sigma(MARGIN)) + 0.1 * math.log(sigma(-MARGIN))) / 0.8,
    "exo_pair": sigma(MARGIN) * (math.log(sigma(MARGIN)) - math.log(1 - 1e-3))
    + sigma(-MARGIN) * (math.log(sigma(-MARGIN)) - math.log(1e-3)),
    "nca_pair": -math.log(sigma(BETA * W)) - 0.5 * math.log(sigma(-BETA * W)) - 0.5 * math.log(sigma(-BETA * L)),
    "bco_pair": -math.log(sigma(BETA * W)) - math.log(sigma(-BETA * L)),
    "sppo_hard": (W - 0.5 / BETA) ** 2 + (L + 0.5 / BETA) ** 2,
    "apo_zero": 1 - sigma(BETA * W) + sigma(BETA * L),
    "apo_down": sigma(BETA * W) + 1 - sigma(MARGIN),
    "discopop": -math.log(sigma(MARGIN)) * (1 - sigma(MARGIN / 0.05)) + math.exp(-MARGIN) * sigma(MARGIN / 0.05),
    "sigmoid_norm": -math.log(sigma(MARGIN / 2)),
    "simpo": -math.log(sigma(BETA * (-2.0 + 4.5) - 0.5)),
    # odds(−2) = e^-2 / (1 − e^-2), odds(−4.5) likewise
    "orpo": 2.0
    - BETA * math.log(sigma(math.log(math.exp(-2) / (1 - math.exp(-2)) / (math.exp(-4.5) / (1 - math.exp(-4.5)))))),
    "cpo": -math.log(sigma(BETA * 5.0)) + 2.0,
    "sft": 2.0,
}


def references(loss_type: str, *refs: pf.SequenceLogprobs) -> tuple:
    return (None, None) if pf.PAIRWISE_LOSSES[loss_type].reference_free else refs


@pytest.mark.parametrize("loss_type", pf.PAIRWISE_LOSSES)
def test_by_hand(loss_type):
    refs = references(loss_type, sequences(-5.0), sequences(-7.0))
    loss = pf.preference_loss(sequences(-4.0), sequences(-9.0), *refs, loss_type=loss_type, beta=BETA)
    assert loss.shape == (1,) and float(loss) == pytest.approx(BY_HAND[loss_type], rel=1e-12)


@pytest.mark.parametrize("loss_type", pf.PAIRWISE_LOSSES)
def test_gradcheck(loss_type):
    refs = references(loss_type, *(sequences(*(-3 - 4 * torch.rand(4)).tolist(), length=3) for _ in range(2)))

    def loss(chosen, rejected):
        length = torch.full((4,), 3)
        pair = (pf.SequenceLogprobs(x, x / length, length) for x in (chosen, rejected))
        return pf.preference_loss(*pair, *refs, loss_type=loss_type, beta=0.3)

    inputs = [(-1 - 5 * torch.rand(4, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("loss_type", pf.PAIRWISE_LOSSES)
def test_extreme_margins_stay_finite(loss_type):
    """A sequence of 2,000 tokens can be thousands of nats better or worse."""
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in ([-1.0, -4000.0], [-4000.0, -1.0]))
    length = torch.tensor([2000, 2000])
    pair = [pf.SequenceLogprobs(x, x / length, length) for x in (chosen, rejected)]
    refs = references(loss_type, sequences(-2000.0, -2000.0), sequences(-2000.0, -2000.0))
    refs = [ref and pf.SequenceLogprobs(ref.sum.float(), ref.mean.float(), length) for ref in refs]
    loss = pf.preference_loss(*pair, *refs, loss_type=loss_type, beta=0.1)
    grads = torch.autograd.grad(loss.sum(), [chosen, rejected], materialize_grads=True)
    for value in (loss, *grads):
        assert value.isfinite().all()


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [("sigmoid", {}), ("sigmoid_norm", {}), ("simpo", {"gamma": 0.0}), ("cpo", {"nll_weight": 0.0})],
)
def test_label_smoothing_is_the_mixture_of_both_orders(loss_type, options):
    pair, refs = [sequences(-4.0), sequences(-9.0)], references(loss_type, sequences(-5.0), sequences(-7.0))
    options = {"loss_type": loss_type, **options}
    smoothed = pf.preference_loss(*pair, *refs, **options, label_smoothing=0.2)
    clean, flipped = (pf.preference_loss(*pair[::o], *refs[::o], **options) for o in (1, -1))
    torch.testing.assert_close(smoothed, 0.8 * clean + 0.2 * flipped)


def trl_loss(mixture: dict[str, float], policy: list, ref: list, length: int, use_weighting: bool = False) -> tuple:
    """TRL computes its losses inside one long method of the trainer; its loop over them itself runs here, on pairs
    of sequences of ``length`` tokens: the weighted loss, and the last member's loss of each pair."""
    trl = pytest.importorskip("trl")
    method = ast.parse(textwrap.dedent(inspect.getsource(trl.DPOTrainer._compute_loss)))
    loop = next(
        node
        for node in ast.walk(method)
        if isinstance(node, ast.For) and ast.unparse(node.target) == "(loss_type, loss_weight)"
    )
    chosen, rejected, ref_chosen, ref_rejected = (item.sum for item in (*policy, *ref))
    smoothing = next((value for name, value in {"robust": 0.1, "exo_pair": 1e-3}.items() if name in mixture), 0.0)
    trainer = {
        "beta": 0.3,
        "label_smoothing": smoothing,
        "args": type("Arguments", (), {"discopop_tau": 0.05}),
        "loss_types": list(mixture),
        "loss_weights": list(mixture.values()),
        "use_weighting": use_weighting,
    }
    tokens = torch.cat([chosen, rejected])[:, None].expand(-1, length) / length
    names = {
        "torch": torch,
        "F": torch.nn.functional,
        "self": type("Trainer", (), trainer),
        "device": "cpu",
        "loss": 0.0,
        "chosen_logratios": chosen - ref_chosen,
        "rejected_logratios": rejected - ref_rejected,
        "chosen_scores": chosen - ref_chosen,
        "rejected_scores": rejected - ref_rejected,
        "completion_mask": torch.ones(len(tokens), length),
        "shift_completion_mask": torch.ones(len(tokens), length),
        "per_token_logps": tokens,
        "outputs": type("Outputs", (), {"log_sum_sq_probs": 0.9 * tokens}),
        "seq_len": length,
    }
    names["delta_score"] = names["chosen_scores"] - names["rejected_scores"]
    exec(compile(ast.Module([loop], []), "trl", "exec"), names)
    return names["loss"], names["per_sequence_loss"]


def three_pairs() -> tuple[list, list]:
    policy = [[-4.0, -30.0, -7.0], [-9.0, -20.0, -6.5]], [[-5.0, -33.0, -7.0], [-7.0, -21.0, -9.0]]
    return tuple([sequences(*values, length=5) for values in side] for side in policy)


def test_against_trl():
    policy, ref = three_pairs()
    for loss_type, loss in pf.PAIRWISE_LOSSES.items():
        if loss.reference_free:
            continue  # those live in trainers of their own
        ours = pf.preference_loss(*policy, *ref, loss_type=loss_type, beta=0.3)
        theirs = trl_loss({loss_type: 1.0}, policy, ref, 5)[1]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, msg=loss_type)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled(dynamic):
    policy, ref = three_pairs()

    def losses(beta):
        refs = {loss_type: references(loss_type, *ref) for loss_type in pf.PAIRWISE_LOSSES}
        return torch.stack([pf.preference_loss(*policy, *refs[name], loss_type=name, beta=beta) for name in refs])

    compiled = torch.compile(losses, fullgraph=True, dynamic=dynamic, backend="eager")
    for beta in (0.1, 0.3, 0.5):
        torch.testing.assert_close(compiled(beta), losses(beta))


MPO = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}


@pytest.mark.parametrize("mixture", [MPO, {"hinge": 0.5, "exo_pair": 2.0}, {"sft": 1.0, "ipo": 0.25}])
def test_mixture_against_trl(mixture):
    """TRL's sft is a mean over a batch's tokens, ours over each pair's: the same for responses of one length."""
    policy, ref = three_pairs()
    ours = pf.preference_loss(*policy, *ref, loss_type=mixture, beta=0.3)
    torch.testing.assert_close(ours.mean(), trl_loss(mixture, policy, ref, 5)[0], rtol=1e-6, atol=0)
    if "sft" in mixture:
        return  # TRL's weighting fails there: it multiplies an expanded tensor in place
    weights = [(0.1 * sequence.mean).exp() for sequence in policy]
    weighted = pf.wpo_loss(*policy, *ref, *weights, loss_type=mixture, beta=0.3, clamp=False).mean()
    torch.testing.assert_close(weighted, trl_loss(mixture, policy, ref, 5, use_weighting=True)[0], rtol=1e-6, atol=0)


def test_mixture_is_the_sum_of_its_members():
    policy, ref = three_pairs()
    members = {"robust": 0.5, "simpo": 1.0, "discopop": 3.0}
    options = {"robust": {"label_smoothing": 0.2}, "simpo": {"label_smoothing": 0.2, "gamma": 0.7}, "discopop": {}}
    mixed = pf.preference_loss(*policy, *ref, loss_type=members, label_smoothing=0.2, gamma=0.7)
    parts = [
        weight * pf.preference_loss(*policy, *references(name, *ref), loss_type=name, **options[name])
        for name, weight in members.items()
    ]
    torch.testing.assert_close(mixed, sum(parts), rtol=1e-12, atol=0)
    free = pf.preference_loss(*policy, loss_type={"simpo": 1.0, "sft": 0.5})
    torch.testing.assert_close(free, pf.preference_loss(*policy, loss_type="simpo") - 0.5 * policy[0].mean)


def test_wpo_weighs_any_pairwise_loss_and_detaches_the_weight():
    weight_w, weight_l = torch.tensor([0.5, 2.0]).double(), torch.tensor([0.5, 3.0]).double().requires_grad_()
    pair = [sequences(-4.0, -4.0), sequences(-9.0, -9.0)]
    for loss_type in pf.PAIRWISE_LOSSES:
        refs = references(loss_type, sequences(-5.0, -5.0), sequences(-7.0, -7.0))
        plain = pf.preference_loss(*pair, *refs, loss_type=loss_type)
        clamped = pf.wpo_loss(*pair, *refs, weight_w, weight_l, loss_type=loss_type)
        unclamped = pf.wpo_loss(*pair, *refs, weight_w, weight_l, loss_type=loss_type, clamp=False)
        torch.testing.assert_close(clamped, plain * torch.tensor([0.25, 1.0]))
        torch.testing.assert_close(unclamped, plain * torch.tensor([0.25, 6.0]))
        assert not clamped.requires_grad
    assert wpo_pair_weight(weight_w, weight_l).tolist() == [0.25, 1.0]


def test_wspo_by_hand():
    policy = torch.tensor([[-1.0, -2.0, 7.0]], dtype=torch.float64)
    ref = torch.tensor([[-1.5, -3.0, float("-inf")]], dtype=torch.float64)
    weak_aligned = torch.tensor([[-2.0, -1.0, 5.0]], dtype=torch.float64)
    weak_ref = torch.tensor([[-2.1, -1.2, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    # s = (0.5, 1), r = (0.1, 0.2); γ = 0.4: residuals 0.1 and 0.2
    token = pf.wspo_loss(policy, ref, weak_aligned, weak_ref, mask, gamma=0.4)
    sequence = pf.wspo_loss(policy, ref, weak_aligned, weak_ref, mask, gamma=0.4, level="sequence")
    assert float(token) == pytest.approx((0.01 + 0.04) / 2) and float(sequence) == pytest.approx(0.15**2)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_wspo_gradcheck_and_independence(level):
    others = [torch.randn(3, 4, dtype=torch.float64) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    policy = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pf.wspo_loss(x, *others, mask, level=level), policy)
    grad = torch.autograd.grad(pf.wspo_loss(policy, *others, mask, level=level)[0], policy)[0]
    assert (grad[1:] == 0).all() and (grad[0] != 0).all()


def test_orpo_in_16_bits_loses_no_more_than_its_input():
    pair = [torch.tensor([mean], dtype=torch.bfloat16) for mean in (-1 / 512, -1 / 64)]
    losses = []
    for dtype in (torch.bfloat16, torch.float64):
        one = torch.ones(1, dtype=dtype)
        losses.append(
            pf.preference_loss(*(pf.SequenceLogprobs(x.to(dtype), x.to(dtype), one) for x in pair), loss_type="orpo")
        )
    assert losses[0].dtype == torch.bfloat16
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=2**-6)


@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, -2.0), (-2.0, 0.0), (0.0, 0.0)])
def test_orpo_of_a_certain_response(chosen, rejected):
    """Where log p is 0 to the last digit the odds are large, not infinite; the slope is the one beside it."""
    pair = [sequences(value, length=1).sum.float().requires_grad_() for value in (chosen, rejected)]
    length = torch.ones(1)
    loss = pf.preference_loss(*(pf.SequenceLogprobs(x, x / length, length) for x in pair), loss_type="orpo")
    grads = torch.autograd.grad(loss, pair)
    eps = torch.finfo(torch.float32).eps
    near = [min(value, -eps) for value in (chosen, rejected)]
    odds_ratio = (near[0] - near[1]) - (math.log(-math.expm1(near[0])) - math.log(-math.expm1(near[1])))
    assert float(loss) == pytest.approx(-near[0] + 0.1 * math.log1p(math.exp(-odds_ratio)), rel=1e-5, abs=1e-6)
    slope = 0.1 * sigma(-odds_ratio)
    expected = [-1 + slope / math.expm1(near[0]), -slope / math.expm1(near[1])]
    assert [float(grad) for grad in grads] == pytest.approx(expected, rel=1e-4)


def test_the_reference_gets_no_gradient():
    leaves = [torch.tensor([-4.0], requires_grad=True) for _ in range(4)]
    assert [
        grad is None for grad in torch.autograd.grad(pf.preference_loss(*leaves).sum(), leaves, allow_unused=True)
    ] == [*(False, False, True, True)]


def test_kto_by_hand():
    logprobs, ref = torch.tensor([-4.0, -9.0]), torch.tensor([-5.0, -7.0])
    loss = pf.kto_loss(logprobs, ref, torch.tensor([True, False]), kl=3.0, beta=0.5, undesirable_weight=2.0)
    expected = [1 - sigma(0.5 * 1.0 - 1.5), 2 * (1 - sigma(1.5 - 0.5 * -2.0))]
    assert loss.tolist() == pytest.approx(expected)
    whole = pf.SequenceLogprobs(logprobs, logprobs / 2, torch.full((2,), 2))
    same = pf.kto_loss(whole, ref, torch.tensor([True, False]), torch.tensor([3.0]), beta=0.5, undesirable_weight=2.0)
    assert torch.equal(same, loss)
    negative_kl = pf.kto_loss(logprobs, ref, torch.tensor([True, False]), kl=-3.0, beta=0.5)
    assert negative_kl.tolist() == pytest.approx([1 - sigma(0.5), 1 - sigma(1.0)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s, t: pf.preference_loss(s, s, s, s, loss_type="dpo"),
            "loss_type must be one of sigmoid, .*found 'dpo'",
        ),
        (lambda s, t: pf.preference_loss(s, s, s, s, beta=0.0), r"beta must be in \(0, inf\), found 0.0"),
        (lambda s, t: pf.preference_loss(s, s), "sigmoid needs ref_chosen and ref_rejected"),
        (lambda s, t: pf.preference_loss(s, s, s, s, "simpo"), "simpo is reference-free"),
        (lambda s, t: pf.preference_loss(s, s, s, s, gamma=1.0), r"sigmoid takes label_smoothing; found \['gamma'\]"),
        (lambda s, t: pf.preference_loss(s, s, s, s, "hinge", tau=1.0), "hinge takes no hyperparameter beside beta"),
        (lambda s, t: pf.preference_loss(s, s, s, s, "robust", label_smoothing=0.5), r"label_smoothing must be in \[0"),
        (lambda s, t: pf.preference_loss(s, s, s, s, label_smoothing=0.6), r"label_smoothing must be in \[0"),
        (lambda s, t: pf.preference_loss(s, s, s, s, {"sigmoid": 1, "dpo": 1}), "loss_type must be .*found 'dpo'"),
        (lambda s, t: pf.preference_loss(s, s, s, s, {}), "loss_type must be .*found an empty mapping"),
        (lambda s, t: pf.preference_loss(s, s, s, s, {"ipo": 0}), "weight of ipo in loss_type must be positive"),
        (lambda s, t: pf.preference_loss(s, s, loss_type=MPO), r"sigmoid \+ bco_pair \+ sft needs ref_chosen"),
        (lambda s, t: pf.preference_loss(s, s, s, s, MPO, gamma=1), r"takes label_smoothing; found \['gamma'\]"),
        (lambda s, t: pf.preference_loss(t, t, t, t, "ipo"), "length-normalised log-probs: pass chosen and rejected"),
        (
            lambda s, t: pf.preference_loss(s, s, s, sequences(-1.0)),
            r"shapes must be equal, \(B,\); found chosen \(2,\), .*ref_rejected \(1,\)",
        ),
        (
            lambda s, t: pf.preference_loss(s._replace(length=s.length[:, None]), s, t, t, "ipo"),
            r"shapes must be equal, \(B,\); found .*chosen.length \(2, 1\)",
        ),
        (lambda s, t: pf.wpo_loss(s, s, s, s, torch.ones(2), torch.ones(3)), r"rejected_weight \(3,\)"),
        (
            lambda s, t: pf.wspo_loss(*[torch.zeros(2, 3)] * 5, level="word"),
            'level must be .* or "segment"; found \'word',
        ),
        (lambda s, t: pf.wspo_loss(*[torch.zeros(2, 3)] * 4, torch.ones(2, 4)), r"mask \(2, 4\)"),
        (lambda s, t: pf.wspo_loss(*[torch.zeros(2, 3)] * 4, torch.tensor([[1.0] * 3, [0.0] * 3])), r"sequences \[1\]"),
        (
            lambda s, t: pf.wspo_loss(*[torch.zeros(2, 3)] * 4, torch.ones(2, 3), gamma=0),
            r"gamma must be in \(0, inf\), found 0",
        ),
        (lambda s, t: pf.preference_loss(*[torch.zeros(2, 3)] * 4), r"\(B,\); found chosen \(2, 3\)"),
        (
            lambda s, t: pf.preference_loss(s, s, s, s, ["sigmoid"]),
            r"loss_type must be a name or .*found \['sigmoid'\]",
        ),
        (lambda s, t: pf.preference_loss(s, s, s, s, beta=math.inf), r"beta must be in \(0, inf\), found inf"),
        (lambda s, t: pf.preference_loss(s, s, s, s, "discopop", tau=0.0), r"tau must be in \(0, inf\), found 0.0"),
        (lambda s, t: pf.preference_loss(s, s, loss_type="simpo", gamma=math.nan), "gamma must be in .*found nan"),
        (lambda s, t: pf.preference_loss(s, s, loss_type="cpo", nll_weight=-1), r"nll_weight must be in \[0, inf\)"),
        (
            lambda s, t: pf.wspo_loss(*[torch.zeros(2, 3)] * 5, level="segment", segments=torch.zeros(2, 3)),
            "segments must be integers, found torch.float32",
        ),
        (lambda s, t: pf.kto_loss(t, t, torch.ones(3), 0.0), r"desirable \(3,\)"),
        (lambda s, t: pf.kto_loss(t, t, torch.tensor([1, -1]), 0.0), "desirable must be boolean, found torch.int64"),
        (lambda s, t: pf.kto_loss(t, t, t > 0, torch.ones(2, 1)), r"kl must be one number, found shape \(2, 1\)"),
        (lambda s, t: pf.kto_loss(t, t, t > 0, 0.0, desirable_weight=-1.0), r"desirable_weight must be in \[0, inf\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(sequences(-1.0, -2.0), torch.zeros(2))
