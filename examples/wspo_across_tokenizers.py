"""WSPO from weak models of another tokenizer, segment by segment, in a loop of your own.

`prefopt-fast train --objective wspo --level segment` does this in batches, with stored log-probs and checkpoints.
"""

import argparse

import torch
from torch import Tensor

import prefopt_fast as pf
from prefopt_fast.batch import align, collate, encode, load_preferences
from prefopt_fast.policy import ResponseModel, load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--weak-aligned-model", "--weak-ref-model", "--dataset", "--output-dir"):
        parser.add_argument(name, required=True)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--gamma", type=float, default=0.1)
    args = parser.parse_args()

    # Each side reads the same texts through its own template and tokens, and notes where in them its tokens end.
    data, tokenizer = load_preferences(args.dataset), load_tokenizer(args.model)
    strong_rows, weak_rows = (
        encode(data, tokens, args.max_length, responses=("chosen",), boundaries=("chosen",))[0]
        for tokens in (tokenizer, load_tokenizer(args.weak_aligned_model))
    )
    segments, report = align(strong_rows, weak_rows)
    print(report)
    strong, weak = ({row["row"]: row for row in rows} for rows in (strong_rows, weak_rows))

    policy, ref = (ResponseModel(load_model(args.model, dtype=torch.float32)).eval() for _ in range(2))
    sources = (args.weak_aligned_model, args.weak_ref_model)
    weak_pair = [ResponseModel(load_model(source)).eval() for source in sources]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate)

    def logprobs(model: ResponseModel, row: dict) -> Tensor:
        return model(collate([row], ("chosen",))).stats.logprobs  # (tokens of the chosen response,)

    for step, pair in enumerate(segments):
        ids, weak_ids = torch.tensor(pair["strong"]), torch.tensor(pair["weak"])
        with torch.no_grad():
            reference = logprobs(ref, strong[pair["row"]])
            targets = [logprobs(model, weak[pair["row"]]) for model in weak_pair]
        targets = [pf.spread_over_segments(values, weak_ids, ids) for values in targets]
        tensors = [x[None] for x in (logprobs(policy, strong[pair["row"]]), reference, *targets, ids >= 0)]
        loss = pf.wspo_loss(*tensors, gamma=args.gamma, level="segment", segments=ids[None]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")
    policy.model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
