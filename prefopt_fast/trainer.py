"""``train``: pairs and frozen models prepared, then a policy trained on them, from wherever an earlier start ended.

The policy is the only model in memory while it trains, and every random choice is a function of the seed and the step:
a run that was killed and started again computes what a run that was never killed computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, gather_object, set_seed
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, SchedulerType, get_scheduler

from . import checkpoint
from .batch import add_sample_weights, align, collate, encode, load_preferences
from .checkpoint import TEMPORARY
from .config import AUTOCAST_DTYPES, FROZEN_MODELS, RESPONSES, TrainConfig
from .frozen import FrozenLogprobs, SegmentIds, scored, spread_mean, stored
from .metrics import CURVES, EVAL, HEAD, MetricsLog, Sums, draw_curves, peak_memory, summarize
from .objectives import Objective, make_objective
from .policy import (
    ResponseModel,
    adapter_base,
    disable_dropout,
    explained,
    find_backbone,
    is_adapter,
    load_model,
    load_tokenizer,
    require_fit,
)
from .scoring import LogprobStore, StoreKey, data_digest, model_digest
from .token_stats import GradReport, TokenStats

MERGED = "merged"  # folder of the model that merge_adapter wants
OPTIMIZER = "optimizer"  # folder of a checkpoint's optimizer where it is sharded
# Options that change where things lie or what is kept, not what is computed. Models and data count by their digests.
_NOT_IDENTITY = {
    *("output_dir", "logprobs_dir", "save_steps", "save_total_limit", "report_to", "merge_adapter"),
    *("trust_remote_code", "model", "dataset", "dataset_split", "eval_dataset", "eval_split"),
    *(f"{name}_{kind}" for name in FROZEN_MODELS for kind in ("model", "logprobs")),
}


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and stopped after a checkpoint."""


class Pairs(NamedTuple):
    """Encoded rows; where the weak models' tokenizer is another, the same rows in their tokens; at segment level, the
    segments that both share. all_encoded: with the rows that these two lack, which a store has."""

    all_encoded: datasets.Dataset
    encoded: datasets.Dataset
    weak: datasets.Dataset | None = None
    segments: datasets.Dataset | None = None

    def select(self, positions: list[int]) -> Pairs:
        return Pairs(self.all_encoded, *(rows and rows.select(positions) for rows in self[1:]))


class Split(NamedTuple):
    """What a loop runs over: encoded rows, each frozen model's log-probs of them and, maybe, their "segments"."""

    encoded: datasets.Dataset
    frozen: dict[str, FrozenLogprobs | SegmentIds]


class BatchPlan(NamedTuple):
    """Which of ``pairs`` training pairs each optimizer step has: a permutation per epoch, cut into batches.

    Steps count from 0. An epoch's last batch may be smaller. The plan knows nothing of processes.
    """

    pairs: int
    batch: int
    seed: int
    steps: int

    @classmethod
    def of(cls, config: TrainConfig, pairs: int, processes: int) -> BatchPlan:
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
        steps = (
            config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * math.ceil(pairs / batch))
        )
        return cls(pairs, batch, config.seed, steps)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.pairs / self.batch)

    def batches(self, start: int = 0) -> Iterator[list[int]]:
        """The positions of the pairs of each step from ``start`` on."""
        generator = torch.Generator().manual_seed(self.seed)
        for epoch in range(math.ceil(self.steps / self.steps_per_epoch)):
            order = torch.randperm(self.pairs, generator=generator).tolist()
            for i in range(self.steps_per_epoch):
                if start <= epoch * self.steps_per_epoch + i < self.steps:
                    yield order[i * self.batch : (i + 1) * self.batch]


