"""Every form of loads, stores, atomics and copies against Python's bytes."""

from functools import cache

import numpy as np
import pytest

from ptx_machine import ExecutionError, UnknownInstructionError
from ptx_machine.translate import FORMS
from tests.ptx_machine.exact import bits_of, number, rounded, signed, wrap
from tests.ptx_machine.handmade import run
from tests.ptx_machine.samples import RNG, integers
from tests.ptx_machine.sheet import THREADS, Sheet

ROW = 32  # bytes of memory of each thread: the largest access
SPACES = ("global", "shared", "local")


def forms(base, space=""):
    """Forms of an opcode in a state space."""
    found = []
    for op in FORMS:
        parts = [p.removesuffix("::cta") for p in op.split(".")]
        if parts[0] == base and (not space or space in parts):
            found.append(op)
    return found


def items_of(op):
    return next((int(p[1:]) for p in op.split(".") if p in ("v2", "v4", "v8")), 1)


def item_bits(op):
    kind = op.rpartition(".")[2]
    return {"f16x2": 32, "bf16x2": 32}.get(kind) or bits_of(kind)


COPIES = [op for op in forms("cp") if op.startswith("cp.async.c") and "commit" not in op]
COMMIT, WAITS = "cp.async.commit_group", ("cp.async.wait_group", "cp.async.wait_all")
TESTED = [
    *(op for base in ("ld", "st") for space in SPACES for op in forms(base, space)),
    *(op for base in ("atom", "red", "createpolicy") for op in forms(base)),
    *forms("ld", "param"), *COPIES, COMMIT, *WAITS,
]  # fmt: skip


def vector(registers):
    return registers[0] if len(registers) == 1 else f"{{{', '.join(registers)}}}"


def aligned(nbytes):
    """Zeros, aligned to the widest access."""
    room = np.zeros(nbytes + ROW, np.uint8)
    start = -room.ctypes.data % ROW
    return room[start : start + nbytes]


def rows(seed=0):
    made = aligned(THREADS * ROW).reshape(THREADS, ROW)
    made[:] = np.random.default_rng(seed).integers(0, 256, made.shape, np.uint8)
    return made


def sheet_in(space, ops):
    """A sheet whose threads have a row each at ``[address]`` of the space."""
    sheet = Sheet(rows(1), shared=THREADS * ROW, local=ROW, target="sm_100a")
    address = sheet.register(64 if space == "global" else 32)
    if space == "global":
        sheet.line(f"mad.wide.u32 {address}, %r0, {ROW}, %rd3;")
    else:
        sheet.line(f"mul.lo.u32 {address}, %r0, {ROW if space == 'shared' else 0};")
    return sheet, address


