"""WSPO in TRL's DPOTrainer: a strong model learns what a weak one was aligned to.

python examples/trl_wspo.py --model STRONG --weak_aligned_model ALIGNED --weak_ref_model WEAK --dataset pairs.json \
    --output_dir out-wspo

TRL computes in bf16 by default: add --bf16 False on a machine without a GPU.
"""

from dataclasses import dataclass

from datasets import Dataset
from transformers import HfArgumentParser

from prefopt_fast.batch import load_preferences, normalize
from prefopt_fast.integrations.trl import WSPOConfig, WSPOTrainer


@dataclass
class ScriptArguments:
    """Models: folders or hub ids of one vocabulary. dataset: preference pairs, as ``prefopt-fast train`` reads them,
    without tools."""

    model: str
    weak_aligned_model: str
    weak_ref_model: str
    dataset: str


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, WSPOConfig)).parse_args_into_dataclasses()
    pairs = [normalize(row, index) for index, row in enumerate(load_preferences(script.dataset))]
    columns = ("prompt", "chosen", "rejected")
    dataset = Dataset.from_list([{name: pair[name] for name in columns} for pair in pairs])
    trainer = WSPOTrainer(
        script.model,
        args=args,
        weak_aligned_model=script.weak_aligned_model,
        weak_ref_model=script.weak_ref_model,
        train_dataset=dataset,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
