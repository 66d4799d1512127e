"""A loop written for Liger's chunked DPO loss, with one import changed."""

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_fast.batch import collate, encode, load_preferences
from prefopt_fast.integrations.liger import LigerFusedLinearDPOLoss  # was: liger_kernel.chunked_loss


def hidden_states(model: torch.nn.Module, batch) -> torch.Tensor:
    return model.model(batch.input_ids, batch.attention_mask, use_cache=False).last_hidden_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a causal language model")
    parser.add_argument("--data", required=True, help="preference pairs")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) for _ in ("policy", "reference")
    )
    encoded, _ = encode(load_preferences(options.data), tokenizer, max_length=1024)
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id
    loader = DataLoader(
        encoded, options.batch_size, shuffle=True, collate_fn=lambda rows: collate(rows, pad_token_id=pad)
    )
    optimizer = torch.optim.AdamW(policy.parameters(), options.learning_rate)
    criterion = LigerFusedLinearDPOLoss(beta=0.1)

    for step, batch in enumerate(loader, 1):
        with torch.no_grad():
            reference_states = hidden_states(reference, batch)
        loss, aux = criterion(
            policy.lm_head.weight,
            hidden_states(policy, batch),
            batch.targets,
            ref_input=reference_states,
            ref_weight=reference.lm_head.weight,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        margin = (aux[-2] - aux[-1]).mean()  # rewards of the chosen and the rejected
        print(f"step {step} margin {margin:.4f} loss {loss:.4f}")


if __name__ == "__main__":
    main()
