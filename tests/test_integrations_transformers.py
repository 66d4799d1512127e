"""transformers' Trainer on fused losses, against itself on full logits and against float64."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
import transformers
from conftest import assert_as_good_as_plain, make_problem, relative_error
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

import prefopt_fast as pf
from prefopt_fast.batch import add_sample_weights, encode, load_preferences
from prefopt_fast.integrations.transformers import (
    FusedCausalLMLoss,
    PairCollator,
    PreferenceTrainer,
    add_ref_logps,
    add_token_logps,
    fused_causal_lm_loss,
)
from prefopt_fast.policy import load_model, load_tokenizer

# With an ε far above any gradient Adam's update is linear in the gradient: weights then compare as gradients do.
LINEAR_ADAM = {"adam_epsilon": 1e4, "learning_rate": 1e4, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    models = {name: tiny.make_model(folder / name, seed) for seed, name in enumerate(("model", "other", "weak"))}
    return models | {"dataset": tiny.make_pairs(folder / "pairs.json", 10)}


@pytest.fixture
def pairs(inputs: dict[str, str]) -> datasets.Dataset:
    encoded, _ = encode(load_preferences(inputs["dataset"]), load_tokenizer(inputs["model"]))
    return add_ref_logps(encoded, load_model(inputs["other"]), batch_size=3)


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    base = {"per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    base |= {"save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False}
    return transformers.TrainingArguments(output_dir=str(folder), **base | options)


def losses(trainer: transformers.Trainer, name: str = "loss") -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def update(model: torch.nn.Module, start: str) -> Tensor:
    before = load_model(start).state_dict()
    return torch.cat([(value - before[name]).flatten() for name, value in model.state_dict().items()])


@pytest.mark.parametrize("items", [None, 7, torch.tensor(11.0)])
@pytest.mark.parametrize("shifted", [False, True])
def test_causal_lm_loss(items: Any, shifted: bool) -> None:
    hidden, weight, labels = make_problem(12, 31, 8)
    labels = labels.view(2, 6)
    labels[0, :3] = -100
    results = []
    for dtype in (torch.float64, torch.float32):
        states, matrix = (x.detach().to(dtype).requires_grad_() for x in (hidden.view(2, 6, 8), weight))
        logits = states @ matrix.T
        # ForCausalLMLoss rounds to fp32 by itself.
        scored = labels.flatten() if shifted else torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), scored, reduction="sum")
        loss = loss / ((scored != -100).sum() if items is None else items)
        results.append((loss, *torch.autograd.grad(loss, (states, matrix))))
    states, matrix = hidden.view(2, 6, 8).clone().requires_grad_(), weight.clone().requires_grad_()
    options = {"num_items_in_batch": items, "shift_labels": labels if shifted else None}
    theirs = ForCausalLMLoss(states @ matrix.T, labels, 31, **options)
    ours = fused_causal_lm_loss(states, labels, pf.LMHead(matrix), **options)
    torch.testing.assert_close(ours, theirs)
    grads = torch.autograd.grad(ours, (states, matrix))
    for name, value, truth, plain in zip(("dhidden", "dweight"), grads, *(x[1:] for x in results), strict=True):
        assert_as_good_as_plain(value, plain, truth, name=name)


def test_nothing_to_score_is_what_it_is_in_transformers() -> None:
    hidden, weight, labels = make_problem(4, 31, 8)
    labels = torch.full_like(labels, -100).view(1, 4)
    assert fused_causal_lm_loss(hidden.view(1, 4, 8), labels, pf.LMHead(weight)).isnan()
    assert fused_causal_lm_loss(hidden.view(1, 4, 8), labels, pf.LMHead(weight), 5) == 0


@pytest.mark.parametrize("adapters", [False, True])
def test_sft_by_compute_loss_func(inputs: dict[str, str], tmp_path: Path, adapters: bool) -> None:
    """The same Trainer with and without: losses, evaluation and update; 10 rows in accumulated batches of 2 · 3."""
    encoded, _ = encode(load_preferences(inputs["dataset"]), load_tokenizer(inputs["model"]), responses=("chosen",))
    rows = [
        {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"],
        }
        for row in encoded
    ]

    def collator(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        return {
            name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True, padding)
            for name, padding in (("input_ids", 0), ("labels", -100))
        }

    def run(fused: bool) -> tuple[transformers.Trainer, torch.nn.Module]:
        model = load_model(inputs["model"])
        if adapters:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, **LINEAR_ADAM}
        trainer = transformers.Trainer(
            model,
            arguments(tmp_path / str(fused), eval_strategy="steps", eval_steps=2, **options),
            data_collator=collator,
            train_dataset=datasets.Dataset.from_list(rows),
            eval_dataset=datasets.Dataset.from_list(rows[:5]),
        )
        if fused:
            with FusedCausalLMLoss(model) as trainer.compute_loss_func:
                trainer.train()
        else:
            trainer.train()
        return trainer, model

    (theirs, expected), (ours, found) = run(False), run(True)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5) and len(losses(ours)) == 3
    assert losses(ours, "eval_loss") == pytest.approx(losses(theirs, "eval_loss"), rel=1e-4)  # as the updates below
    before = load_model(inputs["model"]).state_dict() if not adapters else {}
    difference = [torch.cat([(v - before.get(k, 0)).flatten() for k, v in m.state_dict().items()])
                  for m in (found, expected)]  # fmt: skip
    assert float(difference[1].norm()) > 1e-2 and relative_error(*difference) < 1e-4
    ids = torch.arange(6)[None]
    assert found(ids).logits.shape[1] == 6  # the hooks are gone


def test_sft_under_autocast_runs_the_head_in_it(inputs: dict[str, str]) -> None:
    model = load_model(inputs["model"])
    ids = torch.arange(12).view(2, 6)
    with FusedCausalLMLoss(model) as loss_func:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(ids)
        assert outputs.logits.shape[1] == 1
        rounded = loss_func(outputs, ids)
        exact = loss_func(model(ids), ids)
        with pytest.raises(RuntimeError, match="no forward pass"):
            loss_func(outputs, ids)
        model(ids)
        with pytest.raises(ValueError, match="no labels"):
            loss_func(outputs, None)
    torch.testing.assert_close(exact, model(ids, labels=ids).loss)
    assert 1e-6 < abs(float(rounded - exact)) < 0.05


def test_sft_on_labels_that_the_collator_has_shifted(inputs: dict[str, str]) -> None:
    """As under context parallelism, where a process has no neighbour's label to shift."""
    model = load_model(inputs["model"])
    ids = torch.arange(12).view(2, 6)
    shifted = ids.roll(2, 1)
    with FusedCausalLMLoss(model) as loss_func:
        found = loss_func(model(ids, shift_labels=shifted), ids, 7)
        unshifted = loss_func(model(ids), ids, 7)
    torch.testing.assert_close(found, model(ids, labels=ids, shift_labels=shifted, num_items_in_batch=7).loss)
    torch.testing.assert_close(unshifted, model(ids, labels=ids, num_items_in_batch=7).loss)


