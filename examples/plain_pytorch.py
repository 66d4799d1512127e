"""WPO in a loop of one's own: backbone, head and loss module."""

import argparse
import itertools

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefopt_fast as pf
from prefopt_fast.batch import collate, encode, load_preferences
from prefopt_fast.policy import hidden_states, verify_packing


def response_states(model: torch.nn.Module, batch, packs: bool) -> torch.Tensor:
    """(N, H) from the backbone alone: no logits; without padding and with prompts once where it ``packs``."""
    return hidden_states(model, batch.input_ids, batch.attention_mask, batch.positions, packs, pairs=len(batch.rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a causal language model")
    parser.add_argument("--data", required=True, help="preference pairs")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    encoded, report = encode(load_preferences(options.data), tokenizer, max_length=1024)
    print(report)

    criterion = pf.WPOLoss(beta=0.1)
    head, packs = pf.LMHead.from_model(model), verify_packing(model)
    loader = DataLoader(encoded, options.batch_size, shuffle=True, collate_fn=lambda rows: collate(rows).to(device))
    ref_logps = {}  # of the model before its training, by row: (chosen, rejected)
    with torch.no_grad():
        for batch in loader:
            stats = pf.token_logprobs(response_states(model, batch, packs), head, batch.scored)
            pairs = torch.stack(pf.sequence_logprobs(stats, batch.cu_seqlens).sum.chunk(2), 1)
            ref_logps |= dict(zip(batch.rows.tolist(), pairs, strict=True))

    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for step, batch in enumerate(itertools.islice(batches, options.steps), 1):
        ref = torch.stack([ref_logps[row] for row in batch.rows.tolist()], 1).flatten()
        loss, metrics = criterion(response_states(model, batch, packs), head, batch.scored, ref, batch.cu_seqlens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} margin {metrics['rewards/margins'].mean():.4f} loss {loss:.4f}")


if __name__ == "__main__":
    main()
