"""``hrvlm generate``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import Json, command
from .console import note
from .options import Device, Fetch, StoredDType
from .tables import duration

if TYPE_CHECKING:
    from ..inference.chat import Chat, Generated


def _none_refused(result: dict[str, Any]) -> None:
    """Raise if an image was refused; the others' answers are out."""
    answers = result.get("answers", [])
    if refused := sum("refused" in answer for answer in answers):
        raise ValueError(f"{refused} of {len(answers)} images were refused")


@command(check=_none_refused)
def generate(
    prompt: Annotated[
        str | None, typer.Option(help="What to ask; with --chat: what to ask first.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="An image, folder, - or address; repeat for several, in order."),
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
    dtype: StoredDType = "auto",
    fetch: Fetch = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Answer a prompt about images; the text streams to stdout."""
    ours = model is None
    if ours and not image:
        raise ValueError("--image is needed: the reader of hrvlm reads the text in images")
    if prompt is None and not chat and not ours:
        raise ValueError("--prompt is needed, or --chat")
    if each and (chat or not image):
        raise ValueError("--each: goes with --image, and not with --chat")
    if chat and "-" in (image or []):
        raise ValueError("--image -: standard input is where --chat reads the questions")
    from ..inference.chat import GenerateOptions, start_chats
    from ..inference.inputs import gathered

    bound = {}
    if model is None:
        from ..reader.model import DOUBT_BELOW, PROMPT, WHAT_IT_READS, reader_path

        model, bound = reader_path(), {"doubt_below": DOUBT_BELOW}
        prompt = PROMPT if prompt is None and not chat else prompt
        note(f"no --model, so this answers: {WHAT_IT_READS}")
    options = GenerateOptions(max_new_tokens, temperature, num_beams, **bound)
    with gathered(image or [], fetch=fetch) as inputs:
        images = inputs.paths
        groups = [[path] for path in images] if each else [images]
        talks = start_chats(model, groups, options, device=device, dtype=dtype)
    refused = _not_read(talks, groups) if ours else {}
    if refused and not each:
        raise ValueError("; ".join(f"{inputs.name(path)}: {why}" for path, why in refused.items()))
    turns = []
    for talk, group in zip(talks, groups, strict=True):
        if reason := refused.get(group[0]) if each else None:
            note(f"{inputs.name(group[0])}: refused: {reason}")
            turns.append({"image": inputs.name(group[0]), "refused": reason})
            continue
        for question in _questions(prompt, chat):
            if each and not as_json:
                print(f"{inputs.name(group[0])}: ", end="", flush=True)
            result = _ask(talk, question, stream=not as_json, give_up=not chat)
            if result is None:
                continue
            asked = {"image": inputs.name(group[0])} if each else {}
            turns.append(asked | {"prompt": question} | result.to_json())
            if not as_json:
                _show_speed(result)
    if each:
        return {"model": model, "answers": turns}
    shown = {"model": model, "images": [inputs.name(path) for path in images]}
    return shown | ({"turns": turns} if chat else turns[0])


def _not_read(talks: Sequence[Chat], groups: Sequence[Sequence[Path]]) -> dict[Path, str]:
    """The pictures that the reader refuses, with the reasons."""
    from ..reader.model import why_not_read

    pictures = zip(
        (path for group in groups for path in group),
        (image for talk in talks for image in talk.images),
        strict=True,
    )
    reasons = ((path, why_not_read(image)) for path, image in pictures)
    return {path: reason for path, reason in reasons if reason is not None}


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


def _show_speed(result: Generated) -> None:
    """Counts and speed of ``hrvlm generate``, on stderr: stdout has the text."""
    first = result.first_token_seconds
    begun = "" if first is None else f", the first after {duration(first)}"
    note(
        f"{result.prompt_tokens} prompt tokens, {result.new_tokens} new in "
        f"{duration(result.seconds)} ({result.tokens_per_second:.1f} tokens/s{begun})"
    )
    for doubt in result.doubts.values():
        note(f"doubtful: {doubt}")
