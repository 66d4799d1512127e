"""Compile every shipped kernel configuration for each GPU architecture, without a GPU, and check the machine code.

``make gpu-report`` writes benchmarks/results/gpu_report.md and .json and exits with 1 where a configuration does not
compile, spills registers inside a main loop, needs more shared memory than a program can have, has lost the
instructions its source asks for (tensor-core products and, on Hopper and later, tensor memory access), or copies into
shared memory that a product still reads.

Everything written is a function of the sources and of Triton's version, so a second run writes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import inputs
import prefopt_fast.kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESULTS = Path(__file__).parent / "results"
KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """A compilation target and the device whose limits and peak figures stand for it.

    shared_program, shared_processor: bytes of shared memory for one program, and in one multiprocessor.
    warps: resident in one multiprocessor at most (AMD: wavefronts in one compute unit).
    matrix, copy: mnemonics of its tensor-core products and of its asynchronous copies into shared memory.
    processors, clock (GHz), tflops (dense bf16), bandwidth (TB/s): of ``device``, by ``source``.
    """

    target: GPUTarget
    device: str
    shared_program: int
    shared_processor: int
    warps: int
    matrix: str
    copy: str
    processors: int
    clock: float
    tflops: float
    bandwidth: float
    source: str


ARCHITECTURES = {
    "sm_80": Architecture(
        GPUTarget("cuda", 80, 32),
        *("A100 SXM 80 GB", 163 * KIB, 164 * KIB, 64, "HMMA", "LDGSTS", 108, 1.41, 312.0, 2.04),
        "NVIDIA A100 Tensor Core GPU datasheet and architecture white paper",
    ),
    "sm_89": Architecture(
        GPUTarget("cuda", 89, 32),
        *("RTX 4090", 99 * KIB, 100 * KIB, 48, "HMMA", "LDGSTS", 128, 2.52, 165.2, 1.01),
        "NVIDIA Ada GPU architecture white paper",
    ),
    "sm_90": Architecture(
        GPUTarget("cuda", 90, 32),
        *("H100 SXM", 227 * KIB, 228 * KIB, 64, "HGMMA", "UTMALDG", 132, 1.83, 989.4, 3.35),
        "NVIDIA H100 Tensor Core GPU datasheet and architecture white paper",
    ),
    "sm_100": Architecture(
        GPUTarget("cuda", 100, 32),
        *("B200 SXM", 227 * KIB, 228 * KIB, 64, "UTCHMMA", "UTMALDG", 148, 1.85, 2250.0, 8.0),
        "NVIDIA Blackwell datasheet (HGX B200)",
    ),
    "gfx942": Architecture(
        GPUTarget("hip", "gfx942", 64),
        *("MI300X", 64 * KIB, 64 * KIB, 32, "v_mfma", "", 304, 2.1, 1307.4, 5.3),
        "AMD Instinct MI300X data sheet and CDNA 3 white paper",
    ),
}

# The shared-memory limits above are the CUDA programming guide's table of technical specifications per compute
# capability (163, 99, 227, 227 KiB) and the CDNA 3 ISA's local data share (64 KiB).

ROOFLINE_TOKENS = 8192


def specializations(arch: str) -> Iterator[Any]:
    """What every module of prefopt_fast.kernels lists for ``arch``: see kernels/linear_logprob.py."""
    for module in pkgutil.iter_modules(prefopt_fast.kernels.__path__, "prefopt_fast.kernels."):
        list_signatures = getattr(import_module(module.name), "aot_signatures", None)
        if list_signatures:
            yield from list_signatures(arch)


def source_digest(kernel: Any) -> str:
    """Of a kernel's source and of the functions that its module has for kernels to call."""
    members = vars(sys.modules[kernel.fn.__module__]).items()
    called = [member for name, member in members if hasattr(member, "arg_names") and not name.endswith("_kernel")]
    text = "".join(inspect.getsource(function.fn) for function in (kernel, *called))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def inspect_kernel(arch: str, name: str) -> dict[str, Any]:
    """Compile one kernel configuration and describe its machine code; "problems" lists what a check found."""
    architecture = ARCHITECTURES[arch]
    spec = next(s for s in specializations(arch) if s.name == name)
    # A constexpr None (an absent operand) needs an entry in the signature as well.
    signature = spec.signature | dict.fromkeys(spec.constexprs, "constexpr")
    aligned = {(spec.kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in spec.divisible}
    entry: dict[str, Any] = {"arch": arch, "kernel": name, "config": spec.config._asdict()}
    entry["source"] = source_digest(spec.kernel)
    try:
        compiled = triton.compile(
            ASTSource(spec.kernel, signature, spec.constexprs, aligned),
            target=architecture.target,
            options={
                "num_warps": spec.config.num_warps,
                "num_stages": spec.config.num_stages,
                "enable_fp_fusion": True,  # the default of Triton 3.6 to 3.9, which 3.9 announces to change
            },
        )
    except Exception as error:  # whatever the compiler raises is the finding
        return entry | {"problems": [f"does not compile: {str(error).strip().splitlines()[-1]}"]}
    code = _nvidia_code(compiled.asm["cubin"]) if "cubin" in compiled.asm else _amd_code(compiled.asm["amdgcn"])
    entry |= code
    entry["shared_bytes"] = compiled.metadata.shared
    entry["tensor_memory_columns"] = getattr(compiled.metadata, "tmem_size", None) or 0
    entry["programs_per_processor"] = _programs_per_processor(entry, architecture)
    entry["occupancy"] = entry["programs_per_processor"] * spec.config.num_warps / architecture.warps
    entry["problems"] = list(_problems(entry, compiled.asm["ttir"], architecture))
    if overwritten := _overwritten_buffers(compiled.asm["ttgir"]):
        entry["problems"].append(f"copies may overwrite what a product reads: {', '.join(overwritten)}")
    return entry


REPORTED = (
    r"(HMMA|HGMMA|UTCHMMA|UTCQMMA|FFMA|LDGSTS|UTMALDG|UTMASTG|LDL|STL|LDTM|STTM|ATOMG?|RED)$|v_mfma|v_fma|scratch_"
)
SPILLS = r"(LDL|STL)$|scratch_"
PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA", "v_mfma")  # where a kernel has several, the first are its main product's


def _nvidia_code(cubin: bytes) -> dict[str, Any]:
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # "/*01e0*/  @!P0 BRA 0x410 ;": address, guard, mnemonic with its modifiers, operands.
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z]\w*)[\w.]*([^;]*);"
    lines = [(int(address, 16), guard, op, rest) for address, guard, op, rest in re.findall(pattern, sass)]
    index = {address: i for i, (address, *_) in enumerate(lines)}
    jumps, ends = {}, set()
    for i, (_, guard, op, operands) in enumerate(lines):
        if op == "BRA":
            jumps[i] = index[int(re.findall(r"0x[0-9a-f]+", operands)[-1], 16)]
        # "BRA.U UP0, 0x190" branches on a predicate operand, "BRA 0x190" always.
        if not guard and (op in ("EXIT", "RET") or (op == "BRA" and "P" not in operands)):
            ends.add(i)
    ops = [op for _, _, op, _ in lines]
    return {"registers": registers, "stack_bytes": stack} | _count(ops, jumps, ends)


