"""A causal LM as token statistics: its backbone runs without the head, which then sees response positions alone."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import ResponseBatch, hub_name
from .config import RESPONSES
from .head import LMHead, require_decoder
from .packing import pack, packable
from .parallel import localize
from .token_stats import TokenStats, token_logprobs

_CHECK_TOKENS = 16  # positions on which verify_head compares logits
_CHECK_WINDOW = 4  # and what verify_packing lets attention see of them where its window is limited
_WINDOWS = ("sliding_window", "attention_chunk_size")  # what transformers calls that limit
# And beginnings of what it calls how many tokens or blocks an indexer lets a query see, through the mask alone:
# DeepSeek-V3.2 and those after it, MiniMax-M3, Qwen4-Exp.
_INDEXERS = ("index_topk", "indexer_budget")
_POSITION_LIMITS = ("max_position_embeddings", "n_positions")


class ResponseStats(NamedTuple):
    """Statistics of the N response tokens of a batch, packed (N,), and the sequences' offsets (S + 1,) in them."""

    stats: TokenStats
    cu_seqlens: Tensor


class ResponseModel(nn.Module):
    """A transformers causal LM that maps a :class:`ResponseBatch` to the statistics of its response tokens.

    Wrappers such as DistributedDataParallel, autocast and gradient checkpointing work on it as on the model itself: its
    parameters are the model's, all used in ``forward``.

    Args:
        model: a causal LM, also with PEFT adapters other than prompt learning.
        grad_tolerance, backend: as in :func:`prefopt_fast.token_logprobs`.
        temperature: positive divisor of the logits.
        seed: as in :func:`prefopt_fast.token_logprobs`; an attribute, for those who give each step its own.

    Raises:
        ValueError: a model without a backbone and head that can be run apart.
    """

    def __init__(
        self,
        model: nn.Module,
        grad_tolerance: float | str | tuple[float, float] = "auto",
        backend: str = "auto",
        temperature: float = 1.0,
        seed: int | None = None,
    ):
        super().__init__()
        backbone: Any = find_backbone(model)
        self.model = model
        self._no_split_modules = getattr(backbone, "_no_split_modules", None)  # which Accelerate's FSDP shards apart
        self.grad_tolerance = grad_tolerance
        self.backend = backend
        self.temperature = temperature
        self.seed = seed
        self._packs: bool | None = None  # not known before the first batch
        self._positions = position_limit(model)

    def forward(self, batch: ResponseBatch, stats: tuple[str, ...] = ()) -> ResponseStats:
        """Log-probs, and the statistics named in ``stats``, of the batch's response tokens.

        The first call verifies the head, see :func:`verify_head`, and whether sequences need padding, see
        :func:`verify_packing`.

        Raises:
            ValueError: sequences longer than the model has positions for.
        """
        require_positions(self.model, batch.input_ids.shape[1], self._positions)
        if self._packs is None:
            verify_head(self.model, batch.input_ids[:1, :_CHECK_TOKENS])
            self._packs = verify_packing(self.model)
        token_stats = token_logprobs(
            hidden_states(
                self.model, batch.input_ids, batch.attention_mask, batch.positions, self._packs, len(batch.rows)
            ),
            LMHead.from_model(self.model).with_temperature(self.temperature),
            batch.scored,
            stats=stats,
            grad_tolerance=self.grad_tolerance,
            backend=self.backend,
            seed=self.seed,
        )
        return ResponseStats(token_stats, batch.cu_seqlens)


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,  # (S, T), padded on the right
    attention_mask: Tensor,  # (S, T)
    positions: Tensor,  # (N,), in the flattened (S · T) layout
    packs: bool,
    pairs: int,
) -> Tensor:
    """(N, H): what the model's head would be given at ``positions``.

    packs: leave padding out, and compute what sequence s has in common with sequence s mod ``pairs`` once; see
    :func:`verify_packing`.

    Raises:
        ValueError: a model in DistributedDataParallel, which would not see this forward pass.
    """
    if torch.is_grad_enabled() and isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model must not be a DistributedDataParallel, which averages gradients of its own forward alone: wrap "
            "ResponseModel(model), and call that with the batch"
        )
    backbone = find_backbone(model)
    if not packs:
        output = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)[positions]
    packing = pack(input_ids, attention_mask, pairs)
    return backbone(**packing.inputs()).last_hidden_state[0][packing.place[positions]]


