"""The parts in a folder: what each says of itself, whether it is of this run, all as one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .config import Manifest
from .entries import parquet_named
from .rows import RUN, schema_of
from .store import Store, part_name


@dataclass(frozen=True)
class Part:
    """What a part says of itself.

    Attributes:
        rows: In it.
        bad: Of those without features: kind of error to [count, id of one, its error].
        size: In bytes.
    """

    rows: int
    bad: dict[str, list[Any]]
    size: int


def done_parts(store: Store, manifest: Manifest, among: Sequence[int]) -> dict[int, Part]:
    """Those of `among` that are there and whole, in order.

    Raises:
        ValueError: some are of another run, or no parts at all; they are named.
    """
    there = sorted(part for part in store.parts() if part in among)
    with ThreadPoolExecutor(16) as pool:
        found = zip(there, pool.map(lambda part: _footer(store, part), there), strict=True)
    schema, done, others = schema_of(manifest), {}, []
    for part, footer in found:
        if footer is None:
            continue
        own, metadata, size = footer
        if own.get("run") != manifest.fingerprint:
            others.append(part_name(part))
        elif own["part"] != part:  # moved there
            continue
        elif metadata.num_rows != manifest.rows_of(part) or not _has(metadata, schema):
            others.append(part_name(part))
        else:
            done[part] = Part(metadata.num_rows, own["bad"], size)
    if others:
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise ValueError(
            f"{store.address} holds parts of another run, of another model, input or options than "
            f"its manifest says ({len(others)}: {names}): remove them, or give another --out"
        )
    return done


def _footer(store: Store, part: int) -> tuple[dict[str, Any], Any, int] | None:
    """What it says, pyarrow's own metadata, and its bytes; None where it is not whole."""
    try:
        with store.open(part_name(part)) as file, parquet_named(part_name(part)):
            size = file.seek(0, 2)
            file.seek(0)
            metadata = pq.read_metadata(file)
    except ValueError:
        return None
    try:
        own = json.loads((metadata.metadata or {})[RUN])
        own["run"], own["part"], own["bad"]
    except (KeyError, TypeError, ValueError, RecursionError):
        own = {}  # something else
    return own, metadata, size


def _has(metadata: Any, schema: pa.Schema) -> bool:
    try:
        return metadata.schema.to_arrow_schema().equals(schema)
    except pa.ArrowException:
        return False


def read_parts(store: Store, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
    """Columns of all parts, in the order of the listing.

    Raises:
        ValueError: parts are missing, damaged, or of another run.
    """
    done = done_parts(store, manifest, range(manifest.parts))
    if missing := manifest.parts - len(done):
        raise ValueError(
            f"{store.address}: {missing} of {manifest.parts} parts are not there yet: "
            "run hrvlm embed again"
        )
    tables = []
    for part in done:
        with store.open(part_name(part)) as file, parquet_named(part_name(part)):
            tables.append(pq.read_table(file, columns=list(columns)).replace_schema_metadata())
    return pa.concat_tables(tables)
