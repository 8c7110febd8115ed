"""``hrvlm bench-generate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .command import command
from .console import progress
from .options import Device, Model, StoredDType
from .tables import counted, duration, grid, print_line, print_table, quantity

if TYPE_CHECKING:
    from ..measuring.generation import BenchResult


def show(result: BenchResult) -> None:
    """Times and memory of ``hrvlm bench-generate``."""
    headers = ["size", "image tokens", "prompt tokens", "prepare", "first token", "tokens/s"]
    print_table(
        [*headers, "peak memory"],
        [
            (
                grid(row.size),
                row.image_tokens,
                row.prompt_tokens,
                duration(row.prepare_seconds),
                duration(row.first_token_seconds),
                f"{row.tokens_per_second:.1f}",
                "-" if row.peak_bytes is None else quantity(row.peak_bytes, "B", base=1024),
            )
            for row in result.rows
        ],
    )
    threads = "" if result.threads is None else f", {counted(result.threads, 'thread')}"
    print_line(
        "sizes are height x width; the first token comes after the preparation, and tokens/s "
        f"counts the others; medians of {counted(result.repeats, 'run')} of {result.new_tokens} "
        "new tokens"
    )
    print_line(f"{result.model}, {result.dtype} on {result.device}{threads}, batch of 1")


@command(show=show)
def bench_generate(
    model: Model,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Image size; repeat for several."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate, exactly.")] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of each size, after one to warm up.")] = 5,
    device: Device = None,
    dtype: StoredDType = "auto",
) -> BenchResult:
    """Time to first token, tokens per second, memory by size."""
    from ..encoder.cost import size_of
    from ..measuring.generation import SIZES, BenchOptions
    from ..measuring.generation import bench_generate as run

    sizes = tuple(map(size_of, size)) if size else SIZES
    options = BenchOptions(sizes, new_tokens, repeats)
    with progress("runs", len(sizes) * (repeats + 1)) as advance:
        return run(model, options, device=device, dtype=dtype, on_run=advance)
