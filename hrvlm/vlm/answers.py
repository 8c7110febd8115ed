"""Which tokens of a chat are the assistant's: what training learns, and what masks tell.

They are those that the template marks (``{% generation %}``). No template has to: of another, a
chat up to an answer is rendered with the header of that answer, as it is in generation, and what
the answer adds to it (its end token too) is the assistant's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Piece = tuple[str, bool]


def answer_pieces(render: Callable[..., str], messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """The rendered chat up to its last answer, cut into what is given and what is said (True).

    Args:
        render: Messages, and ``add_generation_prompt``, to text.
        messages: The chat.

    Raises:
        ValueError: the template writes the beginning of a chat otherwise when the chat goes on.
    """
    pieces: list[Piece] = []
    text = ""
    for end, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        before = render(messages[: end - 1], add_generation_prompt=True)
        after = render(messages[:end])
        if not (before.startswith(text) and after.startswith(before)):
            raise ValueError(
                "the chat template writes the beginning of a chat otherwise when the chat goes "
                "on, so that the answers can't be found; give another chat_template"
            )
        pieces += [(before[len(text) :], False), (after[len(before) :], True)]
        text = after
    return pieces


def marked_pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    """A rendered chat up to its last answer, cut where its template marked the answers."""
    pieces: list[Piece] = []
    end = 0
    for first, last in spans:
        pieces += [(text[end:first], False), (text[first:last], True)]
        end = last
    return pieces


def tokens_of(
    tokenizer: Any, pieces: Sequence[Piece], image_token: str, images: Iterator[str]
) -> tuple[list[int], list[bool]]:
    """Token ids of the whole text, and for each whether its characters are an answer's.

    Args:
        tokenizer: A fast one.
        pieces: Of :func:`answer_pieces`.
        image_token: What stands for an image.
        images: The placeholders of the images, in order.
    """
    text, said = "", []
    for piece, is_answer in pieces:
        parts = piece.split(image_token)
        start = len(text)
        text += parts[0] + "".join(next(images) + part for part in parts[1:])
        if is_answer:
            said.append((start, len(text)))
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    encoded = tokenizer(
        text,
        add_special_tokens=not has_bos,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return encoded["input_ids"], [*_inside(encoded["offset_mapping"], said)]


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Iterator[bool]:
    """Whether each stretch of characters begins in one of the spans; both are in order."""
    waiting = iter(spans)
    span = next(waiting, None)
    for first, last in offsets:
        while span is not None and first >= span[1]:
            span = next(waiting, None)
        yield span is not None and first >= span[0] and last > first
