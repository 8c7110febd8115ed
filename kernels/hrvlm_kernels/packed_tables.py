"""The integers behind PackedGrids: their rule, and tables of them, uploaded as one buffer."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]

# These tile lists and the rows of the patches travel with the first copy, so that torch.compile
# never meets a missing one.
TILE_SIZES = (64, 128)
SHORT_SEQLEN = 256  # up to here a segment is short: its keys may fit one tile
_GAP = 4 * 1009


class Segments(NamedTuple):
    """What attention's kernels know about the segments; int32 on the device."""

    cu_seqlens: Tensor  # [B + 1]
    tiles_64: Tensor  # [n, 2]: (segment, its block of 64 rows), longest segment first
    tiles_128: Tensor  # likewise
    short: Tensor  # [3 * (n + 1)], as PackedGrids.short_segments


def is_int(n: object, least: int) -> bool:
    """Whether `n` is an int from `least` on; a bool is none."""
    return isinstance(n, int) and not isinstance(n, bool) and n >= least


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
    buffer = torch.zeros(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=pinned)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for part, start in zip(parts.values(), starts, strict=True):
        buffer[start : start + part.numel()] = part.flatten()
    buffer = buffer.to(device, non_blocking=pinned)
    return {
        name: buffer[start : start + part.numel()].view(part.shape)
        for (name, part), start in zip(parts.items(), starts, strict=True)
    }


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A table on the device."""
    with torch.inference_mode(False):
        return upload_together({"table": table}, device)["table"]


def patch_centres(grids: tuple[Grid, ...], prefix: int) -> Tensor:
    """(y, x) of each patch's centre, ``[T, 2]`` float32; prefix rows are (0, 0)."""
    rows = [torch.zeros(0, 2, dtype=torch.float32, device="cpu")]
    for hp, wp in grids:
        y, x = _centres(hp), _centres(wp)
        rows.append(torch.zeros(prefix, 2, dtype=torch.float32, device="cpu"))
        rows.append(
            torch.stack((y[:, None].expand(hp, wp), x[None, :].expand(hp, wp)), -1).flatten(0, 1)
        )
    return torch.cat(rows)


def _centres(n: int) -> Tensor:
    return 2.0 * ((torch.arange(n, dtype=torch.float32, device="cpu") + 0.5) / n) - 1.0


def tile_list(lengths: tuple[int, ...], block_m: int) -> Tensor:
    """(segment, its block of `block_m` rows) of every tile, longest segment first."""
    n = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    order = n.argsort(descending=True, stable=True)
    blocks = (n[order] + block_m - 1) // block_m
    total = sum(-(-length // block_m) for length in lengths)
    segment = order.repeat_interleave(blocks, output_size=total)
    first = (blocks.cumsum(0) - blocks).repeat_interleave(blocks, output_size=total)
    block = torch.arange(total, device="cpu") - first
    return torch.stack((segment, block), dim=1).to(torch.int32)


def short_segments(lengths: tuple[int, ...]) -> Tensor:
    """(first row, tokens, segment) of each short segment, and a record of zeros."""
    starts = [0, *accumulate(lengths)]
    triples = [(starts[i], n, i) for i, n in enumerate(lengths) if n <= SHORT_SEQLEN]
    return torch.tensor([*triples, (0, 0, 0)], dtype=torch.int32, device="cpu").flatten()


def shuffle_index(grids: tuple[Grid, ...], prefix: int, factor: int) -> Tensor:
    """Packed rows of the patches of each output token, in (dy, dx) order."""
    blocks, start = [torch.empty(0, factor * factor, dtype=torch.int32, device="cpu")], 0
    for hp, wp in grids:
        blocks.append(_shuffled_grid(hp, wp, factor) + (start + prefix))
        start += prefix + hp * wp
    return torch.cat(blocks)


def _shuffled_grid(hp: int, wp: int, s: int) -> Tensor:
    index = torch.arange(hp * wp, dtype=torch.int32, device="cpu").view(hp // s, s, wp // s, s)
    return index.permute(0, 2, 1, 3).reshape(-1, s * s)
