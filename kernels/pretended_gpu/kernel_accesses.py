"""Which of its arguments a Triton kernel reads and which it writes, from its intermediate code.

Triton makes its IR of a kernel and inlines all calls, on the CPU and without a compiler for the
chip. There every load and store names a pointer, and a pointer comes of an argument by additions,
shapes, choices between two and loops alone.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_NAME = re.compile(r"%[\w.]+(?:#\d+)?")
_RESULT = re.compile(r"^\s*(%[\w.]+)(?::(\d+))? = ")
_PARAMETER = re.compile(r"(%[\w.]+): !tt\.(?:ptr|tensordesc)<")
_LOOP_VALUE = re.compile(r"(%[\w.]+) = (%[\w.]+(?:#\d+)?)")
_READS = ("tt.load", "tt.descriptor_load", "tt.descriptor_gather", "tt.atomic_")
_WRITES = ("tt.store", "tt.descriptor_store", "tt.descriptor_reduce", "tt.atomic_")
_ACCESS = re.compile(r"\b(tt\.(?:load|store|atomic_\w+|descriptor_\w+)) (.*)")
_POINTERS = re.compile(r"!tt\.(?:ptr|tensordesc)<")


class Accesses(NamedTuple):
    """Names of arguments of a kernel."""

    read: frozenset[str]
    written: frozenset[str]


def accesses_of(kernel: Any, signature: Any, constants: Any, options: Any, rest: Any) -> Accesses:
    """Of a ``JITFunction`` as it would be compiled.

    Args:
        kernel: The JITFunction.
        signature: As of its ``_do_compile``.
        constants: Likewise.
        options: Likewise.
        rest: (attributes, target, backend).
    """
    from triton._C.libtriton import ir

    attributes, target, backend = rest
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = kernel.ASTSource(kernel, signature, constants, attributes)
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, functions, backend.get_module_map(), context)
    return read_ttir(str(backend.make_ttir(module, {}, options, target.arch)))


def read_ttir(text: str) -> Accesses:
    """Of the printed IR of a kernel.

    Raises:
        ValueError: a load or a store whose argument can't be told.
    """
    lines = text.splitlines()
    header = next(line for line in lines if "tt.func public" in line)
    roots = {name: {name[1:]} for name in _PARAMETER.findall(header)}
    read: set[str] = set()
    written: set[str] = set()
    for line in lines[lines.index(header) + 1 :]:
        code = line.partition(" loc(")[0]
        if access := _ACCESS.search(code):
            pointer = _NAME.search(access[2])
            arguments = roots.get(pointer[0]) if pointer else None
            if arguments is None:
                raise ValueError(f"no argument of the kernel is known to be accessed in {code!r}")
            read |= arguments if access[1].startswith(_READS) else set()
            written |= arguments if access[1].startswith(_WRITES) else set()
            continue
        result = _RESULT.match(code)
        if "scf.for" in code and "iter_args(" in code:
            begun = _LOOP_VALUE.findall(code.partition("iter_args(")[2])
            for i, (inside, before) in enumerate(begun):
                if before in roots:
                    roots[inside] = roots[before]
                    if result:
                        name = f"{result[1]}#{i}" if result[2] else result[1]
                        roots[name] = roots[before]
        elif result and _POINTERS.search(code.partition(" : ")[2]):
            used = [roots[name] for name in _NAME.findall(code[result.end() :]) if name in roots]
            if used:
                roots[result[1]] = set().union(*used)
    return Accesses(frozenset(read), frozenset(written))
