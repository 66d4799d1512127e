"""ResponseModel and LMHead.from_model against the full logits of real model families, at random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import tiny
import torch
import transformers
from conftest import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import prefopt_fast as pf
from prefopt_fast.batch import ResponseBatch, collate
from prefopt_fast.policy import (
    ResponseModel,
    find_backbone,
    hidden_states,
    load_model,
    load_tokenizer,
    position_limit,
    require_positions,
    verify_head,
)
from prefopt_fast.scoring import StoreKey, data_digest, score

VOCAB, HIDDEN = 41, 16
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.5,  # logits large enough for caps and scales to show
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"final_logit_softcapping": None}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 4.0, "tie_word_embeddings": True}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 4.0}),  # Granite's name, and a factor instead of a divisor
    "recurrent_gemma": ("recurrent_gemma", {"logits_soft_cap": 3.0, "block_types": ["recurrent", "attention"]}),
    "falcon_h1": ("falcon_h1", {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
    "mpt": ("mpt", {"d_model": HIDDEN, "n_heads": 2, "n_layers": 1, "max_seq_len": 32, "logit_scale": 0.5}),
    "gpt2": ("gpt2", {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "opt": ("opt", {"ffn_dim": 24, "word_embed_proj_dim": HIDDEN, "dropout": 0.0}),
    "bart's decoder": ("bart", {"d_model": HIDDEN, "decoder_layers": 2, "decoder_attention_heads": 2, "dropout": 0.0}),
    "phi, with bias": ("phi", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
}


def make(family: str) -> Any:
    model_type, options = FAMILIES[family]
    common = {"vocab_size": VOCAB, "initializer_range": 0.5} if model_type == "gpt2" else COMMON
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **common | options), dtype=torch.float32
    )
    if (bias := model.get_output_embeddings().bias) is not None:
        nn.init.normal_(bias)
    return model.eval()


def make_batch(rows: int = 3) -> ResponseBatch:
    generator = torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    return collate(
        [{"row": i, "prompt_ids": ids(1, 6), "chosen_ids": ids(1, 9), "rejected_ids": ids(1, 9)} for i in range(rows)]
    )


def full_logprobs(model: nn.Module, batch: ResponseBatch, temperature: float = 1.0) -> Tensor:
    """(N,) from log_softmax of the model's own logits, one sequence at a time and without padding."""
    parts = []
    for ids, mask, targets in zip(batch.input_ids, batch.attention_mask, batch.targets, strict=True):
        logits = model(input_ids=ids[mask.bool()][None]).logits[0] / temperature
        targets = targets[mask.bool()]
        scored = targets != -100
        parts.append(logits[scored].log_softmax(-1).gather(-1, targets[scored, None])[:, 0])
    return torch.cat(parts)


def gradients(values: Tensor, model: nn.Module) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = torch.linspace(-1, 1, len(values), dtype=values.dtype)
    found = torch.autograd.grad((values * weights).sum(), list(trained.values()), allow_unused=True)
    return {name: grad for name, grad in zip(trained, found, strict=True) if grad is not None}


