"""WPO in TRL's DPOTrainer: python examples/trl_wpo.py --model MODEL --dataset pairs.json --output_dir out-wpo

TRL computes in bf16 by default: add --bf16 False on a machine without a GPU.
"""

from dataclasses import dataclass

from datasets import Dataset
from transformers import HfArgumentParser

from prefopt_fast.batch import load_preferences, normalize
from prefopt_fast.integrations.trl import WPOConfig, WPOTrainer


@dataclass
class ScriptArguments:
    """model: folder or hub id. dataset: preference pairs, as ``prefopt-fast train`` reads them, without tools."""

    model: str
    dataset: str


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, WPOConfig)).parse_args_into_dataclasses()
    pairs = [normalize(row, index) for index, row in enumerate(load_preferences(script.dataset))]
    columns = ("prompt", "chosen", "rejected")
    dataset = Dataset.from_list([{name: pair[name] for name in columns} for pair in pairs])
    trainer = WPOTrainer(script.model, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
