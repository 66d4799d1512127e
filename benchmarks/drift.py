"""Does training notice a gradient that is right on average only? Loss, entropy and KL against exact gradients.

    python benchmarks/drift.py small --data pairs.json                     # a few minutes on two cores
    python benchmarks/drift.py full --model FOLDER --data pairs.json       # WPO, all weights
    python benchmarks/drift.py lora --model FOLDER --data pairs.json --device cuda --max-length 1024

"small" trains a model of about a million parameters by next-token prediction on a shifted domain, over three seeds of
data order and sampling; its head is tied and trains with Adam. "full" and "lora" train a given model by WPO. Every
variant sees the same batches; "bf16" rounds the head's operands and gradients to bf16 and is otherwise exact. Results
are added to drift.json, with one plot of all parts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from torch import Tensor

import prefopt_fast as pf

RESULTS = Path(__file__).parent / "results"
PARTS = {
    "small": "A small model, next-token prediction on a shifted domain",
    "full": "WPO, all weights",
    "lora": "WPO, LoRA (frozen head)",
}
MEASURES = {"loss": "loss minus exact", "entropy": "entropy minus exact", "kl": "KL from exact"}


class Variant(NamedTuple):
    name: str
    tolerance: float = 0.0
    bf16: bool = False

    def token_logprobs(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        targets: Tensor,  # (N,)
        seed: int,
        stats: tuple[str, ...] = (),
    ) -> pf.TokenStats:
        if self.bf16:
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        head = pf.LMHead(weight)
        found = pf.token_logprobs(hidden, head, targets, stats, grad_tolerance=self.tolerance, seed=seed)
        if self.tolerance and found.report is None and found.logprobs.requires_grad:
            raise RuntimeError("this backend computes exact gradients alone: there is no drift to measure")
        return found


VARIANTS = (
    Variant("exact"),
    Variant("bf16", bf16=True),
    *(Variant(peers.format_tolerance(tolerance), tolerance) for tolerance in (2.0**-8, 2.0**-6, 2.0**-4)),
)

NAMES = tuple(variant.name for variant in VARIANTS)  # in the order of their colors


class Snapshot(NamedTuple):
    """What a distribution over the held-out tokens needs: hidden (N, H) and weight (V, H), and the targets (N,)."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor


