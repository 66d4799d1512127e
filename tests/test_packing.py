"""Packed batches: the same hidden states and gradients as of sequences on their own, or no packing at all."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import transformers
from conftest import relative_error
from test_policy import COMMON, FAMILIES, VOCAB, assert_agrees, full_logprobs, gradients, make, make_batch
from torch import Tensor

from prefopt_fast.batch import collate
from prefopt_fast.packing import FLASH, _packed_flash, _packed_sdpa, pack
from prefopt_fast.policy import ResponseModel, find_backbone, hidden_states, verify_packing

PADDED_FAMILIES = {
    "gemma2",  # transformers gives it the attention "eager", for its soft cap
    "recurrent_gemma",  # recurrences and convolutions
    "falcon_h1",  # a state space beside attention
    "mpt",  # ALiBi
    "bart's decoder",  # takes no positions
}


def make_hybrid(model_type: str, **options: Any) -> Any:
    config = transformers.AutoConfig.for_model(model_type, **COMMON | options)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_layout() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [5, 6, 9, 7], [8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    packing = pack(ids, mask, pairs=2)
    assert packing.input_ids.tolist() == [[5, 6, 7, 8, 9, 9, 7]]
    assert packing.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert packing.own == [3, 2, 2, 0] and packing.lengths == [3, 2, 4, 2]  # the last pair's responses are equal
    assert packing.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 3, 4]
    assert torch.equal(packing.input_ids[0][packing.place.view_as(ids)[mask.bool()]], ids[mask.bool()])
    assert pack(ids, mask, pairs=4).own == [3, 2, 4, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_packed(family: str) -> None:
    model, batch = make(family), make_batch()
    packed = ResponseModel(model)
    stats = packed(batch).stats
    assert packed._packs == (family not in PADDED_FAMILIES)
    padded = ResponseModel(model)
    padded._packs = False
    expected = padded(batch).stats
    assert relative_error(stats.logprobs, expected.logprobs) < 1e-6
    found, wanted = gradients(stats.logprobs, model), gradients(expected.logprobs, model)
    scale = float(torch.cat([grad.flatten() for grad in wanted.values()]).norm())
    assert all(float((found[name] - wanted[name]).norm()) < 1e-5 * scale for name in wanted)


def test_sliding_windows_are_kept() -> None:
    model, batch = make_hybrid("mistral", sliding_window=3), make_batch()
    assert verify_packing(model)
    assert_agrees(model.double(), batch, 1e-5)
    unlimited = ResponseModel(make_hybrid("mistral", sliding_window=None))
    unlimited.model.load_state_dict(model.state_dict())
    assert relative_error(unlimited(batch).stats.logprobs, full_logprobs(model, batch)) > 1e-3


@pytest.mark.parametrize(
    "model_type, options",
    [
        ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
        ("qwen3_next", {"num_hidden_layers": 4}),
        ("jamba", {"num_hidden_layers": 8}),
    ],
)
def test_layers_that_see_neighbours_otherwise_are_not_packed(model_type: str, options: dict[str, Any]) -> None:
    model, batch = make_hybrid(model_type, **options), make_batch()
    runner = ResponseModel(model)
    assert relative_error(runner(batch).stats.logprobs, full_logprobs(model, batch)) < 1e-5
    assert runner._packs is False


def test_a_family_that_fails_on_the_mask_is_not_packed() -> None:
    config = transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=True, initializer_range=0.5
    )
    model, batch = transformers.FalconForCausalLM(config).eval(), make_batch()
    runner = ResponseModel(model)
    assert relative_error(runner(batch).stats.logprobs, full_logprobs(model, batch)) < 1e-5
    assert runner._packs is False


@pytest.mark.parametrize(
    "model_type, options, packs",
    [
        ("phimoe", {"sliding_window": 64, "num_local_experts": 2}, False),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 64, "num_experts_per_tok": 2}, False),
        ("llama4_text", {"attention_chunk_size": 64, "num_local_experts": 2, "intermediate_size_mlp": 24}, False),
        ("llama4_text", {"layer_types": ["full_attention"] * 2, "num_local_experts": 2}, True),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, True),
        ("mistral", {"sliding_window": 64}, True),
        ("gemma3_text", {"sliding_window": 64}, True),
        ("qwen2_moe", {"use_sliding_window": False, "num_experts_per_tok": 2}, True),
    ],
)
def test_windows_in_the_mask_alone_are_not_packed(model_type: str, options: dict[str, Any], packs: bool) -> None:
    model = make_hybrid(model_type, **options)
    windows = [vars(module).get("sliding_window") for module in model.modules()]
    assert verify_packing(model) is packs
    assert windows == [vars(module).get("sliding_window") for module in model.modules()]
    assert all(getattr(model.config, name) == value for name, value in options.items() if "window" in name)


@pytest.mark.parametrize(
    "model_type, options",
    [
        ("deepseek_v32", {"index_topk": 32, "q_lora_rank": 8, "kv_lora_rank": 8, "first_k_dense_replace": 2}),
        ("minimax_m3_vl_text", {"index_topk_blocks": 4, "layer_types": ["full_attention", "minimax_m3_sparse"]}),
    ],
)
def test_sparse_attention_is_not_packed(model_type: str, options: dict[str, Any]) -> None:
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2}
    indexer = {"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_local_blocks": 1}
    experts = {"num_local_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    model = make_hybrid(model_type, **heads | indexer | experts | options)
    assert not verify_packing(model)
    # And rightly: what a few tokens do not show, since all of them are chosen, many do.
    ids = torch.randint(3, VOCAB, (1, 120))
    everywhere = torch.arange(120)
    packed, padded = (hidden_states(model, ids, torch.ones_like(ids), everywhere, packs, 1) for packs in (True, False))
    assert relative_error(packed, padded) > 1e-3


def test_equal_responses_and_single_tokens() -> None:
    rows = [
        {"row": 0, "prompt_ids": [7], "chosen_ids": [4, 5], "rejected_ids": [4, 5]},
        {"row": 1, "prompt_ids": [8, 9], "chosen_ids": [3], "rejected_ids": [6]},
    ]
    model = make("llama").double()
    for responses in (("chosen", "rejected"), ("rejected",)):
        assert_agrees(model, collate(rows, responses), 1e-5)


def test_padding_on_the_left() -> None:
    model = make("llama")
    ids = torch.randint(3, 41, (4, 9))
    ids[2:, :6] = ids[:2, :6]
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[3, :4] = 0
    positions = mask.flatten().nonzero().squeeze(-1)
    packed, padded = (hidden_states(model, ids, mask, positions, packs, pairs=2) for packs in (True, False))
    assert relative_error(packed, padded) < 1e-5


def test_under_autocast() -> None:
    model, batch = make("qwen3"), make_batch()
    truth = full_logprobs(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        runner = ResponseModel(model)
        found, plain = runner(batch).stats.logprobs, full_logprobs(model, batch)
    assert runner._packs
    assert relative_error(found, truth) < 2 * relative_error(plain, truth)


def test_flash_attention_gets_own_queries_and_whole_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn runs on GPUs alone: a stand-in computes what its documentation says of these arguments."""

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        assert options["causal"] and options["dropout_p"] == 0 and cu_q.dtype == cu_k.dtype == torch.int32
        assert q.dtype == k.dtype == v.dtype and q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max() and len(k) == cu_k[-1]
        left, outputs = options["window_size"][0], []
        for i in range(len(cu_q) - 1):
            queries = q[cu_q[i] : cu_q[i + 1]]
            scale = options["softmax_scale"] or q.shape[-1] ** -0.5
            keys, values = (x[cu_k[i] : cu_k[i + 1]].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
            if options["softcap"]:
                scores = options["softcap"] * torch.tanh(scores / options["softcap"])
            # Aligned to the lower right corner.
            distance = torch.arange(len(queries))[:, None] + len(keys) - len(queries) - torch.arange(len(keys))
            visible = (distance >= 0) & ((distance <= left) | (left < 0))
            probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", probs, values))
        return torch.cat(outputs)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    batch = make_batch()
    for model in (make("llama"), make("gemma2"), make_hybrid("mistral", sliding_window=3)):
        expected = hidden_states(model, batch.input_ids, batch.attention_mask, batch.positions, False, 3)
        model.config._attn_implementation = FLASH
        found = hidden_states(model, batch.input_ids, batch.attention_mask, batch.positions, True, 3)
        assert relative_error(found, expected) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):  # queries in float32, values in bfloat16
            found = hidden_states(model, batch.input_ids, batch.attention_mask, batch.positions, True, 3)
        assert 1e-5 < relative_error(found, expected) < 0.05

    # Values of another size than the keys', as multi-head latent attention has them.
    packing = pack(batch.input_ids, batch.attention_mask, 3)
    tokens = packing.input_ids.shape[1]
    query, key, value = (torch.randn(1, tokens, 2, size) for size in (8, 8, 4))
    found, expected = (attend(packing, query, key, value) for attend in (_packed_flash, _packed_sdpa))
    assert found.shape == expected.shape and relative_error(found, expected) < 1e-5


def test_other_calls_of_the_model_are_left_alone() -> None:
    model, ids = make("llama"), torch.randint(3, 41, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # as generate() pads
    before = model(ids, attention_mask=mask).logits
    assert ResponseModel(model)(make_batch()) and find_backbone(model).config._attn_implementation == "sdpa"
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
