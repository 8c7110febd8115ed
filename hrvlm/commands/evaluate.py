"""``hrvlm evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .command import command
from .console import note, progress
from .options import Device, Model, StoredDType
from .tables import counted, print_line, print_table


def show(result: dict[str, Any]) -> None:
    """Metrics of ``hrvlm evaluate``."""
    rates = {
        "character error rate": (result["cer"], counted(result["characters"], "character")),
        "exact match": (result["exact_match"], counted(result["answered"], "answer")),
        "VQA accuracy": (result["vqa_accuracy"], counted(result["vqa_questions"], "answer")),
    }
    print_table(
        ["metric", "", "over"],
        [(n, "-" if rate is None else f"{rate:.2%}", of) for n, (rate, of) in rates.items()],
    )
    missed = f", {len(result['bad'])} could not be asked" if result["bad"] else ""
    asked = counted(result["questions"], "question")
    print_line(f"{asked}{missed}; the answers are in {result['predictions']}")


def _check(result: dict[str, Any]) -> None:
    if not result["answered"]:
        raise ValueError(f"{result['data']}: no question could be asked")


@command(show=show, check=_check)
def evaluate(
    data: Annotated[
        str, typer.Argument(help="A .jsonl or .parquet file, a dataset's directory or hub id.")
    ],
    model: Model,
    out: Annotated[Path, typer.Option(help="File of JSON lines for the answers.")],
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of the images; default: that of DATA.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Configuration of the dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Ask only the first so many.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    num_beams: Annotated[int, typer.Option(help="Above 1: beam search.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin again instead of going on.")
    ] = False,
    fetch: Annotated[bool, typer.Option("--fetch", help="Fetch images that are URLs.")] = False,
    device: Device = None,
    dtype: StoredDType = "auto",
) -> dict[str, Any]:
    """Score answers: characters, exact match, VQA accuracy.

    A run that was interrupted goes on where it was; images that can't be read are counted.
    """
    from ..inference.evaluate import EvaluateOptions
    from ..inference.evaluate import evaluate as run
    from ..inference.questions import DataSource

    source = DataSource(data, image_root, name, split)
    options = EvaluateOptions(batch_size, max_new_tokens, num_beams, limit, fetch)
    with progress("questions", limit) as advance:
        scores = run(
            model,
            source,
            out,
            options,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            on_questions=advance,
        )
    for key, reason in scores.bad:
        note(f"not asked: {key}: {reason}")
    return {"model": model, "data": data, "predictions": str(out)} | scores.to_json()
