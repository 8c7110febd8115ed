"""How well a text was read: character error rate, exact match, and the accuracy of VQAv2."""

from __future__ import annotations

import re
from collections.abc import Sequence

MIN_VQA_ANSWERS = 4  # with fewer, no answer could reach an accuracy of 1

_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NEGATED = (
    *("ai", "are", "ca", "could", "did", "does", "do", "had", "has", "have", "is", "might"),
    *("must", "need", "ought", "sha", "should", "was", "were", "wo", "would"),
)
# Where the form without an apostrophe is a word of its own (its, well, were), it stays.
_CONTRACTIONS = {f"{verb}nt": f"{verb}n't" for verb in _NEGATED if f"{verb}nt" != "want"} | {
    f"{word}{ending}": f"{word}'{ending}"
    for words, endings in (
        (("you", "we", "they", "could", "should", "would", "might", "must"), ("ve",)),
        (("you", "they"), ("d", "ll", "re")),
        (("he", "it"), ("d",)),
        (("it", "who", "what"), ("ll",)),
        (("he", "that", "there", "what", "where", "who", "how"), ("s",)),
        (("o",), ("clock",)),
    )
    for word in words
    for ending in endings
}


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions from `a` to `b`.

    A column of the dynamic programme is two bit vectors, of the places where it rises and falls by
    one, and each character of `b` updates all of it at once: Myers, "A fast bit-vector algorithm
    for approximate string matching based on dynamic programming" (1999), in the form of Hyyrö,
    "A bit-vector algorithm for computing Levenshtein and Damerau edit distances" (2003).
    """
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    everywhere, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    rises, falls, distance = everywhere, 0, len(a)
    for character in b:
        equal = places.get(character, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        right_rises = falls | (everywhere & ~(diagonal | rises))
        right_falls = rises & diagonal
        distance += bool(right_rises & last) - bool(right_falls & last)
        right_rises = right_rises << 1 | 1
        right_falls <<= 1
        rises = (right_falls | ~(diagonal | right_rises)) & everywhere
        falls = right_rises & diagonal & everywhere
    return distance


def nearest_reference(prediction: str, references: Sequence[str]) -> str:
    """The reference with the lowest character error rate (an empty one: matched or not at all)."""
    return min(
        references,
        key=lambda r: edit_distance(r, prediction) / len(r) if r else float(bool(prediction)),
    )


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction is one of the references, white space around both left aside."""
    return prediction.strip() in {reference.strip() for reference in references}


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of VQAv2: min(agreeing people / 3, 1), over all ways to leave one person out.

        accuracy = mean over i of min(1, #{j != i: answer_j = prediction} / 3)

    The formula is that of Goyal et al., "Making the V in VQA matter" (2017) and of the challenge's
    evaluation page (visualqa.org/evaluation); prediction and answers pass through
    :func:`normalize_vqa` first (the official script leaves it out where all people agree).

    Raises:
        ValueError: there are fewer than four answers.
    """
    if len(answers) < MIN_VQA_ANSWERS:
        raise ValueError(
            f"answers: VQA accuracy needs at least {MIN_VQA_ANSWERS} people's, got {len(answers)}"
        )
    said = normalize_vqa(prediction)
    agree = [normalize_vqa(answer) == said for answer in answers]
    return sum(min(1.0, (sum(agree) - own) / 3) for own in agree) / len(agree)


def normalize_vqa(text: str) -> str:
    """An answer as VQAv2 compares it (visualqa.org/evaluation).

    Lower case; a full stop goes unless it stands before a digit; other punctuation goes where it
    touches a space (commas between digits always), and becomes a space elsewhere; number words up
    to ten become digits; articles go; contractions get their apostrophe back (the everyday ones:
    the official table has double ones such as "couldnt've" too).
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if touches_space or has_thousands else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
