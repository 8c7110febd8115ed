"""Random texts to draw: words, real and made up, numbers, prices, dates, what a form asks."""

from __future__ import annotations

import string
from functools import lru_cache
from importlib.resources import files
from random import Random

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]

_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxz", "aeiouy"


@lru_cache(maxsize=1)
def words() -> list[str]:
    """About 3000 English words, lower case."""
    return files("hrvlm").joinpath("assets/words.txt").read_text(encoding="ascii").split()


def token(rng: Random) -> str:
    """A word, or something that stands where a word could."""
    kind = rng.random()
    if kind < 0.50:
        return _cased(rng.choice(words()), rng)
    if kind < 0.64:
        return _cased(_made_up(rng), rng)
    if kind < 0.72:
        return "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(2, 7)))
    if kind < 0.80:
        return str(rng.randint(0, 10 ** rng.randint(1, 6)))
    if kind < 0.86:
        return rng.choice(["$", "", "#", "-"]) + price(rng)
    if kind < 0.91:
        return _date(rng)
    if kind < 0.96:
        return rng.choice(words()) + rng.choice(".,:;!?%)'\"")
    return rng.choice(string.punctuation) + rng.choice(words()) + rng.choice(string.punctuation)


def phrase(rng: Random, limit: int, *, fill: bool = False) -> str:
    """Tokens with spaces between them, at most `limit` characters (all of them, with `fill`)."""
    text = token(rng)
    while fill or rng.random() < 0.75:
        longer = f"{text} {token(rng)}"
        if len(longer) > limit:
            if fill:
                text = longer
            break
        text = longer
    return text[:limit].strip()


def price(rng: Random) -> str:
    """Digits with two decimals."""
    return f"{rng.randint(0, 10 ** rng.randint(1, 4) - 1)}.{rng.randint(0, 99):02d}"


def label(rng: Random) -> str:
    """One or two words, capitalised, as on a button or in front of a field."""
    text = " ".join(rng.choice(words()) for _ in range(rng.choice([1, 1, 2])))
    return text.upper() if rng.random() < 0.15 else text.capitalize()


def value(rng: Random) -> str:
    """What a form's field holds."""
    return rng.choice([token, price, _date, _made_up, lambda r: phrase(r, 18)])(rng)


def _cased(word: str, rng: Random) -> str:
    kind = rng.random()
    return word if kind < 0.6 else word.capitalize() if kind < 0.85 else word.upper()


def _made_up(rng: Random) -> str:
    syllables = (
        rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + rng.choice(["", "", *_CONSONANTS])
        for _ in range(rng.randint(1, 3))
    )
    return "".join(syllables)


def _date(rng: Random) -> str:
    day, month, year = rng.randint(1, 31), rng.randint(1, 12), rng.randint(1970, 2039)
    return rng.choice(
        [
            f"{day:02d}/{month:02d}/{year}",
            f"{year}-{month:02d}-{day:02d}",
            f"{day}.{month}.{year}",
            f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}",
        ]
    )