def pair_truth(pairs: datasets.Dataset, model: torch.nn.Module, weights: list[float], wpo: bool) -> Tensor:
    """Mean loss from full logits, of one unpadded sequence at a time, at the model's dtype."""
    total = torch.zeros((), dtype=torch.float64)
    for row, weight in zip(pairs, weights, strict=True):
        margin, alignment = 0.0, 0.0
        for sign, name in ((1, "chosen"), (-1, "rejected")):
            prompt, answer = row["prompt_ids"], row[f"{name}_ids"]
            log_probs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logprobs = log_probs.gather(-1, torch.tensor(answer)[:, None])[:, 0]
            margin = margin + sign * (logprobs.sum() - row[f"ref_{name}_logps"])
            alignment = alignment + (logprobs - (2 * log_probs).logsumexp(-1)).mean().detach()
        loss = -torch.nn.functional.logsigmoid(0.1 * margin)
        total = total + weight * loss * (alignment.exp().clamp(max=1) if wpo else 1)
    return total / len(weights)


@pytest.mark.parametrize("wpo", [False, True])
def test_preferences_against_full_logits(
    inputs: dict[str, str], pairs: datasets.Dataset, tmp_path: Path, wpo: bool
) -> None:
    """One step over all 10 pairs, whole and in batches of 4, 4 and 2: loss, gradient and metrics."""
    weights = [0.0, 0.5, *range(1, 9)]
    raw = load_preferences(inputs["dataset"]).add_column("w", [float(weight) for weight in weights])
    weighted = add_sample_weights(pairs, raw, "w")
    truth = load_model(inputs["model"]).double()
    expected = pair_truth(weighted, truth, weights, wpo)
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in truth.parameters()])
    for size, accumulated in ((10, 1), (4, 3)):
        model = load_model(inputs["model"])
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        trainer = PreferenceTrainer(
            model,
            arguments(tmp_path / "out", **options, **LINEAR_ADAM),
            train_dataset=weighted,
            eval_dataset={"all": weighted, "plain": pairs},
            processing_class=load_tokenizer(inputs["model"]),
            loss=pf.WPOLoss() if wpo else pf.PreferenceLoss(),
        )
        before = trainer.evaluate()
        trainer.train()
        assert losses(trainer) == pytest.approx([float(expected)], rel=1e-5)
        assert before["eval_all_loss"] == pytest.approx(float(expected), rel=1e-5)
        assert ("wpo/weight" in before or "eval_plain_wpo/weight" in before) == wpo
        line = next(line for line in trainer.state.log_history if "loss" in line)
        assert line["rewards/margins"] == pytest.approx(before["eval_plain_rewards/margins"], abs=1e-6)
        start = load_model(inputs["model"])
        found = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)])
        assert relative_error(-found, gradient) < 1e-4  # Adam's first step is −lr · g / (|g| + ε)


