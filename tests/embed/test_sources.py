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
from hrvlm.embed.entries import Entry, digest_of, with_own_ids
from hrvlm.embed.probe import sample_of
from hrvlm.embed.sources import list_images, open_source
from hrvlm.images.intake import ImageError, load_image


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
        entry.id: str(g) if isinstance(g, Exception) else width_of(g)
        for entry, g in zip(entries, given, strict=True)
    }


def width_of(given):
    """Of an image, or why it has none; a path's error is raised."""
    try:
        return load_image(given).width
    except ImageError as error:
        if isinstance(given, str):
            raise
        return str(error)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    for i, name in enumerate(("b/z.png", "a.PNG", "b/c.jpg")):
        (tmp_path / "in" / name).write_bytes(png(17 + i))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path


def test_folders_are_read_to_their_depths_and_sorted(folder):
    config = config_of(folder / "in")
    assert opened(config) == {"a.PNG": 18, "b/c.jpg": 19, "b/z.png": 17}
    source = open_source(config)
    source.entries()
    assert source.left_out == ["notes.txt"]


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


@pytest.mark.parametrize("name", ["link.png", "pipe.png"])
def test_what_can_not_be_read_is_an_entry_with_its_error(folder, name):
    path = folder / "in" / name
    if name == "link.png":
        path.symlink_to(folder / "nothing.png")
    else:
        os.mkfifo(path)  # to open it would wait for ever
    source = open_source(config_of(folder / "in"))
    assert name in [entry.id for entry in list_images(source)]
    with pytest.raises((ImageError, FileNotFoundError), match=name):
        load_image(str(path))


def test_patterns(folder):
    assert opened(config_of(folder / "in" / "b" / "*.png")) == {"z.png": 17}
    assert opened(config_of(folder / "i*" / "b" / "*")) == {"in/b/c.jpg": 19, "in/b/z.png": 17}
    with pytest.raises(FileNotFoundError, match="no files"):
        opened(config_of(folder / "*.tiff"))


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xff.png")
    (tmp_path / name).write_bytes(png(20))
    (tmp_path / "caf\\udcff.png").write_bytes(png(21))  # which the first one is written as
    (tmp_path / "caf\\udcff.png#2").write_bytes(b"no image by its name")
    assert opened(config_of(tmp_path)) == {"caf\\udcff.png": 21, "caf\\udcff.png#2": 20}


def test_ids_stand_once_whatever_the_names_are():
    names = ["a", "a", "a#2", "a", "a#2"]
    entries = with_own_ids(Entry(name, name, i, 0) for i, name in enumerate(names))
    assert [entry.id for entry in entries] == ["a", "a#2", "a#2#2", "a#3", "a#2#3"]
    assert [(entry.file, entry.place) for entry in entries] == list(
        zip(names, range(5), strict=True)
    )


def test_names_with_the_signs_of_patterns(tmp_path):
    folder = tmp_path / "photos [2020]"
    folder.mkdir()
    (folder / "a*[1]?.png").write_bytes(png(18))
    (folder / "b[1].jsonl").write_text(json.dumps("a*[1]?.png"))
    assert opened(config_of(folder)) == {"a*[1]?.png": 18}
    assert opened(config_of(folder / "b[1].jsonl")) == {"b[1].jsonl:0": 18}
    assert opened(config_of(f"{tmp_path}/photos [[]2020]/*.png")) == {
        "photos [2020]/a*[1]?.png": 18
    }
    import fsspec

    fsspec.filesystem("memory").pipe_file("/in/x[1].png", png(19))
    entries = list_images(source := open_source(config_of("memory://in")))
    assert [load_image(given).width for given in source.images(entries)] == [19]


