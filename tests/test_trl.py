"""TRL's trainers on our operator, and our losses in TRL's trainer: the same numbers, and clean undoing."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import assert_as_good_as_plain, make_problem, plain_stats, relative_error

import prefopt_fast as pf

pytest.importorskip("trl")

import trl
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, DogeConfig, DogeForCausalLM, MixtralConfig, MixtralForCausalLM
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction

from prefopt_fast import trainer as trainer_module
from prefopt_fast.batch import encode, load_preferences
from prefopt_fast.config import TrainConfig
from prefopt_fast.integrations import trl as integration
from prefopt_fast.integrations.trl import WPOConfig, WPOTrainer, WSPOConfig, WSPOTrainer, use_fast_logprobs
from prefopt_fast.policy import load_model, load_tokenizer
from prefopt_fast.scoring import StoreKey, score

EXAMPLES = Path(__file__).parent.parent / "examples"
# Plain SGD without clipping, and steps far larger than the weights' rounding: weights move by their gradients.
GRADIENT_STEP = {"optim": "sgd", "learning_rate": 1e3, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
# Both sides compute in float32; measured, gradients differ by 2e-7 to 7e-7 of their norm, metrics by up to 1e-6.
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here."""
    monkeypatch.setattr(trainer_module, "draw_curves", lambda output_dir, title: output_dir / "curves.png")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folders of three models of one tokenizer and one of another, a file of pairs, and its rows."""
    folder = tmp_path_factory.mktemp("inputs")
    models = {name: tiny.make_model(folder / name, seed) for seed, name in enumerate(("model", "aligned", "weak"))}
    models["foreign"] = tiny.make_model(folder / "foreign", 3, by_character=True, hidden_size=8)
    file = tiny.make_pairs(folder / "pairs.json", 6)
    return models | {"file": file, "rows": Dataset.from_list(json.loads(Path(file).read_text()))}


def options(tmp_path: Path, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none"}
    base |= {"gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    return base | {"max_steps": 1, "per_device_train_batch_size": 3} | GRADIENT_STEP | more


def run(trainer: Any) -> tuple[dict[str, float], torch.Tensor]:
    """The first step's metrics, and how far all trained weights moved, as one vector."""
    named = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    before = [p.detach().clone() for _, p in named]
    trainer.train()
    moved = torch.cat([(p.detach() - old).flatten() for (_, p), old in zip(named, before, strict=True)])
    clocks = ("_time", "runtime", "per_second")
    first = trainer.state.log_history[0]
    return {name: value for name, value in first.items() if not any(clock in name for clock in clocks)}, moved


def assert_same(found: Any, expected: Any) -> None:
    (metrics, moved), (expected_metrics, expected_moved) = found, expected
    assert expected_metrics.keys() <= metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=ROUNDING, abs=ROUNDING), name
    assert expected_moved.norm() > 0
    assert relative_error(moved, expected_moved) < ROUNDING


# ---- the operator in TRL's own trainers


@pytest.mark.parametrize(
    ("temperature", "softcap", "scale", "bias"),
    [(1.0, None, 1.0, False), (0.7, None, 1.0, True), (1.0, 5.0, 1.0, False), (1.3, 5.0, 0.5, True)],
)
def test_function_computes_what_trls_does(temperature: float, softcap: float | None, scale: float, bias: bool) -> None:
    hidden, weight, targets = make_problem(33, 301, 16)
    bias_values = torch.randn(301) if bias else None
    leaves = [x if x is None else x.requires_grad_() for x in (hidden, weight, bias_values)]
    upstream = torch.randn(2, 33)

    def results(apply: Callable) -> list[Any]:
        outputs = apply(*leaves, targets, temperature, 64, softcap, scale, ("log_probs", *OPTIONAL_OUTPUTS))
        loss = (outputs[0] * upstream[0]).sum() + 0.1 * (outputs[1] * upstream[1]).sum()  # with an entropy bonus
        return [*outputs, *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])]

    double = [x if x is None else x.detach().double().requires_grad_() for x in leaves]
    head = pf.LMHead(double[1], double[2], softcap, scale, temperature)
    truth = plain_stats(double[0], head, targets)
    loss = (truth["logprobs"] * upstream[0]).sum() + 0.1 * (truth["entropy"] * upstream[1]).sum()
    names = ("logprobs", "entropy", "log_sum_sq_probs", "mean_logit")
    truths = [*map(truth.get, names), None, *torch.autograd.grad(loss, [leaf for leaf in double if leaf is not None])]
    with use_fast_logprobs():
        ours = results(trl.trainer.utils._ChunkedLogProbFunction.apply)
    theirs = results(ChunkedLogProbFunction.apply)
    for our, their, true in zip(ours, theirs, truths, strict=True):
        assert (our.shape, our.dtype) == (their.shape, their.dtype)
        if true is None:
            assert torch.equal(our, their)  # is_top1
        else:
            assert_as_good_as_plain(our, their, true, factor=3.0)


