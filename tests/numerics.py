"""The rules of the numerics (hrvlm/numeric_rules.py) as assertions."""

from torch import Tensor

from hrvlm import numeric_rules
from hrvlm.numeric_rules import Finding, relative_error
from hrvlm_kernels import PackedGrids

__all__ = ["assert_contraction", "assert_rope", "relative_error"]


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
    findings = numeric_rules.contraction(out, oracle, baseline, packed, factor=factor, terms=terms)
    _assert_passed(findings)


def assert_rope(out: Tensor, a: Tensor, coords: Tensor, inv_freq: Tensor) -> None:
    """`out` is `a` ``[T, H, D]`` rotated, within the elementwise bound."""
    _assert_passed(numeric_rules.rope(out, a, coords, inv_freq))


def _assert_passed(findings: list[Finding]) -> None:
    failed = [f"{f.part}: error {f.error:.3e} > {f.limit:.3e}" for f in findings if not f.passed]
    assert not failed, "; ".join(failed)
