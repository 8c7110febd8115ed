"""Nearest neighbours among the rows of a run, by cosine similarity.

Up to `EXACT_ROWS` rows every one is compared. Above that an inverted file (IVF) of faiss looks into
some of its lists only: as many as it takes for `GOAL` of the true neighbours of sampled rows to be
found. It is made once and kept beside the parts; what was measured is kept with it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .config import Manifest
from .rows import POOLED, listed, read_parts
from .sources import Entry
from .store import Store

EXACT_ROWS = 100_000
GOAL = 0.95  # recall
_SAMPLE, _NEIGHBOURS = 100, 10  # rows that recall is measured with, and neighbours of each


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
    return listed(store.address, part)[place]


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
    """What the index is of: changes with any part."""
    sizes = sorted(store.sizes().items())
    return hashlib.blake2b(repr((manifest.digest, sizes)).encode(), digest_size=16).hexdigest()


def _names(by: str) -> tuple[str, str]:
    return f"_index-{by}.faiss", f"_index-{by}.json"


def _kept(store: Store, manifest: Manifest, by: str, state: str) -> Index | None:
    """The index that an earlier search has left, if it is of the parts as they are."""
    import faiss

    content, told = _names(by)
    try:
        with store.open(told) as file:
            own = json.load(file)
        if own.pop("state") != state:
            return None
        with store.open(content) as file:
            index: Any = faiss.deserialize_index(np.frombuffer(file.read(), dtype=np.uint8))
    except FileNotFoundError:
        return None
    index.nprobe = own["lists"][0]
    lists = own["lists"][0], own["lists"][1]
    return Index(own["rows"], False, own["recall"], lists, index, None, store, manifest)


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
    sample = vectors[:: max(1, count // _SAMPLE)][:_SAMPLE]
    true = numbers[flat.search(sample, min(_NEIGHBOURS, count))[1]]
    index.nprobe, recall = 1, 0.0  # faiss's own name: lists looked into
    while (recall := _recall(index, sample, true)) < GOAL and index.nprobe < lists:
        index.nprobe = min(2 * index.nprobe, lists)
    content, told = _names(by)
    store.write(content, faiss.serialize_index(index).tobytes())
    own = {"state": state, "rows": count, "recall": recall, "lists": [index.nprobe, lists]}
    store.write(told, (json.dumps(own) + "\n").encode())
    return Index(count, False, recall, (index.nprobe, lists), index, None, store, manifest)


def _recall(index: Any, queries: np.ndarray, true: Sequence[Sequence[int]] | np.ndarray) -> float:
    found = index.search(queries, true.shape[1])[1]  # type: ignore[union-attr]
    shares = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, true, strict=True)]
    return float(np.mean(shares))
