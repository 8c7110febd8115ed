"""Every form of what a warp does together, by the ISA's descriptions of single threads."""

from fractions import Fraction

import numpy as np
import pytest

from ptx_machine import ExecutionError, MemcheckError, UnknownInstructionError
from ptx_machine.translate import FORMS
from tests.ptx_machine.exact import number, rounded, signed, wrap
from tests.ptx_machine.samples import RNG, integers
from tests.ptx_machine.sheet import THREADS, Sheet

BASES = ("shfl", "vote", "redux", "mma", "ldmatrix", "stmatrix", "elect", "setmaxnreg")
WARPS = [range(w, w + 32) for w in range(0, THREADS, 32)]


def forms(base):
    return [op for op in FORMS if op.partition(".")[0] == base]


TESTED = [op for base in BASES for op in forms(base)]


def partner(mode, lane, b, c):
    """(lane that a lane reads, predicate): the pseudo-code of shfl.sync in the PTX ISA."""
    b, c, segment = b & 31, c & 31, c >> 8 & 31
    largest = (lane & segment) | (c & ~segment)
    j = {
        "up": lane - b, "down": lane + b, "bfly": lane ^ b,
        "idx": (lane & segment) | (b & ~segment),
    }[mode]  # fmt: skip
    valid = j >= largest if mode == "up" else j <= largest
    return (j if valid else lane), valid


@pytest.mark.parametrize("op", forms("shfl"))
def test_shfl(op):
    mode = op.split(".")[2]
    sheet, cases = Sheet(), []
    for width in (32, 16, 8, 2):
        a = integers(32)
        b = [RNG.choice([0, 1, 2, 3, 16, 31, RNG.getrandbits(32)]) for _ in range(THREADS)]
        clamp = (0 if mode == "up" else 31) | (32 - width) << 8
        d, p = sheet.register(32), sheet.register(1)
        names = sheet.load(32, a), sheet.load(32, b)
        sheet.line(f"{op} {d}|{p}, {names[0]}, {names[1]}, {clamp}, -1;")
        sheet.keep((d, 32), (p, 1))
        sheet.add(op, [names[0], names[1], str(clamp), "0xffffffff"], ["b32"])
        cases += [(a, b, clamp), (a, b, clamp)]
    for (a, b, clamp), results in zip(cases, sheet.run([op]), strict=True):
        for warp in WARPS:
            for t in warp:
                source, valid = partner(mode, t % 32, b[t], clamp)
                assert results[0][t] == a[warp[source]]
                assert len(results) == 1 or results[1][t] == valid


def test_vote():
    sheet, cases = Sheet(), []
    for chances in (0.0, 0.5, 1.0):
        votes = [int(RNG.random() < chances) for _ in range(THREADS)]
        for op in forms("vote"):
            bits = 32 if op.endswith("b32") else 1
            sheet.add(op, [("b1", votes), "-1"], [f"b{bits}"])
            cases.append((op, votes))
    for (op, votes), (results,) in zip(cases, sheet.run(forms("vote")), strict=True):
        for warp in WARPS:
            mine = [votes[t] for t in warp]
            want = {
                "all": all(mine), "any": any(mine), "uni": len(set(mine)) == 1,
                "ballot": sum(v << k for k, v in enumerate(mine)),
            }[op.split(".")[2]]  # fmt: skip
            assert {results[t] for t in warp} == {want}, op


def test_redux():
    sheet, cases = Sheet(), []
    for op in forms("redux"):
        values = integers(32)
        sheet.add(op, [("b32", values), "-1"], ["b32"])
        cases.append((op, values))
    for (op, values), (results,) in zip(cases, sheet.run(forms("redux")), strict=True):
        name, kind = op.split(".")[2:]
        for warp in WARPS:
            mine = [values[t] for t in warp]
            if name in ("and", "or", "xor"):
                want = mine[0]
                for v in mine[1:]:
                    want = {"and": want & v, "or": want | v, "xor": want ^ v}[name]
            else:
                held = [signed(v, 32) if kind == "s32" else v for v in mine]
                want = wrap({"add": sum, "min": min, "max": max}[name](held), 32)
            assert {results[t] for t in warp} == {want}, op


