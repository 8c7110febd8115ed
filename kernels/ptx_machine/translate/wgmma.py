"""Products of warpgroups. PTX ISA 9.7.15.

They become calls of the functions in ``ptx_machine/wgmma.py``.
"""

from __future__ import annotations

from ..syntax import Imm, Instruction, Reg, UnknownInstructionError, Vec
from ..wgmma import Product
from .forms import form
from .text import Text

_N = ",".join(str(n) for n in range(8, 257, 8))
_N_OF_INTEGERS = ",".join(map(str, (8, 16, 24, *range(32, 257, 16))))
_OP = "wgmma.mma_async.sync.aligned.m64n"


def product(i: Instruction) -> Product:
    """What a wgmma.mma_async of a known form says.

    Raises:
        UnknownInstructionError: it has not as many registers or numbers as its form asks for.
    """
    d, a, _, _, *more = i.operands
    shape, kind, a_kind, b_kind = i.parts[4:]
    n = int(shape[len("m64n") :].partition("k")[0])
    numbers = [(o.value + 2**31) % 2**32 - 2**31 for o in more if isinstance(o, Imm)]
    own = () if isinstance(a, Vec) else (0,)  # an operand says whether A is transposed
    expected = {"s32": 0}.get(kind, 2 + (1 + len(own)) * (a_kind in ("f16", "bf16")))
    signs, trans = numbers[:2], numbers[2:]
    names = _names(d)
    good = len(names) == (n // 4 if kind == "f16" else n // 2) and (own or len(_names(a)) == 4)
    good = good and len(numbers) == len(more) == expected
    if not good or any(abs(s) != 1 for s in signs) or any(t not in (0, 1) for t in trans):
        raise UnknownInstructionError(f"operands of {i}")
    return Product(
        n, kind, a_kind, b_kind, names, _names(a),
        negative=bool(signs) and signs[0] != signs[1],
        trans_a=len(trans) == 2 and bool(trans[0]), trans_b=bool(trans) and bool(trans[-1]),
    )  # fmt: skip


def _names(operand: object) -> tuple[str, ...]:
    items = operand.items if isinstance(operand, Vec) else ()
    return tuple(r.name for r in items if isinstance(r, Reg))


@form(
    f"{_OP}{{{_N}}}k16.{{f32.bf16.bf16,f32.f16.f16,f16.f16.f16}}",
    f"{_OP}{{{_N}}}k8.f32.tf32.tf32",
    f"{_OP}{{{_N}}}k32.{{f16,f32}}.{{e4m3,e5m2}}.{{e4m3,e5m2}}",
    f"{_OP}{{{_N_OF_INTEGERS}}}k32.s32.{{s8,u8}}.{{s8,u8}}",
)
def _mma_async(w: Text) -> None:
    w.refuse_guard()
    name = f"P_{w.i.index}"
    w.constants[name] = product(w.i)
    d, a, b, scale = w.i.operands[:4]
    assert isinstance(d, Vec)
    left = f"[{w.arrays(a.items, 'b32')}]" if isinstance(a, Vec) else w.array(a, "b64")
    w.call(
        "mma_async", name, f"[{w.arrays(d.items, 'b32')}]", left, w.array(b, "b64"),
        w.array(scale, "pred"), repr(w.uses.unfenced.get(w.i.index, ())),
        repr(w.uses.copied.get(w.i.index, ())),
    )  # fmt: skip


@form("wgmma.fence.sync.aligned")
def _fence(w: Text) -> None:
    """What it orders is known from the text: see wgmma_registers.py."""
    w.refuse_guard()
    w.line(f"g.whole_warps(I[{w.i.index}])")


@form("wgmma.commit_group.sync.aligned")
def _commit_group(w: Text) -> None:
    w.refuse_guard()
    w.call("commit_group")


@form("wgmma.wait_group.sync.aligned")
def _wait_group(w: Text) -> None:
    w.refuse_guard()
    landing = w.uses.landing.get(w.i.index, ())
    held = ", ".join(f"{r.name!r}: {r.name}" for r in landing)
    w.call("wait_group", str(w.number(w.i.operands[0])), f"{{{held}}}", result="T0")
    for r in landing:
        w.line(f"{r.name} = T0[{r.name!r}]")
        w.types.pop(r.name, None)
