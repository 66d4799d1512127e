"""The demo: weak-to-strong alignment with WSPO, and WPO against DPO, on the generated task of demo_task.py."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaForCausalLM

from . import demo_report
from .demo_loop import (
    Objective,
    PairData,
    dpo_objective,
    effective_share,
    evaluate,
    initial_weights,
    make_model,
    sample,
    sft_objective,
    train,
    wpo_objective,
    wspo_objective,
)
from .demo_task import (
    Prompt,
    Response,
    corpus_response,
    encode,
    far_response,
    flip_by_coin,
    preference_pairs,
    sample_prompts,
)
from .sequence_stats import ALIGNMENTS

WEAK = {"hidden": 48, "layers": 1, "heads": 2, "mlp": 96}
STRONG = {"hidden": 96, "layers": 2, "heads": 4, "mlp": 256}
LOSSES = {"DPO": None, **{f"WPO {alignment}": alignment for alignment in ALIGNMENTS}}


@dataclass(kw_only=True)
class DemoOptions:
    """Where the experiment runs and how often."""

    _argument_group_name = "demo"

    output_dir: str = field(default="demo-out", metadata={"help": "Folder of the tables and pictures."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One repetition of all for each."})
    processes: int | None = field(
        default=None, metadata={"help": "Parallel processes of one thread each; by default one for each usable core."}
    )
    quick: bool = field(default=False, metadata={"help": "A few steps of everything, to see that it runs."})

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more different numbers, found {self.seeds}")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be at least 1, found {self.processes}")
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise ValueError(f"output_dir {self.output_dir} is a file, expected a folder or nothing")


@dataclass(kw_only=True)
class DemoConfig(DemoOptions):
    """Options of ``prefopt-fast demo``."""


@dataclass(frozen=True)
class Recipe:
    """Sizes of the experiment. Everything was settled on seeds 100 to 102."""

    weak_sft_steps: int = 450
    weak_sft_lr: float = 4e-3
    strong_sft_steps: int = 300
    strong_sft_lr: float = 3e-3
    sft_batch: int = 64
    pairs: int = 6000
    candidates: int = 8  # responses a pair is the best and the worst of
    steps: int = 120  # of every alignment
    batch: int = 48
    dpo_beta: float = 0.1
    dpo_nll: float = 1.0  # weight of the chosen response's NLL in weak and direct DPO
    dpo_lr: float = 1e-3
    transfer_lr: float = 5e-4  # WSPO, and SFT on the chosen responses
    token_gamma: float = 0.5
    sequence_gamma: float = 0.1
    wpo_lr: float = 3e-4
    wpo_batch: int = 32
    test_prompts: int = 400
    watch_every: int = 30  # steps between the evaluations behind the curves …
    watch_prompts: int = 120  # … on this many of the test prompts
    weighed_pairs: int = 1000  # in the distributions of WPO weights


FULL = Recipe()
QUICK = Recipe(
    weak_sft_steps=4, strong_sft_steps=4, sft_batch=8, pairs=32, candidates=4, steps=4, batch=8, wpo_batch=8,
    test_prompts=48, watch_every=2, watch_prompts=48, weighed_pairs=8,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One seed's share of the experiment. Its three stages draw from generators of their own, in any order."""

    seed: int
    recipe: Recipe
    models: Path  # folder where pretrain leaves the two models
    started: float  # time.time()

    def rng(self, purpose: str) -> random.Random:
        rng = random.Random(f"{self.seed} {purpose}")
        torch.manual_seed(rng.getrandbits(32))
        return rng

    def test_prompts(self) -> list[Prompt]:
        return sample_prompts(self.recipe.test_prompts, self.rng("test"))

    def folder(self, model: str) -> Path:
        return self.models / f"{model}-{self.seed}"

    def load(self, model: str) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(self.folder(model))

    def progress(self, name: str, scores: dict[str, float]) -> None:
        shown = "  ".join(f"{metric} {scores[metric]:.2f}" for metric in ("reward", "style", "accuracy"))
        print(f"{time.time() - self.started:6.0f} s   seed {self.seed}   {name:34} {shown}", flush=True)


