"""Translation of the instructions that sm_90 adds: wgmma, TMA, mbarriers, proxies, stmatrix.

They become calls of the functions in ``wgmma.py``, ``tma.py``, ``mbarrier.py``, ``proxies.py`` and
``collectives.py``, which take the group first. Unknown forms raise.
"""

from __future__ import annotations

import re

from . import collectives, mbarrier, proxies, tma, wgmma
from .formats import ITEMSIZE
from .syntax import (
    Imm,
    Instruction,
    Mem,
    Operand,
    Pair,
    Reg,
    Special,
    Sym,
    UnknownInstructionError,
    Vec,
)
from .tensor_map import FIELDS
from .translate.text import Text

# Names in the translated code.
FUNCTIONS = {
    function.__name__: function
    for function in (
        wgmma.mma_async, wgmma.commit_group, wgmma.wait_group, wgmma.touch,
        mbarrier.init, mbarrier.inval, mbarrier.arrive, mbarrier.try_wait,
        tma.bulk_load, tma.bulk_store, tma.bulk_commit, tma.bulk_wait,
        tma.replace_in_map, tma.copy_map, tma.fence_map,
        proxies.fence_async, collectives.store_matrix, collectives.elect,
    )
}  # fmt: skip

_MMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.(\w+)")
_TYPES = {  # of D -> types of A and B, which are equal or, of 8 bits, any two
    "f32": ({"f16"}, {"bf16"}, {"tf32"}, {"e4m3", "e5m2"}),
    "f16": ({"f16"}, {"e4m3", "e5m2"}),
    "s32": ({"s8", "u8"},),
}
_ORDER = {"cta", "cluster", "acquire", "release", "relaxed"}  # what they say holds here anyway
_REDUCTIONS = {"add", "min", "max", "and", "or", "xor"}


def product(i: Instruction) -> wgmma.Product:
    """What a wgmma.mma_async says; NotImplementedError for what the ISA does not have."""
    found = _MMA.fullmatch(i.op)
    d, a, _, _, *more = i.operands
    if not found or not isinstance(d, Vec):
        raise UnknownInstructionError(str(i))
    n, k = int(found[1]), int(found[2])
    kind, a_kind, b_kind = found[3], found[4], found[5]
    pairs = _TYPES.get(kind, ())
    numbers = [(o.value + 2**31) % 2**32 - 2**31 for o in more if isinstance(o, Imm)]
    short = a_kind in ("f16", "bf16")
    from_registers = isinstance(a, Vec)
    expected = 0 if kind == "s32" else 2 + (2 - from_registers) * short
    registers = n // 4 if kind == "f16" else n // 2
    good = (
        any({a_kind, b_kind} <= pair for pair in pairs)
        and k == 32 // ITEMSIZE[a_kind]
        and n % 8 == 0
        and 8 <= n <= 256
        and len(d.items) == registers
        and len(numbers) == len(more) == expected
        and all(abs(s) == 1 for s in numbers[:2])
    )
    if not good:
        raise UnknownInstructionError(str(i))
    trans = numbers[2:]
    return wgmma.Product(
        n, kind, a_kind, b_kind, _names(d), _names(a) if isinstance(a, Vec) else (),
        negative=bool(numbers) and numbers[0] * numbers[1] < 0,
        trans_a=len(trans) == 2 and bool(trans[0]), trans_b=bool(trans) and bool(trans[-1]),
    )  # fmt: skip


def _names(vector: Vec) -> tuple[str, ...]:
    return tuple(r.name for r in vector.items if isinstance(r, Reg))


