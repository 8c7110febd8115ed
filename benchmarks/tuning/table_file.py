"""triton_kernels/tile_tables.py as a file that a program writes: read, render, replace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

from hrvlm.files import write_text
from hrvlm_kernels.triton_kernels import tile_tables
from hrvlm_kernels.triton_kernels.tilings import CHIPS

PATH = Path(tile_tables.__file__)
Table = dict[tuple[Any, ...], tuple[Any, ...]]
Spills = dict[tuple[int, int], dict[tuple[Any, ...], tuple[Any, ...]]]

_HEADER = '''\
"""Tile sizes of the kernels, by chip: data only, written by ``python -m benchmarks.tuning``.

Each row holds the tile sizes to use, then those for when they do not fit the chip; a row without a
chip is that of all chips without a row of their own. CHOSEN_BY names the GPU that decided, or says
"compiled": chosen by reading compiled code (no spills, asynchronous tensor cores), or, of the
tables that it names, "counted": by what candidates execute (docs/counted.md); neither is measured.
It also names the Triton that compiled. Another one lays out registers anew: SPILLS has, for every
release that all rows were compiled with, the tiles that spill (``python -m
benchmarks.tuning.spills``). There the next ones of their row are used.
"""

from .tilings import BlockConfig, GemmConfig, NormConfig, RopeConfig, Rows, Tiling, by_chip

'''
_COMMENTS = {
    "FORWARD": "varlen_attention: (head_dim rounded up, bytes of an element).",
    "SHORT": (
        "Its kernel for short images with RoPE: rows of queries and of the image.\n"
        "# Chips and heads without a row rotate k in a pass of its own."
    ),
    "DQ": "Its backward: a tile of dq has queries, one of dkdv keys.",
    "DKDV": None,
    "GEMM": "pixel_shuffle_linear, forward, dx and dweight: bytes of an element.",
    "GEMM_PARTS": (
        "For parts of a sum, where the float32 store makes ptxas hold up\n"
        "# the tensor cores with the tiles above."
    ),
    "LINEAR_GELU": (
        "linear_gelu and linear_swiglu, where a GPU found them faster than torch's products and a "
        "pass:\n# bytes of an element. Other chips run them when asked for by name, with the tiles "
        "of GEMM."
    ),
    "LINEAR_SWIGLU": None,
    "LINEAR_ROPE_2D": "linear_rope_2d, likewise.",
    "ROPE": "rope_2d: (head_dim rounded up, bytes of an element).",
    "NORM_FORWARD": "layer_norm_pixel_shuffle and residual_layer_norm: C rounded up.",
    "NORM_BACKWARD": None,
    "SWIGLU": "swiglu, forward and backward: bytes of an element.",
    "PATCHIFY": "normalize_patchify: bytes of an element of its result.",
}

_SPILLS = "SPILLS: dict[tuple[int, int], Rows[Tiling | GemmConfig]]"


def tables() -> dict[str, Table]:
    """The tables as they are, by name."""
    return {name: dict(getattr(tile_tables, name)) for name in _COMMENTS}


def chosen_by() -> dict[str, str]:
    """How the rows of each chip were chosen."""
    return dict(tile_tables.CHOSEN_BY)


def spills() -> Spills:
    """By Triton release and (table, *row), the tiles that spill."""
    return {release: dict(rows) for release, rows in tile_tables.SPILLS.items()}


def render(rows: Mapping[str, Table], chosen: Mapping[str, str], spilling: Spills) -> str:
    """The text of the file, formatted as ``ruff format`` would."""
    lines = ["CHOSEN_BY = {", *(f'    "{chip}": "{how}",' for chip, how in chosen.items()), "}", ""]
    lines += ["# Triton's release, then (table, *row).", f"{_SPILLS} = {{"]
    for release, those in sorted(spilling.items()):
        found = [_item(row, configs, " " * 8) for row, configs in those.items()]
        lines += [f"    {release}: {{", *found, "    },"] if found else [f"    {release}: {{}},"]
    lines += ["}", ""]
    for name, comment in _COMMENTS.items():
        if comment is not None:
            lines.append(f"# {comment}")
        head = f"{name}: Rows[{kind_of(name).__name__}] = by_chip("
        if not rows[name]:
            lines += [f"{head}{{}})", ""]
            continue
        lines += [head, "    {"]
        lines += [_item(row, configs, " " * 8) for row, configs in folded(rows[name]).items()]
        lines += ["    }", ")", ""]
    return _HEADER + "\n".join(lines).rstrip() + "\n"


def replace(
    rows: Mapping[str, Table], chosen: Mapping[str, str], spilling: Spills, path: Path = PATH
) -> None:
    """Write the file, complete or not at all."""
    write_text(path, render(rows, chosen, spilling))


def kind_of(name: str) -> type:
    """What the rows of a table hold."""
    _, configs = get_args(tile_tables.__annotations__[name])
    return get_args(configs)[0]


def folded(table: Table) -> Table:
    """What :func:`by_chip` makes `table` of.

    Where every chip has a row, the one that most have, two at least, stands without a chip.
    """
    rows: Table = {}
    for row in dict.fromkeys(key[1:] for key in table):
        chips = {chip: table[(chip, *row)] for chip in CHIPS if (chip, *row) in table}
        (most, count), *_ = Counter(chips.values()).most_common()
        if count > 1 and len(chips) == len(CHIPS):
            rows[row] = most
            chips = {chip: configs for chip, configs in chips.items() if configs != most}
        rows |= {(chip, *row): configs for chip, configs in chips.items()}
    return rows


def _item(key: tuple[Any, ...], configs: tuple[Any, ...], indent: str) -> str:
    items = ", ".join(map(text, configs)) + "," * (len(configs) == 1)
    line = f"{indent}{_tuple(key)}: ({items}),"
    if len(line) <= 100:
        return line
    parts = [f"{indent}    {text(config)}," for config in configs]
    return "\n".join([f"{indent}{_tuple(key)}: (", *parts, f"{indent}),"])


def _tuple(key: tuple[Any, ...]) -> str:
    items = ", ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in key)
    return f"({items},)" if len(key) == 1 else f"({items})"


def text(config: Any) -> str:
    """The call that makes `config`, without what are defaults anyway."""
    values = [getattr(config, field.name) for field in fields(config)]
    defaults = [field.default for field in fields(config)]
    while defaults[-1] is not MISSING and values[-1] == defaults[-1]:
        values.pop(), defaults.pop()
    return type(config).__name__ + _tuple(tuple(values))
