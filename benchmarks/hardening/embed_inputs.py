"""What `hrvlm embed` and `hrvlm search` read, whole and then changed, for the fuzzing.

Inputs: a JSON Lines file, a parquet table and a tar archive. Folders of results: the manifest, the
listing and a part.
"""

from __future__ import annotations

import functools
import io
import json
import tarfile
import tempfile
from pathlib import Path
from random import Random

import numpy as np

from benchmarks.hardening.draws import changed, changed_bytes

IMAGE = b"\x89PNG\r\n"  # nothing decodes it here
ROWS = [
    {"image": "a.png", "text": "x"},
    "b.png",
    {"image": {"bytes": None, "path": "c.png"}},
    {"images": ["data:image/png;base64,iVBORw0K"]},
]


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-embed-"))


@functools.cache
def inputs() -> dict[str, bytes]:
    """A small file of each kind, by its ending."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    archive, table = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, target in (("a.png", None), ("notes.txt", None), ("link.png", "a.png")):
            member = tarfile.TarInfo(name)
            if target is None:
                member.size = len(IMAGE)
            else:
                member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member, io.BytesIO(IMAGE))
    columns = {"image": [IMAGE, None, IMAGE], "path": ["a.png", "b.png", "c.png"]}
    pq.write_table(pa.table(columns), table, row_group_size=2)
    return {
        ".jsonl": b"\n".join(json.dumps(row).encode() for row in ROWS),
        ".tar": archive.getvalue()[:4096],  # without the zeros that fill a tape's block
        ".parquet": table.getvalue(),
    }


def try_input(value: tuple[str, bytes]) -> None:
    """List the images of a file, and open all and some of them."""
    from hrvlm.embed.config import EmbedConfig
    from hrvlm.embed.sources import list_images, open_source

    suffix, data = value
    path = _folder() / f"input{suffix}"
    path.write_bytes(data)
    source = open_source(EmbedConfig(str(path), "out"))
    try:
        entries = list_images(source)
    except ValueError as error:
        assert path.name in str(error), f"no name in {error!r}"
        raise
    assert len({entry.id.encode() for entry in entries}) == len(entries)
    for some in (entries, entries[1::2]):
        assert len(list(source.images(some))) == len(some)


def draw_input(draw: Random) -> tuple[str, bytes]:
    """One of them with changes."""
    suffix = draw.choice([*inputs()])
    if suffix == ".jsonl" and draw.random() < 0.6:
        rows = [json.dumps(changed(draw, row), default=str, skipkeys=True) for row in ROWS]
        return suffix, "\n".join(rows).encode("utf-8", "replace")
    return suffix, _changed(draw, inputs()[suffix])


def _changed(draw: Random, data: bytes) -> bytes:
    """With changes at its beginning or, as parquet says at its end what it holds, there."""
    return (
        changed_bytes(draw, data) if draw.random() < 0.5 else changed_bytes(draw, data[::-1])[::-1]
    )


@functools.cache
def folder() -> dict[str, bytes]:
    """The files of a run of three images in one part."""
    from hrvlm.embed.config import EmbedConfig, Facts, Manifest
    from hrvlm.embed.entries import Entry, digest_of
    from hrvlm.embed.rows import Row, listing_bytes, parquet_bytes, table_of
    from hrvlm.embed.store import LISTING, MANIFEST, part_name

    entries = [Entry(name, name, 0, 6) for name in ("a.png", "b.png", "c.png")]
    facts = Facts(
        name="m", random_weights=False, weights="0", dtype="float32", hidden_size=4, token_size=0,
        factor=1, patch_size=16, num_prefix_tokens=1, image_mean=(0.5,) * 3, image_std=(0.5,) * 3,
    )  # fmt: skip
    manifest = Manifest.make(EmbedConfig("in", "out"), facts, 3, 3, digest_of(entries))
    vectors = np.ones((2, 4), dtype=np.float32)
    rows = [Row(entry.id, i, size=(16, 16), grid=(1, 1)) for i, entry in enumerate(entries)]
    for row in rows[1:]:
        row.features = dict(zip(("cls", "mean"), vectors, strict=True))
    rows[0].fail("truncated")
    return {
        MANIFEST: json.dumps(manifest.to_json()).encode(),
        LISTING: listing_bytes(entries, manifest),
        part_name(0): parquet_bytes(table_of(rows, 0, manifest)),
    }


def try_folder(value: dict[str, bytes]) -> None:
    """Read a folder as a search does."""
    from hrvlm.embed import rows
    from hrvlm.embed.parts import read_parts
    from hrvlm.embed.store import Store

    place = _folder() / "run"
    place.mkdir(exist_ok=True)
    for name, data in value.items():
        (place / name).write_bytes(data)
    store = Store(str(place))
    manifest = store.read_manifest()
    assert manifest is not None
    assert len(read_parts(store, manifest, ["row", "mean"])) == manifest.images
    rows._listing.cache_clear()
    assert len(rows.listed(store.address, 0, manifest)) == manifest.rows_of(0)


def draw_folder(draw: Random) -> dict[str, bytes]:
    """The folder with changes in one of its files."""
    files = dict(folder())
    name = draw.choice([*files])
    if name.endswith(".json") and draw.random() < 0.7:
        found = changed(draw, json.loads(files[name]))
        files[name] = json.dumps(found, default=str, skipkeys=True).encode("utf-8", "replace")
    else:
        files[name] = _changed(draw, files[name])
    return files
