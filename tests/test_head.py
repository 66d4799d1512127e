"""LMHead: its errors, the one place where scale, cap and temperature meet, frozen, adapted and quantized heads.

Real model families: test_policy.py. Sharded heads: test_parallel.py.
"""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from conftest import relative_error

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
        ({"softcap": 0.0}, "softcap must be positive and finite, or None, found 0.0"),
        ({"logit_scale": -1.0}, "logit_scale must be positive and finite, found -1.0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, found 0.0"),
        ({"softcap": float("inf")}, "softcap must be positive and finite, or None, found inf"),
        ({"bias": torch.zeros(9, dtype=torch.bool)}, "bias must be floating-point, found torch.bool"),
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


def test_rows_without_a_group_are_refused():
    with pytest.raises(ValueError, match="vocab_start must be this rank's first token id, 0 without a group; found 4"):
        pf.LMHead(torch.zeros(9, 3), vocab_start=4)


def make_causal_lm(vocab_size: int) -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocab_size, **sizes))


def test_a_part_of_the_vocabulary_is_refused():
    model = make_causal_lm(40)
    model.lm_head = torch.nn.Linear(64, 20)
    with pytest.raises(ValueError, match="has 20 of the vocabulary's 40 rows"):
        pf.LMHead.from_model(model)


def test_rows_that_pad_the_vocabulary_and_a_width_multiplier():
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "sliding_window_size": 8, "d_rel": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "rel_extent": 16}
    heads |= {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 24}
    config = transformers.AutoConfig.for_model(
        "inkling_text", vocab_size=48, unpadded_vocab_size=41, initializer_range=0.5, **sizes, **heads, **experts
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.arange(9)[None]
    logprobs = pf.token_logprobs(model.model(ids).last_hidden_state, pf.LMHead.from_model(model), ids).logprobs
    expected = model(ids).logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    assert relative_error(logprobs, expected) < 1e-6
    assert pf.LMHead.from_model(model).vocab_size == 41


def test_a_frozen_head_keeps_the_unscaled_gradient_alone():
    model = peft.get_peft_model(make_causal_lm(3000), peft.LoraConfig(target_modules=["q_proj"]))
    head = pf.LMHead.from_model(model)
    hidden, targets = torch.randn(50, 64, requires_grad=True), torch.randint(0, 3000, (50,))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        pf.token_logprobs(hidden, head, targets).logprobs.sum().backward()
    own = {tensor.data_ptr() for tensor in (hidden, head.weight, targets)}
    assert sum(nbytes for pointer, nbytes in kept.items() if pointer not in own) <= 50 * (64 + 4) * 4
    assert head.weight.grad is None


@pytest.mark.parametrize("bias", [False, True])
def test_adapters_on_the_head_stay_trainable_over_a_frozen_one(bias):
    lora = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False, lora_bias=bias)
    model = peft.get_peft_model(make_causal_lm(40), lora)
    hidden, targets = torch.randn(5, 64), torch.randint(0, 40, (5,))
    pf.token_logprobs(hidden, pf.LMHead.from_model(model), targets).logprobs.sum().backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.get_output_embeddings()(hidden).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    assert len(ours) == 2 + bias
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert relative_error(ours[name], p.grad) < 1e-5


def test_adapters_of_parameters_alone():
    """AdaLoRA's have no modules, and so no bias."""
    lora = peft.AdaLoraConfig(target_modules=["lm_head"], init_r=2, total_step=10, init_lora_weights=False)
    model = peft.get_peft_model(make_causal_lm(40), lora)
    hidden, targets = torch.randn(5, 64), torch.randint(0, 40, (5,))
    found = pf.token_logprobs(hidden, pf.LMHead.from_model(model), targets).logprobs
    expected = model.get_output_embeddings()(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert relative_error(found, expected) < 1e-5


def test_a_4_bit_head_is_dequantized():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make_causal_lm(128)
    quantized = bitsandbytes.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    quantized.load_state_dict(model.lm_head.state_dict())
    model.lm_head = quantized.to("cpu")
    hidden, targets = torch.randn(5, 64, requires_grad=True), torch.randint(0, 128, (5,))
    logprobs = pf.token_logprobs(hidden, pf.LMHead.from_model(model), targets).logprobs
    expected = model.lm_head(hidden).log_softmax(-1).gather(1, targets[:, None]).squeeze(-1)
    grads = [torch.autograd.grad(value.sum(), hidden)[0] for value in (logprobs, expected)]
    assert relative_error(logprobs, expected) < 1e-5 and relative_error(*grads) < 1e-5


def test_an_8_bit_head_is_refused():
    model = make_causal_lm(40)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(40, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"found torch.int8 \(40, 64\); keep the head out of quantization"):
        pf.LMHead.from_model(model)
