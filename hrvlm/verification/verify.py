"""Do the ops compute the right thing on this machine? Every backend against float64, with limits.

Each op runs forward and backward on packs of unlike images, per backend and dtype, with random
cotangents; :mod:`hrvlm.verification.rules` has the rules. The oracle is the plain torch reference
in float64 on the same (already rounded) inputs, the baseline the same reference in the dtype
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hrvlm_kernels.backends import flash_attn_obstacle, triton_obstacle

from ..machine import DTYPE_BYTES, MODEL_DTYPES, torch_dtype
from .cases import CASES, Measured, Random

BACKENDS = ("eager", "sdpa", "flash_attn", "triton")
_WITH_ATTENTION = ("varlen_attention", "encoder")
_WITHOUT_ATTENTION = ("eager", "triton")  # all the backends that the other ops differ on


@dataclass(frozen=True)
class Check:
    """Outcome of one direction of one op on one backend.

    Attributes:
        op: Key of :data:`~hrvlm.verification.cases.CASES`.
        backend: What ran.
        dtype: Of inputs and outputs.
        what: forward, backward, gather (data movement) or isolation (of the images of a pack).
        error: Relative error against float64 of the tensor that is nearest to its limit.
        baseline: The same for the eager version in this dtype.
        used: Largest error / limit over all tensors and parts; above 1 fails.
        where: The tensor and part with the largest share.
        passed: No part is above its limit.
        message: The exception, if the op raised one.
    """

    op: str
    backend: str
    dtype: str
    what: str
    error: float
    baseline: float
    used: float
    where: str
    passed: bool
    message: str = ""


@dataclass(frozen=True)
class Skipped:
    """A combination that can't run on this machine, and why."""

    backend: str
    dtype: str
    reason: str
    ops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All checks of a run."""

    device: str
    checks: tuple[Check, ...]
    skipped: tuple[Skipped, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed, and there was one."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        return {
            "device": self.device,
            "passed": self.passed,
            "checks": [{k: _finite(v) for k, v in asdict(check).items()} for check in self.checks],
            "skipped": [asdict(skip) for skip in self.skipped],
        }


def verify(
    device: torch.device | str = "cpu",
    *,
    dtypes: Sequence[str] = MODEL_DTYPES,
    backends: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    on_check: Callable[[Check], None] | None = None,
    seed: int = 0,
) -> Report:
    """Check every op on every backend that this machine can run.

    Args:
        device: Where to run.
        dtypes: Keys of :data:`hrvlm.machine.DTYPE_BYTES`. The encoder leaves out float16, which
            it refuses.
        backends: Some of :data:`BACKENDS`; default: all that can run, the others are reported as
            skipped.
        ops: Some of the keys of :data:`~hrvlm.verification.cases.CASES`; default: all.
        on_check: Called after each check.
        seed: Of all random numbers.

    Raises:
        ValueError: a name is unknown, or a backend that was asked for can't run; the message says
            why.
    """
    device = torch.device(device)
    _check_names("dtype", dtypes, tuple(DTYPE_BYTES))
    _check_names("backend", backends or (), BACKENDS)
    _check_names("op", ops or (), tuple(CASES))
    checks, skipped = [], []
    for dtype_name in dtypes:
        dtype = torch_dtype(dtype_name)
        runnable = []
        for name in backends or BACKENDS:
            reason = obstacle(name, device, dtype)
            if reason is None:
                runnable.append(name)
            elif backends:
                raise ValueError(f"backend {name!r} can't run in {dtype_name}: {reason}")
            else:
                skipped.append(Skipped(name, dtype_name, reason))
        if dtype == torch.float16:
            reason = "DINOv3's activations overflow float16, the encoder refuses it"
            skipped.append(Skipped("any", dtype_name, reason, ops=("encoder",)))
        for check in _run(device, dtype_name, runnable, ops or tuple(CASES), seed):
            checks.append(check)
            if on_check:
                on_check(check)
    return Report(str(device), tuple(checks), tuple(skipped))


def obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend can't be checked with `dtype` on `device`; None when it can."""
    if backend == "triton":
        return triton_obstacle(device, dtype)
    return flash_attn_obstacle(device, dtype) if backend == "flash_attn" else None


def _run(
    device: torch.device,
    dtype_name: str,
    backends: Sequence[str],
    ops: Sequence[str],
    seed: int,
) -> Iterator[Check]:
    dtype = torch_dtype(dtype_name)
    for op in ops:
        if op == "encoder" and dtype == torch.float16:
            continue
        directions = list(CASES[op](Random(device, dtype, seed)))
        for backend in backends:
            if op in _WITH_ATTENTION or backend in _WITHOUT_ATTENTION:
                for what, run in directions:
                    yield _checked(op, backend, dtype_name, what, run)


def _checked(
    op: str, backend: str, dtype: str, what: str, run: Callable[[str], list[Measured]]
) -> Check:
    try:
        measured = run(backend)
    except (
        Exception
    ) as error:  # whatever a kernel raises is a failed check, and the rest still runs
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        nan = math.nan
        return Check(op, backend, dtype, what, nan, nan, math.inf, "raised", False, message)
    found = [(finding, tensor) for tensor in measured for finding in tensor.findings]
    finding, tensor = max(found, key=lambda pair: pair[0].used)
    return Check(
        op,
        backend,
        dtype,
        what,
        tensor.error,
        tensor.baseline,
        finding.used,
        f"{tensor.name}, {finding.part}",
        all(f.passed for f, _ in found),
    )


def _check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}; got {name!r}")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