def pretrain(run: Run) -> dict[str, Any]:
    """Weak and strong model by SFT on the corpus, saved for the other stages."""
    recipe = run.recipe
    losses: dict[str, list[float]] = {}
    for name, shape, steps, lr in (
        ("weak", WEAK, recipe.weak_sft_steps, recipe.weak_sft_lr),
        ("strong", STRONG, recipe.strong_sft_steps, recipe.strong_sft_lr),
    ):
        rng = run.rng(f"{name} sft")
        prompts = sample_prompts(steps * recipe.sft_batch, rng)
        data = encode(prompts, [corpus_response(prompt, rng) for prompt in prompts])
        model = make_model(**shape)
        losses[name] = train(model, sft_objective(data), steps, recipe.sft_batch, lr)
        model.save_pretrained(run.folder(name))
    return {"sft_loss": losses}


def weak_to_strong(run: Run) -> dict[str, Any]:
    """The weak model is aligned; the strong one learns from it by WSPO, and otherwise in three ways without it."""
    recipe, weak, strong = run.recipe, run.load("weak"), run.load("strong")
    rng = run.rng("pairs")
    pairs = preference_pairs(
        recipe.pairs, recipe.candidates, lambda prompts: [corpus_response(prompt, rng) for prompt in prompts], rng
    )
    chosen = encode([pair.prompt for pair in pairs], [pair.chosen for pair in pairs])
    test = run.test_prompts()
    scores: dict[str, dict[str, float]] = {}
    curves: dict[str, dict[int, dict[str, float]]] = {}
    says: dict[str, str] = {}
    shown = next(i for i, prompt in enumerate(test) if prompt.operation == "reverse")

    def align(name: str, start: LlamaForCausalLM, objective: Objective, lr: float) -> LlamaForCausalLM:
        model, curve = copy.deepcopy(start), curves.setdefault(name, {})

        def watch(step: int) -> None:
            if step % recipe.watch_every == 0:
                curve[step], _responses = evaluate(model, start, test[: recipe.watch_prompts], run.seed)

        watch(0)
        train(model, objective, recipe.steps, recipe.batch, lr, watch)
        return judged(name, model, start)

    def judged(name: str, model: LlamaForCausalLM, start: LlamaForCausalLM) -> LlamaForCausalLM:
        scores[name], responses = evaluate(model, start, test, run.seed)
        says[name] = " ".join(responses[shown][:-1])
        run.progress(name, scores[name])
        return model

    def dpo(ref: LlamaForCausalLM) -> Objective:
        return dpo_objective(PairData(pairs, ref), recipe.dpo_beta, recipe.dpo_nll)

    def wspo(gamma: float, level: str) -> Objective:
        return wspo_objective(chosen, strong, weak_aligned, weak, gamma, level)

    judged("weak SFT", weak, weak)
    weak_aligned = align("weak aligned (DPO)", weak, dpo(weak), recipe.dpo_lr)
    judged("strong SFT", strong, strong)
    align("strong SFT on chosen", strong, sft_objective(chosen), recipe.transfer_lr)
    align("strong DPO", strong, dpo(strong), recipe.dpo_lr)
    align("strong WSPO token", strong, wspo(recipe.token_gamma, "token"), recipe.transfer_lr)
    align("strong WSPO sequence", strong, wspo(recipe.sequence_gamma, "sequence"), recipe.transfer_lr)
    prompt = " ".join(test[shown].words[1:-1])
    return {"scores": scores, "curves": curves, "says": {"prompt": prompt, **says}}


