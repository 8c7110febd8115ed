"""Every form that sm_90 adds: spellings of one thing are translated alike, and products all run.

Their meaning is tried in test_tma.py, test_async_*.py and test_wgmma.py, in one spelling each.
"""

import re

from ptx_machine.parse import parse
from ptx_machine.translate import FORMS, Program
from ptx_machine.translate.wgmma import product
from tests.ptx_machine import test_wgmma
from tests.ptx_machine.handmade import text
from tests.ptx_machine.sheet import assemble

PRODUCTS = [op for op in FORMS if op.startswith("wgmma.mma_async")]
# Hints, and orders and scopes of which the machine takes the strongest.
SAYS_NOTHING = re.compile(
    r"\.(tile|L2::cache_hint|acquire|release|relaxed|cta|cluster|gpu|sys)(?=\.|$)|::(cta|cluster)\b"
)
OPERANDS = {  # of an opcode that begins so; the first that fits
    r"cp.*\.prefetch": "[%rd0, {{{coordinates}}}]",
    r"cp.*\.commit": "",
    r"cp.*\.wait": "0",
    r"cp.*\.mbarrier": "[%r1], [%rd0, {{{coordinates}}}], [%r2]",
    r"cp": "[%rd0, {{{coordinates}}}], [%r1]",
    r"tensormap\.replace": "[%r1], {ordinal}{value}",
    r"tensormap\.cp": "[%rd0], [%r1], 128",
    r"fence.*\.acquire": "[%rd0], 128",
    r"prefetch": "[%rd0]",
    r"mbarrier\.init": "[%r1], %r2",
    r"mbarrier\.inval": "[%r1]",
    r"mbarrier\.expect_tx": "[%r1], %r2",
    r"mbarrier\.arrive\.expect_tx": "_, [%r1], %r2",
    r"mbarrier\.arrive": "_, [%r1]",
    r"mbarrier": "%p1, [%r1], %r2",
    r"": "",
}


def instruction(op):
    form = next(form for start, form in OPERANDS.items() if re.match(start, op))
    rank = re.search(r"\.(\d)d\b", op)
    coordinates = ", ".join(f"%r{10 + k}" for k in range(int(rank[1]) if rank else 0))
    ordinal = "0, " if re.search(r"dim|stride", op) else ""
    value = "%rd1" if op.endswith("b64") else "%r2"
    if re.search(r"mode|layout|elemtype", op):
        value = "0"
    operands = form.format(coordinates=coordinates, ordinal=ordinal, value=value)
    return f"{op} {operands}{', %rd2' if 'cache_hint' in op else ''};"


def translations(ops):
    """What each opcode becomes, without the numbers of instructions."""
    whole = text("\n".join(map(instruction, ops)))
    assemble(whole)
    source = Program(parse(whole)).source
    found = dict.fromkeys(ops, "")
    op = None
    for line in map(str.strip, source.splitlines()):
        if line.startswith("# "):
            op = line.removeprefix("# ").partition(" ")[0].rstrip(";")
        elif line.startswith(("def ", "g.regs = ")):
            op = None
        elif op in found:
            found[op] += re.sub(r"I\[\d+\]", "I", line) + "\n"
    return found


def plain(op):
    """The form in its shortest spelling."""
    for proxy_order, name in (("generic.acquire", "acquired"), ("generic.release", "released")):
        op = op.replace(proxy_order, name)
    return SAYS_NOTHING.sub("", op.replace("test_wait", "try_wait"))


def test_spellings_of_a_form_are_translated_alike():
    ops = [op for op in FORMS if FORMS[op].__module__.endswith(".bulk")]
    meanings = {}
    for op, meaning in translations(ops).items():
        assert meanings.setdefault(plain(op), meaning) == meaning, op
    silent = {op for op, meaning in meanings.items() if not meaning}
    assert silent == {
        "fence.proxy.async.global", "fence.proxy.tensormap::released", "fence.mbarrier_init",
        "prefetch.tensormap", "griddepcontrol.launch_dependents", "griddepcontrol.wait",
        *(f"cp.async.bulk.prefetch.tensor.{n}d.L2.global" for n in range(1, 6)),
    }  # fmt: skip
    for n in range(1, 6):
        store = meanings[f"cp.async.bulk.tensor.{n}d.global.shared.bulk_group"]
        for name in ("add", "min", "max", "and", "or", "xor"):
            reduction = meanings[
                f"cp.reduce.async.bulk.tensor.{n}d.global.shared.{name}.bulk_group"
            ]
            assert reduction == store.replace("''", repr(name))


def test_products_are_what_their_opcodes_say():
    lines, short = [], []
    for op in PRODUCTS:
        n, d, a = re.search(r"m64n(\d+)k\d+\.(\w+)\.(\w+)", op).groups()
        registers = ", ".join(f"%r{k}" for k in range(int(n) // (4 if d == "f16" else 2)))
        tail = "" if d == "s32" else ", 1, -1" + (", 0, 1" if a in ("f16", "bf16") else "")
        lines.append(f"{op} {{{registers}}}, %rd0, %rd1, %p0{tail};")
        short += lines[-1:] * (int(n) <= 24)  # all of them take the assembler seconds
    assemble(text("\n".join(short)))
    made = parse(text("\n".join(lines))).instructions[: len(PRODUCTS)]
    for op, p in zip(PRODUCTS, map(product, made), strict=True):
        assert op.endswith(f".m64n{p.n}k{256 // _bits(p.a)}.{p.d}.{p.a}.{p.b}")
        assert p.negative == (p.d != "s32") and not p.trans_a
        assert p.trans_b == (p.a in ("f16", "bf16"))


def _bits(kind):
    return {"tf32": 32, "bf16": 16, "f16": 16}.get(kind, 8)


def test_products_of_all_types_and_sizes_run():
    assert set(test_wgmma.TESTED) == {op for op in FORMS if op.startswith("wgmma.")}
