"""``hrvlm embed``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from .command import command
from .console import console, note, progress
from .options import (
    Backend,
    BatchInvariant,
    Device,
    DType,
    EncoderModel,
    MaxImgSize,
    MaxTokensPerPass,
    Upscale,
)
from .tables import counted, duration, print_line, print_table, quantity

if TYPE_CHECKING:
    from ..embed.report import EmbedPlan, EmbedReport

_EVERY = 30.0  # seconds between lines where there is no terminal


def show(report: EmbedReport) -> None:
    """Rows and errors of ``hrvlm embed``."""
    if report.plan is not None and not report.written and not report.parts:
        return  # --plan: that is on stderr
    if report.bad:
        print_table(
            ["error", "images", "for example"],
            [(kind, count, name) for kind, (count, name, _) in report.bad.items()],
        )
    bad = sum(count for count, *_ in report.bad.values())
    print_line(
        f"{report.out}: {counted(report.rows, 'row')} of {counted(report.images, 'image')} in "
        f"{counted(report.parts, 'part')}, {quantity(report.bytes, 'B', base=1024)}; "
        f"{counted(bad, 'image')} without features"
    )
    if report.written:
        speed = report.written / report.seconds if report.seconds else 0.0
        busy = "" if report.busy is None else f", encoders busy {report.busy:.0%} of it"
        print_line(
            f"this run wrote {counted(report.written, 'row')} in {duration(report.seconds)} "
            f"({speed:.1f} images/s{busy})"
        )


def _check(report: EmbedReport) -> None:
    if report.plan is not None and not report.parts and not report.failed:
        return
    if report.failed:
        parts = ", ".join(map(str, report.failed[:10]))
        raise RuntimeError(
            f"{counted(len(report.failed), 'part')} could not be written ({parts}): the processes "
            "that did them died each time; run the same command again"
        )
    if sum(count for count, *_ in report.bad.values()) == report.rows:
        raise ValueError("no image could be read")


def _told(plan: EmbedPlan) -> None:
    facts, seconds = plan.manifest.facts, plan.seconds
    takes = "unknown, no image of the sample could be read" if seconds is None else _about(seconds)
    done = plan.images - plan.waiting
    note(
        f"{counted(plan.images, 'image')}{f', {done} done or not of this shard' if done else ''}; "
        f"to do: {plan.waiting} in {counted(plan.parts, 'part')}, about "
        f"{quantity(plan.tokens, 'tokens')}, {quantity(plan.bytes, 'B', base=1024)} to be written, "
        f"time {takes}"
    )
    note(
        f"{facts.name}, {facts.dtype}; {counted(plan.encoders, 'encoder')} on "
        f"{plan.probed.device}, {quantity(plan.probed.tokens_per_second, 'tokens')}/s each; "
        f"{duration(plan.probed.decode_seconds)} to decode an image"
    )
    if plan.left_out:
        names = ", ".join(plan.left_out[:3]) + (", ..." if len(plan.left_out) > 3 else "")
        note(f"{counted(len(plan.left_out), 'file')} no images by their names: {names}")
    if facts.random_weights:
        note("note: no --model, so the weights are random: the features mean nothing")


def _about(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"about {seconds:.0f} s"
    return f"about {minutes} min" if minutes < 120 else f"about {minutes / 60:.1f} h"


class _Lines:
    """A line now and then, for logs."""

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._started = self._last = time.monotonic()

    def __call__(self, images: int) -> None:
        self._done += images
        now = time.monotonic()
        if now - self._last >= _EVERY:
            self._last = now
            speed = self._done / (now - self._started)
            left = _about((self._total - self._done) / speed)
            note(f"{self._done} of {self._total} images, {speed:.1f} images/s, {left} left")


@command(show=show, check=_check)
def embed(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A folder, a pattern, .jsonl, .parquet or .tar files, or datasets:NAME.",
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder of the rows: a path, or s3://... and others.")],
    model: EncoderModel = None,
    max_img_size: MaxImgSize = 1024,
    upscale: Upscale = False,
    layer: Annotated[
        int | None, typer.Option(help="0: the embeddings; negative from the end; default: last.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Beside the pooled features: {hrvlm.embed.config.EXTRAS}."),
    ] = None,
    stored: Annotated[
        str, typer.Option(help="Dtype of what --keep keeps: {hrvlm.embed.config.STORED_DTYPES}.")
    ] = "bfloat16",
    dtype: DType = None,
    device: Device = None,
    backend: Backend = "auto",
    batch_invariant: BatchInvariant = False,
    encoders: Annotated[
        int | None, typer.Option(help="Processes that encode; default: one a GPU, or one.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of an encoder on the CPU; default: 3 of 4 CPUs.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="Of this machine; default: all.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster (auto: the one that this machine is in).")
    ] = None,
    shard: Annotated[
        str, typer.Option(help="I/N: do every N-th part, from part I on; all into one --out.")
    ] = "0/1",
    max_tokens_per_pass: MaxTokensPerPass = 32768,
    rows_per_part: Annotated[
        int | None, typer.Option(help="Images of an output file; default: by their size.")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Of tables; default: image, path, jpg, ... what is there.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of datasets:NAME.")] = "train",
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Fetch images of tables from http addresses.")
    ] = False,
    retry_bad: Annotated[
        bool, typer.Option("--retry-bad", help="Do parts again that have rows with errors.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would cost, and stop.")] = False,
) -> EmbedReport:
    """Features of very many images; after a kill it goes on.

    Parquet files with a row for each image: the CLS token and the mean of the patches, or the
    error. The same command again does what is missing. Needs the extra `scale` (Ray Data).
    """
    from ..embed.config import EmbedConfig, Resources, need_extra, parse_keep, parse_shard

    need_extra("ray", "pyarrow")
    from ..embed.run import embed as run

    config = EmbedConfig(
        input=source,
        out=out,
        model=model,
        max_img_size=max_img_size,
        allow_upscale=upscale,
        layer=layer,
        keep=parse_keep(keep or ()),
        stored=stored,
        dtype=dtype,
        device=device,
        backend=backend,
        batch_invariant=batch_invariant,
        max_tokens_per_pass=max_tokens_per_pass,
        rows_per_part=rows_per_part,
        image_column=image_column,
        split=split,
        fetch=fetch,
    )
    resources = Resources(
        address=address, cpus=cpus, encoders=encoders, threads=threads, shard=parse_shard(shard)
    )
    with contextlib.ExitStack() as stack:
        told: list[Callable[[int], None]] = []

        def planned(made: EmbedPlan) -> bool:
            _told(made)
            if plan:
                return False
            told.append(stack.enter_context(progress("embedding", made.waiting)))
            if not console(stderr=True).is_terminal:
                told.append(_Lines(made.waiting))
            return True

        def advance(images: int) -> None:
            for tell in told:
                tell(images)

        return run(config, resources, on_plan=planned, on_images=advance, retry_bad=retry_bad)