def given(sheet, memory):
    """Registers with the words of a row."""
    return [sheet.load(32, memory.view(np.uint32)[:, k]) for k in range(ROW // 4)]


def fill(sheet, space, address, words):
    for k in range(0, len(words), 4):
        sheet.line(f"st.{space}.v4.b32 [{address} + {4 * k}], {vector(words[k : k + 4])};")


def item(row, k, size):
    return int.from_bytes(row[k * size : (k + 1) * size].tobytes(), "little")


@pytest.mark.parametrize("space", SPACES)
def test_loads(space):
    """Bytes in little-endian order; signed types widen to 32 bits with their sign."""
    ops, memory = forms("ld", space), rows()
    sheet, address = sheet_in(space, ops)
    fill(sheet, space, address, given(sheet, memory))
    for op in ops:
        kind = op.rpartition(".")[2]
        bits = bits_of(kind) if kind[0] == "f" else max(32, bits_of(kind))
        targets = [sheet.register(bits) for _ in range(items_of(op))]
        policy = ", %rd1" if "cache_hint" in op else ""
        sheet.line(f"{op} {vector(targets)}, [{address}]{policy};")
        sheet.keep(*((t, bits) for t in targets))
    for op, results in zip(ops, sheet.run(ops), strict=True):
        kind = op.rpartition(".")[2]
        for k, column in enumerate(results):
            for row, got in zip(memory, column, strict=True):
                want = item(row, k, bits_of(kind) // 8)
                if kind[0] == "s":
                    want = wrap(signed(want, bits_of(kind)), max(32, bits_of(kind)))
                assert got == want, (op, k)


@pytest.mark.parametrize("space", SPACES)
def test_stores(space):
    """What is not stored to stays."""
    ops, memory = forms("st", space), rows()
    sheet, address = sheet_in(space, ops)
    sources, cases, before = {}, [], given(sheet, memory)
    for op in ops:
        bits = item_bits(op)
        size = max(16, bits)
        if size not in sources:
            values = [integers(size) for _ in range(8)]
            sources[size] = values, [sheet.load(size, v) for v in values]
        values, names = sources[size]
        fill(sheet, space, address, before)
        policy = ", %rd1" if "cache_hint" in op else ""
        sheet.line(f"{op} [{address}], {vector(names[: items_of(op)])}{policy};")
        words = [sheet.register(64) for _ in range(ROW // 8)]
        for k in range(0, len(words), 2):
            sheet.line(f"ld.{space}.v2.b64 {vector(words[k : k + 2])}, [{address} + {8 * k}];")
        sheet.keep(*((w, 64) for w in words))
        cases.append((op, bits // 8, values[: items_of(op)]))
    for (op, size, values), results in zip(cases, sheet.run(ops), strict=True):
        for thread, row in enumerate(memory):
            data = b"".join(wrap(v[thread], 8 * size).to_bytes(size, "little") for v in values)
            want = data + row.tobytes()[len(data) :]
            got = b"".join(word[thread].to_bytes(8, "little") for word in results)
            assert got == want, op


WIDE = [op for op in forms("ld") + forms("st") if item_bits(op) * items_of(op) > 128]


@pytest.mark.parametrize("op", WIDE[::7])
def test_256_bits_are_for_sm_100_and_global_memory(op):
    assert ".global." in op and item_bits(op) in (32, 64)
    sheet, address = sheet_in("global", [])
    sheet.target = "sm_90a"
    items = vector([sheet.register(item_bits(op)) for _ in range(items_of(op))])
    sheet.line(f"{op} {items}, [{address}];" if op[0] == "l" else f"{op} [{address}], {items};")
    with pytest.raises(UnknownInstructionError, match=r"256 bits before sm_100: (ld|st)\.global"):
        sheet.run()


@pytest.mark.parametrize(
    "op",
    ["ld.global.v8.b64", "ld.global.v8.b8", "st.global.v8.b16", "ld.shared.v4.b64", "ld.shared.f16",
     "st.local.v4.f64", "ld.volatile.local.b32", "st.global.wt.L1::evict_last.b32",
     "red.global.exch.b32", "red.acquire.gpu.global.add.u32", "mov.f16", "selp.f16"],
)  # fmt: skip
def test_forms_that_nvidia_s_assembler_does_not_know(op):
    assert op not in FORMS


def test_parameters():
    """Any type may be read from any byte of a parameter; the kernel's own are its addresses."""
    sheet = Sheet()
    ops = forms("ld", "param")
    for op in ops:
        kind = op.rpartition(".")[2]
        offset = 0 if bits_of(kind) == 64 else 8 - bits_of(kind) // 8
        bits = max(32, bits_of(kind))
        target = sheet.register(bits)
        sheet.line(f"{op} {target}, [made + {offset}];")
        sheet.keep((target, bits))
    whole = sheet.register(64)
    sheet.line(f"ld.param.b64 {whole}, [made];")
    sheet.keep((whole, 64))
    *results, (address,) = sheet.run(ops)
    for op, (got,) in zip(ops, results, strict=True):
        bits = bits_of(op.rpartition(".")[2])
        want = address[0] if bits == 64 else address[0] >> (64 - bits)
        if ".s" in op.removeprefix("ld.param"):
            want = wrap(signed(want, bits), max(32, bits))
        assert set(got) == {want}, op


CHOSEN = """
    mov.u32 %r0, %tid.x;
    setp.lt.u32 %p0, %r0, 5;
    mov.b64 %rd0, arg_1;
    mov.b64 %rd1, arg_2;
    selp.b64 %rd2, %rd0, %rd1, %p0;
    {guard} ld.param.b32 %r1, [%rd2{offset}];
    ld.param.b64 %rd3, [arg_0];
    mad.wide.u32 %rd4, %r0, 4, %rd3;
    st.global.b32 [%rd4], %r1;
"""


def test_a_parameter_whose_address_is_chosen_by_thread():
    out = np.zeros(32, np.int32)
    run(CHOSEN.format(guard="", offset=""), [out, 7, -9], threads=32)
    assert out.tolist() == [7] * 5 + [-9] * 27
    with pytest.raises(ExecutionError, match=r"ld\.param\.b32.*lane 0: no parameter is at 0x"):
        run(CHOSEN.format(guard="", offset=" + 4"), [out, 7, -9], threads=32)
    # Threads that do not take part may hold any address.
    run(
        CHOSEN.format(guard="mov.b32 %r1, 3; @!%p0 mov.b64 %rd2, 0; @%p0", offset=""),
        [out, 7, -9],
        threads=32,
    )
    assert out.tolist() == [7] * 5 + [3] * 27


# Atomics

CELLS = 8  # elements that the threads share


@cache
def combined(name, kind, old, value, compare):
    """The new bits of an element."""
    if name in ("exch", "cas"):
        return value if compare is None or compare == old else old
    if kind.endswith("x2"):
        one = kind.removesuffix("x2")
        parts = [combined(name, one, old >> s & 0xFFFF, value >> s & 0xFFFF, None) for s in (0, 16)]
        return parts[0] | parts[1] << 16
    x, y = number(old, kind), number(value, kind)
    result = {
        "add": x + y, "min": min(x, y), "max": max(x, y),
        "and": old & value, "or": old | value, "xor": old ^ value,
    }[name]  # fmt: skip
    return (
        rounded(result, kind) if kind[0] in "fb" and name == "add" else wrap(result, bits_of(kind))
    )


def numbers(kind, count):
    """Bits of small whole numbers if they are floats: sums are exact in any order."""
    if kind.endswith("x2"):
        one = kind.removesuffix("x2")
        return [a | b << 16 for a, b in zip(numbers(one, count), numbers(one, count), strict=True)]
    if kind in ("f16", "bf16", "f32", "f64"):
        return [rounded(float(RNG.randint(-8, 8)), kind) for _ in range(count)]
    return integers(bits_of(kind), count)


def copy(sheet, size, source, to):
    """Copy so many bytes of the first array to shared memory, or back, between two barriers."""
    address, words = sheet.register(32), vector([sheet.register(32) for _ in range(4)])
    wide = sheet.register(64)
    places = {"global": wide, "shared": address}
    sheet.line(f"shl.b32 {address}, %r0, 4;")
    sheet.line(f"mad.wide.u32 {wide}, %r0, 16, %rd3;")
    sheet.line("bar.sync 0;")
    assert size % (16 * THREADS) == 0
    for k in range(0, size, 16 * THREADS):
        sheet.line(f"ld.{source}.v4.b32 {words}, [{places[source]} + {k}];")
        sheet.line(f"st.{to}.v4.b32 [{places[to]} + {k}], {words};")
    sheet.line("bar.sync 0;")


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("base", ["atom", "red"])
def test_atomics(base, space):
    """Threads that meet at an element take turns, in the order of their numbers."""
    ops = forms(base, space)
    target = aligned(-(-len(ops) // 4) * 4 * CELLS * ROW).reshape(-1, CELLS * ROW)
    sheet = Sheet(target, shared=target.size)
    address = sheet.register(64)
    cell = [RNG.randrange(CELLS) for _ in range(THREADS)]
    sheet.line(f"mad.wide.u32 {address}, {sheet.load(32, cell)}, {ROW}, %rd3;")
    if space == "shared":
        copy(sheet, target.size, "global", "shared")
        address = sheet.register(32)
        sheet.line(f"mul.lo.u32 {address}, {sheet.load(32, cell)}, {ROW};")
    known, cases = {}, []
    for k, op in enumerate(ops):
        kind = op.rpartition(".")[2]
        name = next(
            p
            for p in op.split(".")
            if p in ("add", "min", "max", "and", "or", "xor", "exch", "cas")
        )
        bits, count = item_bits(op), items_of(op)
        size = bits // 8
        before = [numbers(kind, count) for _ in range(CELLS)]
        for c, items in enumerate(before):
            raw = b"".join(v.to_bytes(size, "little") for v in items)
            target[k, c * ROW : c * ROW + len(raw)] = np.frombuffer(raw, np.uint8)
        if kind not in known:
            values = [numbers(kind, THREADS) for _ in range(4)]
            known[kind] = values, [sheet.load(bits, v) for v in values]
        values, names = known[kind]
        compare = (
            [before[c][0] if RNG.random() < 0.5 else 7 for c in cell] if name == "cas" else None
        )
        operands = [f"[{address} + {k * CELLS * ROW}]"]
        operands += [sheet.load(bits, compare)] if compare else []
        operands.append(vector(names[:count]))
        results = [sheet.register(bits) for _ in range(count)] if base == "atom" else []
        sheet.line(f"{op} {', '.join([vector(results)] * bool(results) + operands)};")
        if results:
            sheet.keep(*((r, bits) for r in results))
        cases.append((op, name, kind, size, before, values, compare))
    if space == "shared":
        copy(sheet, target.size, "shared", "global")
    found = sheet.run(ops)
    for k, (op, name, kind, size, cells, values, compare) in enumerate(cases):
        for thread, c in enumerate(cell):
            for j in range(items_of(op)):
                old = cells[c][j]
                if base == "atom":
                    assert found[k][j][thread] == old, op
                other = None if compare is None else compare[thread]
                cells[c][j] = combined(name, kind, old, values[j][thread], other)
        for c, items in enumerate(cells):
            row = target[k, c * ROW : (c + 1) * ROW]
            assert [item(row, j, size) for j in range(len(items))] == items, op


def test_policies_are_numbers():
    sheet = Sheet()
    for op in forms("createpolicy"):
        sheet.add(op, ["1.0"], ["b64"])
    assert len(sheet.run(forms("createpolicy"))) == 4


# Asynchronous copies


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies(size, wait):
    """Bytes beyond those to read are zero."""
    ops = [op for op in COPIES if size == 16 or ".ca." in op]
    memory = rows(2)
    sheet, counts = Sheet(memory, shared=THREADS * 16), []
    source, target = sheet.register(64), sheet.register(32)
    sheet.line(f"mad.wide.u32 {source}, %r0, {ROW}, %rd3;")
    sheet.line(f"mul.lo.u32 {target}, %r0, 16;")
    for k, op in enumerate(ops):
        count = [RNG.randint(0, size) if k % 2 else size for _ in range(THREADS)]
        limit = f", {sheet.load(32, count)}" if k % 2 else ""
        hint = (limit or f", {size}") + ", %rd1" if "cache_hint" in op else limit
        sheet.line(f"{op} [{target}], [{source} + 16], {size}{hint};")
        sheet.line("cp.async.commit_group;" if "group" in wait else "")
        sheet.line(f"{wait} 0;" if "group" in wait else f"{wait};")
        words = [sheet.register(32) for _ in range(size // 4)]
        sheet.line(
            f"ld.shared{f'.v{len(words)}' * (len(words) > 1)}.b32 {vector(words)}, [{target}];"
        )
        sheet.keep(*((w, 32) for w in words))
        counts.append(count)
    found = sheet.run([*ops, wait, *([COMMIT] if "group" in wait else [])])
    for op, count, results in zip(ops, counts, found, strict=True):
        for thread in range(THREADS):
            row = memory[thread, 16 : 16 + count[thread]].tobytes()
            got = b"".join(word[thread].to_bytes(4, "little") for word in results)
            assert got == row + bytes(size - count[thread]), op


def test_groups_land_in_order():
    """wait_group n leaves the n newest groups in flight."""
    memory = rows(3)
    sheet = Sheet(memory, shared=THREADS * ROW)
    source, target = sheet.register(64), sheet.register(32)
    sheet.line(f"mad.wide.u32 {source}, %r0, {ROW}, %rd3;")
    sheet.line(f"mul.lo.u32 {target}, %r0, {ROW};")
    for k in range(4):
        sheet.line(f"cp.async.ca.shared.global [{target} + {4 * k}], [{source} + {4 * k}], 4;")
        sheet.line("cp.async.commit_group;")
    for k in range(4):
        sheet.line(f"cp.async.wait_group {3 - k};")
        word = sheet.register(32)
        sheet.line(f"ld.shared.b32 {word}, [{target} + {4 * k}];")
        sheet.keep((word, 32))
    for k, (got,) in enumerate(sheet.run()):
        assert got == memory.view(np.uint32)[:, k].tolist()
