"""What :func:`hrvlm.accelerate` swapped in a model, and what it left alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .swapping import stock_class

# A module of a model: its name, itself, why it is left alone, and who rotates its q and k.
Found = tuple[str, nn.Module, str, str]


@dataclass(frozen=True)
class Part:
    """Modules of one class that were treated alike.

    Attributes:
        cls: Name of their class, the stock one.
        names: Their names in the model.
        reason: Why they were left alone; empty for swapped ones.
        rope: Of swapped ones whose q and k are rotated: whether the kernels do it, and why if not.
    """

    cls: str
    names: tuple[str, ...]
    reason: str = ""
    rope: str = ""

    def __str__(self) -> str:
        """E.g. ``VisionAttention x 2 (blocks.*.attn)``."""
        line = f"{self.cls} x {len(self.names)}"
        line += f" ({_pattern(self.names)})" if any(self.names) else ""
        line += f", {self.rope}" if self.rope else ""
        return f"{line}: {self.reason}" if self.reason else line


@dataclass(frozen=True)
class Acceleration:
    """What :func:`hrvlm.accelerate` did.

    Attributes:
        model: The model, changed in place.
        swapped: Attention that runs on hrvlm's kernels now.
        left_alone: Attention that does not, and encoders of this package, and why.
    """

    model: nn.Module
    swapped: tuple[Part, ...]
    left_alone: tuple[Part, ...]

    def __repr__(self) -> str:
        """One line for each class of modules."""
        lines = [f"Acceleration of {type(self.model).__name__}"]
        lines += [f"  swapped     {part}" for part in self.swapped]
        lines += [f"  left alone  {part}" for part in self.left_alone]
        return "\n".join(lines)


def parts(found: Iterable[Found]) -> tuple[Part, ...]:
    """Modules that were found, joined by class, reason and rotation."""
    joined: dict[tuple[str, str, str], list[str]] = {}
    for name, module, reason, rope in found:
        cls = stock_class(module) or type(module)
        joined.setdefault((cls.__name__, reason, rope), []).append(name)
    return tuple(
        Part(cls, tuple(names), reason, rope) for (cls, reason, rope), names in joined.items()
    )


def _pattern(names: tuple[str, ...]) -> str:
    """Names with their numbers replaced by *; those of one pattern once."""
    return ", ".join(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names))
