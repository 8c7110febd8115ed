"""What a benchmark compares and what comes of it, as plain records; the mixed draw of sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hrvlm.measuring.encoder import mixed_grids

RESULTS = Path(__file__).parent / "results"
OURS = "hrvlm"

# The mixed draw: 64 image sizes from 224 to 1024 px with aspect ratios from 1:4 to 4:1. For each,
# with u, v, w uniform in [0, 1) from random.Random(0), in this order: the longer side is
# 14 + floor(51 u) patches of 16 px, each as likely as the others, the aspect ratio 4 ** v (as often
# 1:1 to 2:1 as 2:1 to 4:1), and the image stands upright if w < 1/2. The shorter side is the longer
# one divided by the ratio, rounded to whole patches and never less than a quarter.
PATCH_SIZE = 16
PREFIX_TOKENS = 5  # CLS and 4 registers
MIXED_GRIDS = mixed_grids(64)  # patches: height, width
MIXED_SIZES = [(PATCH_SIZE * hp, PATCH_SIZE * wp) for hp, wp in MIXED_GRIDS]  # pixels
MIXED_LENGTHS = [PREFIX_TOKENS + hp * wp for hp, wp in MIXED_GRIDS]  # tokens

Role = Literal["ours", "peer", "bound", "part"]
Outputs = Sequence[Tensor]
Run = Callable[[], Outputs]


def runner(
    op: Callable[..., Tensor | Outputs],
    inputs: Sequence[Tensor],
    cotangents: Tensor | Sequence[Tensor],
    direction: str,
) -> Run:
    """A function that computes an op's outputs, or the gradients of all inputs from one forward.

    Args:
        op: Of the inputs.
        inputs: Its tensors.
        cotangents: One for each output.
        direction: "backward", whatever follows, for the gradients.
    """
    if not direction.startswith("backward"):

        def forward() -> Outputs:
            with torch.no_grad():
                out = op(*inputs)
                return [out] if isinstance(out, Tensor) else out

        return forward
    leaves = [a.detach().requires_grad_() for a in inputs]
    # Buffers given away in a first backward would be missing in the second.
    with torch._functorch.config.patch(donated_buffer=False):
        out = op(*leaves)
        torch.autograd.grad(out, leaves, cotangents, retain_graph=True)
    return lambda: torch.autograd.grad(out, leaves, cotangents, retain_graph=True)


class Unavailable(Exception):
    """A rival can't run here; the message says why."""


@dataclass(frozen=True)
class Rival:
    """One way to compute what a case asks for.

    Attributes:
        name: As in tables.
        make: Builds what is timed, or raises :class:`Unavailable`.
        role: "ours"; "peer"; "bound", what nothing that does the whole work can beat; or "part" of
            the work, such as the attention of all layers.
        compiles: Takes long to make: left out once the suite's time for that is used up.
        headline: Not then, but only with its case.
        pooled: Works in memory that is set aside when it is made, as CUDA graphs do, so that the
            peak of a run says nothing: it gets none.
        full_only: Runs with ``--full`` alone.
        weight_bytes: Of the model.
    """

    name: str
    make: Callable[[], Run]
    role: Role = "peer"
    compiles: bool = False
    headline: bool = False
    pooled: bool = False
    full_only: bool = False
    weight_bytes: int = 0


class Prepared(NamedTuple):
    """The inputs of a case, made: its rivals, and the result they should have.

    Attributes:
        rivals: Who runs.
        reference: Makes the expected outputs; None takes those of the first rival.
    """

    rivals: Sequence[Rival]
    reference: Callable[[], Outputs] | None = None


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: Unique in its suite.
        group: Table and plot that it belongs to.
        op: Op of ``hrvlm verify`` that has to pass first; "" for none.
        parameters: What was run, as plain data.
        prepare: Makes the inputs.
        dtype: Of the inputs.
        flops: Useful floating-point operations (no padding, no recomputation).
        bytes: The fewest bytes it has to move: inputs read once, outputs written once.
        tolerance: Largest relative difference from the reference; default: :data:`TOLERANCE`.
        full_only: Runs with ``--full`` alone.
        threads: Of torch on the CPU; None leaves them as they are.
        min_rounds: Fewest rounds, where the settings' would take too long.
    """

    name: str
    group: str
    op: str
    parameters: dict[str, Any]
    prepare: Callable[[], Prepared]
    dtype: torch.dtype
    flops: int | None = None
    bytes: int | None = None
    tolerance: float | None = None
    full_only: bool = False
    threads: int | None = None
    min_rounds: int | None = None


@dataclass
class RivalResult:
    """What came of one rival; times in seconds.

    Attributes:
        status: "measured", "unavailable", "out of memory", "failed", "differs" or "left out".
        reason: Why there is no number.
        difference: From the reference, relative.
        ratio: Its time over ours, median over the rounds.
        memory_bytes: Peak beside weights and inputs, outputs and gradients included; None without
            a GPU, and of rivals that are `pooled`.
        sdpa: The kernel that torch's scaled_dot_product_attention chose, if it ran.
    """

    name: str
    role: str
    status: str
    reason: str = ""
    difference: float | None = None
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    rounds: int | None = None
    ratio: float | None = None
    memory_bytes: int | None = None
    weight_bytes: int = 0
    flops_per_second: float | None = None
    share_of_product: float | None = None
    bytes_per_second: float | None = None
    share_of_copy: float | None = None
    sdpa: str | None = None


@dataclass
class CaseResult:
    """What came of one case.

    Attributes:
        date: When it was run.
        status: "measured", "gate failed" or "left out".
        reason: Why there are no numbers.
    """

    name: str
    group: str
    parameters: dict[str, Any]
    dtype: str
    flops: int | None
    bytes: int | None
    date: str
    status: str
    reason: str = ""
    rivals: list[RivalResult] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """How a suite is run.

    Attributes:
        device: Where.
        full: Everything, however long it takes.
        small: Tiny inputs: for the tests, which need the code to run and no more.
        compiled: Run the rivals that compile.
        round_s: Seconds that the rounds of a case may take.
        min_rounds: Fewest rounds.
        max_rounds: Most rounds.
        rounds: So many in each case, whatever they take; None: as `round_s` allows.
        results: Directory of the result files.
        commit: Of the code; default: git's.
    """

    device: torch.device
    full: bool = False
    small: bool = False
    compiled: bool = True
    round_s: float = 1.0
    min_rounds: int = 5
    max_rounds: int = 30
    rounds: int | None = None
    results: Path = RESULTS
    commit: str | None = None