def test_function_on_mixed_dtypes_and_chosen_outputs() -> None:
    """As add_fused_lm_head calls it: weights of another dtype, outputs by name, no valid position at all."""
    hidden, weight, targets = make_problem(9, 50, 8)
    with use_fast_logprobs():
        apply = trl.trainer.utils._ChunkedLogProbFunction.apply
        logprobs, entropy, *rest = apply(hidden, weight.bfloat16(), None, targets, 1.0, 64, None, 1.0, ("log_probs",))
        none = apply(hidden[:0].requires_grad_(), weight, None, targets[:0], 1.0, 64)
        with torch.autocast("cpu", torch.bfloat16):
            half = apply(hidden, weight, None, targets, 1.0, 64)[0]
    assert entropy is None and rest == [None] * 3
    assert logprobs.dtype == half.dtype == torch.float32
    assert (
        relative_error(logprobs, plain_stats(hidden, pf.LMHead(weight.bfloat16().float()), targets)["logprobs"]) < 1e-5
    )
    assert none[0].shape == (0,) and none[0].requires_grad


def names_of_trl() -> dict[str, Any]:
    places = {
        f"{m}.{n}": v
        for m, module in list(sys.modules.items())
        if m.split(".")[0] == "trl"
        for n, v in vars(module).items()
    }
    return {
        name: value
        for name, value in places.items()
        if "ChunkedLogProbFunction" in name or name.endswith("_use_triton")
    }


def test_use_is_undone() -> None:
    before = names_of_trl()
    assert len(before) >= 5
    used = use_fast_logprobs(0.0)
    replaced = {name for name, value in names_of_trl().items() if value is not before[name]}
    assert replaced == {"trl.trainer.utils._use_triton", *(name for name in before if "Chunked" in name)}
    with pytest.raises(KeyError), use_fast_logprobs(2**-8) as inner:
        assert trl.kernels.ChunkedLogProbFunction is inner.function
        raise KeyError
    assert trl.kernels.ChunkedLogProbFunction is used.function
    later = use_fast_logprobs()
    used.undo()  # out of order
    assert trl.kernels.ChunkedLogProbFunction is later.function
    later.undo()
    later.undo()
    assert names_of_trl() == before


def make_dpo(inputs: dict[str, Any], tmp_path: Path, **more: Any) -> Any:
    args = trl.DPOConfig(**options(tmp_path, **more))
    return trl.DPOTrainer(inputs["model"], load_model(inputs["aligned"]), args, train_dataset=inputs["rows"])


def make_kto(inputs: dict[str, Any], tmp_path: Path) -> Any:
    rows = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in inputs["rows"]
        for name in ("chosen", "rejected")
    ]
    args = trl.KTOConfig(**options(tmp_path))
    return trl.KTOTrainer(inputs["model"], args=args, train_dataset=Dataset.from_list(rows))


def make_sft(inputs: dict[str, Any], tmp_path: Path) -> Any:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in inputs["rows"]]
    args = trl.SFTConfig(**options(tmp_path))
    return trl.SFTTrainer(inputs["model"], args=args, train_dataset=Dataset.from_list(rows))


