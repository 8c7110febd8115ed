"""`hrvlm search`: true neighbours, with every row compared or by lists; sheets and pages."""

import io
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hrvlm.embed.config import EmbedConfig
from hrvlm.embed.index import GOAL, open_index
from hrvlm.embed.rows import RUN, parquet_bytes
from hrvlm.embed.store import Store, index_names, part_name
from tests.commands.helpers import error_of, run
from tests.embed.here import rows_of, run_here
from tests.embed.pictures import write_model, write_pictures

COUNT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    write_pictures(folder / "in", COUNT)
    write_model(folder / "model")
    run_here(
        EmbedConfig(
            str(folder / "in"),
            str(folder / "index"),
            model=str(folder / "model"),
            max_img_size=48,
            rows_per_part=7,
        )
    )
    return folder


def neighbours(folder, by, row, top):
    """By hand, in float64."""
    rows = [r for r in rows_of(folder / "index", "row", by) if r[by] is not None]
    vectors = np.array([r[by] for r in rows])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    numbers = [r["row"] for r in rows]
    scores = vectors @ vectors[numbers.index(row)]
    return [(numbers[i], scores[i]) for i in np.argsort(-scores)[:top]]


@pytest.mark.parametrize("by", ["cls", "mean"])
def test_hits_are_the_nearest_rows(folder, by, tmp_path):
    query = folder / "in" / "0003.png"
    result = run("search", query, "--index", folder / "index", "--top", 5, "--by", by, "--json")
    document = json.loads(result.stdout)
    hits = document["queries"][0]["hits"]
    assert hits[0]["id"] == "0003.png" and hits[0]["score"] == pytest.approx(1, abs=1e-5)
    expected = neighbours(folder, by, hits[0]["row"], 5)
    assert [hit["row"] for hit in hits] == [row for row, _ in expected]
    np.testing.assert_allclose([h["score"] for h in hits], [s for _, s in expected], atol=1e-5)
    assert document["exact"] and document["recall"] == 1 and document["rows"] == COUNT - 3


def test_sheet_and_page_show_the_query_and_its_hits(folder, tmp_path):
    pictures = folder / "in" / "0003.png", folder / "in" / "deep" / "er" / "0001.png"
    sheet, page = tmp_path / "new" / "sheet.png", tmp_path / "page.html"
    result = run("search", *pictures, "--index", folder / "index", "--top", 4, "--sheet", sheet,
                 "--page", page)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "57 rows, every one compared" in result.stdout and "deep/er/0001.png" in result.stdout
    with Image.open(sheet) as drawn:
        assert drawn.size == (5 * 232 + 8, 2 * 266 + 8)
        assert len(drawn.getcolors(1 << 20)) > 50
    text = page.read_text()
    assert "What is like 0003.png" in text and len(re.findall("data:image/webp", text)) == 5
    address = run("search", "https://example.org/a.png", "--index", folder / "index")
    assert "https://example.org/a.png: addresses are fetched only with" in error_of(address)
    for name in ("a.sheet", "a.psd"):
        wrong = run("search", pictures[0], "--index", folder / "index", "--sheet", name)
        assert f"{name}: no picture by its ending" in error_of(wrong)


def test_many_rows_are_searched_by_lists_and_recall_is_measured(folder, monkeypatch):
    store = Store(str(folder / "index"))
    manifest = store.read_manifest()
    made = open_index(store, manifest, "mean", exact_rows=10)
    assert not made.exact and GOAL <= made.recall <= 1 and made.lists[0] <= made.lists[1] == 30
    queries = np.random.default_rng(0).standard_normal((20, 32))
    exact = open_index(store, manifest, "mean", exact=True, exact_rows=10).search(queries, 10)
    monkeypatch.setattr("hrvlm.embed.index._made", None)  # it is kept
    kept = open_index(store, manifest, "mean", exact_rows=10)
    assert (kept.recall, kept.lists, kept.rows) == (made.recall, made.lists, COUNT - 3)
    found = kept.search(queries, 10)
    common = [len(set(a) & set(b)) for a, b in zip(exact, found, strict=True)]
    assert np.mean(common) > 8 and found == made.search(queries, 10)

    rows = [r for r in rows_of(folder / "index", "row", "mean") if r["mean"] is not None]
    vectors = np.array([r["mean"] for r in rows])
    flat = open_index(store, manifest, "mean", exact=True)
    pairs = zip(rows, made.search(vectors, 11), flat.search(vectors, 11), strict=True)
    shares = [  # of the others: each row finds itself
        len({hit.row for hit in near} & {hit.row for hit in true} - {row["row"]}) / 10
        for row, near, true in pairs
    ]
    assert made.recall == pytest.approx(np.mean(shares))


def test_an_index_of_other_rows_or_a_damaged_one_is_made_anew(folder, tmp_path, monkeypatch):
    for name in ("index", "other"):
        options = {"model": str(folder / "model"), "max_img_size": 48, "rows_per_part": 30}
        if name == "other":
            write_model(tmp_path / "model", seed=4)
            options["model"] = str(tmp_path / "model")
        run_here(EmbedConfig(str(folder / "in"), str(tmp_path / name), **options))
    store, other = Store(str(tmp_path / "index")), Store(str(tmp_path / "other"))
    leftover = tmp_path / "index" / "._index-mean.faiss.77.part"
    leftover.touch()
    open_index(store, store.read_manifest(), "mean", exact_rows=10)
    assert not leftover.exists()
    content, told = (store.read(name) for name in index_names("mean"))
    monkeypatch.setattr("hrvlm.embed.index._made", lambda *_: "made anew")

    def is_kept(store):
        return open_index(store, store.read_manifest(), "mean", exact_rows=10) != "made anew"

    assert is_kept(store)
    for name, file in zip(index_names("mean"), (content, told), strict=True):
        other.write(name, file)
    assert not is_kept(other)  # the same images, parts of the same size
    damaged = [(content[:-9], told), (content[:-1] + b"?", told)]
    broken = (b"", b"[]", b"null", b"{}", b"\xff", told.replace(b"0.", b"?."), told[:-20])
    damaged += [(content, other_told) for other_told in broken]
    for pair in damaged:
        for name, file in zip(index_names("mean"), pair, strict=True):
            store.write(name, file)
        assert not is_kept(store), pair[1]
    store.write(index_names("mean")[1], told)
    store.write(index_names("mean")[0], content)
    assert is_kept(store)
    part = pq.read_table(io.BytesIO(store.read(part_name(0))))
    own = json.loads(part.schema.metadata[RUN])
    own["bad"] = {}  # as where bad images were tried again
    store.write(part_name(0), parquet_bytes(part.replace_schema_metadata({RUN: json.dumps(own)})))
    assert not is_kept(store)


def test_what_can_not_be_searched(folder, tmp_path):
    query = folder / "in" / "0003.png"
    assert "no _manifest.json" in error_of(run("search", query, "--index", tmp_path))
    broken = folder / "in" / "0000.png"
    assert "0000.png" in error_of(run("search", broken, "--index", folder / "index"))
    by = run("search", query, "--index", folder / "index", "--by", "registers")
    assert "by='registers': expected cls or mean" in error_of(by)
    write_model(folder / "other", seed=3)
    other = run("search", query, "--index", folder / "index", "--model", folder / "other")
    assert "its weights are not those that made" in error_of(other)