def train(config: TrainConfig) -> Path:
    """Train as ``config`` says, going on from the last checkpoint in its ``output_dir``; returns that folder.

    Several processes (``accelerate launch``, ``torchrun``) share each step's pairs, and under FSDP2 the weights and the
    optimizer's state, and compute what one would.

    Raises:
        ValueError, FileNotFoundError: options, models, data or stores that do not fit, or an ``output_dir`` that holds
            another run: before any work.
        Interrupted: SIGINT or SIGTERM, to any of the processes; a checkpoint was written.
        FloatingPointError: a loss, gradient or weight that is not finite; nothing is saved of it.
        RuntimeError: another process is training in ``output_dir``; a checkpoint that cannot be written.
        ModuleNotFoundError: TensorBoard is to be written and is not installed.
    """
    objective = make_objective(config)
    _require_schedule(config)
    if config.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ModuleNotFoundError("report_to tensorboard needs tensorboard", name="tensorboard")
    accelerator = _accelerator(config)
    output_dir = Path(config.output_dir)
    identity = _identity(config, accelerator)
    checkpoint.compare(output_dir, identity)
    if is_adapter(config.model) and not config.use_peft:
        raise ValueError(
            f"{config.model} is a PEFT adapter: use_peft trains it on, and merged into its base it is a model"
        )
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    if config.use_peft:
        _require_adapters(config)
    weak_tokenizer = _weak_tokenizer(config, tokenizer)
    if config.level == "segment" and weak_tokenizer is None:
        objective = make_objective(dataclasses.replace(config, level="token"))  # each token is a segment
    stores = {name: LogprobStore.open(path) for name in FROZEN_MODELS if (path := getattr(config, f"{name}_logprobs"))}
    # A store is of the data as it was encoded for it: with the responses that were scored.
    responses = next(iter(stores.values())).responses if stores else objective.responses
    if any(store.responses != responses for store in stores.values()):
        held = "; ".join(f"{name}_logprobs {', '.join(store.responses)}" for name, store in stores.items())
        raise ValueError(f"stores must hold log-probs of the same responses, found {held}")
    if missing := set(objective.responses) - set(responses):
        raise ValueError(
            f"objective {config.objective} needs log-probs of {', '.join(missing)} responses; the store has none"
        )

    tokenizers = (tokenizer, weak_tokenizer)
    pairs = _load_pairs(config, config.dataset, config.dataset_split, tokenizers, responses, accelerator)
    key = StoreKey.of(config.model, tokenizer, pairs.all_encoded, config.max_length, config.truncation_side)
    dtype = AUTOCAST_DTYPES.get(accelerator.mixed_precision, config.dtype)
    frozen = {name: stored(store, key, name, dtype, accelerator.print) for name, store in stores.items()}
    positions, held_out = _hold_out(config, len(pairs.encoded))
    eval_pairs = None
    if config.eval_dataset:
        eval_pairs = _load_pairs(config, config.eval_dataset, config.eval_split, tokenizers, responses, accelerator)
    plan = BatchPlan.of(config, len(positions), accelerator.num_processes)
    shared = f"shared by {world} processes" if (world := accelerator.num_processes) > 1 else "in one process"
    accelerator.print(f"{plan.steps} steps of up to {plan.batch} pairs, {shared}")
    sources = {n: getattr(config, f"{n}_model") or config.model for n in objective.frozen if n not in stores}
    identity |= {"model": key.model, **_digests(config, pairs, eval_pairs)}
    identity |= {name: model_digest(source) for name, source in sources.items()}
    identity |= {name: store.key.model for name, store in stores.items()}

    def freeze(pairs: Pairs) -> dict[str, FrozenLogprobs | SegmentIds]:
        result: dict[str, Any] = {name: frozen[name] for name in objective.frozen if name in frozen}
        if pairs.segments is not None:
            result["segments"] = SegmentIds(pairs.segments)
        for name, source in sources.items():
            rows, its_tokenizer, spread = pairs.encoded, tokenizer, None
            if pairs.weak is not None and name != "ref":
                rows, its_tokenizer = pairs.weak, weak_tokenizer
                spread = result["segments"].spread if "segments" in result else spread_mean
            own_key = StoreKey.of(source, its_tokenizer, rows, config.max_length, config.truncation_side)
            result[name] = scored(source, rows, own_key, config, its_tokenizer, accelerator, spread)
        return result

    with _claimed(output_dir, identity, accelerator) as finished:
        if finished:
            if accelerator.is_main_process:
                done = _complete(config, tokenizer) or "nothing to do"
                print(f"{output_dir} holds this run, finished after {plan.steps} steps: {done}")
            return output_dir

        visited = {positions[i] for batch in plan.batches() for i in batch}
        needed = freeze(pairs.select(sorted(visited | set(held_out))))
        train_split = Split(pairs.encoded.select(positions), needed)
        eval_split = Split(pairs.encoded.select(held_out), needed) if held_out else None
        if eval_pairs is not None:
            eval_split = Split(eval_pairs.encoded, freeze(eval_pairs))
        loop = Loop(config, objective, accelerator, tokenizer, plan, train_split, eval_split)
        loop.run()
    return output_dir