def small(family: str) -> Any:
    common = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 0}
    own: dict[str, Any] = {"ffn_dim": 24, "word_embed_proj_dim": 16}
    if family == "mixtral":
        own = {"intermediate_size": 24, "num_key_value_heads": 1, "num_local_experts": 4, "output_router_logits": True}
    config = transformers.AutoConfig.for_model(family, **common, **own, pad_token_id=0, bos_token_id=0)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["opt", "mixtral"])
def test_families_whose_forward_is_their_own(family: str, pairs: datasets.Dataset, tmp_path: Path) -> None:
    """OPT's goes past its backbone to the decoder; Mixtral's makes a loss of what the routers of all layers did."""
    model = small(family)
    expected = float(pair_truth(pairs, small(family), [1.0] * len(pairs), wpo=True))
    trainer = PreferenceTrainer(
        model, arguments(tmp_path, max_steps=1), train_dataset=pairs, eval_dataset=pairs, loss=pf.WPOLoss()
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    ids = torch.arange(12).view(2, 6)
    model = small(family)
    full = (
        model(input_ids=ids, labels=ids, output_router_logits=False) if family == "mixtral" else model(ids, labels=ids)
    )
    with FusedCausalLMLoss(model) as loss:
        assert float(loss(model(input_ids=ids), ids)) == pytest.approx(float(full.loss), rel=1e-5)


def test_a_model_that_was_trained_under_bf16_goes_on(
    inputs: dict[str, str], pairs: datasets.Dataset, tmp_path: Path
) -> None:
    """Accelerate leaves its autocast in the model's forward."""
    model, given = load_model(inputs["model"]), arguments(tmp_path, bf16=True, max_steps=1)
    columns = pairs.select_columns(["row", "prompt_ids", "chosen_ids", "rejected_ids"])
    for _ in range(2):
        FusedCausalLMLoss(model)
        rows = add_ref_logps(columns, model, dtype=torch.bfloat16)
        PreferenceTrainer(model, given, train_dataset=rows, loss=pf.WPOLoss()).train()
        assert "_original_forward" in vars(model)
    assert relative_error(*(add_ref_logps(columns, m).with_format("torch")["ref_chosen_logps"][:]
                            for m in (model, reloaded(model, tmp_path)))) < 1e-6  # fmt: skip


def reloaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "saved")
    return load_model(str(folder / "saved"))


