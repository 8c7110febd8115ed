"""triton_kernels/tile_tables.py as a file that a program writes: read, render, replace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from hrvlm.files import write_text
from hrvlm_kernels.triton_kernels import tile_tables

PATH = Path(tile_tables.__file__)
Table = dict[tuple[Any, ...], tuple[Any, ...]]
Spills = dict[tuple[int, int], dict[tuple[Any, ...], tuple[Any, ...]]]

_HEADER = '''\
"""Tile sizes of the kernels, by chip: data only, written by ``python -m benchmarks.tuning``.

Each row holds the tile sizes to use, then those for when they do not fit the chip. CHOSEN_BY names
the GPU that decided, or says "compiled": chosen by reading compiled code (no spills, asynchronous
tensor cores), not yet measured on a GPU. It also names the Triton that compiled. Another one lays
out registers anew: SPILLS has, for every release that all rows were compiled with, the tiles that
spill (``python -m benchmarks.tuning.spills``). There the next ones of their row are used.
"""

from .tilings import BlockConfig, GemmConfig, NormConfig, RopeConfig, Tiling

'''
_COMMENTS = {
    "FORWARD": "varlen_attention: (chip, head_dim rounded up, bytes of an element).",
    "SHORT": (
        "Its kernel for short images with RoPE: rows of queries and of the image.\n"
        "# Chips and heads without a row rotate k in a pass of its own."
    ),
    "DQ": "Its backward: a tile of dq has queries, one of dkdv keys.",
    "DKDV": None,
    "ATOMIC": "varlen_attention_dkdv with ATOMIC; heads without a row always take the two kernels.",
    "GEMM": "pixel_shuffle_linear, forward, dx and dweight: (chip, bytes of an element).",
    "GEMM_PARTS": (
        "For parts of a sum, where the float32 store makes ptxas hold up\n"
        "# the tensor cores with the tiles above."
    ),
    "ROPE": "rope_2d: (chip, head_dim rounded up, bytes of an element).",
    "NORM_FORWARD": "layer_norm_pixel_shuffle: (chip, C rounded up).",
    "NORM_BACKWARD": None,
    "SWIGLU": "swiglu, forward and backward: (chip, bytes of an element).",
    "PATCHIFY": "normalize_patchify: (chip, bytes of an element of its result).",
}

_SPILLS = "SPILLS: dict[tuple[int, int], dict[tuple[str | int, ...], tuple[Tiling, ...]]]"


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
        lines.append(f"{name}: {_annotation(rows[name])} = {{")
        for key, configs in rows[name].items():
            lines.append(_item(key, configs, " " * 4))
        lines += ["}", ""]
    return _HEADER + "\n".join(lines).rstrip() + "\n"


def replace(
    rows: Mapping[str, Table], chosen: Mapping[str, str], spilling: Spills, path: Path = PATH
) -> None:
    """Write the file, complete or not at all."""
    write_text(path, render(rows, chosen, spilling))


def _annotation(table: Table) -> str:
    key, configs = next(iter(table.items()))
    kinds = ", ".join(type(part).__name__ for part in key)
    return f"dict[tuple[{kinds}], tuple[{type(configs[0]).__name__}, ...]]"


def _item(key: tuple[Any, ...], configs: tuple[Any, ...], indent: str) -> str:
    items = ", ".join(map(text, configs)) + "," * (len(configs) == 1)
    line = f"{indent}{_tuple(key)}: ({items}),"
    if len(line) <= 100:
        return line
    parts = [f"{indent}    {text(config)}," for config in configs]
    return "\n".join([f"{indent}{_tuple(key)}: (", *parts, f"{indent}),"])


def _tuple(key: tuple[Any, ...]) -> str:
    return "(" + ", ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in key) + ")"


def text(config: Any) -> str:
    """The call that makes `config`, without what are defaults anyway."""
    values = [getattr(config, field.name) for field in fields(config)]
    defaults = [field.default for field in fields(config)]
    while defaults[-1] is not MISSING and values[-1] == defaults[-1]:
        values.pop(), defaults.pop()
    return type(config).__name__ + _tuple(tuple(values))
