"""The integers behind PackedGrids: their rule, and tables of them, uploaded as one buffer."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .merge_orders import MergeOrder

Grid = tuple[int, int]

# These tile lists and the rows of the patches travel with the first copy, so that torch.compile
# never meets a missing one.
TILE_SIZES = (64, 128)
SHORT_SEQLEN = 256  # up to here a segment is short: its keys may fit one tile
_GAP = 4 * 1009
_PIECES = 1024  # patch grids whose parts of the tables are kept on the host


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


def upload_together(parts: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy int32 tensors to the device as one pinned buffer; views of it, 16-byte aligned.

    torch.compile takes numbers that agree for one, so a gap behind the first keeps where the others
    begin away from lengths and widths.
    """
    sizes = [-(-part.numel() // 4) * 4 for part in parts.values()]
    sizes[0] += _GAP
    pinned = device.type == "cuda"
    try:
        buffer = torch.empty(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=pinned)
        padded = zip(parts.values(), buffer.split(sizes), strict=True)
        for part, space in padded:
            space[: part.numel()] = part.view(-1)
        buffer = buffer.to(device, non_blocking=pinned)
    except (RuntimeError, AssertionError) as error:
        if pinned and 0 <= (device.index or 0) < torch.cuda.device_count():
            raise
        first = str(error).partition("\n")[0]
        raise ValueError(f"device={str(device)!r}: it is not here ({first})") from error
    return {
        name: space[: part.numel()].view(part.shape)
        for (name, part), space in zip(parts.items(), buffer.split(sizes), strict=True)
    }


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A table on the device."""
    with torch.inference_mode(False):
        return upload_together({"table": table}, device)["table"]


def patch_centres(grids: tuple[Grid, ...], prefix: int) -> Tensor:
    """(y, x) of each patch's centre, ``[T, 2]`` float32; prefix rows are (0, 0)."""
    if not grids:
        return torch.zeros(0, 2, dtype=torch.float32, device="cpu")
    centres_of = _kept(_centres_of)
    return torch.cat([centres_of(hp, wp, prefix) for hp, wp in grids])


def _kept(make: Any) -> Any:
    """The cached `make`; itself where tensors are fake ones, which must not stay."""
    return make.__wrapped__ if is_in_torch_dispatch_mode() else make


@lru_cache(maxsize=_PIECES)
def _centres_of(hp: int, wp: int, prefix: int) -> Tensor:
    centres = torch.zeros(prefix + hp * wp, 2, dtype=torch.float32, device="cpu")
    of_patches = centres[prefix:].view(hp, wp, 2)
    side = _kept(_centres)
    of_patches[..., 0] = side(hp)[:, None]
    of_patches[..., 1] = side(wp)
    return centres


@lru_cache(maxsize=_PIECES)
def _centres(n: int) -> Tensor:
    return 2.0 * ((torch.arange(n, dtype=torch.float32, device="cpu") + 0.5) / n) - 1.0


def tile_lists(lengths: tuple[int, ...], sizes: tuple[int, ...]) -> dict[int, Tensor]:
    """For each size, (segment, its block of so many rows) of every tile, longest segment first."""
    # As a tensor: torch.compile sorts no symbols, which the lengths are in a graph for any size.
    tokens, segments = torch.tensor(lengths, dtype=torch.int64, device="cpu").sort(
        descending=True, stable=True
    )
    lists = {}
    for size in sizes:
        blocks = (tokens + (size - 1)) // size
        total = sum([-(-n // size) for n in lengths])
        first = blocks.cumsum(0) - blocks
        columns = torch.stack((segments, first)).repeat_interleave(blocks, 1, output_size=total)
        columns[1] = torch.arange(total, device="cpu") - columns[1]
        lists[size] = columns.T.to(torch.int32, memory_format=torch.contiguous_format)
    return lists


def short_segments(lengths: tuple[int, ...]) -> Tensor:
    """(first row, tokens, segment) of each short segment, and a record of zeros."""
    starts = [0, *accumulate(lengths)]
    numbers = [
        number for i, n in enumerate(lengths) if n <= SHORT_SEQLEN for number in (starts[i], n, i)
    ]
    return torch.tensor([*numbers, 0, 0, 0], dtype=torch.int32, device="cpu")


def patch_rows(grids: tuple[Grid, ...], prefix: int) -> Tensor:
    """The packed row of each patch, ``[N, 1]``: :func:`shuffle_index` by 1."""
    counts = torch.tensor([hp * wp for hp, wp in grids], dtype=torch.int64, device="cpu")
    total = sum(hp * wp for hp, wp in grids)
    before = torch.arange(1, len(grids) + 1, dtype=torch.int32, device="cpu") * prefix
    rows = torch.arange(total, dtype=torch.int32, device="cpu")
    return (rows + before.repeat_interleave(counts, output_size=total))[:, None]


def shuffle_index(
    grids: tuple[Grid, ...], prefix: int, factor: int, order: MergeOrder | None = None
) -> Tensor:
    """Packed rows of the patches of each output token, in (dy, dx) order."""
    order = order or MergeOrder()
    if not grids:
        return torch.empty(0, factor * factor, dtype=torch.int32, device="cpu")
    counts = [hp * wp for hp, wp in grids]
    starts = [
        start + prefix * (i + 1) for i, start in enumerate(accumulate(counts[:-1], initial=0))
    ]
    tokens = [count // factor**2 for count in counts]
    first = torch.tensor(starts, dtype=torch.int32, device="cpu").repeat_interleave(
        torch.tensor(tokens, device="cpu"), output_size=sum(tokens)
    )
    shuffled_grid = _kept(_shuffled_grid)
    index = torch.cat([shuffled_grid(hp, wp, factor, order) for hp, wp in grids])
    return index.add_(first[:, None])


@lru_cache(maxsize=_PIECES)
def _shuffled_grid(hp: int, wp: int, s: int, order: MergeOrder) -> Tensor:
    gh, gw = hp // s, wp // s
    index = torch.arange(hp * wp, dtype=torch.int32, device="cpu")
    if order.patches == "blocks":
        blocks = index.view(gh, gw, s * s)
    else:
        blocks = index.view(gh, s, gw, s).transpose(1, 2).reshape(gh, gw, s * s)
    if order.tokens == "columns":
        blocks = blocks.transpose(0, 1)
    return blocks.reshape(-1, s * s)