class Task(NamedTuple):
    """``start(variant, seed)`` returns the step function and the snapshot function of a fresh model."""

    start: Callable[[Variant, int], tuple[Callable[[int], None], Callable[[], Snapshot]]]
    settings: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", default=os.environ.get("PREFOPT_FAST_MODEL"), help="folder or hub id")
    parser.add_argument("--data", default=os.environ.get("PREFOPT_FAST_DATA"), help="preference pairs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="default: 300 for small, 60 else")
    parser.add_argument("--seeds", type=int, help="default: 3 for small, 1 else")
    parser.add_argument("--max-length", type=int, default=320, help="of a WPO sequence, in tokens")
    parser.add_argument("--batch-size", type=int, default=2, help="pairs of a WPO step")
    parser.add_argument("--held-out", type=int, default=8, help="pairs the WPO models are compared on")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-3 for small, 5e-6 for full, 1e-4 for lora")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    small = options.part == "small"
    if not options.data or not (small or options.model):
        parser.error("--data and, but for small, --model are needed (or PREFOPT_FAST_DATA and PREFOPT_FAST_MODEL)")
    options.steps = options.steps or (300 if small else 60)
    options.seeds = options.seeds or (3 if small else 1)
    options.learning_rate = options.learning_rate or {"small": 1e-3, "full": 5e-6, "lora": 1e-4}[options.part]
    from report import environment

    task = small_task(options) if small else wpo_task(options)
    found = run(task, options.steps, range(options.seeds))
    found["environment"] = environment(options.device)
    found["settings"] = {"steps": options.steps, "learning_rate": options.learning_rate, **task.settings}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "drift.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[options.part] = found
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    draw(results, options.output / "drift.png")
    print(markdown(results))


def run(task: Task, steps: int, seeds: range, points: int = 6) -> dict[str, Any]:
    """Train every variant from the same start; ``points`` evaluations along the way, KL against exact at each."""
    marks = sorted({round(steps * i / points) for i in range(1, points + 1)})
    curves: dict[str, dict[int, list[dict[str, float]]]] = {variant.name: {} for variant in VARIANTS}
    finals = []
    for seed in seeds:
        exact: dict[int, Snapshot] = {}
        for variant in VARIANTS:
            step, snapshot = task.start(variant, seed)
            curve = curves[variant.name][seed] = []
            for i in range(1, steps + 1):
                step(i)
                if i in marks:
                    found = snapshot()
                    if variant.name == "exact":
                        exact[i] = found
                    curve.append({"step": i, **evaluate(found, exact[i])})
            print(f"seed {seed}, {variant.name}: {curve[-1]}", flush=True)
        finals.append(exact[steps])
    between = [evaluate(b, a)["kl"] for a, b in itertools.combinations(finals, 2)]
    return {"curves": curves, "kl_between_seeds": between}


@torch.no_grad()
def evaluate(snapshot: Snapshot, exact: Snapshot) -> dict[str, float]:
    """Means over the held-out tokens, in nats: loss, entropy, KL(exact ‖ this)."""
    loss = entropy = kl = 0.0
    for rows in torch.arange(len(snapshot.targets)).split(256):
        ours = torch.log_softmax((snapshot.hidden[rows] @ snapshot.weight.T).double(), -1)
        theirs = torch.log_softmax((exact.hidden[rows] @ exact.weight.T).double(), -1)
        loss -= float(ours.gather(1, snapshot.targets[rows, None]).sum())
        entropy -= float((ours.exp() * ours).sum())
        kl += float((theirs.exp() * (theirs - ours)).sum())
    tokens = len(snapshot.targets)
    return {"loss": loss / tokens, "entropy": entropy / tokens, "kl": kl / tokens}


def small_task(options: argparse.Namespace) -> Task:
    """Trained on the prompts' words first, exactly, then the task: the chosen responses."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefopt_fast.batch import load_preferences, normalize

    vocab, length, batch = 8192, 64, 16
    pairs = [normalize(row, i) for i, row in enumerate(load_preferences(options.data))]
    prompts, responses = (["\n".join(_texts(pair[name])) for pair in pairs] for name in ("prompt", "chosen"))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(prompts + responses, vocab_size=vocab, show_progress=False)

    def sequences(texts: list[str]) -> Tensor:
        ids = [i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids]
        return torch.tensor(ids[: len(ids) // (length + 1) * (length + 1)], device=options.device).view(-1, length + 1)

    cut = max(1, len(pairs) // 10)
    base, shifted, held_out = sequences(prompts), sequences(responses[cut:]), sequences(responses[:cut])[:64]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    pretrained = LlamaForCausalLM(config).to(options.device)

    def trainer(model: Any, data: Tensor, variant: Variant, seed: int) -> Callable[[int], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(seed)

        def step(i: int) -> None:
            ids = data[torch.randint(len(data), (batch,), generator=generator)]
            hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state.flatten(0, 1)
            stats = variant.token_logprobs(hidden, model.lm_head.weight, ids[:, 1:].flatten(), seed=1000 * seed + i)
            optimizer.zero_grad()
            (-stats.logprobs.mean()).backward()
            optimizer.step()

        return step

    step = trainer(pretrained, base, VARIANTS[0], seed=0)
    for i in range(options.steps):
        step(i)

    def start(variant: Variant, seed: int) -> tuple[Callable[[int], None], Callable[[], Snapshot]]:
        model = LlamaForCausalLM(config).to(options.device)
        model.load_state_dict(pretrained.state_dict())

        def snapshot() -> Snapshot:
            with torch.no_grad():
                hidden = model.model(input_ids=held_out[:, :-1]).last_hidden_state.flatten(0, 1)
            return Snapshot(hidden, model.lm_head.weight.detach().clone(), held_out[:, 1:].flatten())

        return trainer(model, shifted, variant, seed + 1), snapshot

    parameters = sum(parameter.numel() for parameter in pretrained.parameters())
    return Task(start, {"parameters": parameters, "vocab": vocab, "tokens_per_step": batch * length})


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        yield from (message["content"] for message in value)


def wpo_task(options: argparse.Namespace) -> Task:
    from prefopt_fast.batch import collate, encode, load_preferences
    from prefopt_fast.config import TrainConfig
    from prefopt_fast.objectives import make_objective
    from prefopt_fast.policy import hidden_states, load_model, load_tokenizer, verify_packing

    tokenizer = load_tokenizer(options.model)
    encoded, _ = encode(load_preferences(options.data), tokenizer, options.max_length)
    objective = make_objective(TrainConfig(objective="wpo", model="", dataset="", output_dir=""))
    order = torch.randperm(len(encoded) - options.held_out, generator=torch.Generator().manual_seed(0)).tolist()

    def batch_of(rows: list[int]) -> Any:
        batch = collate([encoded[row] for row in rows], pad_token_id=tokenizer.pad_token_id)
        return batch.to(options.device)

    def response_states(model: Any, batch: Any) -> Tensor:
        return hidden_states(
            model, batch.input_ids, batch.attention_mask, batch.positions, packs, pairs=len(batch.rows)
        )

    def step_rows(i: int, seed: int) -> list[int]:
        first = (i - 1 + seed * options.steps) * options.batch_size
        return [order[(first + j) % len(order)] for j in range(options.batch_size)]

    held_out = [batch_of([row]) for row in range(len(encoded) - options.held_out, len(encoded))]
    reference_model = load_model(options.model, torch.float32).to(options.device).eval()
    packs = verify_packing(reference_model)
    reference: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def reference_logprobs(rows: list[int], batch: Any) -> Tensor:
        key = tuple(rows)
        if key not in reference:
            hidden, weight = response_states(reference_model, batch), reference_model.get_output_embeddings().weight
            reference[key] = VARIANTS[0].token_logprobs(hidden, weight, batch.scored, 0).logprobs
        return reference[key]

    def start(variant: Variant, seed: int) -> tuple[Callable[[int], None], Callable[[], Snapshot]]:
        torch.manual_seed(seed)
        model = load_model(options.model, torch.float32).to(options.device).train()
        if options.part == "lora":
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, config)
        weight = model.get_output_embeddings().weight
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)

        def step(i: int) -> None:
            rows = step_rows(i, seed)
            batch = batch_of(rows)
            frozen = {"ref": reference_logprobs(rows, batch)}
            hidden = response_states(model, batch)
            stats = variant.token_logprobs(hidden, weight, batch.scored, 1000 * seed + i, objective.stats)
            loss, _ = objective.function(stats, batch.cu_seqlens, frozen)
            optimizer.zero_grad()
            loss.mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

        @torch.no_grad()
        def snapshot() -> Snapshot:
            hidden = torch.cat([response_states(model, batch) for batch in held_out])
            return Snapshot(hidden, weight.detach().clone(), torch.cat([batch.scored for batch in held_out]))

        return step, snapshot

    settings = {"model": Path(options.model).name, "data": Path(options.data).name}
    settings |= {name: getattr(options, name) for name in ("max_length", "batch_size", "held_out")}
    return Task(start, settings)


def markdown(results: Mapping[str, Any]) -> str:
    """Each variant's last evaluation against the exact one of the same seed, beside what bf16 and the seed change."""
    lines = ["## Does training notice?"]
    for part, title in PARTS.items():
        if part not in results:
            continue
        found = results[part]
        finals = {name: [curve[-1] for curve in seeds.values()] for name, seeds in found["curves"].items()}
        settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
        exact = finals["exact"]
        lines += [
            "",
            f"### {title}",
            "",
            f"{found['environment']['device']}, {found['environment']['date']}; {settings}; {len(exact)} seeds. "
            "Differences to the exact run of the same seed, mean over seeds (± half their range).",
            "",
            "| | loss | entropy | KL from exact |",
            "| --- | --- | --- | --- |",
            f"| exact | {_mean(exact, 'loss'):.4f} | {_mean(exact, 'entropy'):.4f} | — |",
        ]
        if len(exact) > 1:
            spread = [f"± {_half_range([run[name] for run in exact]):.4f}" for name in ("loss", "entropy")]
            lines.append(f"| exact, between seeds | {' | '.join(spread)} | {_cell(found['kl_between_seeds'], '.2e')} |")
        for name, runs in finals.items():
            if name != "exact":
                changes = (
                    _cell([run[measure] - base[measure] for run, base in zip(runs, exact, strict=True)], "+.1e")
                    for measure in ("loss", "entropy")
                )
                lines.append(f"| {name} | {' | '.join(changes)} | {_cell([run['kl'] for run in runs], '.2e')} |")
    return "\n".join([*lines, "", "![loss, entropy and KL over training](drift.png)"])


def _mean(runs: list[dict[str, float]], measure: str) -> float:
    return statistics.mean(run[measure] for run in runs)


def _half_range(values: list[float]) -> float:
    return (max(values) - min(values)) / 2


def _cell(values: list[float], form: str) -> str:
    text = format(statistics.mean(values), form)
    return text if len(values) < 2 else f"{text} ± {format(_half_range(values), form.lstrip('+'))}"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Parts by measures, a line for each variant: means over seeds, their range as a band, exact seeds' own in grey."""
    import plots
    from plots import plt

    parts = [part for part in PARTS if part in results]
    colors = dict(zip(NAMES, ("#222222", plots.GREY, plots.BLUE, plots.GREEN, plots.ORANGE), strict=True))
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(
            len(parts), 3, figsize=(11.5, 3.1 * len(parts) + 0.4), squeeze=False, layout="constrained"
        )
        for line, part in zip(axes, parts, strict=True):
            curves = {name: list(seeds.values()) for name, seeds in results[part]["curves"].items()}
            exact, between = curves["exact"], results[part]["kl_between_seeds"]
            steps = [point["step"] for point in exact[0]]
            for axis, (measure, label) in zip(line, MEASURES.items(), strict=True):
                for name, runs in curves.items():
                    if name == "exact":
                        continue
                    pairs = [list(zip(run, base, strict=True)) for run, base in zip(runs, exact, strict=True)]
                    values = [
                        [pair[i][0][measure] - pair[i][1][measure] for pair in pairs] for i in range(len(steps))
                    ]  # the exact run's KL from itself is 0
                    means, low, high = zip(*((statistics.mean(v), min(v), max(v)) for v in values), strict=True)
                    line_style = {"linestyle": "--" if name == "bf16" else "-", "marker": "o", "markersize": 3}
                    axis.plot(steps, means, color=colors[name], label=name, **line_style)
                    axis.fill_between(steps, low, high, color=colors[name], alpha=0.1, linewidth=0)
                if measure != "kl":
                    spread = [_half_range([run[i][measure] for run in exact]) for i in range(len(steps))]
                    axis.axhline(0.0, color=colors["exact"], linewidth=1)
                    axis.fill_between(steps, [-x for x in spread], spread, color=plots.GREY, alpha=0.15, linewidth=0)
                else:
                    axis.set_yscale("log")
                    if between:
                        axis.axhline(statistics.mean(between), color=colors["exact"], linewidth=1, linestyle=":")
                        place = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 8}
                        axis.annotate("between seeds of the exact run", (0.02, statistics.mean(between)), **place)
                axis.xaxis.get_major_locator().set_params(integer=True)
                axis.set(xlabel="step", ylabel=f"{label} (nats)")
            line[0].set_title(PARTS[part], fontsize=11)
        handles, labels = axes[0][0].get_legend_handles_labels()
        handles.append(plt.Rectangle((0, 0), 1, 1, color=plots.GREY, alpha=0.15))
        figure.legend(handles, [*labels, "spread of exact seeds"], loc="outside lower center", ncols=len(handles))
        figure.savefig(path)
        plt.close(figure)


if __name__ == "__main__":
    main()
