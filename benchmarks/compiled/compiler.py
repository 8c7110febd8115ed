"""Compile kernels for chips that this machine does not have, and read what came of it.

    built = compile_kernel(kernel, {"x": "*bf16:16", "n": "i32"}, {"BLOCK": 128}, "sm_90")
    assert_clean(built, tensor_core=True)

The interpreter replaces ``triton.jit`` when Triton is imported, for Triton's own library too, so a
process with TRITON_INTERPRET=1 can't compile: the work goes to one child process without it.

What comes of a kernel depends on nothing but its source and that of all it calls, the options, the
target and Triton's release. So it is kept under these in `RECORD`, which `make compiled` writes,
and looked up there before a kernel is compiled; any change of these compiles it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import platform
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.case import RESULTS

RECORD = RESULTS / "compiled_kernels.jsonl"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

# Bytes of shared memory that one program can have: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability" (opt-in limit per block); AMD CDNA3 ISA, LDS of 64 KiB.
MAX_SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
MAX_TENSOR_MEMORY = 512  # sm_100; Triton reports columns
AROUND_A_LOOP = 64  # bytes of registers stored before a loop and loaded behind it, both counted
REGISTER_FILE = 65_536  # 32-bit registers of an NVIDIA SM, shared by the threads of a program


@dataclass(frozen=True)
class CompiledKernel:
    """What the compilers report about one kernel for one chip; sizes in bytes."""

    name: str
    target: str
    num_warps: int  # as launched, producer warps of a specialised kernel included
    regs: int  # per thread; VGPRs and AGPRs on AMD
    spills: int  # spilled bytes (NVIDIA) or registers (AMD)
    local_ops: int  # LDL + STL (NVIDIA) or scratch_ (AMD) instructions
    stack: int  # stack frame per thread
    shared: int
    tensor_memory: int  # columns, sm_100 only
    hgmma: int  # HGMMA instructions
    tensor_core_ops: int  # HGMMA, HMMA, UTC*MMA or MFMA instructions
    advisories: str  # ptxas' "Potential Performance Loss" lines (C7510 to C7515: wgmma serialized)
    instructions: int
    loop_instructions: int  # of the smallest loop around a tensor-core instruction; 0 without one
    loop_local_ops: int  # LDL + STL or scratch_ instructions among these
    ops: dict[str, int]  # instruction name -> count, modifiers cut off
    global_ops: dict[str, int]  # loads and stores of global memory (NVIDIA) with their width
    exps_beside_wgmma: int  # the most between the issue of a wgmma and the next wait (sm_90)


def compile_kernel(
    fn, signature, constexprs, target, *, fresh: bool = False, **options
) -> CompiledKernel:
    """Compile `fn` for `target`, or look up what came of it.

    `signature` gives each runtime argument's Triton type ("*bf16", "i32", "i64", "fp32"); ":16"
    behind it says divisible by 16, as the launcher finds for aligned pointers and round strides.
    `fresh`: compile it in any case, to see that the record is right.
    `options`: num_warps, num_stages, ...
    """
    return submit_compile(fn, signature, constexprs, target, fresh=fresh, **options).result()


def submit_compile(
    fn, signature, constexprs, target, *, fresh: bool = False, **options
) -> Future[CompiledKernel]:
    """:func:`compile_kernel`, not waiting for the result."""
    plain = getattr(fn, "fn", fn)
    job = (
        plain.__module__,
        plain.__name__,
        dict(signature),
        dict(constexprs),
        target,
        fresh,
        dict(options),
    )
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return _worker().submit(_compile, *job)
    done: Future[CompiledKernel] = Future()
    done.set_result(_compile(*job))
    return done


def assert_clean(
    built: CompiledKernel,
    *,
    tensor_core: bool = False,
    max_spills: int = 0,
    max_stack: int = 0,
    serialized: bool = False,
) -> None:
    """No spills beyond those declared, it fits the chip, and the tensor cores are not held up.

    Registers that are put aside once before a loop around products and fetched once behind it,
    `AROUND_A_LOOP` bytes at most, are none: a dozen instructions of a tile's thousands.

    `tensor_core` expects their instructions (HGMMA on sm_90); `serialized` allows ptxas' advisory.
    """
    what = f"{built.name} on {built.target}"
    assert max_spills or built.loop_local_ops == 0, f"{what}: spills in its loop"
    around = AROUND_A_LOOP if built.loop_instructions and built.target.startswith("sm_") else 0
    assert built.spills <= max(max_spills, around), f"{what}: spills {built.spills}"
    assert built.stack <= max(max_stack, around), f"{what}: {built.stack} bytes of stack"
    if not max_spills and not max_stack:
        local = built.spills // 4
        assert built.local_ops <= local, f"{what}: {built.local_ops} local-memory instructions"
    assert built.shared <= MAX_SHARED[built.target], (
        f"{what}: {built.shared} bytes of shared memory"
    )
    assert built.tensor_memory <= MAX_TENSOR_MEMORY, f"{what}: {built.tensor_memory} columns"
    if built.target.startswith("sm_"):
        assert built.regs <= 255, f"{what}: {built.regs} registers"
        registers = built.regs * 32 * built.num_warps
        assert registers <= REGISTER_FILE, f"{what}: {registers} registers in all"
    else:
        assert built.regs <= 512, f"{what}: {built.regs} registers"
    if tensor_core:
        assert built.tensor_core_ops > 0, f"{what}: no tensor-core instruction"
        assert built.hgmma > 0 or built.target != "sm_90", f"{what}: no HGMMA"
    assert serialized or not built.advisories, f"{what}: {built.advisories}"


def _exps_beside_wgmma(asm: str) -> int:
    most = count = 0
    issued = False
    for line in asm.splitlines():
        if re.search(r"\bHGMMA", line):
            issued = True
        elif "WARPGROUP.DEPBAR" in line:
            issued, count = False, 0
        elif issued and "MUFU.EX2" in line:
            count += 1
            most = max(most, count)
    return most


@functools.cache
def _worker() -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_without_interpreter)
    atexit.register(pool.shutdown, cancel_futures=True)
    return pool


def _without_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["OMP_NUM_THREADS"] = "1"


def _compile(module, name, signature, constexprs, target, fresh, options) -> CompiledKernel:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    fn = getattr(importlib.import_module(module), name)
    gpu = GPUTarget("hip", target, 64)
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    types = {arg: kind.removesuffix(":16") for arg, kind in signature.items()}
    types |= dict.fromkeys(constexprs, "constexpr")
    names = fn.arg_names
    missing = [arg for arg in names if arg not in types]
    if missing:
        raise ValueError(f"{name}: no type and no value for {missing}")
    aligned = [arg for arg, kind in signature.items() if kind.endswith(":16")]
    attrs = {(names.index(arg),): [["tt.divisibility", 16]] for arg in aligned}
    kind = GluonASTSource if fn.is_gluon() else ASTSource
    source = kind(fn, {arg: types[arg] for arg in names}, constexprs, attrs)
    key = _key(source.hash(), triton.__version__, target, sorted(options.items()))
    if not fresh and key in _record():
        return _record()[key]
    log = io.StringIO()
    # Triton hides ptxas' log and caches binaries: a cached kernel would have no log.
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        built = triton.compile(source, target=gpu, options=options)
    read = _read_nvidia if gpu.backend == "cuda" else _read_amd
    asm, report = read(built, log.getvalue())
    ops, loop = _count(asm), _inner_loop(asm)
    compiled = CompiledKernel(
        name=name,
        target=target,
        num_warps=getattr(built.metadata, "num_warps", options.get("num_warps", 4)),
        shared=built.metadata.shared,
        tensor_memory=getattr(built.metadata, "tmem_size", 0) or 0,
        hgmma=ops["HGMMA"],
        tensor_core_ops=sum(n for op, n in ops.items() if _MMA.match(op)),
        instructions=sum(ops.values()),
        loop_instructions=len(loop),
        loop_local_ops=sum(1 for line in loop if _LOCAL.match(_op(line) or "")),
        ops=dict(ops),
        global_ops=dict(Counter(_GLOBAL.findall(asm))),
        exps_beside_wgmma=_exps_beside_wgmma(asm),
        **report,
    )
    if os.environ.get("RECORD_COMPILED"):
        with RECORD.open("a") as lines:
            lines.write(json.dumps({"key": key} | asdict(compiled)) + "\n")
    return compiled


def _key(*parts) -> str:
    """Of what decides the outcome, and of this file, which reads it."""
    reader = Path(__file__).read_bytes()
    return hashlib.sha256(repr((*parts, platform.machine(), reader)).encode()).hexdigest()[:24]


@functools.cache
def _record() -> dict[str, CompiledKernel]:
    if os.environ.get("RECORD_COMPILED") or not RECORD.exists():
        return {}
    rows = map(json.loads, RECORD.read_text().splitlines())
    return {row.pop("key"): CompiledKernel(**row) for row in rows}


def _read_nvidia(built, log: str) -> tuple[str, dict]:
    def number(pattern: str) -> int:
        found = re.findall(pattern, log)
        if not found:
            raise RuntimeError(f"ptxas did not report {pattern!r}:\n{log}")
        return max(map(int, found))

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(built.asm["cubin"])
        command = [_nvidia_tool("nvdisasm"), "-c", path]
        asm = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ops = _count(asm)
    return asm, {
        "regs": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "stack": number(r"(\d+) bytes stack frame"),
        "local_ops": ops["LDL"] + ops["STL"],
        "advisories": "\n".join(filter(_ADVISORY.search, log.splitlines())),
    }


def _read_amd(built, log: str) -> tuple[str, dict]:
    asm = built.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s*(\d+)", asm, re.M)
        if not found:
            raise RuntimeError(f"the AMD assembly has no .{key}")
        return int(found.group(1))

    return asm, {
        "regs": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "stack": number("private_segment_fixed_size"),
        "local_ops": sum(n for op, n in _count(asm).items() if op.startswith("scratch_")),
        "advisories": "",
    }


def _nvidia_tool(name: str) -> str:
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
_GCN = re.compile(r"^\s+([sv]_\w+|ds_\w+|buffer_\w+|global_\w+|flat_\w+|scratch_\w+)\b")
_MMA = re.compile(r"HGMMA|HMMA|UTC\w*MMA|v_mfma|v_smfmac")
_GLOBAL = re.compile(r"\b(?:LDG|STG)\.E(?:\.[US]8|\.[US]16|\.64|\.128)?(?=[.\s])")
_ADVISORY = re.compile(r"C75\d\d|Performance Loss")
_LABEL = re.compile(r"^\s*\.?(L_x_\d+|LBB\d+_\d+):")
_JUMP = re.compile(r"(?:BRA.*`\(\.|s_c?branch\w*\s+\.?)(L_x_\d+|LBB\d+_\d+)")


def _op(line: str) -> str | None:
    found = _SASS.match(line) or _GCN.match(line)
    return found.group(1) if found else None


def _count(asm: str) -> Counter[str]:
    return Counter(op for op in map(_op, asm.splitlines()) if op)


_LOCAL = re.compile(r"LDL|STL|scratch_")
_EXP = re.compile(r"MUFU\.EX2|v_exp_f32")


def _inner_loop(asm: str) -> list[str]:
    """The smallest loop around a product, and around exps if a loop has both; empty without one.

    Slow paths that jump back from behind the end of a kernel look like loops too.
    """
    labels: dict[str, int] = {}
    lines: list[str] = []
    loops: list[tuple[bool, int, list[str]]] = []  # (without exps, size, instructions)
    for line in asm.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(lines)
        jump = _JUMP.search(line)
        if _op(line):
            lines.append(line)
        if jump and jump.group(1) in labels:
            body = lines[labels[jump.group(1)] :]
            if any(_MMA.match(_op(a) or "") for a in body):
                exps = sum(1 for a in body if _EXP.search(a))
                loops.append((exps < 8, len(body), body))
    return min(loops, key=lambda loop: loop[:2], default=(False, 0, []))[2]