class Sm90(Text):
    """The methods of the translator for these instructions."""

    def _call(self, name: str, *arguments: str) -> str:
        return f"{name}(g, I[{self.i.index}]{''.join(f', {a}' for a in arguments)})"

    def touch(self) -> None:
        """Before an instruction on registers that a product may have."""
        if self.i.index in self.uses.touched:
            reads, writes = self.uses.touched[self.i.index]
            self.line(self._call("touch", repr(reads), repr(writes)))

    def sm90(self) -> bool:
        """Translate the instruction, if it is one of these."""
        method = getattr(self, f"_op_{self.i.base}", None)
        if method is not None:
            method()
        return method is not None

    # wgmma

    def _op_wgmma(self) -> None:
        self.refuse_guard()
        kind = self.i.parts[1]
        if self.i.parts[2:4] != ["sync", "aligned"]:
            raise self.unknown()
        if kind == "mma_async":
            self._mma_async()
        elif kind == "fence":
            self.line(f"g.whole_warps(I[{self.i.index}])")
        elif kind == "commit_group":
            self.line(self._call("commit_group"))
        elif kind == "wait_group" and isinstance(self.i.operands[0], Imm):
            landing = self.uses.landing.get(self.i.index, ())
            held = ", ".join(f"{r.name!r}: {r.name}" for r in landing)
            self.line(
                f"t_ = {self._call('wait_group', str(self.i.operands[0].value), f'{{{held}}}')}"
            )
            for r in landing:
                self.line(f"{r.name} = t_[{r.name!r}]")
                self.types.pop(r.name, None)
        else:
            raise self.unknown()

    def _mma_async(self) -> None:
        made = product(self.i)
        name = f"P_{self.i.index}"
        self.constants[name] = made
        d, a, b, scale = self.i.operands[:4]
        assert isinstance(d, Vec)
        left = self.array(a, "b64") if not isinstance(a, Vec) else self._list(a, "b32")
        index = self.i.index
        self.line(
            self._call(
                "mma_async", name, self._list(d, "b32"), left, self.array(b, "b64"),
                self.array(scale, "pred"), repr(self.uses.unfenced.get(index, ())),
                repr(self.uses.copied.get(index, ())),
            )
        )  # fmt: skip

    def _list(self, vector: Vec, kind: str) -> str:
        return f"[{', '.join(self.array(r, kind) for r in vector.items)}]"

    # mbarriers

    def _op_mbarrier(self) -> None:
        kind, *mods = self.i.parts[1:]
        spaces = {"shared", "shared::cta"}
        known = _ORDER | spaces | {"b64", "expect_tx", "parity"}
        if set(mods) - known or not spaces & set(mods):
            raise self.unknown()
        guard, operands = self.guard(), list(self.i.operands)
        if kind == "init":
            address, count = self._shared(operands[0]), self.array(operands[1], "u32")
            self.line(self._call("init", address, count, guard))
        elif kind == "inval":
            self.line(self._call("inval", self._shared(operands[0]), guard))
        elif kind in ("arrive", "expect_tx"):
            self._arrive(kind, "expect_tx" in self.i.parts, operands, guard)
        elif kind in ("try_wait", "test_wait") and "parity" in mods:
            parity = self.array(operands[2], "u32")
            self.line(f"t_ = {self._call('try_wait', self._shared(operands[1]), parity, guard)}")
            self.varies = True
            self.set(operands[0], "t_", "pred")
        else:
            raise self.unknown()

    def _arrive(self, kind: str, tx: bool, operands: list[Operand], guard: str) -> None:
        if not isinstance(operands[0], Mem):
            state = operands.pop(0)  # a token of the phase, which nothing here takes
            if isinstance(state, Reg):
                raise self.unknown()
        number = self.array(operands[1], "u32") if len(operands) > 1 else "None"
        count, bytes_ = ("None", number) if tx else (number, "None")
        self.line(
            self._call(
                "arrive", self._shared(operands[0]), count, bytes_, str(kind == "arrive"), guard
            )
        )

    def _shared(self, operand: Operand) -> str:
        if not isinstance(operand, Mem) or operand.coords:
            raise self.unknown()
        return self.address(operand, 32)

    # TMA

    def _op_cp(self) -> None:
        """cp.async.bulk and cp.reduce.async.bulk: tensors in tile mode, and groups of stores."""
        op, parts = self.i.op, self.i.parts
        if op == "cp.async.bulk.commit_group":
            self.line(f"bulk_commit(g, {self.guard()})")
        elif op in ("cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read"):
            pending = self.i.operands[0]
            if not isinstance(pending, Imm):
                raise self.unknown()
            self.line(f"bulk_wait(g, {pending.value}, {self.guard()})")
        elif op.startswith("cp.async.bulk.prefetch.tensor"):
            pass
        elif "tensor" in parts and "mbarrier::complete_tx::bytes" in parts:
            self._bulk_load()
        elif "tensor" in parts and "bulk_group" in parts:
            self._bulk_store()
        else:
            raise self.unknown()

    def _known_mods(self, known: set[str]) -> set[str]:
        mods = set(self.i.parts) - {"cp", "async", "bulk", "tensor", "reduce", "tile"}
        mods -= {f"{rank}d" for rank in range(1, 6)} | {"L2::cache_hint"}
        if mods - known:
            raise self.unknown()
        return mods

    def _map(self, operand: Operand) -> tuple[str, str]:
        """(address of the tensor map, list of coordinates) of ``[map, {c0, c1}]``."""
        if not isinstance(operand, Mem) or not isinstance(operand.base, Reg):
            raise self.unknown()
        corner = ", ".join(self.array(c, "s32") for c in operand.coords)
        return self.address(Mem(operand.base, operand.offset), 64), f"[{corner}]"

    def _bulk_load(self) -> None:
        self._known_mods(
            {"shared::cluster", "shared::cta", "global", "mbarrier::complete_tx::bytes"}
        )
        target, source, barrier = self.i.operands[:3]
        address, corner = self._map(source)
        self.line(
            self._call(
                "bulk_load", self._shared(target), address, corner, self._shared(barrier),
                self.guard(),
            )
        )  # fmt: skip

    def _bulk_store(self) -> None:
        mods = self._known_mods({"shared::cta", "global", "bulk_group"} | _REDUCTIONS)
        reduction = mods & _REDUCTIONS
        if len(reduction) != ("reduce" in self.i.parts):
            raise self.unknown()
        target, source = self.i.operands[:2]
        address, corner = self._map(target)
        self.line(
            self._call(
                "bulk_store", address, corner, self._shared(source),
                repr("".join(reduction)), self.guard(),
            )
        )  # fmt: skip

    def _op_tensormap(self) -> None:
        parts = self.i.parts
        if parts[1] == "cp_fenceproxy" and parts[2:4] == ["global", "shared::cta"]:
            target, source = self.i.operands[:2]
            if not isinstance(target, Mem):
                raise self.unknown()
            to, guard = self.address(target, 64), self.guard()
            self.line(self._call("copy_map", to, self._shared(source), guard))
            return
        if (
            parts[1:3] != ["replace", "tile"]
            or "shared::cta" not in parts
            or parts[3] not in FIELDS
        ):
            raise self.unknown()
        address, *ordinal, value = self.i.operands
        if ordinal and not isinstance(ordinal[0], Imm):
            raise self.unknown()
        number = ordinal[0].value if ordinal and isinstance(ordinal[0], Imm) else 0
        self.line(
            self._call(
                "replace_in_map", repr(parts[3]), self._shared(address), str(number),
                self.array(value, parts[-1]), self.guard(),
            )
        )  # fmt: skip

    # Proxies, warps

    def _op_fence(self) -> None:
        parts = self.i.parts
        if parts[1] != "proxy":
            return  # of the generic proxy: memory is in order here
        if parts[2] == "async" and parts[3:] in ([], ["shared::cta"], ["shared::cluster"]):
            self.line(f"fence_async(g, {self.guard()})")
        elif parts[2] == "tensormap::generic":
            if "acquire" in parts:
                address = self.i.operands[0]
                if not isinstance(address, Mem):
                    raise self.unknown()
                self.line(f"fence_map(g, {self.address(address, 64)}, {self.guard()})")
        elif parts[2:4] != ["async", "global"]:
            raise self.unknown()

    def _op_elect(self) -> None:
        self.refuse_guard()
        pair, members = self.i.operands
        if not isinstance(pair, Pair) or not isinstance(members, Imm):
            raise self.unknown()
        if members.value & 0xFFFFFFFF != 0xFFFFFFFF:
            raise self.unknown()
        self.line(f"t0_, t1_ = {self._call('elect')}")
        self.varies = True
        if isinstance(pair.first, Reg):
            self.set(pair.first, "t0_", "b32")
        elif not isinstance(pair.first, (Sym, Special)):
            raise self.unknown()
        self.set(pair.second, "t1_", "pred")

    def _op_stmatrix(self) -> None:
        self.refuse_guard()
        parts = self.i.parts
        memory, source = self.i.operands
        registers = source if isinstance(source, Vec) else Vec((source,))
        known = {"stmatrix", "sync", "aligned", "m8n8", "trans", "shared", "shared::cta", "b16"}
        if set(parts) - known != {f"x{len(registers.items)}"} or "m8n8" not in parts:
            raise self.unknown()
        self.line(
            self._call(
                "store_matrix", self._shared(memory), self._list(registers, "b32"),
                str("trans" in parts),
            )
        )  # fmt: skip

    def _op_setmaxnreg(self) -> None:
        """Registers move between warps: nothing that can be seen here."""
        count = self.i.operands[0]
        if not isinstance(count, Imm) or count.value % 8 or not 24 <= count.value <= 256:
            raise self.unknown()

    def _op_griddepcontrol(self) -> None:
        """Launches do not overlap here."""

    def _op_prefetch(self) -> None:
        """Nothing to fetch before its time."""
