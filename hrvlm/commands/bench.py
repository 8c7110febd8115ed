"""``hrvlm bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import command
from .console import note
from .options import Device, DType
from .tables import counted, duration, print_line, print_table, quantity

if TYPE_CHECKING:
    from ..measuring.encoder import BenchReport


def show(report: BenchReport) -> None:
    """Times, rates and ratios of ``hrvlm bench``."""
    rows = [
        (
            case.name,
            case.images,
            case.tokens,
            rival.name if rival.sdpa is None else f"{rival.name} (SDPA: {rival.sdpa})",
            duration(rival.median_s),
            f"{duration(rival.p20_s)} to {duration(rival.p80_s)}",
            f"{rival.images_per_second:.1f}",
            quantity(case.flops / rival.median_s, "FLOP/s"),
            "-" if rival.memory_bytes is None else quantity(rival.memory_bytes, "B", base=1024),
            "" if rival.ratio is None else f"{rival.ratio:.2f}x",
        )
        for case in report.cases
        for rival in case.rivals
    ]
    headers = ["images", "", "tokens", "who", "median", "20 % to 80 %", "images/s", "rate"]
    print_table([*headers, "memory", "as long as hrvlm"], rows)
    machine = report.machine
    threads = f", {counted(machine['threads'], 'thread')}" if machine["type"] == "cpu" else ""
    print_line(f"{report.model}, {report.dtype} on {machine['device']}{threads}")
    print_line(
        f"attention by {report.backend}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}; transformers takes mixed sizes one by one"
    )
    print_line("they took turns; memory is the peak beside weights and images")


@command(show=show)
def bench(
    model: Annotated[
        str | None,
        typer.Option(help="{hrvlm.checkpoints.family.CONFIGS}."),
    ] = None,
    size: Annotated[
        list[int] | None, typer.Option(help="Side of square images in pixels; repeat for several.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="About how many make a batch.")] = None,
    mixed: Annotated[
        int | None, typer.Option(help="Images of mixed sizes; 0 leaves them out.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also time torch.compile of transformers' model.")
    ] = False,
    layers: Annotated[
        int | None, typer.Option(help="Blocks of the model; default: all of them.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="For the rounds of each comparison.")] = 3.0,
    device: Device = None,
    dtype: DType = None,
) -> BenchReport:
    """Time the encoder against transformers on this machine.

    224, 768 and 1024 px and mixed sizes with ViT-B; on the CPU a small model and small sizes.
    """
    from dataclasses import replace

    from ..machine import MODEL_DTYPES, pick_device, torch_dtype
    from ..measuring.encoder import ON_CPU, BenchOptions
    from ..measuring.encoder import bench as run

    weights = None if dtype is None else torch_dtype(dtype, MODEL_DTYPES)
    where = pick_device(device)
    given: dict[str, Any] = {
        "model": model,
        "sizes": size and tuple(size),
        "tokens": tokens,
        "mixed": mixed,
        "layers": layers,
    }
    defaults = ON_CPU if where.type == "cpu" else BenchOptions()
    options = replace(
        defaults,
        compiled=compiled,
        seconds=seconds,
        **{name: value for name, value in given.items() if value is not None},
    )
    return run(
        where,
        options,
        dtype=weights,
        on_case=lambda case: note(f"{case.name}: done"),
    )