def _amd_code(assembly: str) -> dict[str, Any]:
    def metadata(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", assembly)[1])

    ops: list[str] = []
    labels: dict[str, int] = {}
    branches: dict[int, str] = {}
    for label, op, operands in re.findall(r"^(?:(\.LBB\w+):|\t([a-z]+_\w+)(.*))", assembly, re.M):
        if label:
            labels[label] = len(ops)
            continue
        if op.startswith(("s_branch", "s_cbranch")):
            branches[len(ops)] = operands.split()[0]
        ops.append(op)
    jumps = {i: labels[label] for i, label in branches.items() if label in labels}
    ends = {i for i, op in enumerate(ops) if op in ("s_branch", "s_endpgm")}
    return {
        "registers": metadata("vgpr_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        "vgpr_spills": metadata("vgpr_spill_count"),
        "sgpr_spills": metadata("sgpr_spill_count"),
    } | _count(ops, jumps, ends)


def _count(ops: list[str], jumps: dict[int, int], ends: set[int]) -> dict[str, Any]:
    """Instructions, and how many move spilled registers inside loops and inside the main ones.

    The control flow comes from the branches' targets and from what never falls through. (Address ranges of backward
    branches would not do: a wait's slow path is laid out behind the kernel and jumps back into it.) A loop is a cycle
    of basic blocks; a main loop is the shortest cycle through a block of tensor-core products, unless that cycle runs
    through another such block with a shorter one; a kernel without them has its loops as main loops.
    """
    starts = sorted({0, *jumps.values(), *(i + 1 for i in {*jumps, *ends} if i + 1 < len(ops))})
    blocks = [ops[start:stop] for start, stop in zip(starts, [*starts[1:], len(ops)], strict=True)]
    number = {start: b for b, start in enumerate(starts)}
    successors = []
    for stop in [*starts[1:], len(ops)]:
        following = [number[jumps[stop - 1]]] if stop - 1 in jumps else []
        falls = stop - 1 not in ends and stop < len(ops)
        successors.append([*following, number[stop]] if falls else following)

    cycles = {b: cycle for b in range(len(blocks)) if (cycle := _shortest_cycle(b, successors))}
    product = next((kind for kind in PRODUCTS if any(op.startswith(kind) for op in ops)), "none")
    products = {b: cycle for b, cycle in cycles.items() if any(op.startswith(product) for op in blocks[b])}
    lengths = {b: sum(len(blocks[other]) for other in cycle) for b, cycle in cycles.items()}
    main = {
        block
        for b, cycle in products.items()
        if all(lengths[other] >= lengths[b] for other in cycle if other in products)
        for block in cycle
    }

    def spills(inside: Iterable[int]) -> int:
        return sum(bool(re.match(SPILLS, op)) for b in inside for op in blocks[b])

    return {
        "spills": spills(range(len(blocks))),
        "spills_in_loops": spills(cycles),
        "spills_in_main_loops": spills(main or cycles),
        "instructions": dict(sorted((op, n) for op, n in Counter(ops).items() if re.match(REPORTED, op))),
    }


def _shortest_cycle(block: int, successors: list[list[int]]) -> set[int]:
    """The blocks of a shortest way from ``block`` back to it, breadth first; empty if there is none."""
    came_from: dict[int, int] = {}
    queue = deque([block])
    while queue:
        current = queue.popleft()
        for following in successors[current]:
            if following == block:
                cycle = {block, current}
                while current != block:
                    current = came_from[current]
                    cycle.add(current)
                return cycle
            if following not in came_from:
                came_from[following] = current
                queue.append(following)
    return set()


def _programs_per_processor(entry: dict[str, Any], architecture: Architecture) -> int:
    """How many programs fit into one multiprocessor: by registers, shared memory, warps and tensor memory."""
    num_warps = entry["config"]["num_warps"]
    if architecture.target.backend == "hip":
        # Each of a compute unit's 4 SIMDs holds 512 registers per lane, given out in eights, and 8 wavefronts.
        wavefronts = 4 * min(8, 512 // max(8, 8 * math.ceil(entry["registers"] / 8)))
        limits = [wavefronts // num_warps]
        reserved = 0
    else:
        # 65,536 registers, given out in units of 256 per warp; each program's shared memory has 1 KiB of the system's.
        registers_per_warp = 256 * math.ceil(entry["registers"] * 32 / 256)
        limits = [65_536 // (registers_per_warp * num_warps), architecture.warps // num_warps]
        reserved = KIB
    limits.append(architecture.shared_processor // max(1, entry["shared_bytes"] + reserved))
    if entry["tensor_memory_columns"]:
        limits.append(512 // entry["tensor_memory_columns"])
    return min(limits)


def _overwritten_buffers(ttgir: str) -> list[str]:
    """Operands of asynchronous products (Hopper's) whose next copy goes where the running product reads.

    A loop's copies run as many steps ahead as are started before it, around a ring of buffers: so many steps ahead the
    ring must not be back where it is. Triton 3.6 to 3.9 make rings too small for a tile that is used in a product and
    elsewhere.
    """
    rings = {name: int(n) for name, n in re.findall(r"(%\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", ttgir)}
    source = {name: name for name in rings}
    for name, viewed in re.findall(r"(%\S+) = ttg\.memdesc_\w+ (%\w+)", ttgir):
        source[name] = source.get(viewed, viewed)
    dots = list(re.finditer(r"ttng\.warp_group_dot (%\w+), (%\w+),.*isAsync = true", ttgir))
    read = {source.get(operand) for dot in dots for operand in dot.groups()}
    ahead: Counter[str] = Counter()
    for copy in re.finditer(r"ttn?g\.async_\w*copy_global_to_local (.*)", ttgir[: dots[0].start() if dots else 0]):
        ahead.update({source[name] for name in re.findall(r"%\w+", copy[1]) if name in source})
    if dots and not read & set(ahead):
        return ["copies of its operands were not found"]
    return sorted(name for name in read & set(rings) if name in ahead and ahead[name] % rings[name] == 0)


def _problems(entry: dict[str, Any], ttir: str, architecture: Architecture) -> Iterator[str]:
    if entry["spills_in_main_loops"]:
        yield f"{entry['spills_in_main_loops']} instructions of the main loops move spilled registers"
    if entry["shared_bytes"] > architecture.shared_program:
        yield f"needs {entry['shared_bytes']} bytes of shared memory, a program has {architecture.shared_program}"
    elif entry["programs_per_processor"] < 1:
        yield "not one program fits into a multiprocessor"
    found = " ".join(entry["instructions"])
    operands = re.findall(r"tt\.dot .*?tensor<[^>]*x(\w+)>", ttir)
    if operands and set(operands) <= {"bf16", "f16"} and architecture.matrix not in found:
        yield f"16-bit products without {architecture.matrix}"
    if "tt.descriptor_load" in ttir and architecture.copy not in found:
        yield f"tensor descriptors without {architecture.copy}"


def roofline() -> list[dict[str, Any]]:
    """Least time in ms of each pass at the datasheet's peak figures, bf16, N = ROOFLINE_TOKENS.

    forward: 2NVH floating-point operations; exact gradients recompute the logits: 4NVH more for dhidden, 6NVH more for
    dhidden and dweight. memory: hidden and weight read once. exponentials: one per logit, 16 per clock and
    multiprocessor on all of these; where nothing overlaps them with the product, they add to it.
    """
    rows = []
    for shape, (vocab, hidden) in inputs.GPU_MODELS.items():
        for arch, architecture in ARCHITECTURES.items():
            product = 2 * ROOFLINE_TOKENS * vocab * hidden / (architecture.tflops * 1e9)
            memory = 2 * (ROOFLINE_TOKENS + vocab) * hidden / (architecture.bandwidth * 1e9)
            exponentials = ROOFLINE_TOKENS * vocab / (16 * architecture.processors * architecture.clock * 1e6)
            rows.append(
                {
                    "shape": shape,
                    "vocab": vocab,
                    "hidden": hidden,
                    "tokens": ROOFLINE_TOKENS,
                    "arch": arch,
                    "forward_ms": round(max(product, memory), 3),
                    "exact_frozen_ms": round(3 * product, 3),
                    "exact_trainable_ms": round(4 * product, 3),
                    "memory_ms": round(memory, 3),
                    "exponentials_ms": round(exponentials, 3),
                }
            )
    return rows


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Compiled kernels",
        "",
        f"Every kernel in every shipped configuration, compiled with Triton {report['triton']} without a GPU. "
        "Written by `make gpu-report`; see benchmarks/gpu_report.py for what is counted and checked.",
        "",
        "Tile: the configuration's block sizes, tokens by columns by step of the hidden size. Spills: instructions "
        "that move spilled registers, all / inside loops / inside main loops, which are those of the products. "
        "Programs: resident in one multiprocessor, estimated from registers, shared memory, warps and tensor memory.",
    ]
    for arch, architecture in ARCHITECTURES.items():
        entries = [entry for entry in report["kernels"] if entry["arch"] == arch]
        if not entries:
            continue
        lines += [
            "",
            f"## {arch} ({architecture.device}, {architecture.shared_program // KIB} KiB of shared memory per program)",
            "",
            "| kernel | tile | warps | stages | registers | spills | shared KiB | programs (occupancy) "
            "| instructions | problems |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for entry in entries:
            lines.append("| " + " | ".join(_cells(entry)) + " |")
    lines += [
        "",
        f"## Roofline, N = {ROOFLINE_TOKENS}, bf16",
        "",
        "Least time in ms at the peak figures below, an estimate and no measurement: of the forward, and of forward "
        "and exact backward with a frozen and a trainable head, which recompute the logits. The exponentials add to "
        "the product where nothing overlaps the two.",
        "",
        "| shape | V | H | device | forward | frozen head | trainable head | memory alone | exponentials |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["roofline"]:
        cells = (
            *(row["shape"], row["vocab"], row["hidden"], ARCHITECTURES[row["arch"]].device, row["forward_ms"]),
            *(row["exact_frozen_ms"], row["exact_trainable_ms"], row["memory_ms"], row["exponentials_ms"]),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "| device | dense bf16 TFLOP/s | memory TB/s | multiprocessors | GHz | source |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for a in ARCHITECTURES.values():
        lines.append(f"| {a.device} | {a.tflops} | {a.bandwidth} | {a.processors} | {a.clock} | {a.source} |")
    return "\n".join(lines) + "\n"


def _cells(entry: dict[str, Any]) -> Iterator[str]:
    config = entry["config"]
    yield entry["kernel"]
    yield "x".join(str(size) for field, size in config.items() if field.startswith("block_"))
    yield str(config["num_warps"])
    yield str(config["num_stages"])
    if "registers" in entry:
        yield str(entry["registers"])
        yield " / ".join(str(entry[name]) for name in ("spills", "spills_in_loops", "spills_in_main_loops"))
        yield f"{entry['shared_bytes'] / KIB:.1f}"
        yield f"{entry['programs_per_processor']} ({entry['occupancy']:.0%})"
        yield ", ".join(f"{op} {n}" for op, n in entry["instructions"].items())
    else:
        yield from [""] * 5
    yield "; ".join(entry["problems"]) or "none"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile side by side")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu_report.md and gpu_report.json")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")

    wanted = [(a, s.name) for a in options.arch for s in specializations(a) if options.kernel in s.name]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        kernels = list(pool.map(inspect_kernel, *zip(*wanted, strict=True)))
    report = {"triton": triton.__version__, "kernels": kernels, "roofline": roofline()}

    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown(report)
    (options.out / "gpu_report.md").write_text(text)
    (options.out / "gpu_report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(text)
    failed = [entry for entry in kernels if entry["problems"]]
    for entry in failed:
        print(f"{entry['arch']} {entry['kernel']}: {'; '.join(entry['problems'])}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
