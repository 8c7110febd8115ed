"""What the tile sizes of the kernels consist of; the sizes chosen stand in tile_tables.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

Config = TypeVar("Config")
Rows = dict[tuple[str | int, ...], tuple[Config, ...]]

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")  # all that have rows in the tables

# How the forward of varlen_attention walks over keys; see varlen_attention.py.
ORDERS = ("plain", "ahead")


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of an attention kernel."""

    rows: int  # of the tile that a program owns: 128, or a divisor of 64 (the two tile lists)
    step: int  # rows of a block of the loop
    num_warps: int
    num_stages: int
    order: str = "plain"  # one of ORDERS; forward only


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes of a matrix product; block_k runs along the sum."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8  # rows of tiles that run together


@dataclass(frozen=True)
class RopeConfig:
    """Tile sizes of rope_2d."""

    block_t: int  # tokens of a program
    block_h: int  # heads rotated at a time
    num_warps: int


@dataclass(frozen=True)
class NormConfig:
    """Tile sizes of a norm."""

    rows: int
    num_warps: int


@dataclass(frozen=True)
class BlockConfig:
    """What a program of an elementwise kernel has."""

    elements: int
    num_warps: int


def by_chip(rows: Rows[Config]) -> Rows[Config]:
    """A table by (chip, *row), of one in which a row without a chip is that of all others."""
    defaults = {row: configs for row, configs in rows.items() if row[0] not in CHIPS}
    everywhere = {(chip, *row): configs for chip in CHIPS for row, configs in defaults.items()}
    return everywhere | {row: configs for row, configs in rows.items() if row not in defaults}


def table_head_dim(head_dim: int) -> int:
    """The rows of the tables that serve `head_dim`: it is rounded up to one of these widths."""
    return min((width for width in (32, 64, 80, 96, 128) if width >= head_dim), default=128)


def table_width(width: int) -> int:
    """The rows of the tables of norms that serve `width`: a power of two from 512 on."""
    return max(512, 1 << (width - 1).bit_length())
