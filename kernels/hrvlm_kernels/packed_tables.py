"""The integers behind PackedGrids: their rule, and tables of them, uploaded as one buffer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .merge_orders import MergeOrder

Grid = tuple[int, int]

# These tile lists and the rows of the patches travel with the first copy, so that torch.compile
# never meets a missing one.
TILE_SIZES = (64, 128)
SHORT_SEQLEN = 256  # up to here a segment is short: its keys may fit one tile
_GAP = 4 * 1009
_PIECES = 1024  # patch grids whose parts of the tables are kept on the host
_NUMBERS = 1 << 22  # likewise, of the first numbers


class Segments(NamedTuple):
    """What attention's kernels know about the segments; int32 on the device."""

    cu_seqlens: Tensor  # [B + 1]
    tiles_64: Tensor  # [n, 2]: (segment, its block of 64 rows), longest segment first
    tiles_128: Tensor  # likewise
    short: Tensor  # [3 * (n + 1)], as PackedGrids.short_segments


class Uploads:
    """When tables have come to a GPU, and which streams know."""

    def __init__(self, device: torch.device):
        self._device = device
        self.note()

    def note(self) -> None:
        """Something more was uploaded on the current stream."""
        stream = torch.cuda.current_stream(self._device)
        self._event = stream.record_event()
        self._waited = {stream.cuda_stream}

    def wait(self, tensors: list[Tensor]) -> None:
        """Make the current stream wait, once, and keep the memory until it is done with it.

        Not while a graph is captured, which begins when all before it is done.
        """
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream in self._waited or torch.cuda.is_current_stream_capturing():
            return
        stream.wait_event(self._event)
        for a in tensors:
            a.record_stream(stream)
        self._waited.add(stream.cuda_stream)


def is_int(n: object, least: int) -> bool:
    """Whether `n` is an int from `least` on, numpy's too; a bool is none."""
    return isinstance(n, int | Integral) and not isinstance(n, bool) and int(n) >= least


def check_int(name: str, n: object, least: int) -> None:
    """Raise ValueError, about the argument called `name`, unless `n` is an int from `least` on."""
    if not is_int(n, least):
        raise ValueError(f"{name} must be an int >= {least}, got {n!r}")


class Table(NamedTuple):
    """An int32 table that is written where it is uploaded from."""

    shape: tuple[int, ...]
    write: Callable[[Tensor], object]  # into an empty one