@pytest.fixture
def chosen(inputs: dict[str, str]) -> datasets.Dataset:
    encoded, _ = encode(load_preferences(inputs["dataset"]), load_tokenizer(inputs["model"]), responses=("chosen",))
    for name, model in (("ref", "model"), ("weak_aligned", "other"), ("weak_ref", "weak")):
        encoded = add_token_logps(encoded, load_model(inputs[model]), name, batch_size=3)
    return encoded


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_wspo_against_full_logits(inputs: dict[str, str], chosen: datasets.Dataset, tmp_path: Path, level: str) -> None:
    """One step over all 10 chosen responses, in batches of 4, 4 and 2; the policy is not the reference."""
    weights = [k / 16 for k in range(10)]  # gradients below 1, far below Adam's ε
    raw = load_preferences(inputs["dataset"]).add_column("w", weights)
    rows = add_sample_weights(chosen, raw, "w")
    models = [load_model(inputs[name]).double() for name in ("weak", "model", "other", "weak")]
    gamma, total = 0.3, torch.zeros((), dtype=torch.float64)
    for row, weight in zip(rows, weights, strict=True):
        ids = torch.tensor(row["prompt_ids"] + row["chosen_ids"])
        tokens = torch.arange(len(row["prompt_ids"]), len(ids))
        logps = (model(ids[None]).logits[0].log_softmax(-1)[tokens - 1, ids[tokens]] for model in models)
        policy, ref, aligned, weak = logps
        residual = gamma * (policy - ref.detach()) - (aligned - weak).detach()
        total = total + weight * (residual.square().mean() if level == "token" else residual.mean().square())
    expected = total / len(rows)
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in models[0].parameters()])
    model = load_model(inputs["weak"])
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 1, **LINEAR_ADAM}
    trainer = PreferenceTrainer(
        model, arguments(tmp_path, **options), train_dataset=rows, eval_dataset=rows, loss=pf.WSPOLoss(gamma, level)
    )
    before = trainer.evaluate()
    trainer.train()
    assert before["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert losses(trainer) == pytest.approx([float(expected)], rel=1e-5)
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["wspo/target"] == pytest.approx(before["eval_wspo/target"], rel=1e-4)
    start = load_model(inputs["weak"])
    found = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)])
    assert relative_error(-found, gradient) < 1e-4