@contextlib.contextmanager
def _claimed(output_dir: Path, identity: dict[str, Any], accelerator: Accelerator) -> Iterator[bool]:
    """Hold the folder for this run, against others; whether it holds the run finished already."""
    with contextlib.ExitStack() as held:
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                output_dir.mkdir(parents=True, exist_ok=True)
                held.enter_context(checkpoint.locked(output_dir, "training in"))
            finished = checkpoint.claim(output_dir, identity)
        yield finished


class Loop:
    """The policy with its optimizer, from the last checkpoint to the finished model."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        accelerator: Accelerator,
        tokenizer: Any,
        plan: BatchPlan,
        training: Split,
        evaluation: Split | None,
    ):
        self.config, self.objective, self.accelerator, self.tokenizer = config, objective, accelerator, tokenizer
        self.plan, self.training, self.evaluation = plan, training, evaluation
        self.output_dir = Path(config.output_dir)
        if accelerator.is_main_process:
            checkpoint.prune(self.output_dir, config.save_total_limit)
        accelerator.wait_for_everyone()
        resumed = checkpoint.latest_checkpoint(self.output_dir)
        set_seed(config.seed)  # the adapters' initialization, the same in all processes
        self.policy = _build_policy(config, resumed)
        for split in (training, evaluation):
            if split is not None:
                require_fit(self.policy, split.encoded)
        self.response_model = ResponseModel(self.policy, config.head_tolerance, config.backend)
        optimizer = _build_optimizer(config, self.policy)
        self.scheduler = get_scheduler(
            config.lr_scheduler_type, optimizer, math.ceil(config.warmup_ratio * plan.steps), plan.steps
        )
        self.model, self.optimizer = accelerator.prepare(self.response_model, optimizer)
        self.sharded = accelerator.is_fsdp2
        self.step, self.sums, self.seconds = 0, Sums(), 0.0
        self.norms = torch.zeros((), device=accelerator.device)  # of gradients, summed: one that is not finite stays
        narrow = {str(p.dtype) for p in self.policy.parameters() if p.requires_grad and p.dtype.itemsize == 2}
        if narrow:
            accelerator.print(
                f"note: weights in {', '.join(sorted(narrow))} lose updates below half of their last digit, at a "
                f"learning rate of {config.learning_rate:g} maybe most: dtype float32 with bf16 keeps them"
            )
        set_seed(config.seed, device_specific=True)  # dropout
        if resumed is not None:
            self._restore(resumed)
            accelerator.print(f"going on from {resumed}")

    def run(self) -> None:
        config, accelerator = self.config, self.accelerator
        log = (
            MetricsLog(self.output_dir, self.step, config.report_to == "tensorboard")
            if accelerator.is_main_process
            else None
        )
        bar = tqdm(
            total=self.plan.steps, initial=self.step, desc=config.objective, disable=log is None, dynamic_ncols=True
        )
        self.model.train()
        with _stop_requests(accelerator.num_processes) as requests:
            for batch in self.plan.batches(self.step):
                start = time.perf_counter()
                used = {"learning_rate": self.scheduler.get_last_lr()[0], "grad_norm": self._train_step(batch)}
                stop = self._anywhere(bool(requests))
                self.step += 1
                bar.update()
                last = self.step == self.plan.steps
                logs = last or self.step % config.logging_steps == 0
                evaluates = self.evaluation and (last or (config.eval_steps and self.step % config.eval_steps == 0))
                saves = not last and (stop or (config.save_steps and self.step % config.save_steps == 0))
                if logs or evaluates or saves:
                    _await_device()  # within the steps' time, and not in what follows
                self.seconds += time.perf_counter() - start
                if logs:
                    self._log(log, bar, used)
                if logs or evaluates or saves:
                    self._require_finite_gradients()
                if evaluates:
                    self._evaluate(log)
                if saves:
                    if log is not None:
                        log.sync()
                    self._save_checkpoint()
                if stop and not last:
                    bar.close()
                    raise Interrupted(
                        f"stopped after step {self.step} of {self.plan.steps}; the same command goes on from there"
                    )
        bar.close()
        self._require_finite_weights()
        self._save_model()
        if log is not None:
            log.close()
            checkpoint.mark_finished(self.output_dir)
            _complete(config, self.tokenizer, None if self.sharded else self.policy)
            accelerator.print(f"model in {self.output_dir}, curves in {self.output_dir / CURVES}")
        accelerator.wait_for_everyone()

    def _train_step(self, batch: list[int]) -> torch.Tensor:
        """One optimizer step on the pairs at positions ``batch`` of the training rows; returns the gradient's norm."""
        accelerator = self.accelerator
        micro_batches = self._batches(batch, self.training, self.config.per_device_train_batch_size)
        for i, (positions, counts) in enumerate(micro_batches):
            # Another one in each process, so that the errors of what is sampled average out over them.
            forward_passes = self.step * self.config.gradient_accumulation_steps + i
            self.response_model.seed = forward_passes * accelerator.num_processes + accelerator.process_index
            # Sharded gradients that wait for an average are whole meanwhile, in every process.
            averages = self.sharded or i == len(micro_batches) - 1
            with contextlib.nullcontext() if averages else accelerator.no_sync(self.model):
                loss, metrics, stats = self._forward(self.model, self.training, positions)
                # Gradients are averaged over processes, so this is the mean over the step's pairs.
                accelerator.backward(loss.sum() * (accelerator.num_processes / len(batch) if counts else 0.0))
            if counts:
                self.sums.add(metrics | _head_metrics(stats.grad_report, loss))
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm or math.inf)
        if self.sharded:
            grad_norm = grad_norm.full_tensor()
        if accelerator.scaler is None:  # which leaves out steps whose gradients overflow
            self.norms += grad_norm
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _require_finite_weights(self) -> None:
        """What the gradients cannot tell: that the last update went beyond the weights' range."""
        trained: list[Any] = [p for p in self.policy.parameters() if p.requires_grad]
        shards = [p.to_local() for p in trained] if self.sharded else trained
        if self._anywhere(not all(bool(shard.isfinite().all()) for shard in shards)):
            raise FloatingPointError(
                f"a weight is not finite after step {self.step}, and nothing was saved of it: lower learning_rate, or "
                "train in a wider dtype"
            )

    def _require_finite_gradients(self) -> None:
        if not math.isfinite(float(self.norms)):
            raise FloatingPointError(
                f"a gradient up to step {self.step} is not finite, and nothing was saved since: lower learning_rate, "
                "or train in a wider dtype"
            )

    def _anywhere(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process: they all have to do the same after the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)))

    def _forward(
        self, model: nn.Module, split: Split, positions: list[int]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], TokenStats]:
        """The loss (B,) of the pairs at ``positions``, metrics, (B,) each or sums over them, and what both are of."""
        rows = [split.encoded[position] for position in positions]
        batch = collate(rows, self.objective.responses, self.tokenizer.pad_token_id)
        device = self.accelerator.device
        frozen = {name: logprobs.packed(batch).to(device, non_blocking=True) for name, logprobs in split.frozen.items()}
        batch = batch.to(device)
        stats, cu_seqlens = model(batch, self.objective.stats)
        loss, metrics = self.objective.function(stats, cu_seqlens, frozen)
        if batch.sample_weight is not None:
            loss = loss * batch.sample_weight
            metrics["sample_weight"] = batch.sample_weight
        metrics = {"loss": loss, **metrics, "pairs": torch.ones_like(loss), "tokens": batch.attention_mask.sum()}
        return loss, metrics, stats

    def _batches(self, positions: list[int], split: Split, size: int) -> list[tuple[list[int], bool]]:
        """This process's part in batches, by length: pairs of one forward pass then need little padding.

        Every process has as many, since the average of gradients takes all of them, and sharded weights' forward passes
        do: a pair fills up, in a batch that does not count.
        """
        processes = self.accelerator.num_processes
        lengths = {position: _length(split.encoded[position]) for position in positions}
        ordered = sorted(positions, key=lambda position: (lengths[position], position))
        batches = [(batch, True) for batch in _chunks(ordered[self.accelerator.process_index :: processes], size)]
        missing = math.ceil(len(positions) / processes / size) - len(batches)
        return batches + [(positions[:1], False)] * missing

    @torch.no_grad()
    def _evaluate(self, log: MetricsLog | None) -> None:
        assert self.evaluation is not None
        self.model.eval()
        sums = Sums()
        positions = list(range(len(self.evaluation.encoded)))
        for batch, counts in self._batches(positions, self.evaluation, self.config.per_device_eval_batch_size):
            metrics = self._forward(self.response_model, self.evaluation, batch)[1]
            if counts:
                sums.add(metrics)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # of which some wait for a backward with their weights gathered
                module.reshard()
        self.model.train()
        means, _ = self._means(sums)
        if log is not None:
            log.write(self.step, {EVAL + name: value for name, value in means.items()})

    def _log(self, log: MetricsLog | None, bar: tqdm, used: dict[str, Any]) -> None:
        means, tokens = self._means(self.sums)
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is {means['loss']} at step {self.step}: lower learning_rate, or train in a wider dtype"
            )
        peak = max(gather_object([peak_memory()]))
        if log is not None:
            speed = {
                "grad_norm": float(used["grad_norm"]),
                "learning_rate": used["learning_rate"],
                "epoch": round(self.step / self.plan.steps_per_epoch, 6),
                "tokens_per_second": round(tokens / self.seconds, 1),
                "seconds": round(self.seconds, 3),
                "peak_memory_gib": round(peak / 2**30, 3),
            }
            log.write(self.step, means | speed)
            bar.set_postfix_str(_postfix(means | speed))
        self.sums, self.seconds = Sums(), 0.0

    def _means(self, sums: Sums) -> tuple[dict[str, float], float]:
        """Over the pairs of all processes; and the tokens read."""
        total: dict[str, float] = {}
        for state in gather_object([sums.state()]):
            for name, value in state.items():
                total[name] = total.get(name, 0.0) + value
        tokens = total.pop("tokens")
        return summarize(total), tokens

    def _save_checkpoint(self) -> None:
        """An ordinary model folder that also holds what going on needs; renamed into place when it is complete."""
        self._require_finite_weights()
        accelerator = self.accelerator
        final = checkpoint.checkpoint_path(self.output_dir, self.step)
        partial = final.with_name(final.name + TEMPORARY)
        try:
            self._write_checkpoint(partial)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError of a full disk
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise RuntimeError(f"{final} could not be written, and is not there: {error}") from error
        if accelerator.is_main_process:
            checkpoint.publish(partial, final)
            checkpoint.prune(self.output_dir, self.config.save_total_limit)

    def _write_checkpoint(self, partial: Path) -> None:
        accelerator = self.accelerator
        if accelerator.is_main_process:
            partial.mkdir()
        accelerator.wait_for_everyone()
        process = {"rng": checkpoint.rng_state(), "sums": self.sums.state(), "seconds": self.seconds}
        torch.save(process, partial / f"process-{accelerator.process_index}.pt")
        if self.sharded:
            distributed_checkpoint.save(self._sharded_optimizer_state(), checkpoint_id=partial / OPTIMIZER)
        weights = self._weights()
        if accelerator.is_main_process:
            self.policy.save_pretrained(partial, state_dict=weights)
            self.tokenizer.save_pretrained(partial)
            state = {
                "step": self.step,
                "optimizer": None if self.sharded else self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            }
            torch.save(state, partial / "training.pt")
        accelerator.wait_for_everyone()

    def _restore(self, folder: Path) -> None:
        """All but the weights, which the policy was loaded with."""
        state = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        self.step = state["step"]
        if self.sharded:
            optimizer = self._sharded_optimizer_state()
            distributed_checkpoint.load(optimizer, checkpoint_id=folder / OPTIMIZER)
            set_optimizer_state_dict(self.model, self.optimizer.optimizer, optim_state_dict=optimizer)
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        process = torch.load(
            folder / f"process-{self.accelerator.process_index}.pt", map_location="cpu", weights_only=True
        )
        self.sums, self.seconds = Sums(process["sums"]), process["seconds"]
        checkpoint.set_rng_state(process["rng"])

    def _weights(self) -> dict[str, torch.Tensor] | None:
        """Sharded weights in whole, in the main process' memory, by the policy's names; None where they are whole."""
        if not self.sharded:
            return None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=self.config.use_peft)
        weights: dict[str, Any] = get_model_state_dict(self.model, options=options)
        names: dict[nn.Parameter, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in weights:  # tied ones, which were gathered apart, as one again: transformers saves that once
                weights[name] = weights[names.setdefault(parameter, name)]
        return {name.removeprefix("model."): value for name, value in weights.items()}

    def _sharded_optimizer_state(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer.optimizer)

    def _save_model(self) -> None:
        """The model's files in ``output_dir``, weights last: a folder with weights is a whole model."""
        weights = self._weights()
        if not self.accelerator.is_main_process:
            return
        partial = self.output_dir / f"final{TEMPORARY}"
        self.policy.save_pretrained(partial, state_dict=weights)
        self.tokenizer.save_pretrained(partial)
        for path in sorted(partial.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name)):
            final = self.output_dir / path.name
            if final.is_dir():  # from a run that was killed here, of the same files
                shutil.rmtree(final)
            checkpoint.publish(path, final)
        partial.rmdir()


