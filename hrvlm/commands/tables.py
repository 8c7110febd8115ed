"""What the tables of the commands are made of, so that all look alike."""

from __future__ import annotations

from collections.abc import Sequence

from .console import console, printable

ORDER = "sizes and grids are height x width"
STRETCH = "stretch is how far the aspect ratio is from the image's own"


def quantity(value: float, unit: str, *, base: int = 1000) -> str:
    """A number with a prefix: ``1.53 TFLOP``; with base 1024, ``82.1 MiB``."""
    prefixes = ("", "K", "M", "G", "T", "P") if base == 1024 else ("", "k", "M", "G", "T", "P")
    power = 0
    while abs(value) >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    digits = f"{value:.0f}" if power == 0 or value >= 100 else f"{value:.3g}"
    infix = "i" if base == 1024 and power else ""
    return f"{digits} {prefixes[power]}{infix}{unit}"


def grid(sides: Sequence[int]) -> str:
    """Height and width: ``40x60``."""
    return "x".join(map(str, sides))


def duration(seconds: float) -> str:
    """Seconds or milliseconds: ``1.53 s``, ``82.1 ms``."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things: ``1 image``, ``3 images``, ``2 patches``."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def print_line(line: str) -> None:
    """Print a line on stdout as it is, however long."""
    console().print(printable(line), markup=False, soft_wrap=True)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1, header: bool = True
) -> None:
    """Print a table on stdout; the first `left` columns are text, the others numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        show_header=header,
        collapse_padding=True,
    )
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console().print(table)
