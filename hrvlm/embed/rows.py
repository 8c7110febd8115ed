"""Rows as Arrow tables: what the output's columns are, the listing, and how both are read again.

id             string            where the image is
row            int64             its place in the listing
error          string            why it has no features; null for all others
height, width  int32             of the upright image in pixels
grid_height, grid_width  int32   patch grid
cls, mean      float32 [C]       the CLS token, and the mean of the patches in float32
patches        binary            on request: [hp, wp, C] in the stored dtype, little-endian
tokens         binary            on request: the projector's [gh, gw, D], likewise
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .config import Manifest
from .entries import Entry, parquet_named
from .store import LISTING, Store

if TYPE_CHECKING:
    from torch import Tensor

RUN = b"hrvlm"  # in the metadata of a file: what it says of itself
SIZES = ("height", "width", "grid_height", "grid_width")
POOLED = ("cls", "mean")
_LISTED = pa.schema(
    [("id", pa.string()), ("file", pa.binary()), ("place", pa.int64()), ("size", pa.int64())]
)
_QUOTED = re.compile(r"\(?'[^']*'\)?")  # a path


@dataclass
class Row:
    """An image on its way.

    Attributes:
        id: As in the listing.
        row: Likewise.
        error: Why there are no features.
        kind: Of the error.
        size: (height, width) of the upright image in pixels.
        resized: (height, width) that the encoder gets.
        grid: Patch grid.
        pixels: The image resized, uint8 [3, H, W], until it is encoded.
        features: Column to array, afterwards.
    """

    id: str
    row: int
    error: str | None = None
    kind: str | None = None
    size: tuple[int, int] | None = None
    resized: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None
    pixels: np.ndarray | None = None
    features: Mapping[str, Any] | None = None

    def fail(self, error: BaseException | str) -> None:
        """This image gets no features."""
        text = str(error).strip() or type(error).__name__
        self.error, self.kind = text, _kind_of(error, text, self.id)
        self.pixels = self.features = None


def _kind_of(error: BaseException | str, text: str, label: str) -> str:
    """What an error is without the image that it is about: its type, and the start of its text."""
    if isinstance(error, OSError) and error.strerror:
        head = error.strerror
    else:
        head = _QUOTED.sub("", text.replace(label, "")).partition(":")[0]
        head = re.sub(r"\d+", "N", " ".join(head.split()))
    return head if isinstance(error, str) else f"{type(error).__name__}: {head}"


def schema_of(manifest: Manifest) -> pa.Schema:
    """Of the parts."""
    facts, keep = manifest.facts, manifest.asked["keep"]
    vector = pa.list_(pa.float32())  # of fixed size, pyarrow before 26 reads none beside a null
    fields = [("id", pa.string()), ("row", pa.int64()), ("error", pa.string())]
    fields += [(name, pa.int32()) for name in SIZES]
    fields += [(name, vector) for name in POOLED if name != "cls" or facts.num_prefix_tokens]
    fields += [(name, pa.large_binary()) for name in keep]
    return pa.schema([pa.field(name, kind) for name, kind in fields])


def table_of(rows: Sequence[Row], part: int, manifest: Manifest) -> pa.Table:
    """The rows of a part, with what it says of itself in its metadata."""
    schema = schema_of(manifest)
    columns: dict[str, Any] = {
        "id": [row.id for row in rows],
        "row": [row.row for row in rows],
        "error": [row.error for row in rows],
    }
    for name, field, i in zip(SIZES, ("size", "size", "grid", "grid"), (0, 1, 0, 1), strict=True):
        sides = [getattr(row, field) for row in rows]
        columns[name] = [None if pair is None else pair[i] for pair in sides]
    arrays = []
    for field in schema:
        if field.name in columns:
            arrays.append(pa.array(columns[field.name], field.type))
            continue
        values = [row.features and row.features[field.name] for row in rows]
        if field.name in POOLED:
            arrays.append(_vectors(values, field.type))
        else:
            arrays.append(pa.array(values, field.type))
    own = {"part": part, "bad": count_errors(rows), "stored": manifest.asked["stored"]}
    own["run"] = manifest.fingerprint
    return pa.table(arrays, schema=schema.with_metadata({RUN: json.dumps(own)}))


def _vectors(values: Sequence[Any], kind: Any) -> pa.Array:
    missing = np.array([value is None for value in values] + [False])
    present = [np.asarray(value, dtype=np.float32) for value in values if value is not None]
    lengths = [0 if value is None else len(value) for value in values]
    ends = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    flat = np.concatenate(present) if present else np.empty(0, dtype=np.float32)
    return pa.ListArray.from_arrays(pa.array(ends, mask=missing), pa.array(flat), type=kind)


def count_errors(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Kind of error to how often it is there, and the id and error of the first such image."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        if row.kind is not None:
            found.setdefault(row.kind, [0, row.id, row.error])[0] += 1
    return dict(sorted(found.items()))


def add_errors(total: dict[str, list[Any]], more: Mapping[str, Sequence[Any]]) -> None:
    """Add the counts of another part."""
    for kind, (count, name, error) in more.items():
        total.setdefault(kind, [0, name, error])[0] += count


def parquet_bytes(table: pa.Table, row_group_size: int | None = None) -> bytes:
    """A file: equal tables give equal bytes."""
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd", row_group_size=row_group_size)
    return stream.getvalue()


def listing_bytes(entries: Sequence[Entry], manifest: Manifest) -> bytes:
    """The listing as a file with a row group for each part."""
    columns = {
        "id": [entry.id for entry in entries],
        "file": [os.fsencode(entry.file) for entry in entries],
        "place": [entry.place for entry in entries],
        "size": [entry.size for entry in entries],
    }
    table = pa.table(columns, schema=_LISTED)
    own = {RUN: json.dumps({"run": manifest.fingerprint})}
    return parquet_bytes(table.replace_schema_metadata(own), manifest.rows_per_part)


@lru_cache(maxsize=4)
def _listing(address: str, fingerprint: str) -> pq.ParquetFile:
    file = Store(address).open(LISTING)
    table = pq.ParquetFile(file)
    if (table.metadata.metadata or {}).get(RUN) != json.dumps({"run": fingerprint}).encode():
        raise ValueError(f"{address}: {LISTING} is of another run: run hrvlm embed again")
    return table


def listed(address: str, part: int, manifest: Manifest, place: int | None = None) -> list[Entry]:
    """The entries of a part, or the one at that place in it.

    Raises:
        ValueError: the listing is damaged, or of another run.
        OSError: it can't be read.
    """
    with parquet_named(LISTING):
        table = _listing(address, manifest.fingerprint).read_row_group(part)
        table.validate(full=True)  # text that is none
    whole = table.schema.equals(_LISTED) and len(table) == manifest.rows_of(part)
    if not whole or any(column.null_count for column in table.columns):
        raise ValueError(f"damaged parquet file {LISTING!r}: not the columns and rows of the run")
    table = table if place is None else table.slice(place, 1)
    return [
        Entry(row["id"], os.fsdecode(row["file"]), row["place"], row["size"])
        for row in table.to_pylist()
    ]


def map_of(row: Mapping[str, Any], manifest: Manifest, name: str = "patches") -> Tensor:
    """The ``patches`` or ``tokens`` of a row as a tensor [down, across, channels].

    Args:
        row: With the grid.
        manifest: Of its run.
        name: Of the column.
    """
    import torch

    facts = manifest.facts
    factor, size = (1, facts.hidden_size) if name == "patches" else (facts.factor, facts.token_size)
    flat = torch.frombuffer(
        bytearray(row[name]), dtype=getattr(torch, str(manifest.asked["stored"]))
    )
    return flat.view(row["grid_height"] // factor, row["grid_width"] // factor, size)
