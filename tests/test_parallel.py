"""Sharded heads on 2 and 4 gloo processes: everything against one process on the whole of it.

Each world of processes is started once and runs its checks in order; a check that raises ends them. See WORLDS.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
import transformers
from conftest import assert_as_good_as_plain, make_problem, relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import prefopt_fast as pf
from prefopt_fast.batch import ResponseBatch
from prefopt_fast.policy import ResponseModel

VOCAB, HIDDEN = 41, 16
ROWS = {2: [0, 20, VOCAB], 4: [0, 3, 15, 16, VOCAB]}  # where the ranks' rows of the vocabulary begin
IGNORED = 3  # a token id, and after shifting a row number on some rank
SECONDS = 120  # for the checks of one world


def compare(
    dtype: torch.dtype,
    backend: str = "torch",
    needs: tuple[bool, bool, bool] = (True, True, True),
    softcap: float | None = None,
    spread: float = 3.0,
    n: int = 90,
    masked: int = 0,
    offset: float = 0.0,
) -> None:
    """Statistics and gradients of hidden, weight and bias on this rank's rows, against all rows here and in float64.

    ``masked``: so many of the last rows have a bias of −inf. ``offset``: on all biases, but for the first of each rank,
    which is −inf.
    """
    torch.manual_seed(0)
    hidden, weight, targets = make_problem(n, VOCAB, HIDDEN, dtype, scale=spread)
    bias = torch.randn(VOCAB).to(dtype)
    bias[VOCAB - masked :] = -torch.inf
    targets %= VOCAB - masked
    bounds = ROWS[dist.get_world_size()]
    if offset:
        bias += offset
        bias[bounds[:-1]] = -torch.inf
        targets[torch.isin(targets, torch.tensor(bounds[:-1]))] = 1
    targets[::5] = IGNORED
    upstream = torch.randn(n)
    rows = slice(bounds[dist.get_rank()], bounds[dist.get_rank() + 1])

    def run(function: Callable, to: torch.dtype, of: slice, **place: Any) -> tuple[pf.TokenStats, list[Tensor | None]]:
        operands = [
            t.to(to, copy=True).requires_grad_(need) for t, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        head = pf.LMHead(operands[1][of], operands[2][of], softcap, 0.5, 0.7, **place)
        stats = function(operands[0], head, targets, pf.STATS, 0.0, backend if place else "auto", IGNORED)
        (stats.logprobs * upstream).sum().backward()
        grads = [t.grad for t in operands]
        return stats, [grads[0], *(None if g is None else g[rows] for g in grads[1:])]

    truth, true_grads = run(pf.reference.token_logprobs, torch.float64, slice(None))
    plain, plain_grads = run(pf.token_logprobs, dtype, slice(None))
    ours, our_grads = run(pf.token_logprobs, dtype, rows, group=dist.group.WORLD, vocab_start=rows.start)
    factor = 3.0 * max(1.0, spread / 25)  # ranks compare logsumexps, whose last digits large logits take
    for name in ("logprobs", *pf.STATS):
        value, expected = getattr(ours, name), getattr(truth, name)
        if name == "is_top1" or (name == "mean_logit" and (masked or offset)):
            assert torch.equal(value, expected)
        else:
            assert_as_good_as_plain(value, getattr(plain, name), expected, factor, name)
        assert not value[::5].any() and value.shape == targets.shape
    assert (ours.logprobs <= 0).all()
    # The row that stands in for targets of other ranks may have a product of its own, in at least fp32, rounded unlike
    # the rest: its probability is off by its logit's rounding even where it is nearly 1.
    computed = torch.promote_types(dtype, torch.float32)
    alone = float(truth.logsumexp.abs().max()) * torch.finfo(computed).eps / torch.finfo(dtype).eps
    for name, need, value, single, expected in zip(
        ("dhidden", "dweight", "dbias"), needs, our_grads, plain_grads, true_grads, strict=True
    ):
        assert (value is not None) == need
        if need:
            lax = factor if name == "dhidden" else max(factor, alone)
            assert_as_good_as_plain(value, single, expected, lax, name)
            if name == "dweight":
                assert_as_good_as_plain(value[0], single[0], expected[0], 1.5 * lax, "dweight[0]")


def check_vocabulary_parallel() -> None:
    compare(torch.float64, "reference")
    compare(torch.float32)
    compare(torch.float32, softcap=5.0)
    compare(torch.float32, spread=100.0)  # p(target) → 1, and logits beyond exp's range
    compare(torch.bfloat16, n=400)


def check_vocabulary_parallel_parts() -> None:
    compare(torch.bfloat16, softcap=8.0)
    compare(torch.float32, needs=(True, False, False))
    compare(torch.float32, needs=(False, True, False))
    compare(torch.float32, needs=(False, False, True))
    compare(torch.float32, "triton", n=17)
    compare(torch.float32, offset=-100.0)  # as a rank's stand-in for targets of others the first has no logit
    for backend in ("torch", "triton"):  # all rows of the last rank, and some of the others
        compare(torch.float32, backend, n=17, masked=25)


def check_vocabulary_parallel_sampled() -> None:
    """The promise on the whole gradient, and that its mean over draws comes closer still."""
    rank, vocab, tolerance, draws = dist.get_rank(), 8192, 2.0**-4, 6
    torch.manual_seed(0)
    hidden, weight, targets = make_problem(256, vocab, 64, scale=1.0)
    upstream = torch.randn(256)
    rows = slice(rank * vocab // 2, (rank + 1) * vocab // 2)

    def gradients(grad_tolerance: float, seed: int) -> tuple[Tensor, Tensor, pf.GradReport | None]:
        operands = hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()
        head = pf.LMHead(operands[1], group=dist.group.WORLD, vocab_start=rows.start)
        stats = pf.token_logprobs(operands[0], head, targets, grad_tolerance=grad_tolerance, seed=seed)
        (stats.logprobs * upstream).sum().backward()
        return operands[0].grad, operands[1].grad, stats.grad_report

    exact = gradients(0.0, 0)
    drawn = [gradients(tolerance, seed) for seed in range(draws)]
    for k in range(2):
        errors = [relative_error(draw[k], exact[k]) for draw in drawn]
        assert 0.1 * tolerance < max(errors) < tolerance, errors
        mean = relative_error(torch.stack([draw[k] for draw in drawn]).mean(0), exact[k])
        assert mean < 0.7 * max(errors), (mean, errors)
    assert max(draw[2].columns_kept for draw in drawn) < 0.3


def check_bad_targets() -> None:
    hidden, weight, targets = make_problem(6, VOCAB, HIDDEN)
    head = pf.LMHead(weight[:20], group=dist.group.WORLD, vocab_start=20 * dist.get_rank())
    targets[2] = 40
    with pytest.raises(ValueError, match=r"rows of exactly one rank of head.group: 1 are not, from 40 to 40"):
        pf.token_logprobs(hidden, head, targets.clamp(max=39).where(targets != 40, 40))
    with pytest.raises(ValueError, match="from 25 to 25; every rank needs the same"):
        pf.token_logprobs(hidden[:1], pf.LMHead(weight, group=dist.group.WORLD), torch.tensor([25]))


def check_second_derivatives() -> None:
    hidden, weight, targets = make_problem(6, VOCAB, HIDDEN)
    hidden.requires_grad_()
    head = pf.LMHead(weight[:20], group=dist.group.WORLD, vocab_start=20 * dist.get_rank())
    logprobs = pf.token_logprobs(hidden, head, targets % 40).logprobs
    (dhidden,) = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.autograd.grad(dhidden.square().sum(), hidden)


def check_no_tokens() -> None:
    hidden, weight, targets = make_problem(4, VOCAB, HIDDEN)
    for count in (0, 4):
        operands = hidden[:count].requires_grad_(), weight[:20].clone().requires_grad_()
        head = pf.LMHead(operands[1], group=dist.group.WORLD, vocab_start=20 * dist.get_rank())
        stats = pf.token_logprobs(operands[0], head, torch.full_like(targets[:count], -100), stats=pf.STATS)
        stats.logprobs.sum().backward()
        assert stats.entropy.shape == (count,) and not stats.logprobs.any() and not operands[1].grad.any()


def check_sequences() -> None:
    """What is made of TokenStats follows: WSPO's target and WPO's weights."""
    hidden, weight, targets = make_problem(12, VOCAB, HIDDEN)
    ref_hidden, ref_weight, _ = make_problem(12, VOCAB, 8)
    bounds = ROWS[dist.get_world_size()]
    rows = slice(bounds[dist.get_rank()], bounds[dist.get_rank() + 1])
    place = {"group": dist.group.WORLD, "vocab_start": rows.start}
    cu_seqlens = torch.tensor([0, 5, 12])

    def results(head: pf.LMHead, ref_head: pf.LMHead) -> list[Tensor]:
        ratio = pf.token_log_ratio(hidden, head, ref_hidden, ref_head, targets, cu_seqlens)
        stats = pf.token_logprobs(hidden, head, targets, ("log_sum_sq_probs",))
        return [*ratio, pf.wpo_weights(stats, cu_seqlens=cu_seqlens), pf.sequence_logprobs(stats, cu_seqlens).mean]

    ours = results(pf.LMHead(weight[rows], **place), pf.LMHead(ref_weight[rows], **place))
    for value, expected in zip(ours, results(pf.LMHead(weight), pf.LMHead(ref_weight)), strict=True):
        assert relative_error(value, expected) < 1e-5


def make_model(tied: bool, seed: int = 0) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def make_batch(rank: int) -> ResponseBatch:
    """Two sequences with 7 response tokens on rank 0, 4 on rank 2, … and none on rank 1."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, VOCAB, (2, 9), generator=generator)
    targets = torch.full_like(ids, -100)
    if rank != 1:
        targets[0, 2 : 7 - rank] = ids[0, 3 : 8 - rank]
        targets[1, 4:6] = ids[1, 5:7]
    keep = targets != -100
    return ResponseBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        targets=targets,
        positions=keep.flatten().nonzero().squeeze(-1),
        cu_seqlens=nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0)),
        rows=torch.zeros(1, dtype=torch.int64),
        responses=("chosen", "rejected"),
    )


