"""WPO with FSDP2 in a loop of your own: torchrun --nproc-per-node 2 examples/fsdp2.py --model MODEL --data PAIRS."""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard

import prefopt_fast as pf
from prefopt_fast.batch import collate, encode, load_preferences
from prefopt_fast.policy import ResponseModel, load_model, load_tokenizer


def sharded(source: str, device: str, trained: bool) -> FSDPModule:
    model = load_model(source, dtype=torch.float32).to(device).requires_grad_(trained)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(ResponseModel(model))  # not the model: the head is used in ResponseModel's forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a causal LM with its tokenizer")
    parser.add_argument("--data", required=True, help="file of preference pairs")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=2, help="of each rank and step")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    args = parser.parse_args()

    dist.init_process_group()
    rank, ranks, device = dist.get_rank(), dist.get_world_size(), "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    rows, _ = encode(load_preferences(args.data), load_tokenizer(args.model), max_length=1024)
    policy, reference = sharded(args.model, device, True), sharded(args.model, device, False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate)

    for step in range(args.steps):
        first = (step * ranks + rank) * args.pairs
        batch = collate([rows[i % len(rows)] for i in range(first, first + args.pairs)]).to(device)
        stats, cu_seqlens = policy(batch, ("log_sum_sq_probs",))
        with torch.no_grad():
            ref = pf.sequence_logprobs(*reference(batch)).sum.chunk(2)
        weights = pf.wpo_weights(stats, cu_seqlens=cu_seqlens).chunk(2)
        loss = pf.wpo_loss(*pf.sequence_logprobs(stats, cu_seqlens).sum.chunk(2), *ref, *weights, beta=0.1).mean()
        loss.backward()  # FSDP2 averages over the ranks, each with as many pairs
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} rank {rank} loss {float(loss):.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
