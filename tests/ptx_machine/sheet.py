"""Many instructions in one kernel of straight PTX, each on inputs of its own.

    sheet = Sheet()
    sheet.add("add.s32", [("b32", values), ("b32", values)], ["b32"])
    (results,) = sheet.run()        # of each instruction, of each destination, a list by thread

Values are unsigned integers, the bits of registers; "b1" is a predicate. ``%r0`` is the thread,
``%rd3``, ``%rd4``, ... are the addresses of the sheet's arrays.
"""

import os
import re
import subprocess
import tempfile

import numpy as np
from triton import knobs

from ptx_machine import Options, Report
from ptx_machine.global_memory import GlobalMemory, smallest_store
from ptx_machine.machine import Machine
from ptx_machine.parse import parse
from ptx_machine.translate import Program

THREADS = 64
_PREFIX = {1: "%p", 16: "%h", 32: "%r", 64: "%rd"}

_TEXT = """
.version {version}
.target {target}
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry sheet(
{params}
)
.reqntid {threads}
{{
{registers}
{arrays}
    ld.param.b64 %rd0, [given];
    ld.param.b64 %rd1, [made];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd2, %r0, 8;
    add.s64 %rd0, %rd0, %rd2;
    add.s64 %rd1, %rd1, %rd2;
{lines}
    ret;
}}
"""


def execute(text, arrays, *, threads=THREADS, shared=0, grid=(1, 1, 1), params=(), **options):
    """Run PTX on arrays (named a0, a1, ...), whose addresses come first; (report, machine)."""
    program = Program(parse(text))
    check, report = options.get("check_global", True), Report()
    memory = GlobalMemory(check, smallest_store(program.kernel))
    pieces = {}  # an array may be given twice
    for k, array in enumerate(arrays):
        pieces.setdefault(array.ctypes.data, []).append((f"a{k}", array.ctypes.data, array.nbytes))
    shift = {start: memory.add(inside) for start, inside in pieces.items()}
    starts = [array.ctypes.data for array in arrays]
    values = [(start + shift[start]).to_bytes(8, "little") for start in starts]
    values += params
    machine = Machine(program, grid, threads, shared, values, memory, report, Options(**options))
    machine.run()
    return report, machine


def assemble(text):
    """Let the ptxas that Triton brings look at it; what it refuses is in the error."""
    chip = re.search(r"\.target (\w+)", text)[1]
    tool = knobs.nvidia.ptxas_blackwell if chip == "sm_100a" else knobs.nvidia.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text.lstrip())
        file.flush()
        command = [tool.path, "-O0", "--gpu-name", chip, file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr


class Sheet:
    """See the top of the file."""

    def __init__(self, *arrays, shared=0, local=0, target="sm_90a"):
        self.arrays, self.shared, self.local, self.target = arrays, shared, local, target
        self.lines, self.given = [], []
        self.made = []  # by instruction, by destination: slot and bits
        self.slots = 0
        self.counts = dict.fromkeys(_PREFIX, 8)  # registers; the first few are taken

    def register(self, bits):
        self.counts[bits] += 1
        return f"{_PREFIX[bits]}{self.counts[bits] - 1}"

    def line(self, text):
        self.lines.append(f"    {text}")

    def load(self, bits, values):
        """A register with a value for each thread."""
        offset = len(self.given) * THREADS * 8
        self.given.append(list(values))
        assert len(self.given[-1]) == THREADS
        name = self.register(bits)
        if bits == 1:
            byte = self.register(16)
            self.line(f"ld.global.b8 {byte}, [%rd0 + {offset}];")
            self.line(f"setp.ne.b16 {name}, {byte}, 0;")
        else:
            self.line(f"ld.global.b{bits} {name}, [%rd0 + {offset}];")
        return name

    def keep(self, *registers):
        """Let :meth:`run` return what these (name, bits) hold now, as one instruction's results."""
        kept = []
        for name, bits in registers:
            if bits == 1:
                word = self.register(32)
                self.line(f"selp.b32 {word}, 1, 0, {name};")
                name, bits = word, 32
            self.line(f"st.global.b{bits} [%rd1 + {self.slots * THREADS * 8}], {name};")
            kept.append((self.slots, bits))
            self.slots += 1
        self.made.append(kept)

    def add(self, op, inputs, outputs, layout="{d}, {a};", guard=""):
        """An instruction: inputs are (type, values) or text, outputs types such as "b32"."""
        sources = [x if isinstance(x, str) else self.load(int(x[0][1:]), x[1]) for x in inputs]
        targets = [(self.register(int(kind[1:])), int(kind[1:])) for kind in outputs]
        d = ", ".join(name for name, _ in targets)
        self.line(f"{guard}{op} " + layout.format(d=d, a=", ".join(sources)))
        self.keep(*targets)

    def text(self):
        kinds = {1: ".pred", 16: ".b16", 32: ".b32", 64: ".b64"}
        registers = [
            f"    .reg {kinds[bits]} {prefix}<{self.counts[bits] + 1}>;"
            for bits, prefix in _PREFIX.items()
        ]
        if self.local:
            registers.append(f"    .local .align 16 .b8 depot[{self.local}];")
        names = ["given", "made", *(f"array{k}" for k in range(len(self.arrays)))]
        arrays = [f"    ld.param.b64 %rd{k + 3}, [array{k}];" for k in range(len(self.arrays))]
        return _TEXT.format(
            version="8.8" if self.target == "sm_100a" else "8.7",
            target=self.target,
            threads=THREADS,
            params=",\n".join(f"    .param .u64 {name}" for name in names),
            registers="\n".join(registers),
            arrays="\n".join(arrays),
            lines="\n".join(self.lines),
        )

    def run(self, ops=(), **options):
        """Results of every instruction: of each destination, values by thread.

        `ops` are forms that the sheet is to try: all of them have to be in it, and NVIDIA's
        assembler has to know them.
        """
        given = np.zeros((max(1, len(self.given)), THREADS), np.uint64)
        for row, values in zip(given, self.given, strict=False):
            row[:] = np.array(values, np.uint64)
        made = np.zeros((max(1, self.slots), THREADS), np.uint64)
        arrays = [given, made, *self.arrays]
        report, machine = execute(self.text(), arrays, shared=self.shared, **options)
        assert not report, report
        if ops:
            assert not set(ops) - {i.op for i in machine.kernel.instructions}, "not in the sheet"
            assemble(self.text())
        return [
            [[int(x) & ((1 << bits) - 1) for x in made[slot]] for slot, bits in kept]
            for kept in self.made
        ]