def loss_of(logprobs: Tensor, ranks: int) -> Tensor:
    """This rank's part of a mean over all ranks' tokens, for gradients that are averaged over ranks."""
    tokens = sum(len(make_batch(rank).positions) for rank in range(ranks))
    return -(logprobs * torch.linspace(1, 2, len(logprobs))).sum() * ranks / tokens


def expected_gradients(tied: bool, ranks: int) -> dict[str, Tensor]:
    model = ResponseModel(make_model(tied))
    for rank in range(ranks):
        (loss_of(model(make_batch(rank)).stats.logprobs, ranks) / ranks).backward()
    return {name: parameter.grad for name, parameter in model.model.named_parameters()}


def assert_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        assert relative_error(grad, expected[name]) < 1e-5, name


def shard_layers(model: Any, **options: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, **options)


def check_fsdp2() -> None:
    """The module that FSDP2 wraps calls the head, whose weight is then whole."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for tied in (True, False):
        model = make_model(tied)
        shard_layers(model)
        policy = fully_shard(ResponseModel(model))
        loss_of(policy(make_batch(rank)).stats.logprobs, ranks).backward()
        assert_gradients(model, expected_gradients(tied, ranks))


def check_fsdp2_sharded_head() -> None:
    """The head is used after the wrapped model's forward, when its weight is a sharded DTensor again."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard")) if ranks > 2 else None
    for tied in (True, False):
        model = make_model(tied)
        shard_layers(model, mesh=mesh)
        fully_shard(model, reshard_after_forward=True, mesh=mesh)
        batch = make_batch(rank)
        output = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        hidden = output.hidden_states[-1].flatten(0, 1)[batch.positions]
        head = pf.LMHead.from_model(model)
        assert isinstance(head.weight, DTensor) and head.group is None and head.vocab_size == VOCAB
        stats = pf.token_logprobs(hidden, head, batch.targets.flatten()[batch.positions])
        loss_of(stats.logprobs, ranks).backward()
        assert_gradients(model, expected_gradients(tied, ranks))


