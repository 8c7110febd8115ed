"""A search among more rows than are all compared: `python -m benchmarks.embedding.search`.

Vectors are drawn around centres of their own and written as the parts of a run; its index is made
and kept as `hrvlm search` does. Measured: the share of true neighbours that other rows than those
which the index was tuned with find, without themselves, and the time of a query. Real features
cluster otherwise: what an index of theirs reaches, the search says each time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case import RESULTS
from benchmarks.hardening.parts import made_by
from hrvlm.embed.config import EmbedConfig, Facts, Manifest
from hrvlm.embed.entries import Entry, digest_of
from hrvlm.embed.index import EXACT_ROWS, Index, open_index
from hrvlm.embed.rows import Row, parquet_bytes, table_of
from hrvlm.embed.run import begin
from hrvlm.embed.store import Store, part_name
from hrvlm.files import write_text

SEED, ROWS_PER_PART = 17, 512
QUERIES, NEIGHBOURS = 400, 10


def write_run(out: Path, vectors: np.ndarray) -> Manifest:
    """Parts whose means are these vectors."""
    store, width = Store(str(out)), vectors.shape[1]
    entries = [Entry(f"{i:08}.jpg", f"{i:08}.jpg", 0, 1) for i in range(len(vectors))]
    facts = Facts("drawn", True, "", "float32", width, 0, 1, 16, 0, (0.5,) * 3, (0.5,) * 3)
    config = EmbedConfig("in", str(out))
    digest = digest_of(entries)
    manifest = Manifest.make(config, facts, len(entries), ROWS_PER_PART, digest)
    begin(store, manifest, entries, range(manifest.parts))
    for part in range(manifest.parts):
        first = part * ROWS_PER_PART
        rows = [
            Row(entries[i].id, i, features={"mean": vectors[i]})
            for i in range(first, first + manifest.rows_of(part))
        ]
        store.write(part_name(part), parquet_bytes(table_of(rows, part, manifest)))
    return manifest


def found(index: Index, queries: np.ndarray) -> tuple[list[list[int]], float]:
    """Rows that are near each query, and milliseconds for one."""
    started = time.perf_counter()
    hits = index.search(queries, NEIGHBOURS + 1)
    milliseconds = 1e3 * (time.perf_counter() - started) / len(hits)
    return [[hit.row for hit in near] for near in hits], milliseconds


def run(count: int, width: int, clusters: int) -> dict[str, Any]:
    """Make the index and measure it."""
    noise = np.random.default_rng(SEED)
    centres = noise.standard_normal((clusters, width), dtype=np.float32)
    drawn = noise.standard_normal((count, width), dtype=np.float32)
    vectors = centres[noise.integers(clusters, size=count)] + 0.5 * drawn
    with tempfile.TemporaryDirectory() as name:
        manifest, store = write_run(Path(name), vectors), Store(name)
        started = time.perf_counter()
        index = open_index(store, manifest, "mean")
        made = time.perf_counter() - started
        started = time.perf_counter()
        kept = open_index(store, manifest, "mean")
        opened = time.perf_counter() - started
        own = noise.choice(count, QUERIES, replace=False)
        true, exact_ms = found(open_index(store, manifest, "mean", exact=True), vectors[own])
        near, ms = found(kept, vectors[own])
    shares = [
        len(set(a) & set(b) - {n}) / len(set(b) - {n})
        for a, b, n in zip(near, true, own.tolist(), strict=True)
    ]
    assert not index.exact and count > EXACT_ROWS and kept.recall == index.recall
    return {
        "command": "python -m benchmarks.embedding.search "
        f"--rows {count} --width {width} --clusters {clusters}",
        "made_by": made_by() | {"faiss": version("faiss-cpu"), "numpy": np.__version__},
        "rows": count,
        "width": width,
        "clusters": clusters,
        "lists": index.lists[1],
        "lists_looked_into": index.lists[0],
        "recall_stated": round(index.recall, 4),
        "queries": QUERIES,
        "recall_of_queries": round(float(np.mean(shares)), 4),
        "seconds_to_make": round(made, 1),
        "seconds_to_open": round(opened, 2),
        "query_ms": round(ms, 3),
        "exact_query_ms": round(exact_ms, 3),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=120_000)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULTS / "embedding_search.json")
    options = parser.parse_args(arguments)
    result = run(options.rows, options.width, options.clusters)
    print(json.dumps(result, indent=1))
    write_text(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
