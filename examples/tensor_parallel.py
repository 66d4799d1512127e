"""DPO with tensor parallelism: torchrun --nproc-per-node 2 examples/tensor_parallel.py --model MODEL --data PAIRS."""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import prefopt_fast as pf
from prefopt_fast.batch import collate, encode, load_preferences
from prefopt_fast.policy import ResponseModel, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a causal LM with its tokenizer")
    parser.add_argument("--data", required=True, help="file of preference pairs")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=2, help="of each step")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    args = parser.parse_args()

    dist.init_process_group()
    plan = DistributedConfig(tp_size=dist.get_world_size())
    models = [
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, distributed_config=plan) for _ in range(2)
    ]
    policy, reference = ResponseModel(models[0]), ResponseModel(models[1].requires_grad_(False))
    device = models[0].device
    rows, _ = encode(load_preferences(args.data), load_tokenizer(args.model), max_length=1024)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, foreach=False)  # some are not DTensors

    for step in range(args.steps):
        first = step * args.pairs  # the same pairs on every rank
        batch = collate([rows[i % len(rows)] for i in range(first, first + args.pairs)]).to(device)
        logps = pf.sequence_logprobs(*policy(batch)).sum.chunk(2)
        with torch.no_grad():
            ref_logps = pf.sequence_logprobs(*reference(batch)).sum.chunk(2)
        loss = pf.preference_loss(*logps, *ref_logps, loss_type="sigmoid", beta=0.1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} rank {dist.get_rank()} loss {float(loss):.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
