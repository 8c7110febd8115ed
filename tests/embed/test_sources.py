"""Every kind of input: which images, in which order, under which ids, and how they are opened."""

import base64
import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hrvlm.embed.config import EmbedConfig
from hrvlm.embed.sources import digest_of, list_images, open_source
from hrvlm.images.intake import load_image


def png(width):
    stream = io.BytesIO()
    Image.new("RGB", (width, 16)).save(stream, "PNG")
    return stream.getvalue()


def config_of(source, **options):
    return EmbedConfig(str(source), "out", **options)


def opened(config):
    """Id to the width of the image, or to its error."""
    source = open_source(config)
    entries = list_images(source)
    given = list(source.images(entries))
    assert len(given) == len(entries)
    return {
        entry.id: str(g) if isinstance(g, Exception) else load_image(g).width
        for entry, g in zip(entries, given, strict=True)
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    for i, name in enumerate(("b/z.png", "a.PNG", "b/c.jpg")):
        (tmp_path / "in" / name).write_bytes(png(17 + i))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    os.mkfifo(tmp_path / "in" / "pipe.png")  # to open it would wait for ever
    return tmp_path


def test_folders_are_read_to_their_depths_and_sorted(folder):
    config = config_of(folder / "in")
    assert opened(config) == {"a.PNG": 18, "b/c.jpg": 19, "b/z.png": 17}
    assert open_source(config).left_out == ["notes.txt"]


def test_ids_and_digests_do_not_depend_on_where_the_input_lies(folder):
    before = list_images(open_source(config_of(folder / "in")))
    (folder / "in").rename(folder / "moved")
    after = list_images(open_source(config_of(folder / "moved")))
    assert before == after and digest_of(before) == digest_of(after)
    (folder / "moved" / "a.PNG").write_bytes(png(400))
    assert digest_of(list_images(open_source(config_of(folder / "moved")))) != digest_of(after)


def test_links_are_followed(folder):
    (folder / "in" / "b" / "link.png").symlink_to(folder / "in" / "a.PNG")
    assert opened(config_of(folder / "in"))["b/link.png"] == 18


def test_patterns(folder):
    assert opened(config_of(folder / "in" / "b" / "*.png")) == {"z.png": 17}
    assert opened(config_of(folder / "i*" / "b" / "*")) == {"in/b/c.jpg": 19, "in/b/z.png": 17}
    with pytest.raises(FileNotFoundError, match="no files"):
        open_source(config_of(folder / "*.tiff"))


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xff.png")
    (tmp_path / name).write_bytes(png(20))
    assert opened(config_of(tmp_path)) == {name: 20}


def test_json_lines(folder):
    lines = [
        json.dumps({"image": "in/a.PNG"}),
        json.dumps("in/b/z.png"),
        "",
        "{broken",
        json.dumps({"jpg": base64.b64encode(png(33)).decode()}),
        json.dumps({"text": "none"}),
        json.dumps({"image": "https://example.org/x.png"}),
        json.dumps({"images": ["in/a.PNG", "in/a.PNG"]}),
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    found = opened(config_of(folder / "rows.jsonl"))
    assert list(found) == [f"rows.jsonl:{i}" for i in (0, 1, 3, 4, 5, 6, 7)]
    first, second, broken, coded, none, address, two = found.values()
    assert (first, second, coded) == (18, 17, 33)
    assert "no JSON" in broken and "no image in column 'image'; columns: text" in none
    assert "--fetch" in address and "2 images in a row" in two


def test_parquet_rows_come_in_order_over_row_groups_and_files(tmp_path):
    for name, start in (("a", 20), ("b", 30)):
        rows = [{"bytes": png(start + i), "path": None} for i in range(5)]
        table = pa.table({"picture": rows, "n": list(range(5))})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    config = config_of(tmp_path / "*.parquet", image_column="picture")
    widths = {f"{n}.parquet:{i}": s + i for n, s in (("a", 20), ("b", 30)) for i in range(5)}
    assert opened(config) == widths
    source = open_source(config)
    some = list_images(source)[3:7]  # as a part has them
    assert [load_image(g).width for g in source.images(some)] == [23, 24, 30, 31]
    with pytest.raises(ValueError, match=r"no images by their endings; for its \.parquet files"):
        open_source(config_of(tmp_path))


def test_tar_files_and_names_that_stand_twice(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, width in (("k.png", 20), ("k.json", 0), ("k.png", 21)):
            content = png(width) if width else b"{}"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert opened(config_of(tmp_path / "0.tar")) == {"0.tar/k.png": 20, "0.tar/k.png#2": 21}
    (tmp_path / "1.tar").write_bytes(b"no tar file")
    with pytest.raises(ValueError, match=r"1\.tar: no uncompressed tar file"):
        opened(config_of(tmp_path / "*.tar"))


def test_data_sets_of_the_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (20 + i, 16)) for i in range(3)]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    assert opened(config_of(f"datasets:{tmp_path / 'set'}")) == {"0": 20, "1": 21, "2": 22}


def test_an_address_that_no_installed_package_reads_is_named():
    with pytest.raises(ValueError, match=r"^dropbox://a/b: reading from there needs packages that"):
        open_source(config_of("dropbox://a/b"))


def test_inputs_that_are_none(folder):
    with pytest.raises(FileNotFoundError, match="no such file, folder or pattern"):
        open_source(config_of(folder / "none"))
    (folder / "in" / "x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="files of different kinds"):
        open_source(config_of(folder / "in" / "*"))
