"""The rules of the numerics (hrvlm/verification/rules.py) as assertions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hrvlm.verification import rules
from hrvlm.verification.rules import Finding, relative_error
from hrvlm_kernels import PackedGrids

__all__ = [
    "assert_close",
    "assert_contraction",
    "assert_elements",
    "assert_rope",
    "recorded",
    "relative_error",
]

_records: list[list[Finding]] = []


@contextmanager
def recorded() -> Iterator[list[Finding]]:
    """All errors that are measured meanwhile, with their limits, whether they pass or not."""
    record: list[Finding] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


def assert_contraction(
    out: Tensor,
    oracle: Tensor,
    baseline: Tensor,
    packed: PackedGrids | None = None,
    *,
    factor: float = 2.0,
    terms: Tensor | None = None,
) -> None:
    """`out` errs at most `factor` times as much as `baseline`, against the float64 `oracle`."""
    assert oracle.isfinite().all(), "the oracle is not finite"
    findings = rules.contraction(out, oracle, baseline, packed, factor=factor, terms=terms)
    _assert_passed(findings)


def assert_close(
    part: str, out: Tensor, expected: Tensor, tolerance: float, like: Tensor | None = None
) -> None:
    """`out` differs from `expected` by at most `tolerance`, relative to its size or `like`'s."""
    error = relative_error(out, expected)
    if like is not None:
        error *= (expected.norm() / like.norm()).item()
    _assert_passed([Finding(part, error, tolerance)])


def assert_rope(out: Tensor, a: Tensor, coords: Tensor, inv_freq: Tensor) -> None:
    """`out` is `a` ``[T, H, D]`` rotated, within the elementwise bound."""
    _assert_passed(rules.rope(out, a, coords, inv_freq))


def assert_elements(out: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Each element of `out` is within its `bound` of the float64 `exact`."""
    error = (out.double() - exact).abs()
    at = torch.nan_to_num(error / bound, nan=torch.inf).argmax()
    found = Finding("element", error.flatten()[at].item(), bound.flatten()[at].item())
    _assert_passed([found])


def _assert_passed(findings: list[Finding]) -> None:
    for record in _records:
        record.extend(findings)
    failed = [f"{f.part}: error {f.error:.3e} > {f.limit:.3e}" for f in findings if not f.passed]
    assert not failed, "; ".join(failed)