# Tensor cores: which element a register holds, as the ISA lists it ("Matrix Fragments for mma").


EACH = dict.fromkeys(("tf32", "f32", "f64", "s32"), 1) | {"f16": 2, "bf16": 2}  # in a register
EACH |= dict.fromkeys(("e4m3", "e5m2", "s8", "u8"), 4)


def a_place(kind, depth, lane, i):
    """(row, column) of element a_i."""
    group, tid = lane // 4, lane % 4
    if kind in ("tf32", "f64"):
        return group + 8 * (i % 2), tid + 4 * (i // 2)
    if EACH[kind] == 4:
        return group + (8 if 4 <= i < 8 or i >= 12 else 0), tid * 4 + (i & 3) + (
            16 if i >= 8 else 0
        )
    row = group + (8 if i % 4 >= 2 else 0)
    return row, tid * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(kind, depth, lane, i):
    """(row, column) of element b_i."""
    group, tid = lane // 4, lane % 4
    if kind in ("tf32", "f64"):
        return tid + 4 * i, group
    if EACH[kind] == 4:
        return tid * 4 + (i & 3) + (16 if i >= 4 else 0), group
    return tid * 2 + (i & 1) + (8 if i >= 2 else 0), group


def c_place(lane, i):
    return lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2


def short_numbers(kind):
    """Numbers whose products and sums are exact in 53 bits, and in float16 whole."""
    if kind in ("s8", "u8"):
        return RNG.getrandbits(8)
    if EACH[kind] == 4:
        return rounded(Fraction(RNG.randint(-7, 7), 2 ** RNG.randint(0, 3)), kind)
    return rounded(Fraction(RNG.randint(-255, 255), 2 ** RNG.randint(0, 6)), kind)


def large_numbers(kind):
    """Of C: bits fall off in float32, sums pass the ends of s32."""
    if kind == "s32":
        return RNG.choice([0x7FFFFFF0, 0x80000010, RNG.getrandbits(32)])
    if kind == "f16":
        return rounded(Fraction(RNG.randint(-(2**10), 2**10)), kind)
    return rounded(Fraction(RNG.randint(-(2**20), 2**20)) * 2 ** RNG.randint(0, 12), kind)


def words_of(columns, kind):
    """Registers of a fragment, by thread, given its elements in order."""
    each, bits = EACH[kind], 32 // EACH[kind]
    made = []
    for r in range(0, len(columns), each):
        held = zip(*columns[r : r + each], strict=True)
        made.append([sum(v << bits * k for k, v in enumerate(values)) for values in held])
    if kind == "tf32":  # the low bits are ignored
        made = [[v << 13 | RNG.getrandbits(13) for v in words] for words in made]
    return made


def sum_of(exact, kind, saturates):
    """The bits of a result: cut to float32, rounded to float16 and float64, or of 32 bits."""
    if kind != "s32":
        return rounded(exact, kind, "rz" if kind == "f32" else "rn")
    return wrap(int(min(max(exact, -(2**31)), 2**31 - 1) if saturates else exact), 32)


@pytest.mark.parametrize("op", forms("mma"))
def test_mma(op):
    """The exact sum: with a large C, bits fall off."""
    shape, (to, *kinds, _) = op.split(".")[3], op.split(".")[-4:]
    rows, depth = int(shape[1:].partition("n")[0]), int(shape.rpartition("k")[2])
    sheet, size = Sheet(), 64 if to == "f64" else 32
    counts = {"a": (rows * depth, kinds[0]), "b": (8 * depth, kinds[1]), "c": (rows * 8, to)}
    elements, names = {}, {}
    for side, (count, kind) in counts.items():
        pick = large_numbers if side == "c" else short_numbers
        elements[side] = [[pick(kind) for _ in range(THREADS)] for _ in range(count // 32)]
        names[side] = [sheet.load(size, words) for words in words_of(elements[side], kind)]
    d = [sheet.register(size) for _ in names["c"]]
    operands = [d, *names.values()]
    sheet.line(f"{op} " + ", ".join(f"{{{', '.join(x)}}}" for x in operands) + ";")
    sheet.keep(*((r, size) for r in d))
    (results,) = sheet.run([op])
    for warp in WARPS:
        left, right = {}, {}
        for t in warp:
            for place, held, side, kind in (
                (a_place, left, "a", kinds[0]), (b_place, right, "b", kinds[1]),
            ):  # fmt: skip
                for i, column in enumerate(elements[side]):
                    held[place(kind, depth, t % 32, i)] = Fraction(number(column[t], kind))
        assert (len(left), len(right)) == (rows * depth, 8 * depth)
        for t in warp:
            for i, column in enumerate(elements["c"]):
                row, j = c_place(t % 32, i)
                exact = Fraction(number(column[t], to))
                exact += sum(left[row, k] * right[k, j] for k in range(depth))
                each = 2 if to == "f16" else 1
                got = results[i // each][t] >> 16 * (i % each) & (1 << size // each) - 1
                assert got == sum_of(exact, to, ".satfinite" in op)


@pytest.mark.parametrize("op", forms("ldmatrix"))
def test_ldmatrix(op):
    """Thread 8 j + i gives row i of matrix j; thread t gets row t / 4, columns 2 (t % 4) and on."""
    count = int(op.split(".")[4][1:])
    memory = np.random.default_rng(4).integers(0, 2**16, (THREADS, 8), np.uint16)
    sheet = Sheet(memory, shared=THREADS * 16)
    source, target = sheet.register(64), sheet.register(32)
    words = [sheet.register(32) for _ in range(4)]
    sheet.line(f"mad.wide.u32 {source}, %r0, 16, %rd3;")
    sheet.line(f"mul.lo.u32 {target}, %r0, 16;")
    sheet.line(f"ld.global.v4.b32 {{{', '.join(words)}}}, [{source}];")
    sheet.line(f"st.shared.v4.b32 [{target}], {{{', '.join(words)}}};")
    sheet.line("bar.sync 0;")
    places = [RNG.randrange(THREADS) for _ in range(THREADS)]
    address = sheet.load(32, [16 * p for p in places])
    d = [sheet.register(32) for _ in range(count)]
    sheet.line(f"{op} {{{', '.join(d)}}}, [{address}];")
    sheet.keep(*((r, 32) for r in d))
    (results,) = sheet.run([op])
    for warp in WARPS:
        for j in range(count):
            matrix = [memory[places[warp[8 * j + i]]] for i in range(8)]
            for t in range(32):
                row, column = t // 4, 2 * (t % 4)
                if ".trans." in op:
                    pair = matrix[column][row], matrix[column + 1][row]
                else:
                    pair = matrix[row][column], matrix[row][column + 1]
                assert results[j][warp[t]] == int(pair[0]) | int(pair[1]) << 16


@pytest.mark.parametrize("op", forms("stmatrix"))
def test_stmatrix(op):
    """The opposite: what thread t holds of matrix j goes to rows that threads 8 j + i name."""
    count, transposed = int(op.split(".")[4][1:]), ".trans." in op
    sheet = Sheet(shared=THREADS * 16)
    held = [integers(32) for _ in range(count)]
    places = RNG.sample(range(THREADS), THREADS)
    registers = ", ".join(sheet.load(32, v) for v in held)
    own = sheet.load(32, [16 * t for t in range(THREADS)])
    words = [sheet.register(32) for _ in range(4)]
    sheet.line(f"st.shared.v4.b32 [{own}], {{0, 0, 0, 0}};")
    sheet.line("bar.sync 0;")
    sheet.line(f"{op} [{sheet.load(32, [16 * p for p in places])}], {{{registers}}};")
    sheet.line("bar.sync 0;")
    sheet.line(f"ld.shared.v4.b32 {{{', '.join(words)}}}, [{own}];")
    sheet.keep(*((w, 32) for w in words))
    (results,) = sheet.run([op])
    want = [[0] * 8 for _ in range(THREADS)]
    for warp in WARPS:
        for j in range(count):
            for t in range(32):
                row, column, word = t // 4, 2 * (t % 4), held[j][warp[t]]
                for k, half in enumerate((word & 0xFFFF, word >> 16)):
                    at = (column + k, row) if transposed else (row, column + k)
                    want[places[warp[8 * j + at[0]]]][at[1]] = half
    for t in range(THREADS):
        halves = [half for w in results for half in (w[t] & 0xFFFF, w[t] >> 16)]
        assert halves == want[t], (op, t)


def test_elect_and_setmaxnreg():
    """One thread of each warp is chosen; numbers of registers change nothing."""
    sheet = Sheet()
    leader, chosen = sheet.register(32), sheet.register(1)
    for op in forms("setmaxnreg"):
        sheet.line(f"{op} 40;")
    sheet.line(f"elect.sync {leader}|{chosen}, -1;")
    sheet.keep((leader, 32), (chosen, 1))
    ((leaders, flags),) = sheet.run(forms("elect") + forms("setmaxnreg"))
    for warp in WARPS:
        (one,) = {leaders[t] for t in warp}
        assert [flags[t] for t in warp] == [int(lane == one) for lane in range(32)]


def test_the_thread_that_gives_a_wrong_row_is_named():
    for instruction in ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r0};",
                        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];"):  # fmt: skip
        sheet = Sheet(shared=16)
        for text in ("mov.u32 %r1, 0;", "setp.eq.u32 %p1, %r0, 39;", "@%p1 mov.u32 %r1, 4;"):
            sheet.line(text)
        sheet.line(instruction)
        with pytest.raises(MemcheckError, match=r"16 bytes at byte 4 .*warp 1, lane 7$"):
            sheet.run()


COLLECTIVES = {
    "shfl": "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;",
    "vote": "vote.sync.ballot.b32 %r2, %p1, -1;",
    "redux": "redux.sync.add.s32 %r2, %r1, -1;",
    "mma": "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r2, %r3, %r4, %r5}, {%r1, %r1}, "
    "{%r1}, {%r1, %r1, %r1, %r1};",
    "ldmatrix": "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [0];",
    "stmatrix": "stmatrix.sync.aligned.m8n8.x1.shared.b16 [0], {%r2};",
    "elect": "elect.sync %r2|%p2, -1;",
    "setmaxnreg": "setmaxnreg.dec.sync.aligned.u32 40;",
}


@pytest.mark.parametrize("base", BASES)
def test_part_of_a_warp_is_an_error(base):
    """The threads that went elsewhere are missed, and the message says where."""
    sheet = Sheet(shared=16)
    for text in ("mov.u32 %r1, 0;", "setp.lt.u32 %p1, %r0, 40;", "@%p1 bra $L__IN;", "ret;"):
        sheet.line(text)
    sheet.line("$L__IN:")
    sheet.line(COLLECTIVES[base])
    with pytest.raises(ExecutionError, match=r"8 threads of a warp are here.*warp 1, lane 0"):
        sheet.run()
    guarded = Sheet(shared=16)
    guarded.line("setp.lt.u32 %p1, %r0, 40;")
    guarded.line(f"@%p1 {COLLECTIVES[base]}")
    with pytest.raises(UnknownInstructionError, match=f"with a guard: @%p1 {base}"):
        guarded.run()


def test_members_other_than_all_are_not_known():
    sheet = Sheet()
    sheet.line("shfl.sync.bfly.b32 %r2, %r0, 1, 31, 65535;")
    with pytest.raises(UnknownInstructionError, match="part of a warp: shfl"):
        sheet.run()


def test_members_in_a_register():
    """Compilers put the mask of all into one before a loop; other masks are seen as they come."""
    sheet = Sheet()
    everybody, some = (
        sheet.load(32, [2**32 - 1] * THREADS),
        sheet.load(32, [2**32 - 1] * 39 + [7] * 25),
    )
    sheet.add("redux.sync.add.s32", ["%r0", everybody], ["b32"])
    assert sheet.run() == [[[496] * 32 + [1520] * 32]]
    sheet.line(f"redux.sync.add.s32 %r2, %r0, {some};")
    with pytest.raises(UnknownInstructionError, match=r"part of a warp: redux.*warp 1, lane 7$"):
        sheet.run()
