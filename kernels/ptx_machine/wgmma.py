"""wgmma: products of warpgroups, in flight from their issue to their wait.

The operands are read and the product is formed at the issue, but the accumulator's registers keep
what they held until ``wgmma.wait_group`` retires the group of the product, as late as the PTX ISA
("Asynchronous Warpgroup Level Matrix Instructions", "Async Proxy") lets a program rely on it. So a
program that does not wait computes with stale numbers, and is reported: reads and writes of
registers in flight (:func:`touch`, put there by the translator after ``wgmma_registers.py``),
shared memory overwritten under a product (``proxies.py``), ordinary writes with no ``wgmma.fence``
after them.

Products and sum of one instruction are exact, then cut to float32: the chip aligns the products and
cuts a few bits below the result's, so its last bits differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .clocks import WARP
from .formats import ITEMSIZE, cut, decode, encode
from .report import ExecutionError, MemcheckError
from .wgmma_layout import (
    MatrixDescriptor,
    a_fragment,
    accumulator,
    accumulator_registers,
    operand_chunks,
    operand_matrix,
)

if TYPE_CHECKING:
    from .group import Group
    from .syntax import Instruction

WARPGROUP = 128
READ_NOTE = "operand in registers read before its wait: undefined by the ISA, and harmless"
COPY_NOTE = "registers copied between wgmma.fence and the product (Triton 3.6)"


@dataclass(frozen=True)
class Product:
    """What a ``wgmma.mma_async`` says besides its registers."""

    n: int
    d: str  # element types, as in the opcode
    a: str
    b: str
    d_names: tuple[str, ...]
    a_names: tuple[str, ...]  # none if A is in shared memory
    negative: bool = False  # the product of imm-scale-a and imm-scale-b
    trans_a: bool = False
    trans_b: bool = False


@dataclass
class _Accumulator:
    """What registers will hold once their products are waited for."""

    values: np.ndarray  # [units, rows, n] float64
    number: np.ndarray  # of each thread: its newest commit group that writes them, 0 for none
    kind: str
    instruction: Instruction

    def registers(self) -> np.ndarray:
        """[registers, threads] uint32."""
        return accumulator_registers(encode(self.values, self.kind))

    def by_warp(self) -> np.ndarray:
        """As [warps, 16, n]."""
        return self.values.reshape(-1, 16, self.values.shape[-1])


class InFlight:
    """The products in flight of a group of threads."""

    def __init__(self) -> None:
        self.accumulators: dict[tuple[str, ...], _Accumulator] = {}
        self.operands: dict[str, tuple[np.ndarray, Instruction]] = {}  # registers of A

    def __bool__(self) -> bool:
        return bool(self.accumulators or self.operands)

    def part(self, keep: np.ndarray, g: Group) -> InFlight:
        """Those of the threads of `g` where `keep` holds: whole warps, or nothing is in flight."""
        other = InFlight()
        for names, acc in self.accumulators.items():
            if acc.number[keep].any():
                warps = keep.reshape(-1, WARP)
                cut = (warps != warps[:, :1]).ravel()
                if cut.any():
                    raise ExecutionError(
                        f"{g.kernel.name}: {acc.instruction}: part of a warp goes on before its "
                        f"wait; {g.who(int(np.flatnonzero(cut)[0]))}"
                    )
                values = acc.by_warp()[warps[:, 0]]
                other.accumulators[names] = _Accumulator(
                    values, acc.number[keep], acc.kind, acc.instruction
                )
        for name, (number, instruction) in self.operands.items():
            if number[keep].any():
                other.operands[name] = (number[keep], instruction)
        return other

    def join(self, other: InFlight, counts: tuple[int, int], order: np.ndarray) -> InFlight:
        """Both, of so many threads each, which `order` sorts."""
        joined = InFlight()
        warps = order[::WARP] // WARP
        for names in {**self.accumulators, **other.accumulators}:
            found = self.accumulators.get(names), other.accumulators.get(names)
            one = found[0] or found[1]
            assert one is not None
            n = one.values.shape[-1]
            values = [
                np.zeros((c // WARP, 16, n)) if f is None else f.by_warp()
                for f, c in zip(found, counts, strict=True)
            ]
            number = [
                np.zeros(c, np.int64) if f is None else f.number
                for f, c in zip(found, counts, strict=True)
            ]
            joined.accumulators[names] = _Accumulator(
                np.concatenate(values)[warps],
                np.concatenate(number)[order],
                one.kind,
                one.instruction,
            )
        for name in {**self.operands, **other.operands}:
            both = self.operands.get(name), other.operands.get(name)
            number = [
                np.zeros(c, np.int64) if f is None else f[0]
                for f, c in zip(both, counts, strict=True)
            ]
            at = both[0] or both[1]
            assert at is not None
            joined.operands[name] = (np.concatenate(number)[order], at[1])
        return joined


def _unit(g: Group, instruction: Instruction) -> int:
    """Threads of a unit: whole warpgroups if all of the group are, else warps."""
    g.whole_warps(instruction)
    if (g.thread >= g.machine.threads // WARPGROUP * WARPGROUP).any():
        raise ExecutionError(
            f"{g.kernel.name}: {instruction}: not by whole warpgroups of the CTA; {g.who(g.n - 1)}"
        )
    first = g.lanes[::WARPGROUP]
    whole = g.n % WARPGROUP == 0 and not (g.thread[::WARPGROUP] % WARPGROUP).any()
    whole = whole and bool((g.lanes[WARPGROUP - 1 :: WARPGROUP] - first == WARPGROUP - 1).all())
    return WARPGROUP if whole else WARP


def _same(
    g: Group, instruction: Instruction, values: np.ndarray, unit: int, what: str
) -> np.ndarray:
    """One value per unit."""
    by_unit = np.broadcast_to(values, (g.n,)).reshape(-1, unit)
    other = (by_unit != by_unit[:, :1]).ravel()
    if other.any():
        raise ExecutionError(
            f"{g.kernel.name}: {instruction}: {what} differs between the threads of a warpgroup; "
            f"{g.who(int(np.flatnonzero(other)[0]))}"
        )
    return np.ascontiguousarray(by_unit[:, 0])


def _operand(
    g: Group, instruction: Instruction, bits: np.ndarray, unit: int, kind: str, rows: int,
    mn: bool, own: bool,
) -> np.ndarray:  # fmt: skip
    """[units, rows, K] float64 of an operand in shared memory; warps read their `own` rows of A."""
    itemsize, shared = ITEMSIZE[kind], g.machine.shared
    first = np.arange(0, g.n, unit)
    chunks = _chunks(g, instruction, bits, unit, rows, itemsize, mn)
    if own and unit == WARP:
        w, each = g.thread[first] // WARP % 4, np.arange(len(first))
        if mn:
            chunks = chunks.reshape(len(first), 16, 4, 2)[each, :, w]
        else:
            chunks = chunks.reshape(len(first), 4, 16, 2)[each, w]
    outside = chunks.max(axis=(1, 2)) + 16 > shared.size
    if outside.any():
        i = int(np.flatnonzero(outside)[0])
        raise MemcheckError(
            f"{g.kernel.name}: {instruction}: 16 bytes at byte {int(chunks[i].max())} of shared "
            f"memory ({shared.size} bytes): outside; {g.who(int(first[i]))}"
        )
    where = chunks + g.base[first][:, None, None]
    g.machine.proxies.products_read(g, instruction, where.reshape(len(first), -1), unit)
    raw = shared.bytes.reshape(-1, 16)[where >> 4]
    return decode(operand_matrix(raw, itemsize, mn), kind)


def _chunks(
    g: Group, instruction: Instruction, bits: np.ndarray, unit: int, rows: int, itemsize: int,
    mn: bool,
) -> np.ndarray:  # fmt: skip
    """Shared addresses of the chunks of each unit's operand, by their descriptors."""
    forms = bits >> np.uint64(14)  # all fields but the start, and mostly the same
    found: dict[int, np.ndarray] = {}
    for form in np.unique(forms):
        mine = np.flatnonzero(forms == form)
        start = ((bits[mine] & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
        with g.blamed(instruction, int(mine[0]) * unit):
            descriptor = MatrixDescriptor.decode(int(bits[mine[0]]))
            chunks = operand_chunks(descriptor, rows, itemsize, mn, start=start)
        found |= zip(mine.tolist(), chunks, strict=True)
    return np.stack([found[i] for i in range(len(bits))])


def mma_async(
    g: Group,
    instruction: Instruction,
    product: Product,
    d: list[np.ndarray],
    a: np.ndarray | list[np.ndarray],
    b: np.ndarray,
    scale_d: np.ndarray,
    unfenced: tuple[str, ...] = (),
    copied: tuple[str, ...] = (),
) -> None:
    """Issue D = A B (+ D where `scale_d`); A is four registers or a descriptor.

    `unfenced` and `copied` name the registers that may have been written, or copied from others,
    after the last wgmma.fence.
    """
    unit = _unit(g, instruction)
    rows = unit // 2
    scale = _same(g, instruction, scale_d, unit, "scale-d").astype(bool)
    _check_fence(g, instruction, product, unfenced, copied, bool(scale.any()))
    if isinstance(a, list):
        left = decode(a_fragment(np.stack(a, -1), rows, product.a), product.a)
    else:
        bits = _same(g, instruction, a, unit, "the descriptor of A")
        left = _operand(g, instruction, bits, unit, product.a, 64, product.trans_a, True)
    bits = _same(g, instruction, b, unit, "the descriptor of B")
    right = _operand(g, instruction, bits, unit, product.b, product.n, product.trans_b, False)
    exact = _multiply(left, right)
    if product.negative:
        exact = -exact
    if scale.any():
        exact = np.where(
            scale[:, None, None], exact + _before(g, instruction, product, d, rows), exact
        )
    if product.d == "f32":
        exact = cut(exact).astype(np.float64)
    elif product.d == "f16":
        exact = exact.astype(np.float16).astype(np.float64)
    number = g.machine.products[g.warp] + 1
    _check_overlap(g, instruction, product.d_names)
    g.in_flight.accumulators[product.d_names] = _Accumulator(exact, number, product.d, instruction)
    for name in product.a_names:
        g.in_flight.operands[name] = (number, instruction)


def _multiply(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[units, rows, n], exact: sums of 8 to 32 products of short numbers in float64."""
    exact = left @ right.swapaxes(1, 2)
    if not np.isfinite(exact).all():  # a library may leave out Inf * 0
        exact = (left[:, :, None, :] * right[:, None, :, :]).sum(-1)
    return exact


def _before(
    g: Group, instruction: Instruction, product: Product, d: list[np.ndarray], rows: int
) -> np.ndarray:
    """D before the product [units, rows, n]: of the products in flight on it, or its registers."""
    flying = g.in_flight.accumulators.get(product.d_names)
    if flying is not None and flying.number.all():
        return flying.values.reshape(-1, rows, product.n)
    size = ITEMSIZE[product.d]
    held = decode(accumulator(np.stack(d, -1), rows, size), product.d)
    if flying is None:
        return held
    busy = (flying.number > 0).reshape(-1, 2 * rows)[:, 0]
    return np.where(busy[:, None, None], flying.values.reshape(held.shape), held)


def _check_fence(
    g: Group,
    instruction: Instruction,
    product: Product,
    unfenced: tuple[str, ...],
    copied: tuple[str, ...],
    reads_d: bool,
) -> None:
    """PTX ISA, wgmma.fence: between other accesses to these registers and the product."""
    used = set(product.a_names) | (set(product.d_names) if reads_d else set())
    late = [name for name in unfenced if name in used]
    if late:
        g.report.add(
            "no wgmma.fence", g.kernel.name, instruction,
            f"registers written since the last wgmma.fence: {', '.join(late[:4])}; {g.who(0)}",
            len(late),
        )  # fmt: skip
    if any(name in used for name in copied):
        g.report.note(COPY_NOTE)


def _check_overlap(g: Group, instruction: Instruction, d_names: tuple[str, ...]) -> None:
    """Products in flight share all registers of D, in order, or none."""
    for names, flying in g.in_flight.accumulators.items():
        if names == d_names or set(names).isdisjoint(d_names):
            continue
        common = [name for name in d_names if name in names]
        lane = int(np.flatnonzero(flying.number)[0])
        g.report.add(
            "accumulators overlap", g.kernel.name, instruction,
            f"{', '.join(common[:4])} of {flying.instruction}, not waited for; {g.who(lane)}",
            int((flying.number > 0).sum()),
        )  # fmt: skip


def commit_group(g: Group, instruction: Instruction) -> None:
    """The products issued since the last commit become a group."""
    g.whole_warps(instruction)
    g.machine.products[np.unique(g.warp)] += 1


def wait_group(
    g: Group, instruction: Instruction, pending: int, registers: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Retire all but the `pending` newest groups: the registers afterwards."""
    g.whole_warps(instruction)
    newest = g.machine.products[g.warp] - pending
    warps = np.unique(g.warp)
    g.machine.proxies.products_done(warps, g.machine.products[warps] - pending)
    flying = g.in_flight
    for names, acc in list(flying.accumulators.items()):
        done = (acc.number > 0) & (acc.number <= newest)
        if not done.any():
            continue
        for name, new in zip(names, acc.registers(), strict=True):
            old = registers[name].view(np.uint32)
            registers[name] = new if done.all() else np.where(done, new, old)
        acc.number = np.where(done, 0, acc.number)
        if not acc.number.any():
            del flying.accumulators[names]
    for name, (number, issued) in list(flying.operands.items()):
        left = np.where(number <= newest, 0, number)
        if left.any():
            flying.operands[name] = (left, issued)
        else:
            del flying.operands[name]
    return registers


def touch(
    g: Group, instruction: Instruction, reads: tuple[str, ...], writes: tuple[str, ...]
) -> None:
    """Report an instruction that reads or writes registers which a product in flight has."""
    flying = g.in_flight
    for names, acc in flying.accumulators.items():
        busy = acc.number > 0
        if not busy.any():
            continue
        who = g.who(int(np.flatnonzero(busy)[0]))
        for kind, touched in (
            ("accumulator read before its wait", reads),
            ("accumulator written before its wait", writes),
        ):
            common = [name for name in touched if name in names]
            if common:
                g.report.add(
                    kind, g.kernel.name, instruction,
                    f"{', '.join(common[:4])} of {acc.instruction}; {who}", int(busy.sum()),
                )  # fmt: skip
    if any(name in flying.operands and flying.operands[name][0].any() for name in reads):
        g.report.note(READ_NOTE)
    for name in writes:
        if name in flying.operands and flying.operands[name][0].any():
            number, issued = flying.operands[name]
            g.report.add(
                "operand written before its wait", g.kernel.name, instruction,
                f"{name}, A of {issued}; {g.who(int(np.flatnonzero(number)[0]))}",
                int((number > 0).sum()),
            )  # fmt: skip
