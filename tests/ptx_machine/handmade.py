"""Kernels written in PTX by hand, for the machine's own tests.

    report = run(body, [array, tensor_map, 5], shared=4096)

`body` is what stands between the braces after the declarations: predicates ``%p<>``, registers
``%r<>`` (32 bits), ``%h<>`` (16), ``%f<>`` (float32), ``%rd<>`` (64). Shared memory begins at 0.
Arguments are ``arg_0``, ``arg_1``, ...: the address of an array, the 128 bytes of a tensor map, an
int of 32 bits.
"""

import numpy as np

from ptx_machine import Options, Report
from ptx_machine.global_memory import GlobalMemory
from ptx_machine.machine import Machine
from ptx_machine.parse import parse
from ptx_machine.tensor_map import TensorMap
from ptx_machine.translate import Program
from ptx_machine.wgmma_layout import MatrixDescriptor

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry handmade(
{params}
)
.reqntid {threads}
{{
    .reg .pred %p<40>;
    .reg .b16 %h<40>;
    .reg .b32 %r<400>;
    .reg .f32 %f<400>;
    .reg .b64 %rd<80>;
{body}
    ret;
}}
"""


def text(body, arguments=(), threads=128):
    """The whole module."""
    kinds = {TensorMap: ".align 64 .b8", int: ".u32"}
    params = [
        f".param {kinds.get(type(a), '.u64')} arg_{k}{'[128]' if isinstance(a, TensorMap) else ''}"
        for k, a in enumerate(arguments)
    ]
    return HEAD.format(params=",\n".join(params), threads=threads, body=body)


class Global:
    """Arrays as the global memory of a launch."""

    def __init__(self, *arrays, check=True):
        self.memory = GlobalMemory(check)
        self.address = {
            id(a): a.ctypes.data + self.memory.add([(f"array {k}", a.ctypes.data, a.nbytes)])
            for k, a in enumerate(arrays)
        }

    def map(self, array, box, *, mode=0, element=None, padding=0, shape=None, strides=None):
        """A tensor map as the host makes it; `mode` is that of the swizzle."""
        kinds = {"u2": 1, "u4": 2, "i4": 3, "f2": 6, "f4": 7, "u1": 0}
        return TensorMap.host(
            self.address[id(array)],
            mode,
            array.itemsize,
            kinds[array.dtype.str[1:]] if element is None else element,
            box,
            array.shape if shape is None else shape,
            [s // array.itemsize for s in array.strides] if strides is None else strides,
            padding,
        )


def run(body, arguments=(), *, memory=None, threads=128, shared=4096, grid=1, **options):
    """Run it; the report of what was found."""
    if memory is None:
        memory = Global(*(a for a in arguments if isinstance(a, np.ndarray)))
    params = []
    for a in arguments:
        if isinstance(a, np.ndarray):
            params.append(memory.address[id(a)].to_bytes(8, "little"))
        elif isinstance(a, TensorMap):
            params.append(a.pack().tobytes())
        else:
            params.append(int(a).to_bytes(4, "little", signed=a < 0))
    report = Report()
    program = Program(parse(text(body, arguments, threads)))
    Machine(
        program, (grid, 1, 1), threads, shared, params, memory.memory, report, Options(**options)
    ).run()
    return report


def kinds(report):
    """The kinds of finding in a report."""
    return set(report.kinds())


def fill(nbytes, argument=0, threads=128, at=0):
    """Copy so many bytes of an array to shared memory, 16 at a time, by all threads."""
    lines = ["mov.u32 %r390, %tid.x;", f"ld.param.b64 %rd70, [arg_{argument}];"]
    lines += ["shl.b32 %r391, %r390, 4;", "cvt.u64.u32 %rd71, %r391;"]
    lines += ["add.s64 %rd70, %rd70, %rd71;"]
    step = 16 * threads
    for k in range(-(-nbytes // step)):
        guard = ""
        if (k + 1) * step > nbytes:
            lines.append(f"setp.lt.u32 %p39, %r391, {nbytes - k * step};")
            guard = "@%p39 "
        lines.append(
            f"{guard}ld.global.v4.b32 {{%r392, %r393, %r394, %r395}}, [%rd70 + {k * step}];"
        )
        lines.append(
            f"{guard}st.shared.v4.b32 [%r391 + {at + k * step}], {{%r392, %r393, %r394, %r395}};"
        )
    return "\n".join(lines)


def dump(nbytes, argument, threads=128, at=0):
    """Copy so many bytes of shared memory to an array, the same way."""
    lines = ["mov.u32 %r390, %tid.x;", f"ld.param.b64 %rd70, [arg_{argument}];"]
    lines += ["shl.b32 %r391, %r390, 4;", "cvt.u64.u32 %rd71, %r391;"]
    lines += ["add.s64 %rd70, %rd70, %rd71;"]
    step = 16 * threads
    for k in range(-(-nbytes // step)):
        guard = ""
        if (k + 1) * step > nbytes:
            lines.append(f"setp.lt.u32 %p39, %r391, {nbytes - k * step};")
            guard = "@%p39 "
        lines.append(
            f"{guard}ld.shared.v4.b32 {{%r392, %r393, %r394, %r395}}, [%r391 + {at + k * step}];"
        )
        lines.append(
            f"{guard}st.global.v4.b32 [%rd70 + {k * step}], {{%r392, %r393, %r394, %r395}};"
        )
    return "\n".join(lines)


def registers_out(names, argument):
    """Store 32-bit registers of each thread, one row of an array per thread."""
    lines = ["mov.u32 %r390, %tid.x;", f"ld.param.b64 %rd70, [arg_{argument}];"]
    lines += [f"mul.wide.u32 %rd71, %r390, {4 * len(names)};", "add.s64 %rd70, %rd70, %rd71;"]
    lines += [f"st.global.b32 [%rd70 + {4 * k}], {name};" for k, name in enumerate(names)]
    return "\n".join(lines)


def registers_in(names, argument):
    """The opposite."""
    lines = ["mov.u32 %r390, %tid.x;", f"ld.param.b64 %rd70, [arg_{argument}];"]
    lines += [f"mul.wide.u32 %rd71, %r390, {4 * len(names)};", "add.s64 %rd70, %rd70, %rd71;"]
    lines += [f"ld.global.b32 {name}, [%rd70 + {4 * k}];" for k, name in enumerate(names)]
    return "\n".join(lines)


# A [64, 16] and B [8, 16] of bf16, K-major, rows of 32 bytes under that swizzle: A at 0, B at 2048.
A, B = (MatrixDescriptor(start, 16, 256, 32).encode() for start in (0, 2048))
MMA = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {%f0,%f1,%f2,%f3}, %rd0, %rd1, %p0, 1, 1, 0, 0;"""
SETUP = f"""
    mov.b64 %rd0, {A};
    mov.b64 %rd1, {B};
    mov.b32 %f0, 0f00000000;
    mov.b32 %f1, %f0;
    mov.b32 %f2, %f0;
    mov.b32 %f3, %f0;
    mov.u32 %r0, %tid.x;
    shr.u32 %r1, %r0, 5;
    setp.eq.u32 %p1, %r0, 0;
    setp.ne.u32 %p0, %r0, 1000;"""
FENCE = "fence.proxy.async.shared::cta;"
WAIT = "wgmma.wait_group.sync.aligned 0;"
COMMIT = "wgmma.commit_group.sync.aligned;"


def edit(body, old, new=""):
    """The program with one place changed, which must be there."""
    assert old in body, old
    return body.replace(old, new)
