"""Translate a parsed kernel into Python: one function per block, one numpy expression per
instruction over all threads of the group that runs it.

    program = Program(parse(text))
    print(program.source)

What is not translated raises NotImplementedError with the instruction, before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import values
from .memory import PARAM_BASE, PARAM_STEP
from .syntax import Imm, Instruction, Kernel, Mem, Pair, Reg, Special, Sym, Vec
from .translate_sm90 import FUNCTIONS, Sm90
from .wgmma_registers import Uses, analyse

_TYPES = {
    f"{ptx}{bits}": f"{numpy}{bits}"
    for ptx, numpy in (("u", "u"), ("b", "u"), ("s", "i"), ("f", "f"))
    for bits in (8, 16, 32, 64)
    if (ptx, bits) != ("f", 8)
}
_SCOPES = {"cta", "gpu", "sys", "cluster", "relaxed", "acquire", "release", "acq_rel", "weak"}
_NO_DESTINATION = {
    "st", "bra", "brx", "ret", "exit", "bar", "barrier", "cp", "red", "fence", "membar", "trap",
    "prefetch", "griddepcontrol", "nanosleep", "wgmma", "setmaxnreg", "stmatrix", "tensormap",
}  # fmt: skip


def reads_and_writes(i: Instruction) -> tuple[list[Reg], list[Reg]]:
    """Registers that an instruction reads and writes; a guarded write keeps old values: a read."""
    base = i.parts[0]
    operands = list(i.operands)
    writes: list[Reg] = []
    no_result = base in _NO_DESTINATION or (base == "mbarrier" and not _mbarrier_result(i))
    if not no_result and operands:
        writes = _registers(operands.pop(0))
    reads = [r for o in operands for r in _registers(o)]
    if i.guard is not None:
        reads.append(i.guard)
        if not i.op.startswith("bra"):
            reads += writes
    return reads, writes


def _mbarrier_result(i: Instruction) -> bool:
    return (
        "try_wait" in i.op
        or "test_wait" in i.op
        or ("arrive" in i.op and not isinstance(i.operands[0], (Mem, Sym)))
    )


def _registers(operand) -> list[Reg]:
    if isinstance(operand, Reg):
        return [operand]
    if isinstance(operand, Mem):
        inner = [operand.base, *operand.coords]
    elif isinstance(operand, Vec):
        inner = list(operand.items)
    elif isinstance(operand, Pair):
        inner = [operand.first, operand.second]
    else:
        return []
    return [r for o in inner for r in _registers(o)]


class Program:
    """A kernel ready to run: `functions[b]` runs block b for a group of threads."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.successors = [self._successors(b) for b in range(len(kernel.blocks))]
        self.uses = analyse(kernel, self.successors, reads_and_writes)
        self.live_in, self.live_out = self._liveness()
        writer = _Writer(kernel, self.live_in, self.live_out, self.uses)
        self.source = writer.source()
        space = {name: getattr(values, name) for name in dir(values) if not name.startswith("_")}
        space |= {"np": np, "I": kernel.instructions} | FUNCTIONS | writer.constants
        exec(compile(self.source, f"<{kernel.name}>", "exec"), space)  # noqa: S102
        self.functions: list[Callable] = [space[f"block_{b.index}"] for b in kernel.blocks]

    def _successors(self, index: int) -> list[int]:
        block = self.kernel.blocks[index]
        last = block.instructions[-1] if block.instructions else None
        following = [index + 1] if index + 1 < len(self.kernel.blocks) else []
        if last is None:
            return following
        base = last.parts[0]
        if base == "bra":
            target = self.kernel.label_block(last.operands[0].name)
            return [target] if last.guard is None else [target, *following]
        if base in ("ret", "exit", "trap"):
            return [] if last.guard is None else following
        if base == "brx":
            labels = self.kernel.tables[last.operands[1].name]
            return [self.kernel.label_block(label) for label in labels]
        return following

    def _liveness(self):
        blocks = self.kernel.blocks
        uses, defs = [], []
        for block in blocks:
            used, defined = {}, {}
            for i in block.instructions:
                reads, writes = reads_and_writes(i)
                landing = self.uses.landing.get(i.index, ())  # by a wait, of some threads perhaps
                for r in (*reads, *landing):
                    if r.name not in defined:
                        used[r.name] = r
                for r in (*writes, *landing):
                    defined[r.name] = r
            uses.append(used)
            defs.append(defined)
        live_in = [dict(u) for u in uses]
        live_out: list[dict[str, Reg]] = [{} for _ in blocks]
        changed = True
        while changed:
            changed = False
            for b in reversed(range(len(blocks))):
                out = {n: r for s in self.successors[b] for n, r in live_in[s].items()}
                into = uses[b] | {n: r for n, r in out.items() if n not in defs[b]}
                if len(out) != len(live_out[b]) or len(into) != len(live_in[b]):
                    live_out[b], live_in[b] = out, into
                    changed = True
        return live_in, live_out