def make_grpo(inputs: dict[str, Any], tmp_path: Path) -> Any:
    args = trl.GRPOConfig(
        **options(tmp_path, per_device_train_batch_size=4),
        num_generations=2,
        max_completion_length=6,
        temperature=0.9,
        beta=0.1,
        entropy_coef=0.1,
    )
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in inputs["rows"]])
    return trl.GRPOTrainer(
        inputs["model"], lambda completions, **_: [float(sum(map(ord, text))) for text in completions], args, prompts
    )


@pytest.mark.parametrize("make", [make_dpo, make_kto, make_sft, make_grpo])
def test_trls_trainers_compute_the_same(make: Callable, inputs: dict[str, Any], tmp_path: Path) -> None:
    expected = run(make(inputs, tmp_path))
    trainer = make(inputs, tmp_path)
    with use_fast_logprobs():
        found = run(trainer)
    assert found[0].keys() == expected[0].keys()
    assert_same(found, expected)


# ---- WPO


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"precompute_ref_log_probs": True, "loss_type": "ipo", "beta": 0.5},
        {"loss_type": ["sigmoid_norm", "sigmoid"], "loss_weights": [0.5, 2.0]},
    ],
    ids=["sigmoid", "ipo", "mixed"],
)
def test_wpo_is_trls(more: dict[str, Any], inputs: dict[str, Any], tmp_path: Path) -> None:
    expected = run(make_dpo(inputs, tmp_path, use_weighting=True, **more))
    args = WPOConfig(**options(tmp_path, clamp=False, **more))
    found = run(WPOTrainer(inputs["model"], load_model(inputs["aligned"]), args, train_dataset=inputs["rows"]))
    assert found[0].keys() - expected[0].keys() == {"wpo/weight"}
    assert_same(found, expected)


def test_wpo_with_a_routers_loss_is_trls(inputs: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "eos_token_id": 0},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "initializer_range": 0.3},
        router_aux_loss_coef=0.1,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    load_tokenizer(inputs["model"]).save_pretrained(tmp_path / "experts")
    experts, data = str(tmp_path / "experts"), {"train_dataset": inputs["rows"]}
    expected = run(trl.DPOTrainer(experts, args=trl.DPOConfig(**options(tmp_path, use_weighting=True)), **data))
    found = run(WPOTrainer(experts, args=WPOConfig(**options(tmp_path, clamp=False)), **data))
    assert found[0]["aux_loss"] > 0.1
    assert_same(found, expected)
    dense = WPOConfig(**options(tmp_path, router_aux_loss_coef=0.5))
    config = DogeConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=0)
    DogeForCausalLM(config).save_pretrained(tmp_path / "dense")
    load_tokenizer(inputs["model"]).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"DogeForCausalLM makes no router loss for router_aux_loss_coef 0.5"):
        WPOTrainer(str(tmp_path / "dense"), args=dense, **data)