def wpo_against_dpo(run: Run) -> dict[str, Any]:
    """DPO and WPO's alignments at equal steps on pairs of which half are on-policy and half far off-policy; once with
    the judge's labels, and once with those of the far half decided by a coin."""
    recipe, weak, strong = run.recipe, run.load("weak"), run.load("strong")
    rng = run.rng("mixed pairs")
    n = recipe.steps * recipe.wpo_batch // 2
    sources: dict[str, Callable[[list[Prompt]], list[Response]]] = {
        "on-policy": lambda prompts: sample(strong, prompts),
        "weak model's": lambda prompts: sample(weak, prompts),
        "far": lambda prompts: [far_response(prompt, rng) for prompt in prompts],
    }
    counts = {"on-policy": max(n, recipe.weighed_pairs), "weak model's": recipe.weighed_pairs, "far": n}
    pairs = {name: preference_pairs(counts[name], recipe.candidates, respond, rng) for name, respond in sources.items()}
    weights = {name: initial_weights(strong, pairs[name][: recipe.weighed_pairs]) for name in pairs}

    order = rng.sample(range(2 * n), 2 * n)
    near, far = pairs["on-policy"][:n], pairs["far"]
    test = run.test_prompts()
    settings: dict[str, Any] = {}
    for setting, labelled in (("right labels", far), ("coin-flip labels", flip_by_coin(far, rng))):
        mixed = [(near + labelled)[i] for i in order]
        data = PairData(mixed, strong)
        is_far = torch.tensor(order) >= n
        scores, training = {}, {}
        for name, alignment in LOSSES.items():
            steps: list[Tensor] = []
            objective = (
                dpo_objective(data, recipe.dpo_beta)
                if alignment is None
                else wpo_objective(data, recipe.dpo_beta, alignment, steps)
            )
            model = copy.deepcopy(strong)
            train(model, objective, recipe.steps, recipe.wpo_batch, recipe.wpo_lr)
            scores[name], _ = evaluate(model, strong, test, run.seed)
            run.progress(f"{name}, {setting}", scores[name])
            if steps:
                training[name] = weight_curves(torch.stack(steps), is_far.view(recipe.steps, recipe.wpo_batch))
        settings[setting] = {"scores": scores, "training": training}
    return {"settings": settings, "weights": weights}


def weight_curves(
    weights: Tensor,  # (steps, B)
    is_far: Tensor,  # (steps, B)
) -> dict[str, list[float]]:
    """Over training: the mean weight, the effective share of the batch, and the far pairs' share of all weight."""
    return {
        "mean": weights.mean(-1).tolist(),
        "effective_share": effective_share(weights).tolist(),
        "far_share": ((weights * is_far).sum(-1) / weights.sum(-1)).tolist(),
    }


STAGES = {"pretrain": pretrain, "weak_to_strong": weak_to_strong, "wpo": wpo_against_dpo}


def run_stages(runs: Sequence[Run], processes: int) -> dict[int, dict[str, Any]]:
    """What the stages return, by seed and stage."""
    results: dict[int, dict[str, Any]] = {run.seed: {} for run in runs}
    if processes == 1:
        with one_thread():
            for run in runs:
                results[run.seed] = {name: stage(run) for name, stage in STAGES.items()}
        return results
    executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        waiting: dict[Future[dict[str, Any]], tuple[Run, str]] = {}
        for run in runs:
            waiting[executor.submit(pretrain, run)] = run, "pretrain"
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                run, name = waiting.pop(future)
                results[run.seed][name] = future.result()
                for other in STAGES if name == "pretrain" else ():
                    if other != name:
                        waiting[executor.submit(STAGES[other], run)] = run, other
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
    return results


def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    quiet()
    torch.set_num_threads(1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As in a worker: the models are too small for more threads, and the same sums are taken in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main(argv: list[str] | None = None) -> int:
    """Run the experiment, print its report and write it to the output folder."""
    from .cli import parse

    config = parse(DemoConfig, "prefopt-fast demo", sys.argv[1:] if argv is None else argv)
    quiet()
    started = time.time()
    recipe = QUICK if config.quick else FULL
    processes = min(config.processes or usable_cores(), 2 * len(config.seeds))
    print(
        f"Weak-to-strong with WSPO, and WPO against DPO: seeds {', '.join(map(str, config.seeds))}, "
        f"{processes} process{'es' * (processes > 1)} of one thread.\n",
        flush=True,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="prefopt-fast-demo-") as models:
            runs = [Run(seed, recipe, Path(models), started) for seed in config.seeds]
            by_seed = run_stages(runs, processes)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; nothing was written") from None
    results = {"recipe": asdict(recipe), "models": {"weak": WEAK, "strong": STRONG}, "seeds": by_seed}
    seconds = time.time() - started
    print(demo_report.write(results, Path(config.output_dir), seconds, processes))
    return 0


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
