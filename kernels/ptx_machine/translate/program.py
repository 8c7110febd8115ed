"""A kernel ready to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import (
    collectives,
    copies,
    formats,
    global_access,
    local_memory,
    mbarrier,
    proxies,
    shared_access,
    shuffles,
    tensor_cores,
    tma,
    values,
    wgmma,
)
from ..liveness import liveness, reads_and_writes, successors
from ..loops import Order
from ..syntax import Kernel
from ..wgmma_registers import analyse
from .writer import Writer

if TYPE_CHECKING:
    from ..group import Group

# Translated code calls the functions of these modules by name.
_CALLED = (
    values, formats, shuffles, tensor_cores, global_access, shared_access, local_memory, copies,
    wgmma, tma, mbarrier, proxies, collectives,
)  # fmt: skip


class Program:
    """A kernel ready to run: `functions[b]` runs block b for a group of threads.

    A function returns which threads take the jump at the block's end, or leave there.

    Raises:
        UnknownInstructionError: names an instruction that can't be translated.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.successors = [successors(kernel, b) for b in range(len(kernel.blocks))]
        uses = analyse(kernel, self.successors, reads_and_writes)
        self.live = liveness(kernel, self.successors, uses.landing)
        self.order = Order(self.successors)
        writer = Writer(kernel, self.live, uses)
        self.source = writer.source()
        space: dict[str, Any] = {}
        for module in _CALLED:
            space |= {name: x for name, x in vars(module).items() if not name.startswith("_")}
        space |= {"np": np, "I": kernel.instructions} | writer.constants
        exec(compile(self.source, f"<{kernel.name}>", "exec"), space)
        self.functions: list[Callable[[Group], Any]] = [
            space[f"block_{block.index}"] for block in kernel.blocks
        ]
