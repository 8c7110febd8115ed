"""TMA and mbarriers. PTX ISA 9.7.9 (cp.async.bulk, tensormap), 9.7.13 (mbarrier, fence.proxy).

They become calls of the functions in ``tma.py``, ``mbarrier.py`` and ``proxies.py``. Of tensors,
only the tile mode is known; and no clusters of CTAs.
"""

from __future__ import annotations

from ..syntax import Mem, Operand, Reg
from ..tensor_map import FIELDS
from .forms import form
from .text import Text

_REDUCTIONS = ("add", "min", "max", "and", "or", "xor")
_LONG_FIELDS = ("global_address", "global_stride")
_FIELDS = ",".join(name for name in FIELDS if name not in _LONG_FIELDS)


def _tensor(w: Text, operand: Operand) -> tuple[str, str]:
    """(address of the tensor map, list of coordinates) of ``[map, {c0, c1}]``."""
    if not isinstance(operand, Mem):
        raise w.unknown()
    address = w.address(Mem(operand.base, operand.offset), 64)
    return address, f"[{w.arrays(operand.coords, 's32')}]"


@form(
    "cp.async.bulk.tensor.{1d,2d,3d,4d,5d}.{shared::cluster,shared::cta}.global[.tile]"
    ".mbarrier::complete_tx::bytes[.L2::cache_hint]"
)
def _load(w: Text) -> None:
    target, source, barrier = w.i.operands[:3]
    address, corner = _tensor(w, source)
    w.call("bulk_load", w.address(target, 32), address, corner, w.address(barrier, 32), w.guard())


@form(
    "cp.async.bulk.tensor.{1d,2d,3d,4d,5d}.global.shared::cta[.tile].bulk_group[.L2::cache_hint]",
    "cp.reduce.async.bulk.tensor.{1d,2d,3d,4d,5d}.global.shared::cta"
    f".{{{','.join(_REDUCTIONS)}}}[.tile].bulk_group[.L2::cache_hint]",
)
def _store(w: Text) -> None:
    reduction = next((name for name in _REDUCTIONS if name in w.parts), "")
    address, corner = _tensor(w, w.i.operands[0])
    source = w.address(w.i.operands[1], 32)
    w.call("bulk_store", address, corner, source, repr(reduction), w.guard())


@form("cp.async.bulk.commit_group")
def _commit(w: Text) -> None:
    w.line(f"bulk_commit(g, {w.guard()})")


@form("cp.async.bulk.wait_group[.read]")
def _wait(w: Text) -> None:
    w.line(f"bulk_wait(g, {w.number(w.i.operands[0])}, {'read' in w.parts}, {w.guard()})")


@form(
    f"tensormap.replace.tile.{{{_FIELDS}}}.shared::cta.b1024.b32",
    f"tensormap.replace.tile.{{{','.join(_LONG_FIELDS)}}}.shared::cta.b1024.b64",
)
def _replace(w: Text) -> None:
    address, *ordinal, value = w.i.operands
    number = w.number(ordinal[0]) if ordinal else 0
    where, new = w.address(address, 32), w.array(value, w.kind)
    w.call("replace_in_map", repr(w.parts[3]), where, str(number), new, w.guard())


@form(
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release"
    ".{cta,cluster,gpu,sys}.sync.aligned"
)
def _copy_map(w: Text) -> None:
    target, source = w.i.operands[:2]
    w.call("copy_map", w.address(target, 64), w.address(source, 32), w.guard())


@form("fence.proxy.tensormap::generic.acquire.{cta,cluster,gpu,sys}")
def _fence_map(w: Text) -> None:
    w.line(f"fence_map(g, {w.address(w.i.operands[0], 64)}, {w.guard()})")


@form("fence.proxy.async[.{shared::cta,shared::cluster}]")
def _fence_async(w: Text) -> None:
    w.line(f"fence_async(g, {w.guard()})")


@form(
    "fence.proxy.async.global",
    "fence.proxy.tensormap::generic.release.{cta,cluster,gpu,sys}",
    "fence.mbarrier_init.release.cluster",
    "prefetch.tensormap",
    "cp.async.bulk.prefetch.tensor.{1d,2d,3d,4d,5d}.L2.global[.tile][.L2::cache_hint]",
    "griddepcontrol.{launch_dependents,wait}",
)
def _nothing(w: Text) -> None:
    """What they order or fetch is not followed here; launches do not overlap."""


# mbarriers


@form("mbarrier.init.shared[::cta].b64")
def _init(w: Text) -> None:
    address, count = w.i.operands
    w.call("mbarrier_init", w.address(address, 32), w.array(count, "u32"), w.guard())


@form("mbarrier.inval.shared[::cta].b64")
def _inval(w: Text) -> None:
    w.call("mbarrier_inval", w.address(w.i.operands[0], 32), w.guard())


@form(
    "mbarrier.arrive[.expect_tx].shared[::cta].b64",
    "mbarrier.arrive[.expect_tx].{release,relaxed}.{cta,cluster}.shared[::cta].b64",
    "mbarrier.expect_tx.shared[::cta].b64",
    "mbarrier.expect_tx.relaxed.{cta,cluster}.shared[::cta].b64",
)
def _arrive(w: Text) -> None:
    operands = list(w.i.operands)
    if not isinstance(operands[0], Mem):
        state = operands.pop(0)
        if isinstance(state, Reg):
            raise w.unknown("the state of a phase in a register")
    number = w.array(operands[1], "u32") if len(operands) > 1 else "None"
    count, bytes_ = ("None", number) if "expect_tx" in w.parts else (number, "None")
    arrives = str(w.parts[1] == "arrive")
    w.call("mbarrier_arrive", w.address(operands[0], 32), count, bytes_, arrives, w.guard())


@form(
    "mbarrier.{try_wait,test_wait}.parity.shared[::cta].b64",
    "mbarrier.{try_wait,test_wait}.parity.{acquire,relaxed}.{cta,cluster}.shared[::cta].b64",
)
def _try_wait(w: Text) -> None:
    done, address, parity = w.i.operands[:3]
    where = w.address(address, 32)
    w.call("mbarrier_wait", where, w.array(parity, "u32"), w.guard(), result="T0")
    w.varies = True
    w.set(done, "T0", "pred")