def _complete(config: TrainConfig, tokenizer: Any, policy: Any = None) -> str:
    """Make what a finished run lacks beside its model, the merged one and the curves; says where it merged, if it did.

    policy: the adapted model, where it is in memory.
    """
    output_dir, merged = Path(config.output_dir), ""
    if config.merge_adapter and not (output_dir / MERGED).exists():
        _save_merged(_finished_adapter(config) if policy is None else policy, tokenizer, output_dir)
        merged = f"merged into {output_dir / MERGED}"
    if (output_dir / checkpoint.METRICS_FILE).exists() and not (output_dir / CURVES).exists():
        draw_curves(output_dir, f"{config.objective} · {Path(config.model).name}")
    return merged


def _save_merged(policy: Any, tokenizer: Any, output_dir: Path) -> None:
    partial = output_dir / f"{MERGED}{TEMPORARY}"
    policy.merge_and_unload().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    checkpoint.publish(partial, output_dir / MERGED)


def _accelerator(config: TrainConfig) -> Accelerator:
    # Layer by layer: by Accelerate's default, FSDP would gather all weights at once.
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if (world := int(os.environ.get("WORLD_SIZE", 1))) != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {world} processes (WORLD_SIZE), and Accelerate sees {accelerator.num_processes}: "
            "each would train alone. Without an accelerator, set ACCELERATE_USE_CPU=1"
        )
    kind = accelerator.distributed_type
    if not accelerator.is_fsdp2 and kind not in (
        DistributedType.NO,
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_XPU,
    ):
        raise ValueError(
            "training runs in one process, with DistributedDataParallel, or with FSDP of version 2 (accelerate launch "
            f"--use_fsdp --fsdp_version 2), found {kind.value}"
        )
    parallelism = accelerator.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise ValueError(
            "processes share pairs out, not sequences or layers: cp_size, sp_size and tp_size of Accelerate's "
            "parallelism config must be 1"
        )
    if accelerator.is_fsdp2:
        plugin, gathered = accelerator.state.fsdp_plugin, AUTOCAST_DTYPES.get(accelerator.mixed_precision)
        plugin.cpu_ram_efficient_loading = False  # as load_model has it
        if gathered is not None:  # Accelerate's own would have log-probs and sums of gradients in 16 bits
            plugin.mixed_precision_policy = MixedPrecisionPolicy(getattr(torch, gathered), reduce_dtype=torch.float32)
            if config.dtype != "float32" and not config.use_peft:
                raise ValueError(f"dtype must be float32, which FSDP trains in mixed precision; found {config.dtype}")
    return accelerator


