"""Nearest neighbours among the rows of a run, by cosine similarity.

Up to `EXACT_ROWS` rows every one is compared. Above that an inverted file (IVF) of faiss looks into
some of its lists only: as many as it takes for `GOAL` of the true neighbours of sampled rows to be
found. It is made once and kept beside the parts; what was measured is kept with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files import hexdigest
from .config import Manifest
from .entries import Entry
from .parts import done_parts, read_parts
from .rows import POOLED, listed
from .store import Store, index_names

EXACT_ROWS = 100_000
GOAL = 0.95  # recall
_SAMPLE, _NEIGHBOURS = 400, 10  # rows that recall is measured with, and neighbours of each


@dataclass(frozen=True)
class Hit:
    """A row that is near.

    Attributes:
        row: Its place in the listing.
        id: As in the listing.
        score: Cosine similarity.
    """

    row: int
    id: str
    score: float


@dataclass(frozen=True)
class Index:
    """Rows that can be searched.

    Attributes:
        rows: How many.
        exact: Whether every one is compared.
        recall: Share of the true neighbours of sampled rows that were found; 1 if exact.
        lists: Looked into, and in all; (1, 1) if exact.
    """

    rows: int
    exact: bool
    recall: float
    lists: tuple[int, int]
    _faiss: Any
    _numbers: np.ndarray | None  # of the rows, where faiss counts its own
    _store: Store
    _manifest: Manifest

    def search(self, queries: np.ndarray, top: int) -> list[list[Hit]]:
        """The nearest rows of each query ``[n, C]``, nearest first; equal ones by their place."""
        scores, found = self._faiss.search(_unit(queries), min(top, self.rows))
        return [
            [self._hit(int(n), float(s)) for n, s in zip(numbers, near, strict=True) if n >= 0]
            for numbers, near in zip(found, scores, strict=True)
        ]

    def _hit(self, number: int, score: float) -> Hit:
        row = number if self._numbers is None else int(self._numbers[number])
        return Hit(row, entry_of(self._store, self._manifest, row).id, score)


def entry_of(store: Store, manifest: Manifest, row: int) -> Entry:
    """Where the image of a row is."""
    part, place = divmod(row, manifest.rows_per_part)
    (entry,) = listed(store.address, part, manifest, place)
    return entry


def open_index(
    store: Store,
    manifest: Manifest,
    by: str = "cls",
    *,
    exact: bool = False,
    exact_rows: int = EXACT_ROWS,
) -> Index:
    """The index of a complete run.

    Args:
        store: Its folder.
        manifest: What is there.
        by: ``cls`` or ``mean``.
        exact: Compare every row, however many there are.
        exact_rows: Up to which number that is done unasked.

    Raises:
        ValueError: parts are missing, there is no such column, or no row has features.
    """
    if by not in POOLED or (by == "cls" and not manifest.facts.num_prefix_tokens):
        raise ValueError(f"by={by!r}: expected {' or '.join(POOLED)}, of which the run has some")
    if not exact and manifest.images > exact_rows:
        state = _state_of(store, manifest)
        return _kept(store, manifest, by, state) or _made(store, manifest, by, state)
    import faiss

    numbers, vectors = _vectors(store, manifest, by)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    return Index(len(vectors), True, 1.0, (1, 1), flat, numbers, store, manifest)


def _vectors(store: Store, manifest: Manifest, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows with features, and these at length 1."""
    table = read_parts(store, manifest, ["row", by])
    table = table.filter(table[by].is_valid())
    if not len(table):
        raise ValueError(f"{store.address}: no row has features")
    column = table[by].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    return table["row"].to_numpy(), _unit(vectors)


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = np.ascontiguousarray(vectors, dtype=np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def _state_of(store: Store, manifest: Manifest) -> str:
    """What the index is of: changes with the run and with any part."""
    parts = done_parts(store, manifest, range(manifest.parts))
    told = [(part, own.size, sorted(own.bad.items())) for part, own in parts.items()]
    return hexdigest(repr((manifest.fingerprint, told)).encode())


def _kept(store: Store, manifest: Manifest, by: str, state: str) -> Index | None:
    """The index that an earlier search has left, if it is whole and of the parts as they are."""
    import faiss

    content_name, told_name = index_names(by)
    try:
        with store.open(told_name) as file:
            own = json.load(file)
        with store.open(content_name) as file:
            content = file.read()
        if (own["state"], own["digest"]) != (state, hexdigest(content)):
            return None
        rows, recall, (looked_into, lists) = own["rows"], own["recall"], own["lists"]
    except (FileNotFoundError, KeyError, TypeError, ValueError, RecursionError):
        return None
    index: Any = faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8))
    index.nprobe = looked_into
    return Index(rows, False, recall, (looked_into, lists), index, None, store, manifest)


def _made(store: Store, manifest: Manifest, by: str, state: str) -> Index:
    """A new index, kept for the next search."""
    import faiss

    numbers, vectors = _vectors(store, manifest, by)
    count, width = vectors.shape
    flat = faiss.IndexFlatIP(width)
    flat.add(vectors)
    lists = max(1, round(4 * math.sqrt(count)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = 1234
    index.train(vectors[:: max(1, count // (64 * lists))])
    index.add_with_ids(vectors, numbers.astype(np.int64))
    sample = np.arange(0, count, max(1, count // _SAMPLE))[:_SAMPLE]
    queries, own = vectors[sample], numbers[sample]
    nearest = flat.search(queries, min(_NEIGHBOURS + 1, count))[1]
    true = _others(numbers[nearest], own)
    index.nprobe, recall = 1, 0.0  # faiss's own name: lists looked into
    while (recall := _recall(index, queries, own, true)) < GOAL and index.nprobe < lists:
        index.nprobe = min(2 * index.nprobe, lists)
    content, names = faiss.serialize_index(index).tobytes(), index_names(by)
    told = {"state": state, "digest": hexdigest(content), "rows": count, "recall": recall}
    told["lists"] = [index.nprobe, lists]
    store.write(names[0], content)
    store.write(names[1], (json.dumps(told) + "\n").encode())
    store.remove_leftovers(names)
    return Index(count, False, recall, (index.nprobe, lists), index, None, store, manifest)


def _others(found: np.ndarray, own: np.ndarray) -> list[np.ndarray]:
    """Of each row's neighbours the nearest that are not itself."""
    return [row[row != n][:_NEIGHBOURS] for row, n in zip(found, own, strict=True)]


def _recall(index: Any, queries: np.ndarray, own: np.ndarray, true: Sequence[np.ndarray]) -> float:
    """Share of the true neighbours that the index finds."""
    found = _others(index.search(queries, _NEIGHBOURS + 1)[1], own)
    shares = [len(np.intersect1d(a, b)) / max(1, len(b)) for a, b in zip(found, true, strict=True)]
    return float(np.mean(shares))