def check_fsdp2_frozen_head() -> None:
    """A frozen head is gathered without a gradient of its own, as it is under LoRA."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = make_model(False)
    model.lm_head.requires_grad_(False)
    fully_shard(model.model)
    fully_shard(model.lm_head)
    batch = make_batch(rank)
    hidden = model.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    head = pf.LMHead.from_model(model)
    stats = pf.token_logprobs(hidden.flatten(0, 1)[batch.positions], head, batch.targets.flatten()[batch.positions])
    loss_of(stats.logprobs, ranks).backward()
    assert isinstance(head.weight, DTensor) and head.weight.grad is None
    assert_gradients(model.model, {name[6:]: grad for name, grad in expected_gradients(False, ranks).items()})


def check_tensor_parallel_head() -> None:
    """A DTensor whose rows do not divide: over the mesh dimension "tp" none is gathered, over another all are."""
    hidden, weight, targets = make_problem(30, VOCAB, HIDDEN)
    bias = torch.randn(VOCAB)
    single = hidden.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()
    pf.token_logprobs(single[0], pf.LMHead(*single[1:]), targets).logprobs.sum().backward()
    for name in ("tp", "model"):
        model = nn.Sequential(nn.Linear(HIDDEN, VOCAB))
        model[0].weight.data, model[0].bias.data = weight.clone(), bias.clone()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(name,))
        parallelize_module(model[0], mesh, ColwiseParallel())
        model.config, model.get_output_embeddings = (
            transformers.LlamaConfig(vocab_size=VOCAB),
            functools.partial(model.get_submodule, "0"),
        )
        head, operand = pf.LMHead.from_model(model), hidden.clone().requires_grad_()
        assert (head.group is None) == (name != "tp")
        pf.token_logprobs(operand, head, targets).logprobs.sum().backward()
        assert relative_error(operand.grad, single[0].grad) < 1e-6
        for ours, expected in zip((head.weight, head.bias), single[1:], strict=True):
            assert ours.grad.placements == (Shard(0),)
            assert relative_error(ours.grad.full_tensor(), expected.grad) < 1e-6


def check_data_and_tensor_parallel_head() -> None:
    """FSDP2 over TP on a 2 × 2 mesh: gathered over one dimension, vocabulary-parallel over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(HIDDEN, VOCAB, bias=False))
    weight = model[0].weight.detach().clone()
    parallelize_module(model[0], mesh["tp"], ColwiseParallel())
    fully_shard(model, mesh=mesh["dp"])
    model.config, model.get_output_embeddings = transformers.LlamaConfig(vocab_size=VOCAB), lambda: model[0]
    expected = torch.zeros_like(weight)
    for place in range(2):
        torch.manual_seed(place)
        hidden, _, targets = make_problem(20 + place, VOCAB, HIDDEN)
        whole = pf.LMHead(weight.clone().requires_grad_())
        pf.token_logprobs(hidden, whole, targets).logprobs.sum().backward()
        expected += whole.weight.grad / 2
        if place == mesh.get_local_rank("dp"):
            head = pf.LMHead.from_model(model)
            assert head.weight.device_mesh.ndim == 2 and head.group is not None
            pf.token_logprobs(hidden, head, targets).logprobs.sum().backward()
    assert relative_error(model[0].weight.grad.full_tensor(), expected) < 1e-6