def train_in_child(options: dict[str, Any], model: str, rows: str, output: Path) -> None:
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    trainer = PreferenceTrainer(
        load_model(model), arguments(output, **options), train_dataset=datasets.load_from_disk(rows), loss=pf.WPOLoss()
    )
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        (output / "log.json").write_text(json.dumps(trainer.state.log_history))


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_compute_what_one_does(
    inputs: dict[str, str], pairs: datasets.Dataset, tmp_path: Path, sharded: bool
) -> None:
    """Two steps of 4 pairs, 2 + 2 in two processes."""
    pairs.save_to_disk(tmp_path / "pairs")
    options, model = {"max_steps": 2, **LINEAR_ADAM}, inputs["model"]
    shared = options | {"per_device_train_batch_size": 2}, model, str(tmp_path / "pairs"), tmp_path / "two"
    assert tiny.in_two_processes(train_in_child, *shared, sharded=sharded) == [0, 0]
    train_in_child(options | {"per_device_train_batch_size": 4}, *shared[1:3], tmp_path / "one")
    lines = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("two", "one")]
    for found, expected in zip(lines[0][:2], lines[1][:2], strict=True):
        for name in ("loss", "rewards/margins", "wpo/weight"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
    two, one = (update(load_model(str(tmp_path / name)), model) for name in ("two", "one"))
    assert float(one.norm()) > 1e-2 and relative_error(two, one) < 1e-4


def test_preferences_train_and_are_saved(inputs: dict[str, str], pairs: datasets.Dataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load_model(inputs["model"]), LoraConfig(r=4, target_modules="all-linear"))
    own = add_ref_logps(pairs, model)  # in place of what was there
    trainer = PreferenceTrainer(
        model,
        arguments(
            tmp_path,
            max_steps=20,
            learning_rate=2e-2,
            eval_strategy="steps",
            eval_steps=20,
            save_strategy="steps",
            save_steps=20,
            gradient_checkpointing=True,
        ),
        train_dataset=own,
        eval_dataset=own,
        loss=pf.WPOLoss({"sigmoid": 1.0, "sft": 0.1}, clamp=False),
        data_collator=PairCollator(1),
    )
    trainer.train()
    margins = losses(trainer, "rewards/margins")
    assert margins[0] == pytest.approx(0.0, abs=1e-6) and losses(trainer, "eval_rewards/margins")[0] > 0.05
    assert 0 < losses(trainer, "eval_wpo/effective_sample_size")[0] <= 1 + 1e-6
    assert (tmp_path / "checkpoint-20" / "adapter_model.safetensors").exists()


def test_reference_free_under_bf16(inputs: dict[str, str], pairs: datasets.Dataset, tmp_path: Path) -> None:
    """Autocast as Accelerate has it, in which the loss runs; before another Trainer's subclass."""

    class Theirs(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

    class Mine(PreferenceTrainer, Theirs):
        pass

    values = {}
    for bf16 in (False, True):
        trainer = Mine(
            load_model(inputs["model"]), arguments(tmp_path, max_steps=1, bf16=bf16), train_dataset=pairs,
            loss=pf.PreferenceLoss("simpo", beta=2.0),
        )  # fmt: skip
        trainer.train()
        values[bf16] = losses(trainer)[0]
    assert 1e-7 < abs(values[True] - values[False]) < 0.05


@pytest.mark.parametrize("wspo", [False, True])
def test_reference_scored_in_the_precision_of_training(inputs: dict[str, str], tmp_path: Path, wspo: bool) -> None:
    """Before its first step a policy that is its own reference has no margin, under autocast too."""
    encoded, _ = encode(load_preferences(inputs["dataset"]), load_tokenizer(inputs["model"]))
    values = {}
    for dtype in (None, torch.bfloat16):
        model = load_model(inputs["model"])
        if wspo:
            rows = add_token_logps(encoded, model, "ref", dtype=dtype)
            for name in ("weak_aligned", "weak_ref"):
                rows = rows.add_column(f"{name}_chosen_logps", rows["ref_chosen_logps"])
        else:
            rows = add_ref_logps(encoded, model, dtype=dtype)
        trainer = PreferenceTrainer(
            model,
            arguments(tmp_path, bf16=True),
            train_dataset=rows,
            eval_dataset=rows,
            loss=pf.WSPOLoss() if wspo else pf.WPOLoss(),
        )
        values[dtype] = abs(trainer.evaluate()["eval_wspo/log_ratio" if wspo else "eval_rewards/chosen"])
    assert values[torch.bfloat16] < 1e-6 < 1e-5 < values[None]


def test_scoring_leaves_every_module_in_its_mode(inputs: dict[str, str], pairs: datasets.Dataset) -> None:
    model = load_model(inputs["model"]).train()
    frozen = model.get_input_embeddings().eval()
    columns = pairs.select_columns(["row", "prompt_ids", "chosen_ids", "rejected_ids"])
    add_ref_logps(columns, model)
    with pytest.raises(ValueError, match="no token in rejected_ids"):
        add_ref_logps(columns.remove_columns("rejected_ids"), model)
    assert [module for module in model.modules() if not module.training] == [frozen]


def test_predictions_stay_out_of_the_next_evaluation(
    inputs: dict[str, str], pairs: datasets.Dataset, tmp_path: Path
) -> None:
    trainer = PreferenceTrainer(
        load_model(inputs["model"]), arguments(tmp_path), eval_dataset=pairs.select(range(3)), loss=pf.PreferenceLoss()
    )
    before = trainer.evaluate()
    trainer.predict(pairs)
    after = trainer.evaluate()
    assert before["eval_rewards/margins"] == after["eval_rewards/margins"] != 0.0


def test_streams_do_not_know_their_columns(inputs: dict[str, str], pairs: datasets.Dataset, tmp_path: Path) -> None:
    stream = datasets.IterableDataset.from_generator(lambda: iter(pairs))
    assert stream.column_names is None
    trainer = PreferenceTrainer(
        load_model(inputs["model"]), arguments(tmp_path, max_steps=1), train_dataset=stream, loss=pf.PreferenceLoss()
    )
    trainer.train()
    assert len(losses(trainer)) == 1


def test_bad_options_are_named(
    inputs: dict[str, str], pairs: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(inputs["model"])

    def build(loss: Any, rows: datasets.Dataset = pairs, data_collator: Any = None, **options: Any) -> None:
        args = arguments(tmp_path, **options)
        PreferenceTrainer(model, args, train_dataset=rows, loss=loss, data_collator=data_collator)

    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        build(pf.WPOLoss(), remove_unused_columns=True)
    with pytest.raises(ValueError, match="label_smoothing is an argument of the loss"):
        build(pf.WPOLoss(), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="loss must be a PreferenceLoss, WPOLoss or WSPOLoss, found MSELoss"):
        build(torch.nn.MSELoss())
    with pytest.raises(ValueError, match='WSPO at level "segment"'):
        build(pf.WSPOLoss(level="segment"))
    with pytest.raises(ValueError, match=r"lacks weak_aligned_chosen_logps, weak_ref_chosen_logps: .*add_token_logps"):
        build(pf.WSPOLoss())
    with pytest.raises(ValueError, match="train_dataset holds sums of log-probs: WSPO needs those of tokens"):
        sums = pairs
        for name in ("weak_aligned", "weak_ref"):
            sums = sums.add_column(f"{name}_chosen_logps", pairs["ref_chosen_logps"])
        build(pf.WSPOLoss(), sums)
    with pytest.raises(ValueError, match="about chosen and rejected responses, the data_collator has chosen"):
        build(pf.WPOLoss(), data_collator=PairCollator(0, ("chosen",)))
    with pytest.raises(TypeError, match="data_collator must be a PairCollator, found function"):
        build(pf.WPOLoss(), data_collator=lambda rows: rows)
    with pytest.raises(TypeError, match="data_collator must be a PairCollator, found type"):
        PreferenceTrainer(model, arguments(tmp_path), dict, train_dataset=pairs, loss=pf.WPOLoss())
    rows = list(pairs.remove_columns("ref_chosen_logps"))
    listed = PreferenceTrainer(model, arguments(tmp_path), train_dataset=rows, loss=pf.WPOLoss())
    with pytest.raises(ValueError, match="the batch lacks ref_logps, from add_ref_logps or add_token_logps"):
        listed.train()
    with pytest.raises(ValueError, match="name must be one of ref, weak_aligned, weak_ref; found 'weak'"):
        add_token_logps(pairs, model, "weak")
    with pytest.raises(ValueError, match=r"row 0: 2 log-probs of ref for \d+ response tokens"):
        PairCollator(0, ("chosen",))([pairs[0] | {"ref_chosen_logps": [-1.0, -2.0]}])
    with pytest.raises(ValueError, match=r"train_dataset lacks ref_chosen_logps: .*add_ref_logps"):
        build(pf.WPOLoss(), pairs.remove_columns("ref_chosen_logps"))
    bare = pairs.remove_columns("ref_chosen_logps")
    trainer = PreferenceTrainer(model, arguments(tmp_path), train_dataset=pairs, loss=pf.WPOLoss())
    with pytest.raises(ValueError, match="eval_dataset lacks ref_chosen_logps"):
        trainer.evaluate(bare)
    with pytest.raises(ValueError, match="test_dataset lacks ref_chosen_logps"):
        trainer.predict(bare)
    with pytest.raises(ValueError, match="train_dataset lacks chosen_ids"):
        build(pf.PreferenceLoss("simpo"), pairs.remove_columns("chosen_ids"))
    with monkeypatch.context() as patch:
        tiny.share_sequences_out(patch)
        with pytest.raises(ValueError, match="each process needs whole sequences: context"):
            build(pf.WPOLoss())
    config = transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(ValueError, match=r"GPT2Model.forward has no logits_to_keep"):
        FusedCausalLMLoss(transformers.GPT2Model(config))


def test_example(inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--model", inputs["model"], "--data", inputs["dataset"], "--output_dir", str(tmp_path / "out")]
    options += ["--max_steps", "3", "--report_to", "none", "--use_cpu", "--logging_steps", "1", "--save_strategy", "no"]
    monkeypatch.setattr(sys, "argv", ["hf_trainer.py", *options])
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "hf_trainer.py"), run_name="__main__")
    assert float(update(load_model(str(tmp_path / "out")), inputs["model"]).norm()) > 0
