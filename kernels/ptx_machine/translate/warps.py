"""What the threads of a warp do together: shuffles, votes, reductions, matrices, tensor cores.

PTX ISA 9.7.9.6 (shfl), 9.7.13 (vote, redux, elect), 9.7.14 (mma, ldmatrix, stmatrix), 9.7.19
(setmaxnreg).
"""

from __future__ import annotations

from ..syntax import Imm, Operand, Pair, Vec
from .forms import form
from .text import Text

_ALL = (-1, 0xFFFFFFFF)


def collective(w: Text, members: Operand | None = None) -> None:
    """Whole warps only; `members` is the operand that names the threads."""
    w.refuse_guard()
    if isinstance(members, Imm) and members.value not in _ALL:
        raise w.unknown("by part of a warp")
    w.line(f"g.whole_warps(I[{w.i.index}])")
    if members is not None and not isinstance(members, Imm):
        w.line(f"g.all_members(I[{w.i.index}], {w.array(members, 'b32')})")


@form("shfl.sync.{up,down,bfly,idx}.b32")
def _shfl(w: Text) -> None:
    d, a, b, c, members = w.i.operands
    collective(w, members)
    read = w.arrays((a, b, c), "b32")
    w.line(f"T0, T1 = shuffle({w.parts[2]!r}, {read})")
    w.varies = True
    if isinstance(d, Pair):
        w.set(d.first, "T0", "b32")
        w.set(d.second, "T1", "pred")
    else:
        w.set(d, "T0", "b32")


@form("vote.sync.{all,any,uni}.pred", "vote.sync.ballot.b32")
def _vote(w: Text) -> None:
    d, a, members = w.i.operands
    collective(w, members)
    w.set(d, f"vote({w.parts[2]!r}, {w.array(a, 'pred')})", w.kind)


@form("redux.sync.{add,min,max}.{u32,s32}", "redux.sync.{and,or,xor}.b32")
def _redux(w: Text) -> None:
    d, a, members = w.i.operands
    collective(w, members)
    w.set(d, f"reduce_warp({w.parts[2]!r}, {w.array(a, w.kind)})", w.kind)


def _items(w: Text, operand: Operand) -> tuple[Operand, ...]:
    if not isinstance(operand, Vec):
        raise w.unknown()
    return operand.items


@form(
    "mma.sync.aligned.m16n8k{8,16}.row.col.f32.{f16.f16,bf16.bf16}.f32",
    "mma.sync.aligned.m16n8k{8,16}.row.col.f16.f16.f16.f16",
    "mma.sync.aligned.m16n8k{4,8}.row.col.f32.tf32.tf32.f32",
    "mma.sync.aligned.m16n8k32.row.col.f32.{e4m3,e5m2}.{e4m3,e5m2}.f32",
    "mma.sync.aligned.m16n8k{16,32}.row.col[.satfinite].s32.{s8,u8}.{s8,u8}.s32",
    "mma.sync.aligned.{m8n8k4,m16n8k4,m16n8k8,m16n8k16}.row.col.f64.f64.f64.f64",
)
def _mma(w: Text) -> None:
    d, a, b, c = (_items(w, operand) for operand in w.i.operands)
    to, left, right, _ = w.parts[-4:]
    depth = int(w.parts[3].rpartition("k")[2])
    collective(w)
    bits = "b64" if to == "f64" else "b32"
    read = ", ".join(f"[{w.arrays(x, bits)}]" for x in (a, b, c))
    kinds = f"{(left, right, to)}, {depth}, {'satfinite' in w.parts}"
    w.set_many(list(d), f"mma({read}, {kinds})", bits)


@form("ldmatrix.sync.aligned.m8n8.{x1,x2,x4}[.trans].shared[::cta].b16")
def _ldmatrix(w: Text) -> None:
    d, memory = w.i.operands
    collective(w)
    targets: list[Operand] = list(d.items) if isinstance(d, Vec) else [d]
    if f"x{len(targets)}" not in w.parts:
        raise w.unknown()
    arguments = f"{w.address(memory, 32)}, {len(targets)}, {'trans' in w.parts}"
    w.set_many(targets, f"load_matrix(g, I[{w.i.index}], {arguments})", "b32")


@form("stmatrix.sync.aligned.m8n8.{x1,x2,x4}[.trans].shared[::cta].b16")
def _stmatrix(w: Text) -> None:
    memory, source = w.i.operands
    collective(w)
    sources = source.items if isinstance(source, Vec) else (source,)
    if f"x{len(sources)}" not in w.parts:
        raise w.unknown()
    address = w.address(memory, 32)
    w.call("store_matrix", address, f"[{w.arrays(sources, 'b32')}]", str("trans" in w.parts))


@form("elect.sync")
def _elect(w: Text) -> None:
    pair, members = w.i.operands
    if not isinstance(pair, Pair):
        raise w.unknown()
    collective(w, members)
    w.varies = True
    w.line("T0, T1 = elect(g)")
    w.set(pair.first, "T0", "b32")
    w.set(pair.second, "T1", "pred")


@form("setmaxnreg.{inc,dec}.sync.aligned.u32")
def _setmaxnreg(w: Text) -> None:
    """Registers move between warps: nothing that can be seen here."""
    collective(w)
    count = w.number(w.i.operands[0])
    if count % 8 or not 24 <= count <= 256:
        raise w.unknown("a number of registers that there is not")