def upload_together(tables: dict[str, Table], device: torch.device) -> dict[str, Tensor]:
    """Write tables into one pinned buffer and copy it; views of it, 16-byte aligned.

    torch.compile takes numbers that agree for one, so a gap behind the first keeps where the others
    begin away from lengths and widths.
    """
    counts = [math.prod(table.shape) for table in tables.values()]
    sizes = [-(-count // 4) * 4 for count in counts]
    sizes[0] += _GAP
    pinned = device.type == "cuda"

    def views(buffer: Tensor) -> list[Tensor]:
        spaces = zip(buffer.split(sizes), counts, tables.values(), strict=True)
        return [space[:count].view(table.shape) for space, count, table in spaces]

    try:
        buffer = torch.empty(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=pinned)
        there = views(buffer)
        for table, space in zip(tables.values(), there, strict=True):
            table.write(space)
        if pinned or device.type != "cpu":
            there = views(buffer.to(device, non_blocking=pinned))
    except (RuntimeError, AssertionError) as error:
        if pinned and 0 <= (device.index or 0) < torch.cuda.device_count():
            raise
        first = str(error).partition("\n")[0]
        raise ValueError(f"device={str(device)!r}: it is not here ({first})") from error
    return dict(zip(tables, there, strict=True))


def upload(table: Table, device: torch.device) -> Tensor:
    """A table on the device."""
    with torch.inference_mode(False):
        return upload_together({"table": table}, device)["table"]


class Tables:
    """The tables of a layout, each yet to be written.

    Args:
        lengths: Of each segment, in tokens.
        grids: Of each image, where the segments have patches.
        prefix: Tokens in front of each image's patches.
    """

    def __init__(self, lengths: tuple[int, ...], grids: tuple[Grid, ...] = (), prefix: int = 0):
        self.lengths, self.grids, self.prefix = lengths, grids, prefix
        # On the host: how many tokens a segment has, and which row is its first.
        self.tokens = torch.tensor(lengths, dtype=torch.int32, device="cpu")
        self.ends = self.tokens.cumsum(0, dtype=torch.int32)
        self.starts = self.ends - self.tokens

    def cu_seqlens(self) -> Table:
        """``[B + 1]``: where each segment begins, and the end."""

        def write(out: Tensor) -> None:
            out[:1] = 0
            out[1:] = self.ends

        return Table((len(self.lengths) + 1,), write)

    def tile_lists(self, sizes: tuple[int, ...]) -> dict[int, Table]:
        """For each size, (segment, its block of so many rows) of each tile, longest first."""
        # By torch: torch.compile sorts no symbols, which the lengths are in a graph for any size.
        tokens, segments = self.tokens.sort(descending=True, stable=True)
        blocks = torch.cat([(tokens - 1) // size + 1 for size in sizes])  # within int32
        totals = [sum([-(-n // size) for n in self.lengths]) for size in sizes]
        less = blocks - blocks.cumsum(0, dtype=torch.int32)  # than a tile's place in the list
        pairs = torch.stack((segments.to(torch.int32).repeat(len(sizes)), less), 1)
        tiles = _repeated(pairs, blocks, sum(totals))
        tiles[:, 1] += _numbers(0, sum(totals))
        lists = zip(sizes, tiles.split(totals), strict=True)
        return {size: Table(tuple(tiles.shape), partial(_copy, tiles)) for size, tiles in lists}

    def short_segments(self) -> Table:
        """(first row, tokens, segment) of each short segment, and a record of zeros."""
        numbers: list[int] = []
        start = 0
        for i, n in enumerate(self.lengths):
            if n <= SHORT_SEQLEN:
                numbers += (start, n, i)
            start += n
        records = torch.tensor([*numbers, 0, 0, 0], dtype=torch.int32, device="cpu")
        return Table(tuple(records.shape), partial(_copy, records))

    def patch_centres(self) -> Table:
        """(y, x) of each patch's centre, ``[T, 2]``: the bits of float32; (0, 0) in prefix rows."""
        centres_of, prefix = _kept(_centres_of), self.prefix
        return Table(
            (sum(self.lengths), 2),
            lambda out: _join([centres_of(hp, wp, prefix) for hp, wp in self.grids], out),
        )

    def patch_rows(self) -> Table:
        """The packed row of each patch, ``[N, 1]``: :meth:`shuffle_index` by 1."""
        prefix, total = self.prefix, sum(self.lengths) - self.prefix * len(self.lengths)

        def write(out: Tensor) -> None:
            # In runs of patches that are one image's, there is less to repeat than in single ones.
            run = 1
            if not torch.compiler.is_compiling():  # symbols have no divisor
                run = math.gcd(*[hp * wp for hp, wp in self.grids]) or 1
            runs = total // run
            image = torch.repeat_interleave((self.tokens - prefix) // run, output_size=runs)
            first = (_numbers(0, runs) * run).add_(image, alpha=prefix)
            torch.add(first[:, None], _numbers(prefix, run), out=out.view(runs, run))

        return Table((total, 1), write)

    def shuffle_index(self, factor: int, order: MergeOrder | None = None) -> Table:
        """Packed rows of the patches of each output token, in (dy, dx) order."""
        order = order or MergeOrder()
        how, grid_of = (order.patches, order.tokens), _kept(_shuffled_grid)
        total = sum([hp * wp for hp, wp in self.grids]) // factor**2

        def write(out: Tensor) -> None:
            _join([grid_of(hp, wp, factor, *how) for hp, wp in self.grids], out)
            counts = (self.tokens - self.prefix) // factor**2
            out += _repeated(self.starts + self.prefix, counts, total)[:, None]

        return Table((total, factor * factor), write)


def _repeated(values: Tensor, counts: Tensor, total: int) -> Tensor:
    """``values.repeat_interleave(counts, 0)``, which takes twice as long."""
    return values.index_select(0, torch.repeat_interleave(counts, output_size=total))


def _copy(source: Tensor, out: Tensor) -> None:
    out.copy_(source)


def _join(pieces: list[Tensor], out: Tensor) -> None:
    if pieces:
        torch.cat(pieces, out=out)


def _numbers(first: int, count: int) -> Tensor:
    """``first, first + 1, ...``, `count` of them; not to be written to."""
    end = first + count
    if torch.compiler.is_compiling() or makes_wrappers() or end > _NUMBERS:
        return torch.arange(first, end, dtype=torch.int32, device="cpu")
    return _numbers_below(1 << end.bit_length())[first:end]


@lru_cache(maxsize=1)
def _numbers_below(end: int) -> Tensor:
    return torch.arange(end, dtype=torch.int32, device="cpu")


def makes_wrappers() -> bool:
    """Whether new tensors are fake ones or a transform's, which must not stay in a cache."""
    return is_in_torch_dispatch_mode() or _are_functorch_transforms_active()


def _kept(make: Any) -> Any:
    """The cached `make`; itself where tensors must not stay."""
    return make.__wrapped__ if makes_wrappers() else make


@lru_cache(maxsize=_PIECES)
def _centres_of(hp: int, wp: int, prefix: int) -> Tensor:
    centres = torch.zeros(prefix + hp * wp, 2, dtype=torch.float32, device="cpu")
    of_patches = centres[prefix:].view(hp, wp, 2)
    side = _kept(_centres)
    of_patches[..., 0] = side(hp)[:, None]
    of_patches[..., 1] = side(wp)
    return centres.view(torch.int32)


@lru_cache(maxsize=_PIECES)
def _centres(n: int) -> Tensor:
    return 2.0 * ((torch.arange(n, dtype=torch.float32, device="cpu") + 0.5) / n) - 1.0


@lru_cache(maxsize=_PIECES)
def _shuffled_grid(hp: int, wp: int, s: int, patches: str, tokens: str) -> Tensor:
    gh, gw = hp // s, wp // s
    index = torch.arange(hp * wp, dtype=torch.int32, device="cpu")
    if patches == "blocks":
        blocks = index.view(gh, gw, s * s)
    else:
        blocks = index.view(gh, s, gw, s).transpose(1, 2).reshape(gh, gw, s * s)
    if tokens == "columns":
        blocks = blocks.transpose(0, 1)
    return blocks.reshape(-1, s * s)
