"""WPO by transformers' own Trainer, without logits."""

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments

import prefopt_fast as pf
from prefopt_fast.batch import encode, load_preferences
from prefopt_fast.integrations.transformers import PreferenceTrainer, add_ref_logps


@dataclass
class Options:
    model: str = field(metadata={"help": "folder or hub id of a causal language model"})
    data: str = field(metadata={"help": "preference pairs"})
    beta: float = 0.1
    max_length: int = 1024


def main() -> None:
    options, arguments = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    arguments.remove_unused_columns = False  # no column of a pair is an argument of the model
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32").to(arguments.device)
    pairs, report = encode(load_preferences(options.data), tokenizer, options.max_length)
    print(report)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    pairs = add_ref_logps(pairs, model, dtype=dtype)  # the reference is the model before its training
    trainer = PreferenceTrainer(
        model,
        arguments,
        train_dataset=pairs,
        processing_class=tokenizer,
        loss=pf.WPOLoss(beta=options.beta),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
