"""Why some faults in compiled kernels do nothing: nothing notices them, and nothing has to."""

import re
from dataclasses import dataclass

from tests.compiled.faults import Fault


@dataclass(frozen=True)
class Harmless:
    """A reason.

    Attributes:
        kind: of the faults.
        place: what the line of source contains.
        why: in the words of docs/compiled.md.
        subjects: pattern of the names of the kernels.
    """

    kind: str
    place: str
    why: str
    subjects: str = ""


def reason_for(subject: str, fault: Fault) -> str:
    """Why the fault does nothing; "" if that is not known."""
    for entry in REASONS:
        if (
            entry.kind == fault.kind
            and entry.place in fault.place
            and re.search(entry.subjects, subject)
        ):
            return entry.why
    return ""


# Vector clocks leave nothing to luck: with the barrier dropped, every two accesses of different
# warps to the same bytes, one of them a write, are still ordered by the other barriers.
ORDERED = "another barrier orders the same accesses: the vector clocks find no pair without order"
# What is in flight is known byte by byte.
EMPTY = "nothing is in flight there: the groups it waits for are empty, or were waited for before"

FENCED = "another fence lies between the same writes and reads"
UNSTORED = "a row past the end of the segment: read, but nothing that it gives is stored"

REASONS = (
    Harmless("barrier dropped", "", ORDERED),
    Harmless("wait dropped", "", EMPTY),
    Harmless("wait a group short", "", EMPTY),
    Harmless("fence dropped", "", FENCED),
    Harmless("mask off by one", "return tl.load(p_rows, mask=(rows < n)", UNSTORED, "attention"),
)
