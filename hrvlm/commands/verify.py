"""``hrvlm verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .command import FAILURE, command
from .console import progress
from .options import Device
from .tables import print_line, print_table

if TYPE_CHECKING:
    from ..verification.verify import Report


def show(report: Report) -> None:
    """Errors and limits of ``hrvlm verify``."""
    columns = ["op", "backend", "dtype", "what", "nearest to its limit"]
    print_table(
        [*columns, "error", "eager's", "of limit", ""],
        [
            (
                check.op,
                check.backend,
                check.dtype,
                check.what,
                check.message or check.where,
                "" if check.message else f"{check.error:.1e}",
                "" if check.message else f"{check.baseline:.1e}",
                "" if check.message else f"{check.used:.0%}",
                "ok" if check.passed else "FAILED",
            )
            for check in report.checks
        ],
        left=len(columns),
    )
    print_line(
        "errors are relative to float64; the limit is 2x the error of eager in the same dtype,"
    )
    print_line("whole, per segment and in the worst row (RoPE: rounding of each element);")
    print_line("8x for sdpa in float32 on a GPU, whose attention is torch's own")
    for skip in report.skipped:
        ops = f" for {', '.join(skip.ops)}" if skip.ops else ""
        print_line(f"not run: {skip.backend} in {skip.dtype}{ops}: {skip.reason}")
    failed = sum(not check.passed for check in report.checks)
    verdict = f"{failed} of {len(report.checks)} checks FAILED" if failed else "all checks passed"
    print_line(f"{report.device}: {verdict}")


def _check(report: Report) -> None:
    if not report.passed:
        raise typer.Exit(FAILURE)


@command(show=show, check=_check)
def verify(
    device: Device = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="{hrvlm.machine.DTYPE_BYTES}; repeat for several. "
            "Default: {hrvlm.machine.MODEL_DTYPES}."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="{hrvlm.verification.verify.BACKENDS}; default: all that can run."),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(help="{hrvlm.verification.cases.CASES}; default: all."),
    ] = None,
) -> Report:
    """Check every op on every backend against float64.

    Forward and backward, on this machine; exit code 1 if an error is above its limit.
    """
    from ..machine import MODEL_DTYPES, pick_device
    from ..verification.verify import verify as run

    with progress("checks") as advance:
        return run(
            pick_device(device),
            dtypes=dtype or MODEL_DTYPES,
            backends=backend,
            ops=op,
            on_check=lambda _: advance(1),
        )
