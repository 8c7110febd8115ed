"""The commands that run a vision-language model; `cli.py` adds them to ``hrvlm``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..reader.shipped import DOUBT_BELOW, PROMPT, WHAT_IT_READS, reader_path
from . import console, tables
from .console import json_only, note, print_json
from .options import Debug, Device, Json, StoredDtype

if TYPE_CHECKING:
    from ..inference.chat import Chat

# Arguments of another program's are passed on, --help included.
PASS_ON: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}

Model = Annotated[str, typer.Option(help="Directory or hub id of a VisionLanguageModel.")]


def generate(
    prompt: Annotated[
        str | None, typer.Option(help="What to ask; with --chat: what to ask first.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image; repeat for several, in order.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub id; without it: the small reader of hrvlm."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Go on asking: one question a line, from stdin.")
    ] = False,
    each: Annotated[bool, typer.Option("--each", help="Ask about every image by itself.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    num_beams: Annotated[int, typer.Option(help="Above 1: beam search.")] = 1,
    device: Device = None,
    dtype: StoredDtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer a prompt about images; the text streams to stdout."""
    bound = {}
    if model is None:
        model, bound = reader_path(), {"doubt_below": DOUBT_BELOW}
        prompt = PROMPT if prompt is None and not chat else prompt
        if not image:
            raise ValueError("--image is needed: the reader of hrvlm reads the text in images")
    if prompt is None and not chat:
        raise ValueError("--prompt is needed, or --chat")
    if each and (chat or not image):
        raise ValueError("--each: goes with --image, and not with --chat")
    images = image or []
    if bound:
        note(f"no --model, so this answers: {WHAT_IT_READS}")
    with json_only(as_json):
        from ..inference.chat import GenerateOptions, start_chats

        options = GenerateOptions(max_new_tokens, temperature, num_beams, **bound)
        groups = [[path] for path in images] if each else [images]
        talks = start_chats(model, groups, options, device=device, dtype=dtype)
        turns = []
        for talk, group in zip(talks, groups, strict=True):
            for question in _questions(prompt, chat):
                if each and not as_json:
                    print(f"{group[0]}: ", end="", flush=True)
                result = _ask(talk, question, stream=not as_json, give_up=not chat)
                if result is None:
                    continue
                asked = {"image": str(group[0])} if each else {}
                turns.append(asked | {"prompt": question} | result.to_json())
                if not as_json:
                    tables.show_generated(result)
    if as_json:
        if each:
            print_json({"model": model, "answers": turns})
        else:
            shown = {"model": model, "images": [str(path) for path in images]}
            print_json(shown | ({"turns": turns} if chat else turns[0]))


def _questions(prompt: str | None, chat: bool) -> Iterator[str]:
    """The prompt, then with `chat` the lines of stdin that are not empty."""
    if prompt is not None:
        yield prompt
    if not chat:
        return
    asking = sys.stdin.isatty()
    if asking:
        note("one question a line; end with Ctrl-D")
    while True:
        if asking:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _ask(talk: Chat, question: str, *, stream: bool, give_up: bool) -> Any:
    """The answer; in a chat, a question that can't be asked is reported, and the chat goes on."""
    try:
        return talk.ask(question, stream=stream)
    except ValueError as error:
        if give_up:
            raise
        note(f"error: {error}")
        return None


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
    device: Device = None,
    dtype: StoredDtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a model's answers: character error rate, exact match, VQA accuracy.

    A run that was interrupted goes on where it was; images that can't be read are counted.
    """
    with json_only(as_json):
        from ..inference.evaluate import EvaluateOptions
        from ..inference.evaluate import evaluate as run
        from ..inference.questions import DataSource

        source = DataSource(data, image_root, name, split)
        options = EvaluateOptions(batch_size, max_new_tokens, num_beams, limit)
        with console.progress("questions", limit) as advance:
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
    if as_json:
        print_json({"model": model, "data": data, "predictions": str(out)} | scores.to_json())
    else:
        tables.show_scores(scores, out)
    if not scores.answered:
        raise ValueError(f"{data}: no question could be asked")


def bench_generate(
    model: Model,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Image size; repeat for several."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate, exactly.")] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of each size, after one to warm up.")] = 5,
    device: Device = None,
    dtype: StoredDtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time to the first token, tokens per second and memory, by image size (medians)."""
    with json_only(as_json):
        from ..encoder.cost import size_of
        from ..measuring.generation import SIZES, BenchOptions
        from ..measuring.generation import bench_generate as run

        sizes = tuple(map(size_of, size)) if size else SIZES
        options = BenchOptions(sizes, new_tokens, repeats)
        with console.progress("runs", len(sizes) * (repeats + 1)) as advance:
            result = run(model, options, device=device, dtype=dtype, on_run=advance)
    if as_json:
        print_json(result.to_json())
    else:
        tables.show_generate_bench(result)


def serve(
    context: typer.Context,
    debug: Debug = False,
) -> None:
    """An OpenAI-compatible server: `transformers serve`, and all its arguments, with our models."""
    from ..inference.serve import serve as run

    run(context.args)