def check_tensor_parallel_model(folder: Path) -> None:
    """transformers' own plan: backbone, head and the first call's comparison with the model's logits."""
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        make_model(False).save_pretrained(folder / "model")
    dist.barrier()
    ranks = dist.get_world_size()
    config = DistributedConfig(tp_size=ranks)
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "model", distributed_config=config)
    policy, single = ResponseModel(model), ResponseModel(make_model(False))
    for rank in (0, 2):
        for module in (policy, single):
            loss_of(module(make_batch(rank), ("entropy",)).stats.logprobs, ranks).backward()
    assert pf.LMHead.from_model(model).group is not None
    assert_gradients(model, {name: parameter.grad for name, parameter in single.model.named_parameters()})


def check_accelerate_accumulation() -> None:
    """DistributedDataParallel that accumulates two batches, one of them without response tokens on this rank."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    policy = accelerator.prepare(ResponseModel(make_model(True)))
    assert isinstance(policy, nn.parallel.DistributedDataParallel)
    for batch in (make_batch(accelerator.process_index), make_batch(1 - accelerator.process_index)):
        with accelerator.accumulate(policy):
            accelerator.backward(2 * loss_of(policy(batch).stats.logprobs, 2))
    expected = expected_gradients(True, 2)
    assert_gradients(accelerator.unwrap_model(policy).model, {name: 2 * grad for name, grad in expected.items()})


def check_zero3() -> None:
    """DeepSpeed's ZeRO-3, where it is installed: parameters and gradients are partitioned."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    for tied in (True, False):
        policy = ResponseModel(make_model(tied))
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        engine = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)[0]
        expected = expected_gradients(tied, ranks)
        for _step in range(3):  # from the third step on DeepSpeed knows the order of parameters
            engine.backward(loss_of(engine(make_batch(rank)).stats.logprobs, ranks))
            for name, parameter in policy.model.named_parameters():
                assert relative_error(deepspeed.utils.safe_get_full_grad(parameter), expected[name]) < 1e-5, name
            engine.step()