def assert_agrees(model: nn.Module, batch: ResponseBatch, tolerance: float, temperature: float = 1.0) -> None:
    """Log-probs and every parameter's gradient."""
    stats, cu_seqlens = ResponseModel(model, 0.0, temperature=temperature)(batch)
    truth = full_logprobs(model, batch, temperature)
    assert cu_seqlens.tolist() == batch.cu_seqlens.tolist()
    assert relative_error(stats.logprobs, truth) < tolerance
    found, expected = gradients(stats.logprobs, model), gradients(truth, model)
    assert found.keys() == expected.keys()
    # Single parameters may have no gradient but rounding (a key's bias, say): their scale is the whole gradient's.
    scale = torch.cat([grad.flatten() for grad in expected.values()]).norm() / len(expected)
    for name, grad in expected.items():
        assert float((found[name] - grad).norm()) < 100 * tolerance * float(scale + grad.norm()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree_with_their_own_logits(family: str) -> None:
    # Some families compute in float32 inside whatever their dtype, hence no tighter bound in float64.
    model, batch = make(family).double(), make_batch()
    assert_agrees(model, batch, 1e-5)
    assert relative_error(ResponseModel(model)(batch).stats.logprobs, full_logprobs(model, batch)) < 1e-6
    assert_agrees(model.float(), batch, 1e-5, temperature=1.7)


def test_head_reads_cap_scale_and_bias() -> None:
    heads = {family: pf.LMHead.from_model(make(family)) for family in FAMILIES}
    assert heads["gemma2"].softcap == 3.0 and heads["gemma3"].softcap is None
    assert heads["cohere"].logit_scale == heads["granite"].logit_scale == 0.25
    config = transformers.MptConfig(vocab_size=11, d_model=8, n_heads=2, n_layers=1, logit_scale="inv_sqrt_d_model")
    assert pf.LMHead.from_model(transformers.MptForCausalLM(config)).logit_scale == 1.0  # as transformers computes
    assert heads["phi, with bias"].bias is not None and heads["llama"].bias is None
    tied = make("llama tied")
    assert pf.LMHead.from_model(tied).weight is tied.get_input_embeddings().weight


LORA = {
    "layers": {"target_modules": ["q_proj", "v_proj"]},
    "layers and head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def with_lora(model: nn.Module, **options: Any) -> Any:
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    with torch.no_grad():  # an adapter that changes nothing would test nothing
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
@pytest.mark.parametrize("family", ["llama", "llama tied"])
def test_adapters_agree(family: str, options: dict) -> None:
    model = with_lora(make(family).double(), **options)
    adapted = full_logprobs(model, batch := make_batch())
    assert_agrees(model, batch, 1e-5)
    with model.disable_adapter():
        base = ResponseModel(model)(batch).stats.logprobs
        assert relative_error(base, full_logprobs(model, batch)) < 1e-5
        assert relative_error(base, adapted) > 1e-3
    model.merge_adapter()  # which moves tied embeddings with the head, so that the truth is the merged model's
    assert relative_error(ResponseModel(model)(batch).stats.logprobs, full_logprobs(model, batch)) < 1e-5
    if family == "llama tied" and options is LORA["layers and head"]:
        return  # its embedding stays merged until the head has run
    with model.disable_adapter():  # takes merged adapters out of layers as they run
        assert relative_error(ResponseModel(model)(batch).stats.logprobs, base) < 1e-5


def test_dora_on_the_head_is_refused() -> None:
    model = with_lora(make("llama"), target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="adapter 'default' on the output embedding is not plain LoRA"):
        ResponseModel(model)(make_batch())


def test_prompt_learning_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"'default' is of type .*PROMPT_TUNING"):
        ResponseModel(peft.get_peft_model(make("llama"), config))


def test_activated_lora_is_refused() -> None:
    """Which of its layers' outputs count, PeftModel's own forward reads from the token ids."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    with pytest.raises(ValueError, match="'default' is an activated LoRA"):
        ResponseModel(peft.get_peft_model(make("llama"), config))


def test_models_without_a_head_or_backbone_are_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel has no backbone apart from a head"):
        ResponseModel(make("llama").model)
    with pytest.raises(ValueError, match="Linear has no backbone apart from a head"):
        find_backbone(nn.Linear(2, 2))
    small = {"vocab_size": 9, "d_model": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    whole = transformers.BartForConditionalGeneration(transformers.BartConfig(**small))
    for use in (ResponseModel, pf.LMHead.from_model):
        with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder: a causal"):
            use(whole)


def test_an_unknown_scaling_is_found_before_training() -> None:
    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.05
            return output

    model = Scaled(transformers.LlamaConfig(**COMMON)).train()
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match="Scaled: logits from its hidden states and head differ by"):
            ResponseModel(model.to(dtype))(make_batch())
    assert all(module.training for module in model.modules())


def test_verification_keeps_modes_and_random_state() -> None:
    model = make("gpt2").train()  # it has dropout
    model.transformer.h[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    verify_head(model, make_batch().input_ids[:1])
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "model_type, options",
    [
        ("gpt2", {"n_embd": HIDDEN, "n_layer": 1, "n_head": 2, "n_positions": 30}),
        ("opt", {"ffn_dim": 24, "max_position_embeddings": 30, "word_embed_proj_dim": HIDDEN}),  # two rows are unused
        ("gptj", {"n_embd": HIDDEN, "n_layer": 1, "n_head": 2, "n_positions": 30, "rotary_dim": 4}),  # a buffer
        ("ctrl", {"n_embd": HIDDEN, "n_layer": 1, "n_head": 2, "n_positions": 30, "dff": 24}),
        ("mpt", {"d_model": HIDDEN, "n_heads": 2, "n_layers": 1, "max_seq_len": 30}),  # a table of biases
        ("llama", {"max_position_embeddings": 30}),
        ("gpt_neox", {"max_position_embeddings": 30}),
        ("bloom", {"n_layer": 1, "n_head": 2}),
        ("xglm", {"d_model": HIDDEN, "attention_heads": 2, "num_layers": 1, "max_position_embeddings": 30}),  # it grows
    ],
)
def test_sequences_beyond_a_table_of_positions_are_refused(model_type: str, options: dict[str, Any]) -> None:
    options = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_hidden_layers": 1} | options
    config_type = transformers.CONFIG_MAPPING[model_type]
    known = {name: value for name, value in options.items() if hasattr(config_type(), name)}
    model = transformers.AutoModelForCausalLM.from_config(config_type(**known)).eval()

    def batch(tokens: int) -> ResponseBatch:
        ids = list(range(3, 3 + tokens))
        return collate([{"row": 0, "prompt_ids": ids[:2], "chosen_ids": ids[2:], "rejected_ids": ids[2:5]}])

    ResponseModel(model)(batch(30))
    if model_type in ("llama", "gpt_neox", "bloom", "xglm"):
        assert position_limit(model) is None
        ResponseModel(model)(batch(31))
        return
    assert position_limit(model) == 30
    with pytest.raises(Exception):  # noqa: B017  (families fail in their own ways)
        model(batch(31).input_ids)
    for refuse in (lambda: ResponseModel(model)(batch(31)), lambda: require_positions(model, 31, 30)):
        with pytest.raises(
            ValueError, match=r"max_length must be at most 30 with \w+, .*found a sequence of 31 tokens"
        ):
            refuse()
    require_positions(model, 30, 30)


def test_sequences_beyond_a_table_are_refused_before_anything_is_scored(tmp_path: Path) -> None:
    rows = [{"row": 0, "prompt_ids": [3] * 60, "chosen_ids": [3] * 5, "rejected_ids": [3]}]
    encoded = datasets.Dataset.from_list(rows)
    key = StoreKey("model", "tokenizer", data_digest(encoded), "none")
    with pytest.raises(ValueError, match=r"max_length must be at most 64 with GPT2LMHeadModel.*found a sequence of 65"):
        score(make("gpt2"), encoded, key, tmp_path / "store")
    encoded = datasets.Dataset.from_list([rows[0] | {"prompt_ids": [3], "rejected_ids": [VOCAB]}])
    with pytest.raises(ValueError, match=r"the tokenizer makes token 41 of the data, .* has embeddings for 41"):
        score(nn.DataParallel(make("llama")), encoded, replace(key, data=data_digest(encoded)), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_wrapper_whose_forward_would_not_run_is_refused() -> None:
    class Wrapper(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module):
            nn.Module.__init__(self)
            self.module = module

    batch, model = make_batch(), Wrapper(make("llama"))
    arguments = (batch.input_ids, batch.attention_mask, batch.positions, True, 3)
    with pytest.raises(ValueError, match=r"model must not be a DistributedDataParallel.*ResponseModel\(model\)"):
        hidden_states(model, *arguments)
    with torch.no_grad():
        hidden_states(model, *arguments)


def test_a_table_of_positions_is_found_through_adapters() -> None:
    assert position_limit(peft.get_peft_model(make("gpt2"), peft.LoraConfig(target_modules=["c_attn"]))) == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast_run_and_stay_near(dtype: torch.dtype) -> None:
    model, batch = make("gemma2"), make_batch()
    truth = full_logprobs(model, batch)
    with torch.autocast("cpu", dtype):
        under_autocast = ResponseModel(model)(batch).stats.logprobs
        plain = full_logprobs(model, batch)
    assert relative_error(under_autocast, truth) < 2 * max(relative_error(plain, truth), torch.finfo(dtype).eps)
    model = model.to(dtype)
    plain, ours = full_logprobs(model, batch), ResponseModel(model)(batch).stats.logprobs
    assert relative_error(ours, truth) < 2 * max(relative_error(plain, truth), torch.finfo(dtype).eps)


def test_verification_under_autocast_leaves_no_weight_without_a_gradient() -> None:
    """What autocast casts for the verification, without gradients, it keeps; torch before 2.11 kept it so."""
    model, batch = make("llama tied").train(), make_batch()
    runner = ResponseModel(model)

    def step() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logprobs = runner(batch).stats.logprobs
        return gradients(logprobs, model)

    first, second = step(), step()
    assert first.keys() == second.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    model, batch = make("llama tied").train(), make_batch()
    plain = gradients(ResponseModel(model)(batch).stats.logprobs, model)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(ResponseModel(model)(batch).stats.logprobs, model)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_data_parallel_wrapper(tmp_path: Path) -> None:
    model, batch = make("llama"), make_batch()
    expected = gradients(ResponseModel(model)(batch).stats.logprobs, model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ResponseModel(model))
        values = wrapped(batch).stats.logprobs
        (values * torch.linspace(-1, 1, len(values))).sum().backward()
        assert pf.LMHead.from_model(nn.parallel.DistributedDataParallel(model)).weight is model.lm_head.weight
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in model.named_parameters())


def test_loading(tmp_path: Path) -> None:
    source = tiny.make_model(tmp_path / "model")
    model, tokenizer = load_model(source, torch.float32), load_tokenizer(source)
    assert tokenizer.pad_token == tiny.EOS
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = source
    adapter.save_pretrained(tmp_path / "adapter")
    assert isinstance(load_model(str(tmp_path / "adapter"), torch.bfloat16), peft.PeftModel)
    assert load_tokenizer(str(tmp_path / "adapter")).get_vocab() == tokenizer.get_vocab()  # its base's
    config = tmp_path / "adapter" / "adapter_config.json"
    for base, error, message in (
        (None, ValueError, "does not say what it adapts"),
        ("./no", FileNotFoundError, "./no"),
    ):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
        with pytest.raises(error, match=message):
            load_model(str(tmp_path / "adapter"))


def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="none does not exist"):
            load(str(tmp_path / "none"))

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no connection")

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty cannot be loaded: "):
        load_tokenizer(str(tmp_path / "empty"))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", unreachable)
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder here, .* no connection"):
        load_model("nowhere")
    tiny.make_model(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled has no .safetensors file"):
        load_model(str(tmp_path / "pickled"))


def test_files_without_all_weights_are_refused(tmp_path: Path) -> None:
    """transformers would make them up, others in each load: a policy would not be its own reference."""
    weights = load_file(tmp_path / tiny.make_model(tmp_path) / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its files lack 1 of its weights, model"):
        load_model(str(tmp_path))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded: "):
        load_model(str(tmp_path))