def find_backbone(model: nn.Module) -> nn.Module:
    """The causal LM's module below its head, through PEFT (adapters live inside it) and ``.module`` wrappers.

    Raises:
        ValueError: prompt-learning PEFT, whose virtual tokens only the whole model adds; an encoder-decoder; a model
            without a backbone of its own.
    """
    causal_lm: Any = model
    while hasattr(causal_lm, "module") and not hasattr(causal_lm, "get_output_embeddings"):
        causal_lm = causal_lm.module
    for name, config in (getattr(causal_lm, "peft_config", None) or {}).items():
        if config.is_prompt_learning:
            raise ValueError(
                f"PEFT adapter {name!r} is of type {config.peft_type}, whose virtual tokens shift every position; "
                "use an adapter that changes layers, such as LoRA"
            )
        activated = getattr(config, "alora_invocation_tokens", None)
        if activated or config.peft_type in ("POLY", "XLORA"):
            kind = "an activated LoRA" if activated else f"of type {config.peft_type}"
            raise ValueError(
                f"PEFT adapter {name!r} is {kind}, which the whole model's forward steers by its inputs; use one that "
                "changes layers alone, such as LoRA"
            )
    if hasattr(causal_lm, "get_base_model"):
        causal_lm = causal_lm.get_base_model()
    backbone = getattr(causal_lm, "base_model", causal_lm)
    if backbone is causal_lm:  # Llama 4's base_model_prefix names no attribute
        backbone = getattr(causal_lm, "model", causal_lm)
    if backbone is causal_lm:
        name = type(causal_lm).__name__
        raise ValueError(f"{name} has no backbone apart from a head: a causal language model is needed")
    require_decoder(causal_lm)
    # What OPT, Bart and their like have for a model only passes on to its decoder, which their causal LMs call.
    decoder: Any = getattr(backbone, "decoder", None)
    return decoder if hasattr(decoder, "embed_tokens") else backbone


@contextlib.contextmanager
def kept_hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """(S, T, H) of each forward pass of ``model`` within, as the head is given them."""
    kept: list[Tensor] = []
    hook = find_backbone(model).register_forward_hook(lambda _, __, output: kept.append(output.last_hidden_state))
    try:
        yield kept
    finally:
        hook.remove()