def check_examples(folder: Path, ports: list[int]) -> None:
    """examples/ as torchrun would start them; what a rank prints ends in its losses."""
    if dist.get_rank() == 0:
        make_model(False).save_pretrained(folder / "example")
        tiny.make_tokenizer(tiny.WORDS).save_pretrained(folder / "example")
        tiny.make_pairs(folder / "pairs.json", 8)
    dist.barrier()
    rank = dist.get_rank()
    for name, port, equal in (("fsdp2", ports[0], False), ("tensor_parallel", ports[1], True)):
        dist.destroy_process_group()
        os.environ["MASTER_PORT"] = str(port)
        options = {
            "--model": folder / "example",
            "--data": folder / "pairs.json",
            "--steps": 2,
            "--learning-rate": 0.01,
        }
        sys.argv = [name, *(str(word) for option in options.items() for word in option)]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(Path(__file__).parents[1] / "examples" / f"{name}.py"), run_name="__main__")
        losses = torch.tensor([float(line.split()[-1]) for line in printed.getvalue().splitlines()])
        dist.init_process_group("gloo", init_method=f"file://{folder}/{name}.store", rank=rank, world_size=2)
        everyone = losses.new_empty(2, 2)
        dist.all_gather([*everyone.unbind(0)], losses)
        assert everyone.isfinite().all() and everyone[:, 0].min() > 0 and everyone[:, 0].max() < 0.6932, everyone
        assert torch.equal(everyone[0], everyone[1]) == equal and not torch.equal(everyone[:, 0], everyone[:, 1])


WORLDS: dict[int, list[Callable[..., None]]] = {
    2: [
        check_vocabulary_parallel,
        check_vocabulary_parallel_parts,
        check_vocabulary_parallel_sampled,
        check_second_derivatives,
        check_no_tokens,
        check_sequences,
        check_fsdp2,
        check_fsdp2_sharded_head,
        check_fsdp2_frozen_head,
        check_tensor_parallel_model,
        check_accelerate_accumulation,
        check_bad_targets,
        check_examples,
    ],
    4: [
        check_vocabulary_parallel,
        check_sequences,
        check_tensor_parallel_head,
        check_data_and_tensor_parallel_head,
        check_fsdp2_sharded_head,
    ],
}
if importlib.util.find_spec("deepspeed"):
    WORLDS[2].insert(-1, check_zero3)


def run_checks(rank: int, ranks: int, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    for check in WORLDS[ranks]:
        torch.manual_seed(0)
        try:
            check(*(folder, ports)[: check.__code__.co_argcount])
            outcome = ""
        except Exception:
            outcome = traceback.format_exc()
        (folder / f"{check.__name__}.{rank}").write_text(outcome)
        if outcome:
            return
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Of a number of processes, which run once, the folder in which each has left what its checks raised."""

    @functools.cache
    def run(ranks: int) -> Path:
        folder, context = tmp_path_factory.mktemp("world"), torch.multiprocessing.get_context("spawn")
        with socket.socket() as one, socket.socket() as other:
            ports = [(listener.bind(("127.0.0.1", 0)), listener.getsockname()[1])[1] for listener in (one, other)]
        processes = [context.Process(target=run_checks, args=(rank, ranks, folder, ports)) for rank in range(ranks)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        return folder

    return run


@pytest.mark.parametrize(
    ("ranks", "name"), [(ranks, check.__name__) for ranks, checks in WORLDS.items() for check in checks]
)
def test_against_one_process(world: Callable[[int], Path], ranks: int, name: str) -> None:
    folder = world(ranks)
    outcomes = [folder / f"{name}.{rank}" for rank in range(ranks)]
    failures = [path.read_text() if path.exists() else "not reached, or hung" for path in outcomes]
    assert not any(failures), "\n".join(f"rank {rank}: {failure}" for rank, failure in enumerate(failures))