class _Writer(Sm90):
    def __init__(self, kernel: Kernel, live_in, live_out, uses: Uses) -> None:
        self.uses = uses
        self.kernel, self.live_in, self.live_out = kernel, live_in, live_out
        self.constants: dict[str, object] = {}
        self.lines: list[str] = []
        self.types: dict[str, str] = {}
        self.i: Instruction
        self.varies = False

    def source(self) -> str:
        for block in self.kernel.blocks:
            self.types = {}
            live = self.live_in[block.index]
            self.lines.append(f"def block_{block.index}(g):")
            self._line("R = g.regs")
            for name in live:
                self._line(f"{name} = R[{name!r}]")
            for instruction in block.instructions:
                self.i = instruction
                self._instruction()
            kept = ", ".join(f"{n!r}: {n}" for n in self.live_out[block.index])
            self._line(f"g.regs = {{{kept}}}")
            last = block.instructions[-1] if block.instructions else None
            if last is not None and last.parts[0] in ("bra", "ret", "exit") and last.guard:
                self._line(f"return {self._guard(last)}")
            elif last is not None and last.parts[0] == "brx":
                self._line(f"return {self._value(last.operands[0], 'u32')}")
            self.lines.append("")
        return "\n".join(self.lines)

    def _line(self, text: str) -> None:
        self.lines.append("    " + text)

    def _todo(self) -> NotImplementedError:
        return NotImplementedError(f"{self.kernel.name}: {self.i}")

    def _instruction(self) -> None:
        base = self.i.parts[0]
        method = getattr(self, f"_op_{base}", None)
        if method is None:
            raise self._todo()
        self._line(f"# {self.i.text}")
        self._touch()
        self.varies = False
        method()

    # Operands

    def _guard(self, i: Instruction) -> str:
        assert i.guard is not None
        return f"~{i.guard.name}" if i.negated else i.guard.name

    def _guard_or_none(self) -> str:
        return self._guard(self.i) if self.i.guard else "None"

    def _constant(self, value: object) -> str:
        kind = type(value).__name__
        key = f"K_{kind}_{np.asarray(value).tobytes().hex()}"
        self.constants[key] = value
        return key

    def _value(self, operand, kind: str) -> str:
        """An expression for an operand, read as PTX type `kind` ("s32")."""
        if isinstance(operand, Imm):
            return self._constant(self._immediate(operand, kind))
        self.varies = True
        if isinstance(operand, Special):
            return f"g.special({operand.name!r})"
        if kind == "pred":
            if not isinstance(operand, Reg):
                raise self._todo()
            return operand.name
        numpy = _TYPES.get(kind)
        if numpy is None or not isinstance(operand, Reg):
            raise self._todo()
        bits = int(numpy[1:])
        if operand.bits == bits:
            known = self.types.get(operand.name)
            return operand.name if known == numpy else f"{operand.name}.view({numpy})"
        if operand.bits > bits:
            return f"{operand.name}.view(u{operand.bits}).astype(u{bits}).view({numpy})"
        raise self._todo()

    def _immediate(self, operand: Imm, kind: str) -> object:
        if kind == "pred":
            return np.bool_(operand.value != 0)
        numpy = getattr(np, {"u": "uint", "i": "int", "f": "float"}[_TYPES[kind][0]] + kind[1:])
        if operand.float_bits:
            raw = np.array([operand.value], f"u{operand.float_bits // 8}")
            number = raw.view(f"f{operand.float_bits // 8}")[0]
            if kind[0] == "f":
                return numpy(number)
            if int(kind[1:]) == operand.float_bits:
                return raw.view(numpy)[0]
            raise self._todo()
        if kind[0] == "f":
            raise self._todo()
        bits = int(kind[1:])
        return np.array([operand.value & ((1 << bits) - 1)], f"u{bits // 8}").view(numpy)[0]

    def _address(self, operand: Mem, kind: str) -> str:
        """Bytes, as u64 (global) or u32 (shared)."""
        if isinstance(operand.base, Sym):
            offset = self.kernel.shared[operand.base.name] + operand.offset
            return f"g.full({self._constant(np.uint32(offset))})"
        if isinstance(operand.base, Imm):
            return f"g.full({self._constant(np.uint32(operand.base.value + operand.offset))})"
        base = self._value(operand.base, f"u{operand.base.bits}")
        if operand.base.bits == 64 and kind == "u32":
            base = f"{base}.astype(u32)"
        if not operand.offset:
            return base
        bits = int(kind[1:])
        offset = operand.offset & ((1 << bits) - 1)
        numpy = np.uint64 if bits == 64 else np.uint32
        return f"({base} + {self._constant(numpy(offset))})"

    # Results

    def _set(self, target, expression: str, kind: str) -> None:
        """Assign a value of PTX type `kind` to a register, widened as the type says."""
        if isinstance(target, Special) and target.name == "%_":
            return
        if isinstance(target, Sym) and target.name == "_":
            self._line(expression)
            return
        if not isinstance(target, Reg):
            raise self._todo()
        if kind == "pred":
            numpy = "bool"
        else:
            numpy = _TYPES[kind]
            if target.bits > int(numpy[1:]):
                wide = ("i" if numpy[0] == "i" else "u") + str(target.bits)
                expression, numpy = f"({expression}).astype({wide})", wide
            elif target.bits < int(numpy[1:]):
                raise self._todo()
        if not self.varies:
            expression = f"g.full({expression})"
        if self.i.guard is not None:
            old = target.name
            if numpy != "bool" and self.types.get(old) != numpy:
                old = f"{old}.view({numpy})"
            expression = f"np.where({self._guard(self.i)}, {expression}, {old})"
        self._line(f"{target.name} = {expression}")
        self.types[target.name] = numpy

    def _set_many(self, targets, expression: str, kind: str) -> None:
        names = [f"t{n}_" for n in range(len(targets))]
        self._line(f"{', '.join(names)}, = {expression}")
        self.varies = True
        for target, name in zip(targets, names, strict=True):
            self._set(target, name, kind)

    # Arithmetic

    def _modifiers(self, allowed: set[str]) -> set[str]:
        mods = set(self.i.parts[1:-1])
        if mods - allowed:
            raise self._todo()
        return mods

    def _arithmetic(self, symbol: str, half: str) -> None:
        kind = self.i.parts[-1]
        d, a, b = self.i.operands
        if kind in ("f16", "bf16", "f16x2", "bf16x2"):
            self._half(half, kind, d, a, b)
            return
        mods = self._modifiers({"rn", "ftz", "lo", "full", "approx"})
        x, y = self._value(a, kind), self._value(b, kind)
        if kind == "f32" and "ftz" in mods:
            self._set(d, f"flush(flush({x}) {symbol} flush({y}))", kind)
        else:
            self._set(d, f"{x} {symbol} {y}", kind)

    def _half(self, name: str, kind: str, d, *operands) -> None:
        mods = set(self.i.parts[1:-1]) - {"rn", "ftz"}
        if mods:
            raise self._todo()
        bits = "b32" if kind.endswith("x2") else "b16"
        read = ", ".join(self._value(o, bits) for o in operands)
        self._set(d, f"half_op({name!r}, {kind!r}, {read})", bits)

    def _op_add(self) -> None:
        self._arithmetic("+", "add")

    def _op_sub(self) -> None:
        self._arithmetic("-", "sub")

    def _op_mul(self) -> None:
        if "wide" in self.i.parts:
            d, a, b = self.i.operands
            kind, wide = self._wide(self.i.parts[-1])
            x, y = self._value(a, kind), self._value(b, kind)
            self._set(d, f"{x}.astype({_TYPES[wide]}) * {y}", wide)
        elif "hi" in self.i.parts:
            d, a, b = self.i.operands
            kind = self.i.parts[-1]
            self._set(d, f"high_product({self._array(a, kind)}, {self._array(b, kind)})", kind)
        else:
            self._arithmetic("*", "mul")

    def _wide(self, kind: str) -> tuple[str, str]:
        return kind, f"{kind[0]}{2 * int(kind[1:])}"

    def _op_mad(self) -> None:
        d, a, b, c = self.i.operands
        kind = self.i.parts[-1]
        if "wide" in self.i.parts:
            kind, wide = self._wide(kind)
            x, y = self._value(a, kind), self._value(b, kind)
            z = self._value(c, wide)
            self._set(d, f"{x}.astype({_TYPES[wide]}) * {y} + {z}", wide)
        elif "lo" in self.i.parts and len(self.i.parts) == 3:
            x, y, z = (self._value(o, kind) for o in (a, b, c))
            self._set(d, f"{x} * {y} + {z}", kind)
        else:
            raise self._todo()

    def _op_fma(self) -> None:
        kind = self.i.parts[-1]
        d, *operands = self.i.operands
        if kind in ("f16", "bf16", "f16x2", "bf16x2"):
            self._half("fma", kind, d, *operands)
            return
        mods = self._modifiers({"rn", "ftz"})
        if kind != "f32":
            raise self._todo()
        read = [self._value(o, kind) for o in operands]
        if "ftz" in mods:
            read = [f"flush({x})" for x in read]
            self._set(d, f"flush(fma({', '.join(read)}))", kind)
        else:
            self._set(d, f"fma({', '.join(read)})", kind)

    def _op_div(self) -> None:
        kind = self.i.parts[-1]
        if kind == "f32":
            self._arithmetic("/", "div")
            return
        d, a, b = self.i.operands
        if kind[0] not in "us" or len(self.i.parts) != 2:
            raise self._todo()
        self._set(d, f"divide({self._value(a, kind)}, {self._array(b, kind)})", kind)

    def _array(self, operand, kind: str) -> str:
        value = self._value(operand, kind)
        return f"g.full({value})" if isinstance(operand, Imm) else value

    def _op_rem(self) -> None:
        kind = self.i.parts[-1]
        d, a, b = self.i.operands
        self._set(d, f"remainder({self._array(a, kind)}, {self._array(b, kind)})", kind)

    def _function(self, name: str, half: str = "") -> None:
        kind = self.i.parts[-1]
        d, *operands = self.i.operands
        if kind in ("f16", "bf16", "f16x2", "bf16x2") and half:
            self._half(half, kind, d, *operands)
            return
        mods = self._modifiers({"ftz", "approx", "rn"})
        read = ", ".join(self._value(o, kind) for o in operands)
        if "ftz" in mods:
            read = ", ".join(f"flush({self._value(o, kind)})" for o in operands)
            self._set(d, f"flush({name}({read}))", kind)
        else:
            self._set(d, f"{name}({read})", kind)

    def _op_max(self) -> None:
        self._minmax("max", "fmax", "maximum")

    def _op_min(self) -> None:
        self._minmax("min", "fmin", "minimum")

    def _minmax(self, name: str, quiet: str, strict: str) -> None:
        if "NaN" in self.i.parts and self.i.parts[-1] == "f32":
            d, a, b = self.i.operands
            self._set(d, f"np.{strict}({self._value(a, 'f32')}, {self._value(b, 'f32')})", "f32")
        elif self.i.parts[-1][0] in "us":
            self._function(f"np.{strict}")
        else:
            self._function(f"np.{quiet}", name)

    def _op_neg(self) -> None:
        self._function("np.negative", "neg")

    def _op_abs(self) -> None:
        self._function("np.abs", "abs")

    def _op_ex2(self) -> None:
        self._function("np.exp2", "ex2")

    def _op_tanh(self) -> None:
        self._function("np.tanh", "tanh")

    def _op_lg2(self) -> None:
        self._function("np.log2")

    def _op_sin(self) -> None:
        self._function("np.sin")

    def _op_cos(self) -> None:
        self._function("np.cos")

    def _op_sqrt(self) -> None:
        self._function("np.sqrt")

    def _op_rsqrt(self) -> None:
        self._function("1 / np.sqrt")

    def _op_rcp(self) -> None:
        self._function("np.reciprocal")

    # Bits

    def _bitwise(self, symbol: str) -> None:
        kind = self.i.parts[-1]
        d, a, b = self.i.operands
        self._set(d, f"{self._value(a, kind)} {symbol} {self._value(b, kind)}", kind)

    def _op_and(self) -> None:
        self._bitwise("&")

    def _op_or(self) -> None:
        self._bitwise("|")

    def _op_xor(self) -> None:
        self._bitwise("^")

    def _op_not(self) -> None:
        kind = self.i.parts[-1]
        d, a = self.i.operands
        self._set(d, f"~{self._value(a, kind)}", kind)

    def _shift(self, symbol: str) -> None:
        kind = self.i.parts[-1]
        d, a, b = self.i.operands
        bits = int(kind[1:])
        count = self._value(b, "u32")
        numpy = _TYPES[kind]
        limit = self._constant(np.uint32(bits))
        amount = f"np.minimum({count}, {limit}).astype({numpy})"
        if isinstance(b, Imm):
            number = min(b.value, bits)
            amount = self._constant(self._immediate(Imm(number), kind))
        self._set(d, f"{self._value(a, kind)} {symbol} {amount}", kind)

    def _op_shl(self) -> None:
        self._shift("<<")

    def _op_shr(self) -> None:
        self._shift(">>")

    def _op_bfe(self) -> None:
        kind = self.i.parts[-1]
        if kind not in ("u32", "s32"):
            raise self._todo()
        d, a, p, n = self.i.operands
        a_, p_, n_ = self._array(a, "u32"), self._value(p, "u32"), self._value(n, "u32")
        self._set(d, f"extract({a_}, {p_}, {n_}, {kind == 's32'})", kind)

    def _op_bfi(self) -> None:
        if self.i.parts[-1] != "b32":
            raise self._todo()
        d, a, b, p, n = self.i.operands
        read = [self._array(o, "u32") for o in (a, b)] + [self._value(o, "u32") for o in (p, n)]
        self._set(d, f"insert({', '.join(read)})", "b32")

    def _op_lop3(self) -> None:
        d, a, b, c, table = self.i.operands
        if self.i.op != "lop3.b32":
            raise self._todo()
        read = ", ".join(self._value(o, "u32") for o in (a, b, c))
        self._set(d, f"lop3({read}, {table.value})", "b32")

    def _op_prmt(self) -> None:
        if self.i.op != "prmt.b32":
            raise self._todo()
        d, a, b, c = self.i.operands
        read = ", ".join(self._value(o, "u32") for o in (a, b, c))
        self._set(d, f"permute({read})", "b32")

    def _op_shf(self) -> None:
        _, side, mode, _ = self.i.parts
        d, a, b, c = self.i.operands
        read = ", ".join(self._value(o, "u32") for o in (a, b, c))
        self._set(d, f"funnel({read}, {side == 'l'}, {mode == 'wrap'})", "b32")

    def _op_popc(self) -> None:
        d, a = self.i.operands
        self._set(d, f"np.bitwise_count({self._value(a, self.i.parts[-1])}).astype(u32)", "u32")

    # Moves and conversions

    def _op_mov(self) -> None:
        kind = self.i.parts[-1]
        d, a = self.i.operands
        if isinstance(d, Vec):
            low, high = d.items
            if kind == "b32":
                x = self._value(a, "b32")
                self._set(low, f"lower({x})", "b16")
                self._set(high, f"upper({x})", "b16")
            elif kind == "b64":
                x = self._value(a, "b64")
                self._line(f"t0_ = {x}")
                self._set(low, "t0_.astype(u32)", "b32")
                self._set(high, "(t0_ >> u64(32)).astype(u32)", "b32")
            else:
                raise self._todo()
        elif isinstance(a, Vec):
            half = {"b32": "b16", "b64": "b32"}.get(kind)
            if half is None or len(a.items) != 2:
                raise self._todo()
            low, high = (self._array(x, half) for x in a.items)
            self._set(d, f"{'pack' if kind == 'b32' else 'pack64'}({low}, {high})", kind)
        elif isinstance(a, Sym):
            params = [p.name for p in self.kernel.params]
            if a.name in self.kernel.shared:
                number = self.kernel.shared[a.name]
            elif a.name in params and d.bits == 64:
                number = PARAM_BASE
                number += PARAM_STEP * params.index(a.name)
            else:
                raise self._todo()
            self._set(d, self._constant(self._immediate(Imm(number), f"u{d.bits}")), f"u{d.bits}")
        else:
            if isinstance(a, Special) and a.name == "%clock64":
                raise self._todo()
            self._set(d, self._value(a, kind), kind)

    def _op_createpolicy(self) -> None:
        """A hint to the L2: any number will do."""
        self._set(self.i.operands[0], self._constant(np.uint64(0)), "u64")

    def _op_cvta(self) -> None:
        d, a = self.i.operands
        if not {"global", "param"} & set(self.i.parts):
            raise self._todo()
        self._set(d, self._value(a, "u64"), "u64")

    def _op_selp(self) -> None:
        kind = self.i.parts[-1]
        d, a, b, p = self.i.operands
        x, y = self._value(a, kind), self._value(b, kind)
        self._set(d, f"np.where({self._value(p, 'pred')}, {x}, {y})", kind)

    def _op_setp(self) -> None:
        parts = self.i.parts
        d, a, b, *rest = self.i.operands
        kind = parts[-1]
        if isinstance(d, Pair) or set(parts[2:-1]) - {"ftz", "and", "or", "xor"}:
            raise self._todo()
        float_ = kind[0] == "f" or kind == "bf16"
        if kind == "bf16":
            x, y = (f"from_bf16({self._array(o, 'b16')})" for o in (a, b))
        else:
            x, y = self._value(a, kind), self._value(b, kind)
        symbols = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
        symbols |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
        name = parts[1]
        if name in symbols:
            expression = f"({x} {symbols[name]} {y})"
            if float_ and name == "ne":
                expression = f"(({x} != {y}) & ({x} == {x}) & ({y} == {y}))"
        elif float_ and name in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
            expression = f"(({x} {symbols[name[:2]]} {y}) | ({x} != {x}) | ({y} != {y}))"
        elif float_ and name in ("num", "nan"):
            expression = f"(({x} == {x}) & ({y} == {y}))"
            expression = f"~{expression}" if name == "nan" else expression
        else:
            raise self._todo()
        if rest:
            joined = next(m for m in parts if m in ("and", "or", "xor"))
            symbol = {"and": "&", "or": "|", "xor": "^"}[joined]
            expression = f"({expression} {symbol} {self._value(rest[0], 'pred')})"
        self._set(d, expression, "pred")

    def _op_cvt(self) -> None:
        *mods, to, source = self.i.parts[1:]
        d, a, *more = self.i.operands
        mods = set(mods)
        if to in ("bf16x2", "f16x2") and source == "f32":
            high, low = (self._array(o, "f32") for o in (a, *more))
            if "relu" in mods:
                high, low = f"relu({high})", f"relu({low})"
            if mods - {"rn", "relu"}:
                raise self._todo()
            convert = "to_bf16" if to == "bf16x2" else "to_f16"
            self._set(d, f"pack({convert}({low}), {convert}({high}))", "b32")
            return
        if more:
            raise self._todo()
        if source == "bf16" and to == "f32" and not mods - {"ftz"}:
            self._set(d, f"from_bf16({self._value(a, 'b16')})", "f32")
            return
        if to in ("bf16", "tf32") and source == "f32":
            names = {"bf16rn": "to_bf16", "bf16rz": "to_bf16_rz"}
            names |= {"tf32rna": "to_tf32", "tf32rn": "to_tf32_rn"}
            if len(mods) != 1 or to + next(iter(mods)) not in names:
                raise self._todo()
            function = names[to + next(iter(mods))]
            x = self._value(a, "f32")
            self._set(d, f"{function}({x})", "b16" if to == "bf16" else "b32")
            return
        if to not in _TYPES or source not in _TYPES:
            raise self._todo()
        x, target = self._value(a, source), _TYPES[to]
        if source[0] == "f":
            if "ftz" in mods and source == "f32":
                x = f"flush({x})"
            whole = {"rmi": "np.floor", "rpi": "np.ceil", "rzi": "np.trunc", "rni": "np.rint"}
            rounding = next((whole[m] for m in mods if m in whole), None)
            if mods - {"ftz", "rn", "sat"} - set(whole) or "sat" in mods:
                raise self._todo()
            if to[0] == "f":
                x = f"{rounding}({x})" if rounding else x
                self._set(d, f"{x}.astype({target})", to)
            elif rounding:
                self._set(d, f"to_int({rounding}({x}), {target})", to)
            else:
                raise self._todo()
        elif mods - {"rn"}:
            raise self._todo()
        else:
            self._set(d, f"{x}.astype({target})", to)

    # Memory

    def _access(self) -> tuple[str, int, str]:
        """(space, items, type) of a load or store."""
        parts = self.i.parts[1:]
        space = next((p for p in parts if p in ("global", "shared", "param", "local")), None)
        if "shared::cta" in parts:
            space = "shared"
        if space is None:
            raise self._todo()
        items = next((int(p[1:]) for p in parts if p in ("v2", "v4", "v8")), 1)
        known = {"global", "shared", "shared::cta", "param", "nc", "volatile", "v2", "v4", "v8"}
        for p in parts[:-1]:
            if p not in known | _SCOPES and not p.startswith(("L1::", "L2::")):
                raise self._todo()
        return space, items, parts[-1]

    def _op_ld(self) -> None:
        space, items, kind = self._access()
        d, memory = self.i.operands[:2]
        targets = list(d.items) if isinstance(d, Vec) else [d]
        if kind not in _TYPES or len(targets) != items:
            raise self._todo()
        bits = int(kind[1:])
        numpy = _TYPES[kind]
        number = self.i.index
        if space == "param":
            found = [k for k, p in enumerate(self.kernel.params) if p.name == memory.base.name]
            expression = f"g.param({found[0]}, {memory.offset}, {numpy})"
            if items != 1:
                raise self._todo()
            self.varies = True
            self._set(d, expression, kind)
            return
        if space == "local":
            raise self._todo()
        address = self._address(memory, "u64" if space == "global" else "u32")
        call = (
            f"g.load_{space}(I[{number}], {address}, {bits // 8}, {items}, {self._guard_or_none()})"
        )
        if numpy[0] != "u":
            call = f"[x.view({numpy}) for x in {call}]"
        self._set_many(targets, call, kind)

    def _op_st(self) -> None:
        space, items, kind = self._access()
        memory, source = self.i.operands[:2]
        sources = list(source.items) if isinstance(source, Vec) else [source]
        if space not in ("global", "shared") or len(sources) != items or kind not in _TYPES:
            raise self._todo()
        bits = int(kind[1:])
        data = ", ".join(self._array(s, f"b{bits}") for s in sources)
        address = self._address(memory, "u64" if space == "global" else "u32")
        self._line(
            f"g.store_{space}(I[{self.i.index}], {address}, {bits // 8}, [{data}], "
            f"{self._guard_or_none()})"
        )

    def _op_cp(self) -> None:
        parts = self.i.parts
        if "bulk" in parts:
            self._bulk()
            return
        number = self.i.index
        if self.i.op in ("cp.async.commit_group", "cp.async.wait_all"):
            if self.i.guard:
                raise self._todo()
            name = "commit" if "commit_group" in parts else "wait_all"
            self._line(f"g.async_{name}()")
            return
        if self.i.op == "cp.async.wait_group":
            self._line(f"g.async_wait({self.i.operands[0].value})")
            return
        if parts[2] in ("ca", "cg"):
            target, source, size, *rest = self.i.operands
            # With a register, the bytes to read: the rest is zero. A 64-bit one is a cache policy.
            read = "None"
            if rest and not (isinstance(rest[0], Reg) and rest[0].bits == 64):
                read = self._array(rest[0], "u32")
            to, from_ = self._address(target, "u32"), self._address(source, "u64")
            guard = self._guard_or_none()
            self._line(f"g.copy_async(I[{number}], {to}, {from_}, {size.value}, {read}, {guard})")
            return
        raise self._todo()

    def _op_ldmatrix(self) -> None:
        parts = self.i.parts
        d, memory = self.i.operands
        count = next(int(p[1]) for p in parts if p in ("x1", "x2", "x4"))
        if "m8n8" not in parts or parts[-1] != "b16" or self.i.guard:
            raise self._todo()
        targets = list(d.items) if isinstance(d, Vec) else [d]
        address = self._address(memory, "u32")
        call = f"g.load_matrix(I[{self.i.index}], {address}, {count}, {'trans' in parts})"
        self._set_many(targets, call, "b32")

    def _op_mma(self) -> None:
        parts = self.i.parts
        shape, types = parts[3], parts[6:]
        if parts[1:3] != ["sync", "aligned"] or parts[4:6] != ["row", "col"] or self.i.guard:
            raise self._todo()
        d, a, b, c = (list(o.items) for o in self.i.operands)
        read = [", ".join(self._array(r, "b32") for r in regs) for regs in (a, b)]
        read.append(", ".join(self._array(r, "f32") for r in c))
        args = ", ".join(f"[{r}]" for r in read)
        if types == ["f32", "tf32", "tf32", "f32"] and shape in ("m16n8k8", "m16n8k4"):
            call = f"mma_tf32({args}, {shape[-1]})"
        elif types[0] == types[3] == "f32" and types[1] == types[2] and types[1] in ("f16", "bf16"):
            depth = {"m16n8k16": 16, "m16n8k8": 8}.get(shape)
            if depth is None:
                raise self._todo()
            call = f"mma_16bit({args}, {types[1]!r}, {depth})"
        else:
            raise self._todo()
        self._line(f"g.whole_warps(I[{self.i.index}])")
        self._set_many(d, call, "f32")

    def _op_shfl(self) -> None:
        _, _, mode, kind = self.i.parts
        d, a, b, c, _members = self.i.operands
        if kind != "b32" or self.i.guard:
            raise self._todo()
        read = ", ".join(self._array(o, "b32") for o in (a, b, c))
        call = f"g.shuffle(I[{self.i.index}], {mode!r}, {read})"
        targets = [d.first, d.second] if isinstance(d, Pair) else [d]
        self._line(f"t0_, t1_ = {call}")
        self.varies = True
        self._set(targets[0], "t0_", "b32")
        if len(targets) == 2:
            self._set(targets[1], "t1_", "pred")

    def _op_vote(self) -> None:
        raise self._todo()

    def _op_atom(self) -> None:
        self._atomic(True)

    def _op_red(self) -> None:
        self._atomic(False)

    def _atomic(self, result: bool) -> None:
        parts = self.i.parts[1:]
        if "global" not in parts:
            raise self._todo()
        *mods, kind = [p for p in parts if p not in _SCOPES | {"global"}]
        items = next((int(p[1:]) for p in mods if p in ("v2", "v4", "v8")), 1)
        mods = [p for p in mods if not p.startswith(("L1::", "L2::", "v"))]
        operands = list(self.i.operands)
        d = operands.pop(0) if result else None
        memory, source = operands[:2]
        if mods not in (["add"], ["max"], ["min"], ["exch"]) or kind not in _TYPES:
            raise self._todo()
        sources = list(source.items) if isinstance(source, Vec) else [source]
        data = ", ".join(self._array(s, kind) for s in sources)
        targets = [] if d is None else list(d.items) if isinstance(d, Vec) else [d]
        if len(sources) != items:
            raise self._todo()
        call = (
            f"g.atomic(I[{self.i.index}], {mods[0]!r}, {self._address(memory, 'u64')}, "
            f"{_TYPES[kind]}, [{data}], {self._guard_or_none()}, {bool(targets)})"
        )
        if targets:
            self._set_many(targets, call, kind)
        else:
            self._line(call)

    # Control: the machine reads the last instruction of a block itself.

    def _op_bra(self) -> None:
        pass

    def _op_ret(self) -> None:
        pass

    def _op_brx(self) -> None:
        if self.i.guard or self.i.op != "brx.idx":
            raise self._todo()

    def _op_bar(self) -> None:
        if self.i.guard or self.i.op not in ("bar.sync", "bar.warp.sync"):
            raise self._todo()

    def _op_barrier(self) -> None:
        if self.i.guard or self.i.op not in (
            "barrier.sync",
            "barrier.cta.sync",
            "barrier.sync.aligned",
        ):
            raise self._todo()

    def _op_membar(self) -> None:
        pass