def test_what_a_run_has_written_is_no_input_of_the_next(tmp_path):
    names = ("a.parquet", "part-00000000.parquet", "_listing.parquet", "._listing.parquet.7.part")
    for name in names:
        (tmp_path / name).touch()
    pq.write_table(pa.table({"image": [png(20)]}), tmp_path / "a.parquet")
    (tmp_path / "same").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "same"):
        config = EmbedConfig(str(tmp_path / "*.parquet"), str(out))
        assert opened(config) == {"a.parquet:0": 20}
    with pytest.raises(ValueError, match=r"damaged parquet file '_listing\.parquet'"):
        opened(config_of(tmp_path / "*.parquet"))  # another folder's


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
    assert "not valid JSON (Expecting property name enclosed" in broken and "column 2" in broken
    assert "no image in column 'image'; columns: text" in none
    assert "--fetch" in address and "2 images in a row" in two


def test_a_row_that_names_a_pipe_does_not_wait_for_it(folder):
    os.mkfifo(folder / "in" / "pipe.png")  # to open it would wait for ever
    (folder / "rows.jsonl").write_text(json.dumps("in/pipe.png"))
    config = config_of(folder / "rows.jsonl")
    with pytest.raises(ImageError, match=r"pipe\.png' is a pipe or a device: expected a regular"):
        opened(config)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_a_pattern_that_finds_a_pipe_names_it(folder, kind):
    os.mkfifo(folder / f"pipe.{kind}")  # to open it would wait for ever
    (folder / f"link.{kind}").symlink_to(folder / f"pipe.{kind}")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match=rf"^{name}\.{kind}: expected a regular file$"):
            opened(config_of(folder / f"{name[:3]}*.{kind}"))


