"""Faults seeded in the PTX of every kernel: noticed, or known to do nothing, for a reason."""

import os
import re
from pathlib import Path

import pytest

from benchmarks.compiled import results
from hrvlm_kernels import triton_kernels
from tests.compiled.faults import PLACES, Subject, faults_of, noticed_by, ptx_of, subjects
from tests.compiled.harmless import reason_for

KNOWN = {
    (int(document["chip"].removeprefix("sm_")), row["kernel"], row["fault"], row["place"]): row
    for document in results.read(results.FOLDER, "fault")
    for row in document["rows"]
    if row["number"] == 0
}
EVERYTHING = os.environ.get("COMPILED") == "all"
# The kernels that `make test` takes, with one fault of every kind.
CORE = {("attention forward, ahead", 90), ("pixel_shuffle_linear forward", 80)}


def tried() -> list[tuple[Subject, int]]:
    pairs = [(subject, chip) for subject in subjects() for chip in subject.chips]
    return [(s, chip) for s, chip in pairs if EVERYTHING or (s.name, chip) in CORE]


def test_every_kernel_has_faults_on_every_chip_it_is_shipped_for():
    missing, kernels = [], 0
    for path in Path(triton_kernels.__file__).parent.glob("*.py"):
        for name in set(re.findall(r"\b(\w+)\[\(", path.read_text())):
            kernels += 1
            own = [s for s in subjects() if s.kernel == name]
            chips = {chip for s in own for chip in s.chips}
            if chips != {80, 90}:
                missing.append((path.stem, name, chips))
    assert kernels and not missing, missing


@pytest.mark.parametrize(
    ("subject", "chip"), tried(), ids=lambda a: a.name if isinstance(a, Subject) else f"sm_{a}"
)
def test_every_fault_is_noticed_or_harmless(machine, subject, chip, record):
    unexplained = []
    original = ptx_of(machine, subject)
    for fault in faults_of(original, PLACES if EVERYTHING else 1):
        noticed = noticed_by(machine, subject, original, fault)
        reason = "" if noticed else reason_for(subject.name, fault)
        record(
            kind="fault", chip=chip, kernel=subject.name, fault=fault.kind, number=fault.number,
            place=fault.place, noticed=noticed, reason=reason,
        )  # fmt: skip
        if not noticed and not reason:
            unexplained.append(str(fault))
        known = KNOWN.get((chip, subject.name, fault.kind, fault.place))
        if fault.number == 0 and known is not None and not EVERYTHING:
            assert bool(noticed) == bool(known["noticed"]), f"{fault}: {noticed}, known: {known}"
    assert not unexplained, "\n".join(unexplained)
