"""The layout of a packed batch: where each image's tokens lie, and where its patches are.

Three images with one CLS and four registers (P = 5 prefix tokens) are packed as

    row    0      5            5+h0*w0   ...                 total_tokens
           |prefix|patches of 0|prefix|patches of 1|prefix|patches of 2|
           '---- segment 0 ----'---- segment 1 ----'---- segment 2 ----'
    cu_seqlens = [0, n0, n0+n1, n0+n1+n2],  n_i = P + hp_i * wp_i

Patches run over the grid row by row. Everything is computed on the host from Python ints, so that a
forward never asks the device for a size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .merge_orders import merge_order
from .packed_tables import (
    TILE_SIZES,
    Grid,
    Segments,
    Table,
    Tables,
    Uploads,
    check_int,
    is_int,
    makes_wrappers,
    upload,
    upload_together,
)

_INT32_MAX = 2**31 - 1
_CACHE_SIZE = 64


# Not frozen: of a frozen one that it returns, torch.compile guards every field, so that each number
# of images would have a graph of its own.
@dataclass(eq=False)
class PackedGrids:
    """Layout of images packed one after the other in ``[T, C]``, without padding or masks.

    Made by :meth:`from_grids`, :meth:`from_lengths` or :meth:`from_cu_seqlens`, once per batch, and
    passed to every op of every layer; never changed afterwards. Equal requests return the same
    object while it stays in a small LRU cache. Its tensors are uploaded without waiting; a request
    on another stream makes that stream wait for them. An object that is carried from one stream to
    another is waited for as any tensor is.

    Attributes:
        grids: Patch grid ``(hp, wp)`` of each image, or None for a pack without grids.
        lengths: Tokens of each segment, prefix tokens included.
        num_prefix_tokens: CLS and registers in front of each image's patches.
        total_tokens: Rows of the packed axis, T.
        max_seqlen: Tokens of the longest segment; 0 for an empty pack.
        cu_seqlens: ``[B + 1]`` int32 on the device; segment i is rows ``cu_seqlens[i]:cu_seqlens[i
            + 1]``.
    """

    grids: tuple[Grid, ...] | None
    lengths: tuple[int, ...]
    num_prefix_tokens: int
    total_tokens: int
    max_seqlen: int
    cu_seqlens: Tensor = field(repr=False)
    # The bits of float32 as int32: mixed precision (FSDP, accelerate) casts every float tensor it
    # finds in a layer's inputs, and a position rounded to bfloat16 is another position.
    _coords: Tensor | None = field(repr=False)
    _tables: dict[str, Tensor] = field(repr=False)
    _uploads: Uploads | None = field(default=None, repr=False)
    _own_coords: bool = field(default=False, repr=False)  # of with_coords

    @staticmethod
    def from_grids(
        grids: Sequence[Sequence[int]],
        *,
        num_prefix_tokens: int = 0,
        device: torch.device | str = "cpu",
        shuffle_factors: Sequence[int] = (),
    ) -> PackedGrids:
        """Layout of images with the patch grids ``[(hp, wp), ...]``.

        Args:
            grids: Patches down and across, one pair of positive ints per image.
            num_prefix_tokens: Tokens (CLS, then registers) in front of each image's patches.
            device: Where ``cu_seqlens``, ``coords`` and the index tables live.
            shuffle_factors: Of which :meth:`shuffle_index` will be asked for: those tables then
                come in the same upload as all others.

        Raises:
            ValueError: a grid is not two positive ints, a factor does not divide one, or the pack
                has more tokens than an int32 can count.
        """
        check_int("num_prefix_tokens", num_prefix_tokens, 0)
        pairs, prefix = _as_pairs(grids), int(num_prefix_tokens)
        for factor in shuffle_factors:
            check_factor(pairs, factor)
        lengths = tuple([prefix + hp * wp for hp, wp in pairs])
        factors = tuple([int(factor) for factor in shuffle_factors])
        return _cached(pairs, lengths, prefix, _canonical(device), factors)

    @staticmethod
    def from_lengths(lengths: Sequence[int], *, device: torch.device | str = "cpu") -> PackedGrids:
        """Layout of segments without grids, e.g. windows; zero-length segments are fine.

        Raises:
            ValueError: a length is negative, or their sum does not fit in int32.
        """
        for i, n in enumerate(lengths):
            check_int(f"lengths[{i}]", n, 0)
        return _cached(None, tuple(int(n) for n in lengths), 0, _canonical(device))

    @staticmethod
    def from_cu_seqlens(
        cu_seqlens: Tensor | Sequence[int], *, device: torch.device | str | None = None
    ) -> PackedGrids:
        """Layout from flash-attention's cumulative lengths ``[0, n0, n0 + n1, ...]``.

        A tensor on an accelerator is read back once, which waits for the device: build the layout
        once per batch.

        Raises:
            ValueError: the list is empty, does not start at 0, or decreases.
        """
        if device is None:
            device = cu_seqlens.device if isinstance(cu_seqlens, Tensor) else "cpu"
        ends = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
        for i, end in enumerate(ends):
            check_int(f"cu_seqlens[{i}]", end, 0)
        if not ends or ends[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {_short(ends)}")
        return PackedGrids.from_lengths([b - a for a, b in pairwise(ends)], device=device)

    def __len__(self) -> int:
        """Number of segments."""
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where the tensors of this layout live."""
        return self.cu_seqlens.device

    @property
    def coords(self) -> Tensor:
        """``[T, 2]`` float32: (y, x) of each patch's centre in [-1, +1]; prefix rows are (0, 0).

        ``y = 2 * (i + 0.5) / hp - 1`` as in DINOv3's ``layers/rope_position_encoding.py`` (separate
        normalisation of both axes). An angle of 0 makes rotation the identity for prefix tokens.
        """
        if self._coords is None:
            raise ValueError("coords: this pack was made from lengths and has no patch grids")
        return self._coords.view(torch.float32)

    def tiles(self, block_m: int) -> Tensor:
        """``[n_tiles, 2]`` int32 (segment, its block of `block_m` rows), longest segment first."""
        key = f"tiles{block_m}"
        if key not in self._tables:
            self._add(key, Tables(self.lengths).tile_lists((block_m,))[block_m])
        return self._tables[key]

    def _add(self, key: str, table: Table) -> None:
        self._tables[key] = upload(table, self.device)
        if self._uploads is not None:
            self._uploads.note()

    @property
    def short_segments(self) -> Tensor:
        """``[3 * (n + 1)]`` int32: (first row, tokens, segment) of the n short segments.

        A record of zeros ends them, since torch.compile takes a size of 0 for a constant.
        """
        return self._tables["short_segments"]

    @property
    def segments(self) -> Segments:
        """All that attention's kernels take of this layout."""
        return Segments(self.cu_seqlens, self.tiles(64), self.tiles(128), self.short_segments)

    def token_grids(self, factor: int) -> tuple[Grid, ...]:
        """Token grid ``(hp // factor, wp // factor)`` of each image.

        Raises:
            ValueError: `factor` does not divide a patch grid (the image is named), or there are no
                grids.
        """
        if self.grids is None:
            raise ValueError("token_grids: this pack was made from lengths and has no patch grids")
        check_factor(self.grids, factor)
        return tuple((hp // factor, wp // factor) for hp, wp in self.grids)

    def shuffle_index(self, factor: int, order: str = "nanovlm") -> Tensor:
        """``[sum gh*gw, factor**2]`` int32: each output token's packed rows in (dy, dx) order.

        Args:
            factor: Pixel-shuffle factor.
            order: A name of :data:`~hrvlm_kernels.merge_orders.MERGE_ORDERS`, whose model has its
                patches, or its tokens, in another order than row by row.

        Raises:
            ValueError: as :meth:`token_grids`, or there is no such order.
        """
        merged = merge_order(order)
        key = f"shuffle{factor}{merged.key}"
        if key not in self._tables:
            self.token_grids(factor)
            made = Tables(self.lengths, self.grids or (), self.num_prefix_tokens)
            self._add(key, made.shuffle_index(factor, merged))
        return self._tables[key]

    def patch_rows(self) -> Tensor:
        """``[sum hp*wp]`` int32: the packed row of every patch, prefix tokens left out."""
        return self.shuffle_index(1).flatten()

    def split(self, x: Tensor) -> list[Tensor]:
        """Views of the rows of each segment of `x` ``[T, ...]``.

        Raises:
            ValueError: `x` does not have T rows.
        """
        self.check_rows(x, "x")
        return list(x.split(self.lengths))

    def to(
        self, device: torch.device | str | int | None, non_blocking: bool = False
    ) -> PackedGrids:
        """The same layout with its tensors on `device`; None, as for a tensor, leaves it there.

        On another device the coordinates are the usual ones, not those of :meth:`with_coords`.
        accelerate's hooks call this on whatever has such a method, with both arguments.
        """
        if device is None or (there := _canonical(device)) == self.device:
            return self
        return _cached(self.grids, self.lengths, self.num_prefix_tokens, there)

    def with_coords(self, coords: Tensor) -> PackedGrids:
        """The same layout with other coordinates ``[T, 2]`` float32, e.g. augmented ones."""
        self.check_rows(coords, "coords")
        tables = {name: table for name, table in self._tables.items() if name != "rope"}
        bits = coords.float().contiguous().view(torch.int32)
        return replace(self, _coords=bits, _tables=tables, _own_coords=True)

    @property
    def rope_table(self) -> Tensor | None:
        """RoPE's table of these coordinates, if :meth:`with_rope_table` gave one."""
        bits = self._tables.get("rope")
        return None if bits is None else bits.view(torch.float32)

    def with_rope_table(self, table: Tensor) -> PackedGrids:
        """The same layout with RoPE's table ``[T, D]``, for the attention of all layers."""
        self.check_rows(table, "table")
        return replace(self, _tables=self._tables | {"rope": table.view(torch.int32)})

    def check_rows(self, x: Tensor, name: str) -> None:
        """Raise ValueError, about the tensor called `name`, unless `x` has one row per token."""
        if x.shape[0] != self.total_tokens:
            what = (
                f"grids {_short(self.grids)}" if self.grids else f"lengths {_short(self.lengths)}"
            )
            raise ValueError(
                f"{name} has {x.shape[0]} rows, but the pack of {len(self)} images with {what} and "
                f"{self.num_prefix_tokens} prefix tokens each has {self.total_tokens}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by value of the host ints; the tensors are built again.

        But for coordinates of :meth:`with_coords`, which are carried along.
        """
        key = self.grids, self.lengths, self.num_prefix_tokens, self.device
        return (_with_bits, (key, self._coords)) if self._own_coords else (_cached, key)


def _with_bits(key: tuple[Any, ...], bits: Tensor) -> PackedGrids:
    return replace(_cached(*key), _coords=bits, _own_coords=True)


def check_packed(packed: object, **tensors: object) -> None:
    """Raise TypeError unless `packed` is a layout, and the others, by their names, tensors."""
    if not isinstance(packed, PackedGrids):
        raise TypeError(
            f"packed: expected a PackedGrids, got {type(packed).__name__}; "
            "PackedGrids.from_grids([(hp, wp), ...]) makes one"
        )
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def _cached(
    grids: tuple[Grid, ...] | None,
    lengths: tuple[int, ...],
    prefix: int,
    device: torch.device,
    factors: tuple[int, ...] = (),
) -> PackedGrids:
    if makes_wrappers():  # which must not enter the cache
        return _build(grids, lengths, prefix, device, factors)
    packed = _build_cached(grids, lengths, prefix, device, factors)
    if packed._uploads is not None and not torch.compiler.is_compiling():
        packed._uploads.wait([packed.cu_seqlens, *packed._tables.values()])
    return packed


def _build(
    grids: tuple[Grid, ...] | None,
    lengths: tuple[int, ...],
    prefix: int,
    device: torch.device,
    factors: tuple[int, ...],
) -> PackedGrids:
    if sum(lengths) > _INT32_MAX:
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        raise ValueError(
            f"the pack has {sum(lengths)} tokens, more than int32 can count ({_INT32_MAX}); "
            f"the longest is image {longest} with {lengths[longest]}"
        )
    # A tensor made under inference_mode could not be used by a later training step.
    with torch.inference_mode(False), torch.no_grad():
        made = Tables(lengths, grids or (), prefix)
        tables = {"cu_seqlens": made.cu_seqlens()}
        tables |= {f"tiles{size}": a for size, a in made.tile_lists(TILE_SIZES).items()}
        tables["short_segments"] = made.short_segments()
        if grids is not None:
            tables["coords"] = made.patch_centres()
            tables["shuffle1"] = made.patch_rows()
            tables |= {f"shuffle{s}": made.shuffle_index(s) for s in factors if s > 1}
        on_device = upload_together(tables, device)
        return PackedGrids(
            grids=grids,
            lengths=lengths,
            num_prefix_tokens=prefix,
            total_tokens=sum(lengths),
            max_seqlen=max(lengths) if lengths else 0,
            cu_seqlens=on_device.pop("cu_seqlens"),
            _coords=on_device.pop("coords", None),
            _tables=on_device,
        )


@lru_cache(maxsize=_CACHE_SIZE)
def _build_cached(*key: Any) -> PackedGrids:
    packed = _build(*key)
    if packed.device.type == "cuda" and not torch.compiler.is_compiling():
        packed._uploads = Uploads(packed.device)
    return packed


def check_factor(grids: tuple[Grid, ...], factor: int) -> None:
    """Raise ValueError unless the pixel-shuffle factor divides all patch grids."""
    check_int("factor", factor, 1)
    for i, (hp, wp) in enumerate(grids):
        if hp % factor or wp % factor:
            raise ValueError(
                f"image {i}: patch grid {hp}x{wp} is not divisible by "
                f"the pixel-shuffle factor {factor}"
            )


def _as_pairs(grids: Sequence[Sequence[int]]) -> tuple[Grid, ...]:
    pairs = tuple([grid if type(grid) is tuple else _as_tuple(grid) for grid in grids])
    for pair in pairs:
        if len(pair) != 2 or type(pair[0]) is not int or type(pair[1]) is not int or min(pair) < 1:
            return tuple(_as_grid(j, grid) for j, grid in enumerate(pairs))
    return pairs


def _as_tuple(grid: Any) -> tuple[Any, ...]:
    return tuple(grid) if isinstance(grid, Iterable) else (grid,)


def _as_grid(i: int, pair: tuple[Any, ...]) -> Grid:
    if len(pair) != 2 or not all(is_int(n, 1) for n in pair):
        raise ValueError(f"image {i}: a patch grid is two positive ints (hp, wp), got {pair}")
    return int(pair[0]), int(pair[1])


def _canonical(device: torch.device | str | int) -> torch.device:
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"device={device!r}: torch knows no such device") from error
    if device.type == "cuda" and device.index is None:
        # "cuda" and "cuda:0" must share one cache entry.
        try:
            return torch.device("cuda", torch.cuda.current_device())
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={str(device)!r}: it is not here ({error})") from error
    return device


def _short(values: Sequence[object] | None) -> str:
    values = list(values or ())
    return (
        str(values)
        if len(values) <= 8
        else f"[{', '.join(map(str, values[:8]))}, ... {len(values)} in all]"
    )


def _flatten(packed: PackedGrids) -> tuple[list[Any], tuple[Any, ...]]:
    return [packed.cu_seqlens, packed._coords, packed._tables], (
        packed.grids,
        packed.lengths,
        packed.num_prefix_tokens,
    )


def _unflatten(leaves: Iterable[Any], context: Any) -> PackedGrids:
    cu_seqlens, coords, tables = leaves
    grids, lengths, prefix = context
    return PackedGrids(
        grids,
        lengths,
        prefix,
        sum(lengths),
        max(lengths) if lengths else 0,
        cu_seqlens,
        coords,
        dict(tables),
    )


def _from_dumped(context: Any) -> Any:
    """JSON, in which a saved program keeps the context, has lists for tuples."""
    grids, lengths, prefix = context
    return None if grids is None else tuple(map(tuple, grids)), tuple(lengths), prefix


pytree.register_pytree_node(
    PackedGrids,
    _flatten,
    _unflatten,
    serialized_type_name=f"{__package__}.PackedGrids",
    to_dumpable_context=lambda context: context,
    from_dumpable_context=_from_dumped,
)