def test_wpo_with_adapters_is_trls(inputs: dict[str, Any], tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": "gaussian"}
    args = trl.DPOConfig(**options(tmp_path, use_weighting=True))
    kwargs = {"train_dataset": inputs["rows"], "peft_config": LoraConfig(**lora)}
    expected = run(trl.DPOTrainer(inputs["model"], args=args, **kwargs))
    trainer = WPOTrainer(inputs["model"], args=WPOConfig(**options(tmp_path, clamp=False)), **kwargs)
    assert not trainer.model.get_output_embeddings().weight.requires_grad
    assert_same(run(trainer), expected)


@pytest.mark.parametrize("alignment", pf.ALIGNMENTS)
def test_wpo_is_our_loops(alignment: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    """All pairs in one step, so that their order is all one: the loss, and the weight of a clamped pair."""
    same = {"per_device_train_batch_size": 6, "max_steps": 1, "alignment": alignment, "learning_rate": 1e-3}
    config = TrainConfig(
        model=inputs["model"],
        dataset=inputs["file"],
        output_dir=str(tmp_path / "ours"),
        objective="wpo",
        save_steps=0,
        **same,
    )
    trainer_module.train(config)
    (expected,) = tiny.read_metrics(tmp_path / "ours")
    trainer = WPOTrainer(inputs["model"], args=WPOConfig(**options(tmp_path, **same)), train_dataset=inputs["rows"])
    found, _ = run(trainer)
    for name in ("loss", "wpo/weight", "logps/chosen", "logps/rejected"):
        assert found[name] == pytest.approx(expected[name], rel=ROUNDING), name


def test_wpo_trains_evaluates_and_takes_columns(inputs: dict[str, Any], tmp_path: Path) -> None:
    rows = inputs["rows"].add_column("ref_chosen_logps", [-1.0] * 6).add_column("ref_rejected_logps", [-2.0] * 6)
    more = {"learning_rate": 1.0, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    args = WPOConfig(**options(tmp_path, precompute_ref_log_probs=True, loss_type="sigmoid_norm", **more))
    trainer = WPOTrainer(inputs["model"], args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    logs = trainer.state.log_history
    first = next(line for line in logs if "loss" in line)
    assert first["rewards/chosen"] == pytest.approx(0.1 * (first["logps/chosen"] + 1), rel=1e-5)
    margins = [line["eval_rewards/margins"] for line in logs if "eval_loss" in line]
    assert margins[1] > margins[0]
    found = trainer.evaluate()
    assert {"eval_rewards/margins", "eval_wpo/weight"} <= found.keys()
    new = trainer.evaluate({"new": rows})  # the reference is gone, but these rows need none
    assert new["eval_new_loss"] == pytest.approx(found["eval_loss"], rel=ROUNDING)
    with pytest.raises(ValueError, match="after training has started"):
        trainer.evaluate(inputs["rows"])
    trainer.save_model()
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ---- WSPO


def our_wspo(inputs: dict[str, Any], tmp_path: Path, **more: Any) -> dict[str, Any]:
    config = TrainConfig(
        model=inputs["model"],
        dataset=inputs["file"],
        output_dir=str(tmp_path / "ours"),
        objective="wspo",
        weak_aligned_model=inputs["aligned"],
        weak_ref_model=inputs["weak"],
        ref_model=inputs["weak"],
        per_device_train_batch_size=6,
        max_steps=1,
        save_steps=0,
        truncation_side="sequence_end",
        **more,
    )
    trainer_module.train(config)
    return tiny.read_metrics(tmp_path / "ours")[0]


def weak_models(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"weak_aligned_model": inputs["aligned"], "weak_ref_model": inputs["weak"]}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("source", ["paths", "modules", "stores"])
def test_wspo_is_our_loops(level: str, source: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    more: dict[str, Any] = {"level": level, "gamma": 0.3, "max_length": 12}
    expected = our_wspo(inputs, tmp_path, **more)
    given: dict[str, Any] = {"ref_model": load_model(inputs["weak"]), **weak_models(inputs)}
    if source == "modules":
        given |= {name: load_model(path) for name, path in weak_models(inputs).items()}
    if source == "stores":
        tokenizer = load_tokenizer(inputs["model"])
        rows, _ = encode(load_preferences(inputs["file"]), tokenizer, 12, "sequence_end")
        for name, model in (("ref", "weak"), ("weak_aligned", "aligned"), ("weak_ref", "weak")):
            key = StoreKey.of(inputs[model], tokenizer, rows, 12, "sequence_end")
            score(load_model(inputs[model]), rows, key, tmp_path / name)
            more[f"{name}_logprobs"] = str(tmp_path / name)
        given = {}
    args = WSPOConfig(**options(tmp_path, per_device_train_batch_size=6, **more))
    found, _ = run(WSPOTrainer(inputs["model"], args=args, train_dataset=inputs["rows"], **given))
    for model in given.values():  # are the caller's again
        assert isinstance(model, str) or "forward" not in vars(model) or model is given["ref_model"]
    for name in ("loss", "wspo/residual", "wspo/target", "wspo/log_ratio", "logps/chosen"):
        assert found[name] == pytest.approx(expected[name], rel=ROUNDING), name


def test_wspo_of_columns_of_other_tokens(inputs: dict[str, Any], tmp_path: Path) -> None:
    """At sequence level only the mean of a weak model's log-probs counts, over however many tokens."""
    rows = inputs["rows"]
    for name, value in (("weak_aligned", -1.0), ("weak_ref", -3.0)):
        rows = rows.add_column(f"{name}_chosen_logps", [[value - 0.5, value + 0.5]] * 6)
    args = options(tmp_path, gamma=0.5)
    trainer = WSPOTrainer(inputs["model"], args=WSPOConfig(**args, level="sequence"), train_dataset=rows)
    found, _ = run(trainer)
    assert found["wspo/target"] == pytest.approx(2.0, rel=ROUNDING)
    assert found["loss"] == pytest.approx(4.0, rel=ROUNDING)  # the policy is its own reference before the first step
    assert trainer.evaluate(trainer.train_dataset)["eval_wspo/target"] == pytest.approx(2.0, rel=ROUNDING)
    with pytest.raises(ValueError, match=r"weak_aligned_chosen_logps must hold .* found \(2,\)"):
        WSPOTrainer(inputs["model"], args=WSPOConfig(**args), train_dataset=rows).train()


def test_wspo_trains_adapters_and_evaluates(inputs: dict[str, Any], tmp_path: Path) -> None:
    args = WSPOConfig(**options(tmp_path, learning_rate=0.05, max_steps=4, eval_strategy="steps", eval_steps=2))
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    kwargs = {"train_dataset": inputs["rows"], "eval_dataset": inputs["rows"], "peft_config": lora}
    trainer = WSPOTrainer(inputs["model"], args=args, **weak_models(inputs), **kwargs)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses[1] < losses[0]
    assert trainer.evaluate(inputs["rows"])["eval_loss"] == pytest.approx(losses[1], rel=ROUNDING)


@pytest.mark.parametrize("algorithm", ["WPO", "WPO precomputed", "WSPO"])
def test_a_policy_is_its_own_reference_in_bf16(algorithm: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    """Both by our head, which does not round logits to bf16 as DPOTrainer's does."""
    args = options(tmp_path, bf16=True, learning_rate=0.0)
    if algorithm == "WSPO":
        trainer: Any = WSPOTrainer(
            inputs["model"], args=WSPOConfig(**args), train_dataset=inputs["rows"], **weak_models(inputs)
        )
    else:
        config = WPOConfig(**args, precompute_ref_log_probs=algorithm == "WPO precomputed")
        trainer = WPOTrainer(inputs["model"], args=config, train_dataset=inputs["rows"])
    found, _ = run(trainer)
    assert abs(found["wspo/log_ratio" if algorithm == "WSPO" else "rewards/chosen"]) < 1e-6


def test_wpo_compiled(inputs: dict[str, Any], tmp_path: Path) -> None:
    more = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = WPOTrainer(inputs["model"], args=WPOConfig(**options(tmp_path, **more)), train_dataset=inputs["rows"])
    found, _ = run(trainer)
    expected, _ = run(WPOTrainer(inputs["model"], args=WPOConfig(**options(tmp_path)), train_dataset=inputs["rows"]))
    assert found["loss"] == pytest.approx(expected["loss"], rel=ROUNDING)


def train_in_child(algorithm: str, bf16: bool, inputs: dict[str, Any], output: Path) -> None:
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    more = {"bf16": bf16, "per_device_train_batch_size": 2, "output_dir": str(output)}
    shared: dict[str, Any] = {"train_dataset": load_dataset("json", data_files=inputs["file"], split="train")}
    if algorithm == "WPO":
        trainer: Any = WPOTrainer(inputs["model"], args=WPOConfig(**options(output, **more)), **shared)
    else:
        args = WSPOConfig(**options(output, **more))
        trainer = WSPOTrainer(inputs["model"], args=args, **shared, **weak_models(inputs))
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        (output / "log.json").write_text(json.dumps(trainer.state.log_history[0]))


@pytest.mark.parametrize("algorithm", ["WPO", "WSPO"])
def test_two_sharded_processes(algorithm: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    """They compute what two with whole weights do; in mixed precision too, a policy is its own reference."""
    found = {}
    for name, sharded, bf16 in (("whole", False, False), ("sharded", True, False), ("mixed", True, True)):
        shared = (algorithm, bf16, {k: v for k, v in inputs.items() if k != "rows"}, tmp_path / name)
        assert tiny.in_two_processes(train_in_child, *shared, sharded=sharded) == [0, 0]
        before, after = tiny.read_weights(inputs["model"]), tiny.read_weights(tmp_path / name)
        metrics = json.loads((tmp_path / name / "log.json").read_text())
        metrics = {key: value for key, value in metrics.items() if not key.endswith(("_time", "per_second"))}
        found[name] = metrics, torch.cat([(after[key] - value).flatten() for key, value in before.items()])
    assert_same(found["sharded"], found["whole"])
    mixed, moved = found["mixed"]
    assert abs(mixed["wspo/log_ratio" if algorithm == "WSPO" else "rewards/chosen"]) < 1e-6 and moved.norm() > 0


def test_a_reference_that_fsdp_shards(inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of it nothing but the whole forward runs: packing is known from the policy, which is of its kind."""

    def shard(accelerator: Any, model: Any, **_: Any) -> Any:
        def refuse(*_: Any) -> None:
            assert inside, "the backbone alone meets sharded parameters"

        model.model.register_forward_pre_hook(refuse)
        model.register_forward_pre_hook(lambda *_: inside.append(True))
        return model

    inside: list[bool] = []
    monkeypatch.setattr("accelerate.Accelerator.prepare_model", shard)
    args = WPOConfig(**options(tmp_path))
    reference = load_model(inputs["aligned"])
    trainer = WPOTrainer(inputs["model"], reference, args, train_dataset=inputs["rows"])
    assert trainer.ref_model is reference


# ---- what cannot be


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        (WPOConfig, {"use_weighting": True}, "cannot honour use_weighting=True"),
        (WPOConfig, {"use_liger_kernel": True}, "use_liger_kernel"),
        (WPOConfig, {"padding_free": True}, "padding_free"),
        (WPOConfig, {"ld_alpha": 0.5}, "ld_alpha"),
        (WPOConfig, {"f_divergence_type": "js_divergence"}, "f_divergence_type"),
        (WPOConfig, {"loss_type": "aot"}, "loss_type must be one of"),
        (WPOConfig, {"loss_type": "simpo"}, "simpo has no reference"),
        (WPOConfig, {"loss_type": "exo_pair"}, "label_smoothing must be in"),
        (WPOConfig, {"loss_type": "hinge", "label_smoothing": 0.1}, "hinge makes no use of label_smoothing=0.1"),
        (WPOConfig, {"loss_type": ["ipo", "robust"], "discopop_tau": 0.1}, "ipo, robust makes no use of discopop_tau"),
        (WPOConfig, {"alignment": "best"}, "alignment must be one of"),
        (WPOConfig, {"grad_tolerance": 2.0}, "grad_tolerance must be"),
        (WPOConfig, {"backend": "cuda"}, "backend must be one of"),
        (WSPOConfig, {"level": "segment"}, "level must be"),
        (WSPOConfig, {"gamma": 0.0}, r"gamma must be in \(0, inf\), found 0"),
        (WSPOConfig, {"precompute_ref_log_probs": False}, "precompute_ref_log_probs"),
        (WSPOConfig, {"loss_type": "hinge"}, "loss_type"),
        (WSPOConfig, {"discopop_tau": 0.1}, "discopop_tau"),
        (WSPOConfig, {"ref_logprobs": "store", "truncation_mode": "keep_end"}, "keep_start"),
    ],
)
def test_contradictory_options(config: Any, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options(tmp_path, **more))


def test_hyperparameters_go_to_the_members_that_take_them(tmp_path: Path) -> None:
    config = WPOConfig(
        **options(tmp_path, loss_type=["hinge", "discopop", "robust"], discopop_tau=0.2, label_smoothing=0.1)
    )
    assert config.objective().function.keywords["hyperparameters"] == {"tau": 0.2, "label_smoothing": 0.1}


@pytest.mark.parametrize(("trainer", "config"), [(WPOTrainer, WPOConfig), (WSPOTrainer, WSPOConfig)])
def test_a_model_split_over_devices(
    trainer: Any, config: Any, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is scored, also where the trainer loads it."""

    def split(path: str, **_: Any) -> Any:
        model = load_model(path)
        model.hf_device_map = {"model": 0, "lm_head": 1}
        return model

    monkeypatch.setattr(trl.trainer.dpo_trainer, "create_model_from_path", split)
    monkeypatch.setattr(trl.DPOTrainer, "compute_ref_log_probs", None)
    args = config(**options(tmp_path, precompute_ref_log_probs=True))
    given: dict[str, Any] = {"train_dataset": inputs["rows"], **(weak_models(inputs) if config is WSPOConfig else {})}
    with pytest.raises(ValueError, match=r"^model must be on one device, found it split over 0, 1: "):
        trainer(inputs["model"], args=args, **given)
    if config is WSPOConfig:
        with pytest.raises(ValueError, match="weak_ref_model must be on one device"):
            trainer(inputs["model"], args=args, **given | {"weak_ref_model": split(inputs["weak"])})


def test_copies_of_a_policy_are_their_own(inputs: dict[str, Any], tmp_path: Path) -> None:
    """A snapshot, or an average of weights, computes with its own ones, not with those of the model in training."""
    trainer = WPOTrainer(inputs["model"], args=WPOConfig(**options(tmp_path)), train_dataset=inputs["rows"])
    snapshot, ids = copy.deepcopy(trainer.model), torch.arange(2, 9)[None]
    before = trainer.model.eval()(ids).logits
    trainer.train()
    assert torch.equal(snapshot.eval()(ids).logits, before)
    assert not torch.equal(trainer.model.eval()(ids).logits, before)


def test_dropout_of_attention_is_off(inputs: dict[str, Any], tmp_path: Path) -> None:
    """As a number, which DPOTrainer does not look for: a policy in its first step is its own reference."""
    model = load_model(inputs["model"])
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    first, _ = run(WPOTrainer(model, args=WPOConfig(**options(tmp_path)), train_dataset=inputs["rows"]))
    assert abs(first["rewards/chosen"]) < 1e-6 and model.config.attention_dropout == 0.5


def test_bad_arguments(inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"train_dataset": inputs["rows"]}
    args = WSPOConfig(**options(tmp_path))
    with pytest.raises(TypeError, match="args must be a WPOConfig, found DPOConfig"):
        WPOTrainer(inputs["model"], args=trl.DPOConfig(**options(tmp_path)), **data)
    with pytest.raises(ValueError, match="WSPO needs weak_ref_model, weak_ref_logprobs, or the column"):
        WSPOTrainer(inputs["model"], args=args, weak_aligned_model=inputs["aligned"], **data)
    with pytest.raises(ValueError, match="weak_ref_model has another vocabulary"):
        WSPOTrainer(inputs["model"], args=args, **weak_models(inputs) | {"weak_ref_model": inputs["foreign"]}, **data)
    foreign = AutoModelForCausalLM.from_pretrained(inputs["foreign"])
    with pytest.raises(ValueError, match="weak_aligned_model has another vocabulary"):
        WSPOTrainer(inputs["model"], args=args, **weak_models(inputs) | {"weak_aligned_model": foreign}, **data)
    both = WSPOConfig(**options(tmp_path, weak_ref_logprobs="store"))
    with pytest.raises(ValueError, match="give weak_ref_model or weak_ref_logprobs, not both"):
        WSPOTrainer(inputs["model"], args=both, **weak_models(inputs), **data)
    with pytest.raises(TypeError, match="data_collator must be a DataCollatorForWSPO"):
        WSPOTrainer(inputs["model"], args=args, **weak_models(inputs), data_collator=list, **data)
    tiny.share_sequences_out(monkeypatch)
    with pytest.raises(ValueError, match="each process needs whole sequences: context"):
        WPOTrainer(inputs["model"], args=WPOConfig(**options(tmp_path)), **data)


def test_a_store_of_other_data(inputs: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(inputs["model"])
    rows, _ = encode(load_preferences(inputs["file"], "train[:4]"), tokenizer, None, "sequence_end")
    key = StoreKey.of(inputs["weak"], tokenizer, rows, None, "sequence_end")
    score(load_model(inputs["weak"]), rows, key, tmp_path / "store")
    args = WSPOConfig(**options(tmp_path, ref_logprobs=str(tmp_path / "store")))
    given = weak_models(inputs) | {"train_dataset": inputs["rows"]}
    with pytest.raises(ValueError, match="was made from something else, it differs in data"):
        WSPOTrainer(inputs["model"], args=args, **given)
    given["train_dataset"] = inputs["rows"].select(range(4))
    with pytest.raises(ValueError, match="ref_logprobs hold the training data alone"):
        WSPOTrainer(inputs["model"], args=args, eval_dataset=inputs["rows"], **given)


def test_bad_use() -> None:
    before = names_of_trl()
    with pytest.raises(ValueError, match="grad_tolerance must be"):
        use_fast_logprobs(-1.0)
    with pytest.raises(ValueError, match="backend must be one of"):
        use_fast_logprobs(backend="fast")
    assert names_of_trl() == before


def test_other_versions_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r">=1.16,<1.17, found 1.17.0"):
        importlib.reload(integration)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs TRL 1.16 .*pip install .* -e '.\[trl\]'"):
        importlib.reload(integration)


@pytest.mark.parametrize("name", ["trl_wpo", "trl_wspo"])
def test_examples(name: str, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {**(weak_models(inputs) if name == "trl_wspo" else {}), "model": inputs["model"], "dataset": inputs["file"]}
    flags |= {"output_dir": tmp_path, "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2}
    monkeypatch.setattr(sys, "argv", [name, *(f"--{flag}={value}" for flag, value in flags.items())])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert (tmp_path / "model.safetensors").is_file()


def test_train_step_benchmark(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its loops train the same pairs to the same loss; here in one process, where memory means nothing.

    Our loop writes its tokens per second and its rounded seconds, not its tokens.
    """
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks"))
    bench = importlib.import_module("bench_train_step")

    def measure(name: str, options: argparse.Namespace, pairs: Path, folder: Path) -> Any:
        bench.work(argparse.Namespace(**vars(options) | {"worker": name, "data": str(pairs), "output": folder}))
        found = json.loads((folder / "result.json").read_text())
        assert found["parameters"] == sum(p.numel() for p in load_model(inputs["model"]).parameters())
        return bench.Result(name, found["step_seconds"], 1.0, found["tokens"], 2**30, found["loss"])

    monkeypatch.setattr(bench, "measure", measure)
    flags = ["--short", "--model", inputs["model"], "--data", inputs["file"], "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_train_step.py", *flags])
    bench.main()
    trainers = json.loads((tmp_path / "train_step.json").read_text())["trainers"]
    assert [row["name"] for row in trainers] == [name for name in bench.TRAINERS if name not in bench.ON_REQUEST]
    first = {name.startswith("wspo"): trainers[i] for i, name in ((0, "ours"), (5, "wspo-ours"))}
    for row in trainers:
        expected = first[row["name"].startswith("wspo")]
        assert row["absent"] is None and row["tokens"] == pytest.approx(expected["tokens"], rel=0.1)
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4) and row["loss"] > 1e-5
    assert capsys.readouterr().out.count("| not measured |") == 9