def _identity(config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """What a run's result depends on and is known at once; digests of models and data come to it later."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_IDENTITY}
    launched = {
        "processes": accelerator.num_processes,
        "sharded": accelerator.is_fsdp2,
        "mixed_precision": accelerator.mixed_precision,
    }
    return {name: value for name, value in options.items() if name not in ("bf16", "fp16")} | launched


def _digests(config: TrainConfig, pairs: Pairs, eval_pairs: Pairs | None) -> dict[str, Any]:
    """Of the data, by the names that a run's identity has for them."""
    found: dict[str, Any] = {
        "data": data_digest(pairs.encoded),
        "eval_data": eval_pairs and data_digest(eval_pairs.encoded),
        # The weak models' tokens decide what is regressed on, and their digests say nothing of their tokenizer.
        "weak_data": pairs.weak and data_digest(pairs.weak),
        "segments_data": pairs.segments and data_digest(pairs.segments),
    }
    if config.sample_weight_column:
        # As text: their own digits, which JSON keeps.
        weights = [split and split.encoded["sample_weight"][:] for split in (pairs, eval_pairs)]
        found["sample_weights"] = hashlib.sha256(json.dumps(weights).encode()).hexdigest()
    return found


def _require_schedule(config: TrainConfig) -> None:
    """Raise ValueError for a schedule that does not exist or needs more than a warm-up, a length and a rate."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)

    def usable(name: str) -> bool:
        try:
            return isinstance(get_scheduler(name, optimizer, 1, 2), torch.optim.lr_scheduler.LambdaLR)
        except (TypeError, ValueError, ZeroDivisionError):
            return False

    name, names = config.lr_scheduler_type, [kind.value for kind in SchedulerType]
    if name not in names or not usable(name):
        raise ValueError(
            f"lr_scheduler_type must, at learning_rate {config.learning_rate:g}, be one of "
            f"{', '.join(filter(usable, names))}; found {name!r}"
        )


def _weak_tokenizer(config: TrainConfig, tokenizer: Any) -> Any | None:
    """The aligned weak model's tokenizer where it makes other tokens of a conversation than the policy's, else None.

    At token level all models score the policy's tokens. So do weak models of its vocabulary that have no chat template
    of their own, and those of which one is a store.
    """
    sources = [source for name in FROZEN_MODELS[1:] if (source := getattr(config, f"{name}_model"))]
    others = {source: load_tokenizer(source, config.trust_remote_code) for source in sources}
    vocabulary = tokenizer.get_vocab()
    ref = load_tokenizer(config.ref_model, config.trust_remote_code) if config.ref_model else tokenizer
    if ref.get_vocab() != vocabulary:
        raise ValueError(f"ref_model {config.ref_model} has another tokenizer than model {config.model}")
    foreign = [source for source, other in others.items() if other.get_vocab() != vocabulary]
    if foreign and config.level == "token":
        raise ValueError(
            f"level token compares log-probs token by token, and {foreign[0]} has another tokenizer than "
            f"{config.model}: use level sequence, which compares means over each response, or level segment, which "
            "compares sums over the text between characters where both tokenizers have a boundary"
        )
    both = [getattr(config, f"{name}_model") for name in FROZEN_MODELS[1:]]
    if foreign and (None in both or others[both[0]].get_vocab() != others[both[1]].get_vocab()):
        raise ValueError("weak_aligned_model and weak_ref_model must have one tokenizer, and both be given as models")
    if config.level == "token" or None in both:
        return None
    weak = others[both[0]]
    return weak if foreign or weak.chat_template not in (None, tokenizer.chat_template) else None


def _load_pairs(
    config: TrainConfig,
    source: str,
    split: str | None,
    tokenizers: tuple[Any, Any | None],
    responses: tuple[str, ...],
    accelerator: Accelerator,
) -> Pairs:
    tokenizer, weak_tokenizer = tokenizers
    rows = load_preferences(source, split)
    limits = (config.max_length, config.truncation_side, responses)
    # WSPO reads chosen responses alone.
    boundaries = RESPONSES[:1] if weak_tokenizer is not None and config.level == "segment" else ()
    encoded, report = encode(rows, tokenizer, *limits, boundaries)
    accelerator.print(f"{source}: {report}")
    if config.sample_weight_column:
        encoded = add_sample_weights(encoded, rows, config.sample_weight_column)
    if weak_tokenizer is None:
        return Pairs(encoded, encoded)
    weak, report = encode(rows, weak_tokenizer, *limits, boundaries)
    accelerator.print(f"{source} in the weak models' tokens: {report}")
    segments = None
    if boundaries:
        segments, aligned = align(encoded, weak)
        accelerator.print(f"{source}: {aligned}")
        # The keys of stores are of tokens alone.
        encoded, weak = (side.remove_columns("chosen_boundaries") for side in (encoded, weak))
    shared = set(encoded["row"]) & set(weak["row"]) if segments is None else set(segments["row"])
    kept, weak = (side.select([i for i, row in enumerate(side["row"]) if row in shared]) for side in (encoded, weak))
    return Pairs(encoded, kept, weak, segments)


def _hold_out(config: TrainConfig, count: int) -> tuple[list[int], list[int]]:
    """Positions of the pairs to train on, and of a seeded share to evaluate on where that is wanted."""
    if config.test_split_size is None:
        return list(range(count)), []
    held_out = max(1, round(config.test_split_size * count))
    if held_out == count:
        raise ValueError(f"test_split_size {config.test_split_size} leaves none of {count} pairs for training")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def _build_policy(config: TrainConfig, resumed: Path | None) -> Any:
    """From the checkpoint's weights, or the starting model's, with fresh adapters where it has none."""
    model = _load_policy(config, str(resumed) if resumed is not None and not config.use_peft else _base(config))
    for parameter in model.parameters():
        # transformers maps weights from their file, at any alignment, and products round by alignment: a resumed run
        # would differ in the last bit. Copies are aligned, and keep the file from being needed.
        parameter.data = parameter.data.clone()
    if config.disable_dropout:
        disable_dropout(model)
    if config.gradient_checkpointing:
        # transformers 5.23 renames the method.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.use_peft and (resumed is not None or is_adapter(config.model)):
        return _load_adapter(model, resumed or config.model)
    if config.use_peft:
        return _add_adapters(config, model)
    for name in _other_modalities(model):
        model.get_submodule(name).requires_grad_(False)
    return model


def _other_modalities(model: Any) -> list[str]:
    """Modules of a multimodal model that text does not go through. They stay as they are: they get no gradient, for
    which DistributedDataParallel would wait."""
    if model.config.get_text_config() is model.config:
        return []
    text = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    inside = {module for part in text for module in part.modules()}
    return [name for name, module in model.named_modules() if inside.isdisjoint(module.modules())]


def _add_adapters(config: TrainConfig, model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules or ["all-linear"]
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        exclude_modules=_other_modalities(model) or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _require_adapters(config: TrainConfig) -> None:
    """Raise ValueError for adapters that the model cannot have, on a model without weights."""
    from peft import PeftConfig, get_peft_model

    trust = config.trust_remote_code
    base = _base(config)
    with explained(base):
        model_config = AutoConfig.from_pretrained(base, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust)
    if is_adapter(config.model):
        if given := [name for name in config.changed_lora_options if name not in ("use_peft", "merge_adapter")]:
            raise ValueError(f"leave out {', '.join(given)}: model {config.model} is an adapter, which has its own")
        policy = get_peft_model(model, PeftConfig.from_pretrained(config.model))
        find_backbone(policy)
    else:
        try:
            policy = _add_adapters(config, model)
        except ValueError as error:
            raise ValueError(f"lora_target_modules {config.lora_target_modules}: {error}") from error
    tied = model_config.get_text_config().tie_word_embeddings
    if config.merge_adapter and tied and hasattr(policy.get_output_embeddings(), "base_layer"):
        raise ValueError(
            "merge_adapter would add the output embedding's adapter to the input embedding, to which it is tied: leave "
            "it out of lora_target_modules, or keep the adapter apart"
        )


def _base(config: TrainConfig) -> str:
    """The model below the adapters: the policy's, or that of the adapter which it starts from."""
    return adapter_base(config.model) if is_adapter(config.model) else config.model


def _load_policy(config: TrainConfig, source: str) -> Any:
    return load_model(source, config.dtype, config.trust_remote_code, config.attn_implementation)


def _finished_adapter(config: TrainConfig) -> Any:
    """What a finished run has saved, on its base."""
    return _load_adapter(_load_policy(config, _base(config)), config.output_dir)


def _load_adapter(model: nn.Module, folder: Path | str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def _build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,  # one pass, and no temporaries of the parameters' size
    )


def _await_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextlib.contextmanager
def _stop_requests(processes: int) -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM makes true, so that the step in progress can end; a second one kills.

    Not of several processes: their launcher passes on what the terminal has sent to all of them.
    """
    received: list[int] = []

    def receive(number: int, _: Any) -> None:
        received.append(number)
        if processes == 1:
            for other, handler in previous.items():
                signal.signal(other, handler)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _head_metrics(report: GradReport | None, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """(B,) each: what the gradient of the head reports, for pairs where it was not exact."""
    if report is None:
        return {}
    names = ("columns_kept", "estimated_error", "dense_chunks")
    values = {"pairs": 1, **{name: getattr(report, name) for name in names}}
    return {HEAD + name: torch.full_like(loss, value) for name, value in values.items()}


def _length(row: dict[str, Any]) -> int:
    responses = [len(row[f"{name}_ids"]) for name in RESPONSES if f"{name}_ids" in row]
    return len(row["prompt_ids"]) + max(responses)


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _postfix(values: dict[str, float]) -> str:
    shown = {
        "loss": "loss",
        "rewards/margins": "margin",
        "rewards/accuracies": "accuracy",
        "wpo/weight": "weight",
        "wpo/effective_sample_size": "ESS",
        "wspo/residual": "residual",
        "tokens_per_second": "tok/s",
        "peak_memory_gib": "GiB",
    }
    return ", ".join(f"{label} {values[name]:.4g}" for name, label in shown.items() if name in values)