def write_input(folder, kind, count):
    """Images of the widths 16, 17 and so on, all in one input; what it is called."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:02}.png").write_bytes(png(16 + i))
    names = [f"{i:02}.png" for i in range(count)]
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("\n".join(json.dumps({"image": n}) for n in names))
    elif kind == "parquet":
        images = [(folder / name).read_bytes() for name in names]
        table = pa.table({"image": images, "other": images})
        pq.write_table(table, folder / "rows.parquet", row_group_size=7, use_dictionary=False)
    elif kind == "tar":
        with tarfile.open(folder / "rows.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for name in names:
                archive.add(folder / name, name)
    return folder if kind == "folder" else folder / f"rows.{kind}"


KINDS = ("folder", "jsonl", "parquet", "tar")


@pytest.mark.parametrize("kind", KINDS)
def test_some_of_many_images_are_opened_without_a_listing(kind, tmp_path):
    config = config_of(write_input(tmp_path / "in", kind, 40))
    entries = list_images(open_source(config))
    for some in (sample_of(entries), entries[3:9], [entries[39]], entries[::-9]):
        given = list(open_source(config).images(some))
        assert [load_image(one).width for one in given] == [16 + entries.index(e) for e in some]
    sampled = sample_of(entries)
    assert len(sampled) == 16 and sampled[1] == entries[2]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_file_that_is_gone_or_cut_short_is_the_error_of_its_own_images(kind, tmp_path):
    for name in "abc":
        made = write_input(tmp_path / name, kind, 2)
        made.rename(tmp_path / f"{name}.{kind}")
    config = config_of(tmp_path / f"*.{kind}")
    entries = list_images(open_source(config))
    (tmp_path / f"a.{kind}").unlink()
    (tmp_path / f"b.{kind}").write_bytes(b"")
    (tmp_path / "00.png").write_bytes(png(16))
    (tmp_path / "01.png").write_bytes(png(17))
    given = list(open_source(config).images(entries))
    assert len(given) == len(entries) == 6
    assert all(isinstance(one, FileNotFoundError) for one in given[:2])
    assert all(isinstance(one, Exception) or one == b"" for one in given[2:4])
    assert [load_image(one).width for one in given[4:]] == [16, 17]


def test_a_damaged_row_group_is_the_error_of_its_own_rows(tmp_path):
    for name in "ab":
        write_input(tmp_path / name, "parquet", 20).rename(tmp_path / f"{name}.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    column = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0)
    content[column.data_page_offset : column.data_page_offset + 20] = b"\xff" * 20
    (tmp_path / "a.parquet").write_bytes(content)
    found = opened(config_of(tmp_path / "*.parquet"))
    bad = {name for name, width in found.items() if isinstance(width, str)}
    assert bad == {f"a.parquet:{i}" for i in range(7, 14)}
    assert all("damaged parquet file 'a.parquet': " in found[name] for name in bad)
    assert [found[f"{n}.parquet:{i}"] for n in "ab" for i in (6, 14, 19)] == [22, 30, 35] * 2


def test_a_parquet_file_that_has_no_images_is_refused_by_name(tmp_path):
    table = pa.table({"picture": [png(20)], "n": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"^a\.parquet: no column 'image' or .*are 'picture', 'n'"):
        opened(config_of(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"^a\.parquet: no column 'photo'; .*--image-column"):
        opened(config_of(tmp_path / "a.parquet", image_column="photo"))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"^damaged parquet file 'b\.parquet': "):
        opened(config_of(tmp_path / "*.parquet", image_column="picture"))


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
        opened(config_of(tmp_path))


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


def test_where_a_tar_file_is_damaged_is_an_image_with_an_error(tmp_path):
    whole = write_input(tmp_path / "in", "tar", 3).read_bytes()
    second = open_source(config_of(tmp_path / "in" / "rows.tar")).entries()[1].place - 512
    garbled = whole[: second + 148] + b"00000000" + whole[second + 156 :]  # its checksum
    ended = whole.rstrip(b"\0")
    ended += bytes(-len(ended) % 512)  # nothing where the end should be
    cases = {"garbled": garbled, "cut": whole[: second + 530], "ended": ended, "whole": whole}
    for name, content in cases.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    found = opened(config_of(tmp_path / "*.tar"))
    images = {name for name in found if name.endswith(".png")}
    assert images == {
        f"{tar}.tar/{i:02}.png"
        for tar, count in (("cut", 2), ("ended", 3), ("garbled", 1), ("whole", 3))
        for i in range(count)
    }
    assert {name: found[name] for name in set(found) - images} == {
        f"{tar}.tar": f"damaged tar file '{tar}.tar': neither a member nor the end at byte {at}; "
        "what may follow is not listed"
        for tar, at in (("cut", second + 1024), ("ended", len(ended)), ("garbled", second))
    }
    assert "truncated" in found["cut.tar/01.png"] and found["garbled.tar/00.png"] == 16


def test_links_in_tar_files_are_followed(tmp_path):
    (tmp_path / "a.png").write_bytes(png(20))
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "x/a.png")
        links = ("x/soft.png", tarfile.SYMTYPE, "a.png"), ("hard.png", tarfile.LNKTYPE, "x/a.png")
        gone = ("gone.png", tarfile.SYMTYPE, "/etc/a.png"), ("y.png", tarfile.SYMTYPE, "y.png")
        twice = ("twice.png", tarfile.SYMTYPE, "./x/../hard.png")
        for name, kind, target in (*links, *gone, twice):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    found = opened(config_of(tmp_path / "0.tar"))
    good = ("x/a.png", "x/soft.png", "hard.png", "twice.png")
    assert [found.pop(f"0.tar/{name}") for name in good] == [20] * 4
    assert found == {
        f"0.tar/{n}.png": "a link to what is not in tar file '0.tar'" for n in ("gone", "y")
    }


def test_data_sets_of_the_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (20 + i, 16)) for i in range(3)]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    assert opened(config_of(f"datasets:{tmp_path / 'set'}")) == {"0": 20, "1": 21, "2": 22}
    with pytest.raises(ValueError, match=r"set: no column 'photo'; its columns are 'image'"):
        opened(config_of(f"datasets:{tmp_path / 'set'}", image_column="photo"))
    with pytest.raises(ValueError, match=r"^datasets:: expected datasets:NAME"):
        open_source(config_of("datasets:"))


def test_an_address_that_no_installed_package_reads_is_named():
    with pytest.raises(ValueError, match=r"^dropbox://a/b: reading from there needs packages that"):
        open_source(config_of("dropbox://a/b"))


def test_inputs_that_are_none(folder):
    with pytest.raises(FileNotFoundError, match="no such file, folder or pattern"):
        opened(config_of(folder / "none"))
    (folder / "in" / "x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="files of different kinds"):
        opened(config_of(folder / "in" / "*"))