def position_limit(model: nn.Module) -> int | None:
    """Tokens of the longest sequence that the model's table of positions serves; None where positions have no table.

    A table is known by its name and by having as many rows as the configuration says, beyond those that OPT and its
    like leave unused at its beginning: a vision tower's, or one that grows, is none.
    """
    backbone = find_backbone(model)
    config: Any = getattr(backbone, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if getattr(config, "model_type", None) == "mpt":
        return config.max_seq_len  # rows of its table of ALiBi's biases, which is made anew in each forward pass
    sizes = {size for name in _POSITION_LIMITS if isinstance(size := getattr(config, name, None), int)}
    for module in backbone.modules():
        for name, table in (*module.named_children(), *module.named_buffers(recurse=False)):
            rows = None
            if isinstance(table, nn.Embedding):  # whose weight may be sharded
                rows = table.num_embeddings - getattr(table, "offset", 0)
            elif isinstance(table, Tensor) and table.ndim == 2:
                rows = len(table)
            if rows in sizes and ("pos" in name or name == "wpe"):
                return rows
    return None


def require_fit(model: nn.Module, encoded: datasets.Dataset) -> None:
    """Raise ValueError where rows of :func:`prefopt_fast.batch.encode` are longer than the model has positions for, or
    have tokens that it has no embedding for.

    Beyond its tables a model fails in the middle of a forward pass: with a bare IndexError on CPUs, and losing the
    device's context on GPUs. Positions that are computed, as rotary ones, have no such end.
    """
    table = encoded.with_format("arrow")[:]
    columns = [table[f"{name}_ids"] for name in ("prompt", *RESPONSES) if f"{name}_ids" in table.column_names]
    largest = max(pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns)
    embedding, backbone = None, cast(Any, find_backbone(model))
    with contextlib.suppress(NotImplementedError):  # of code that is not transformers' own
        embedding = backbone.get_input_embeddings()
    if largest >= (tokens := getattr(embedding, "num_embeddings", math.inf)):
        raise ValueError(
            f"the tokenizer makes token {largest} of the data, and {type(model).__name__} has embeddings for {tokens}: "
            "it is another model's tokenizer, or one to which tokens were added without resize_token_embeddings"
        )
    prompt, *responses = map(pc.list_value_length, columns)
    require_positions(model, max(pc.max(pc.add(prompt, each)).as_py() for each in responses), position_limit(model))


def require_positions(model: nn.Module, longest: int, limit: int | None) -> None:
    """Raise ValueError where a sequence of ``longest`` tokens is longer than the model's :func:`position_limit`."""
    if limit is not None and longest > limit:
        raise ValueError(
            f"max_length must be at most {limit} with {type(model).__name__}, which has that many positions; found a "
            f"sequence of {longest} tokens"
        )


def check_tokens(model: nn.Module) -> Tensor:
    """(1, T) token ids to verify a model on where there is no batch yet."""
    count = min(_CHECK_TOKENS, LMHead.from_model(model).vocab_size)
    return torch.arange(count, device=next(model.parameters()).device)[None]


@torch.no_grad()
def verify_head(
    model: nn.Module,
    input_ids: Tensor,  # (1, T)
) -> None:
    """Compare backbone and :class:`LMHead` with the model's own logits on a few tokens, in evaluation mode.

    A family that scales its hidden states or logits in a way that LMHead.from_model does not know is found here,
    instead of trained on wrong numbers.

    Raises:
        ValueError: logits that differ by more than rounding, or are not finite.
    """
    with evaluation(model):
        with _own_forward(model):
            expected = model(input_ids=input_ids, use_cache=False).logits.double()
        hidden = find_backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state
        head = localize(LMHead.from_model(model), hidden.dtype)
        logits = nn.functional.linear(hidden, head.weight.to(hidden.dtype)).double()
    if head.group is not None:
        expected = expected[..., head.vocab_start : head.vocab_start + head.vocab_size]
    if head.bias is not None:
        logits = logits + head.bias
    scale, softcap = head.transform
    logits = scale * logits if softcap is None else softcap * torch.tanh(scale * logits / softcap)
    # Both sides round operands, product and a few elementwise steps.
    epsilon = _epsilon(hidden.device, hidden.dtype, head.weight.dtype)
    difference, norm = float((logits - expected).norm()), float(expected.norm())
    if not math.isfinite(norm):
        raise ValueError(f"{type(model).__name__} computes logits that are not finite: are its weights?")
    if not difference <= 8 * epsilon * norm:
        raise ValueError(
            f"{type(model).__name__}: logits from its hidden states and head differ by {difference:.2g} (norm) from "
            f"its own, of norm {norm:.2g}: this family computes logits in a way that LMHead.from_model does not know"
        )


@torch.no_grad()
def verify_packing(model: nn.Module) -> bool:
    """Whether the backbone computes packed sequences as padded ones: compared on two that share a beginning.

    A model whose layers look at neighbours by other means than an attention known to packing.py is found here, and so
    is one whose windows are in the mask alone, which packing leaves out; their batches are padded. So are those of
    sparse attention, whose choice of tokens is in the mask too: a few tokens are all chosen.
    """
    backbone = find_backbone(model)
    if not packable(backbone) or _chooses_tokens(backbone):
        return False
    ids = check_tokens(model)
    other = torch.cat([ids[:, : -(ids.shape[1] // 2)], ids.flip(1)], 1)
    pair = torch.cat([F.pad(ids, (0, other.shape[1] - ids.shape[1])), other])
    mask = torch.ones_like(pair)
    mask[0, ids.shape[1] :] = 0
    positions = mask.flatten().nonzero().squeeze(-1)
    with evaluation(model), _short_windows(backbone):
        padded = hidden_states(model, pair, mask, positions, packs=False, pairs=1)
        try:
            packed = hidden_states(model, pair, mask, positions, packs=True, pairs=1)
        except Exception:  # of the family's own code, which makes something of the mask
            return False
    # All layers round here, each way in its own order.
    allowed = 16 * _epsilon(padded.device, padded.dtype) * padded.norm(dim=-1)
    return bool(((packed - padded).norm(dim=-1) <= allowed).all())


def require_whole_sequences(accelerator: Any) -> None:
    """Raise ValueError where Accelerate shares each sequence's tokens out over processes.

    A loss sums over whole sequences, and the masks that keep packed ones apart are dropped there.
    """
    parallelism = accelerator.parallelism_config
    if parallelism is not None and parallelism.cp_size * getattr(parallelism, "sp_size", 1) > 1:
        raise ValueError(
            "each process needs whole sequences: context and sequence parallelism (cp_size and sp_size of Accelerate's "
            "parallelism config) must be 1"
        )


def _epsilon(device: torch.device, *dtypes: torch.dtype) -> float:
    """Machine epsilon of the coarsest dtype a product may be computed in; float32 may be TF32."""
    if torch.is_autocast_enabled(device.type):
        dtypes += (torch.get_autocast_dtype(device.type),)
    return max(1e-4, *(torch.finfo(dtype).eps for dtype in dtypes))


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Without the autocast that Accelerate leaves in the forward of a model that it has trained."""
    forward = vars(model).get("forward")
    if forward is None or "_original_forward" not in vars(model):
        yield
        return
    del model.forward
    try:
        yield
    finally:
        model.forward = forward


def _attributes(backbone: nn.Module) -> list[dict[str, Any]]:
    """Of every module, and of every configuration that a module has."""
    holders = [holder for module in backbone.modules() for holder in (module, getattr(module, "config", None))]
    return list({id(holder): getattr(holder, "__dict__", {}) for holder in holders}.values())


def _chooses_tokens(backbone: nn.Module) -> bool:
    """Whether an indexer chooses the tokens that a query attends to."""
    # Not by a comparison with a few of them chosen, as for windows: each family derives its own fields from these.
    return any(
        name.startswith(_INDEXERS) and isinstance(value, int)
        for each in _attributes(backbone)
        for name, value in each.items()
    )


@contextlib.contextmanager
def _short_windows(backbone: nn.Module) -> Iterator[None]:
    """Windows of attention so short that a few tokens tell whether they are kept; afterwards as they were."""
    found = _attributes(backbone)
    windows = [(each, name, each[name]) for each in found for name in _WINDOWS if isinstance(each.get(name), int)]
    for each, name, window in windows:
        each[name] = min(window, _CHECK_WINDOW)
    try:
        yield
    finally:
        for each, name, window in windows:
            each[name] = window


def disable_dropout(model: Any) -> None:
    """Of dropout modules, and of those that drop values or layers by a number, their own or their config's."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    saved = copy.deepcopy(causal_lm.config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            attributes = getattr(holder, "__dict__", {})
            attributes |= {
                name: 0.0 for name, value in attributes.items() if "drop" in name and isinstance(value, float)
            }
    causal_lm.config = saved  # the finished model's is that of the model it began as


def load_model(
    source: str,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> nn.Module:
    """A causal LM from a folder or hub id, safetensors only; from a PEFT adapter, its base with it (where PEFT finds
    nothing but pickled weights of an adapter on the hub, those).

    Raises:
        FileNotFoundError: a local path that does not exist, or a hub id that cannot be reached.
        ValueError: a folder without safetensors weights, or that transformers cannot load.
    """
    from accelerate.utils import patch_environment
    from transformers import AutoModelForCausalLM

    if is_adapter(source):
        from peft import PeftModel

        base = load_model(adapter_base(source), dtype, trust_remote_code, attn_implementation)
        with explained(source):
            return PeftModel.from_pretrained(base, source)
    # Under Accelerate's FSDP, transformers gives weights to one process and expects that they are broadcast: frozen
    # models, which nothing shards, would be left without any.
    with explained(source), patch_environment(fsdp_cpu_ram_efficient_loading="false"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
        model, report = loaded
        weights = {name for name, _ in model.named_parameters()}
        if missing := sorted(weights & {*report["missing_keys"]}):
            raise ValueError(f"its files lack {len(missing)} of its weights, {', '.join(missing[:3])} …")
    return model


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id, with EOS as its padding token where it has none; of an adapter's folder
    without one, its base's.

    Raises:
        FileNotFoundError: a local path that does not exist, or a hub id that cannot be reached.
        ValueError: nothing that transformers can load, or neither a padding nor an EOS token.
    """
    from transformers import AutoTokenizer

    if Path(source).is_dir() and is_adapter(source) and not any(Path(source).glob("tokenizer*")):
        source = adapter_base(source)
    with explained(source, weights=False):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {source} has neither a padding nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_adapter(source: str) -> bool:
    """Whether a folder, or a hub id, holds a PEFT adapter instead of a model.

    Raises:
        FileNotFoundError: a local path that does not exist.
    """
    return (Path(source) / "adapter_config.json").is_file() if Path(source).is_dir() else _is_adapter_on_hub(source)


@functools.cache
def _is_adapter_on_hub(source: str) -> bool:
    from transformers.utils import find_adapter_config_file

    hub_name(source)
    return find_adapter_config_file(source) is not None


def adapter_base(source: str) -> str:
    """The folder or hub id of the model that an adapter is of; raises ValueError where it does not say."""
    from peft import PeftConfig

    with explained(source):
        base = PeftConfig.from_pretrained(source).base_model_name_or_path
    if not base:
        raise ValueError(f"{source} does not say what it adapts: base_model_name_or_path in its adapter_config.json")
    return base


def require_safetensors(folder: str | Path) -> list[Path]:
    """The folder's weight files, sorted; raises ValueError where it has none in safetensors."""
    if files := sorted(Path(folder).glob("*.safetensors")):
        return files
    raise ValueError(f"{folder} has no .safetensors file; weights in other formats are not loaded")


@contextlib.contextmanager
def explained(source: str, weights: bool = True) -> Iterator[None]:
    """Bad paths before any work; transformers' errors say what they are about, and its OSError for an id it cannot
    find says what that most likely means."""
    folder = Path(source).is_dir()
    if folder and weights:
        require_safetensors(source)
    if not folder:
        hub_name(source)
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # ImportError: of an attention implementation
        if folder or not isinstance(error, OSError):
            raise ValueError(f"{source} cannot be loaded: {error}") from error
        raise FileNotFoundError(
            f"{source} is no folder here, and could not be read from the Hugging Face hub: {error}"
        ) from error
