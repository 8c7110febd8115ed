"""No image file costs more than 8 bytes a pixel of its first frame and 100 MB, or 3 CPU seconds."""

import io
import json
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.images.fuzz import broken_rule, measure, supervise
from benchmarks.images.mutations import seeds
from hrvlm.images import headers_boxes, headers_heif, worker
from hrvlm.images.formats import read_header
from hrvlm.images.intake import MAX_PIXELS, ImageError, load_image
from hrvlm.images.stills import LimitError, Reader
from hrvlm.images.worker import load_image_in_worker
from tests.images.bombs import DISARMED, REFUSED, encode, run_length_bmp

RESULTS = Path(__file__).parents[2] / "benchmarks/results/image_fuzz.json"


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What the readers import where they use it is no part of what a file costs."""
    for name in ("PNG", "JPEG"):
        measure(encode(Image.new("RGB", (8, 8)), name))


@pytest.mark.parametrize("name", DISARMED)
def test_what_is_beside_the_first_frame_is_passed_over(name):
    found = measure(DISARMED[name])
    assert found["outcome"] == "read" and broken_rule(found) is None, found
    assert found["seconds"] < 1 and found["peak"] < 30e6, found


@pytest.mark.parametrize("name", REFUSED)
def test_what_costs_too_much_is_refused_by_its_header(name):
    data, message = REFUSED[name]
    with pytest.raises(ImageError, match=rf"^image 7 .*{message}"):
        load_image(data, name=7)
    found = measure(data)
    assert found["seconds"] < 1 and found["peak"] < 30e6, found


def test_a_large_file_can_be_passed_as_a_pillow_image():
    data, _ = REFUSED["WebP of a few kilobytes"]
    with pytest.raises(ImageError, match=r"that you trust: open it yourself and pass the Pillow"):
        load_image(data)
    assert load_image(Image.open(io.BytesIO(data))).size == (7000, 7000)


@pytest.mark.parametrize("name", ["PNG", "GIF", "WEBP", "AVIF", "TIFF"])
def test_the_first_frame_is_that_of_pillow(name):
    frames = [Image.effect_noise((70, 50), sigma).convert("RGB") for sigma in (9, 60, 120)]
    data = encode(frames[0], name, save_all=True, append_images=frames[1:])
    expected = Image.open(io.BytesIO(data))
    assert expected.n_frames == 3
    expected.seek(0)
    np.testing.assert_array_equal(load_image(data), expected.convert("RGB"))


def test_an_animation_whose_first_frame_covers_a_part():
    canvas = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    second = canvas.copy()
    second.paste((255, 0, 0, 255), (0, 0, 40, 30))
    canvas.paste((0, 0, 255, 255), (10, 10, 20, 20))
    for name, options in (("WEBP", {"lossless": True}), ("GIF", {})):
        data = encode(canvas, name, save_all=True, append_images=[second], **options)
        first = Image.open(io.BytesIO(data)).convert("RGBA")
        expected = Image.alpha_composite(Image.new("RGBA", first.size, "white"), first)
        np.testing.assert_array_equal(load_image(data), expected.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "L", "CMYK", "I;16", "F"])
def test_large_images_are_brought_to_rgb_in_stripes_exactly(mode, monkeypatch):
    values = np.random.default_rng(3).integers(0, 256, (50, 70, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    if mode in ("I;16", "F"):
        image = Image.fromarray(
            np.uint16(values[..., 0]) * 257 if mode == "I;16" else values[..., 0] / np.float32(255)
        )
    else:
        image = image.convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    whole = load_image(image)
    monkeypatch.setattr("hrvlm.images.intake._STRIPE_PIXELS", 200)
    np.testing.assert_array_equal(load_image(image), whole)


def test_mutated_files():
    """A few hundred of the cases of `make fuzz-images`, by another seed."""
    found = supervise(seed=20, start=0, stop=600)
    assert found["failures"] == []
    read = {name for name, row in found["formats"].items() if row["outcomes"].get("read")}
    assert {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} <= read


def test_mutated_heic():
    pytest.importorskip("pillow_heif")
    found = supervise(seed=20, start=0, stop=400, only="HEIF")
    assert found["failures"] == [] and found["formats"]["HEIF"]["outcomes"]["read"] > 50


def test_a_heic_of_a_telephone_is_within_the_limits():
    """4032 x 3024 pixels in 4 MB; a header is enough."""
    pytest.importorskip("pillow_heif")
    small = seeds()["HEIF"]
    was = read_header(io.BytesIO(small), "image", MAX_PIXELS)
    small += struct.pack(">I", 4_000_000) + b"free" + bytes(4_000_000 - 8)
    of_sides = [
        small.replace(struct.pack(">II", was.width, was.height), struct.pack(">II", *sides))
        for sides in ((4032, 3024), (9000, 6000))
    ]
    still = read_header(io.BytesIO(of_sides[0]), "image", MAX_PIXELS)
    assert (still.width, still.height) == (4032, 3024)
    with pytest.raises(ImageError, match="over the limits of a HEIF file"):
        read_header(io.BytesIO(of_sides[1]), "image", MAX_PIXELS)


def cost_of(data):
    return read_header(io.BytesIO(data), "image", MAX_PIXELS)


def with_sides(data, old, new):
    """Other sides in the boxes."""
    return data.replace(struct.pack(">II", *old), struct.pack(">II", *new))


def test_a_heic_whose_coded_picture_is_larger_than_its_boxes_say():
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (2048, 1536))).save(stream, format="HEIF")
    data = stream.getvalue()
    assert cost_of(data).memory < 40e6
    with pytest.raises(ImageError, match="coded pictures of 3145728 pixels for one of 64 x 64"):
        cost_of(with_sides(data, (2048, 1536), (64, 64)))


def test_what_is_decoded_of_a_heic():
    """The header of a coded picture, by itself and among its units; tiles, alpha, other codecs."""
    pytest.importorskip("pillow_heif")
    data = seeds()["HEIF alpha"]
    file = Reader(io.BytesIO(data), "image")
    items = headers_heif._items(file)
    (start, end), *_ = items.headers[items.primary]
    budget = headers_boxes.Budget("units")
    assert headers_heif._in_configuration(data[start:end], budget) == [(64, 64)]
    at = data.index(b"\x42\x01", start)  # of the sequence header
    unit = data[at : at + int.from_bytes(data[at - 2 : at], "big")]
    units = b"".join(len(u).to_bytes(4, "big") + u for u in (b"\x26\x01abc", unit))
    among = headers_heif._in_units(Reader(io.BytesIO(units), ""), [(0, len(units))], 4, budget)
    assert list(among) == [(64, 64)]

    assert len(items.parts[items.primary]) == 1  # alpha
    tiled = items._replace(parts={1: [2] * 90 + [3], 3: [2]})
    assert headers_heif._decoded(1, tiled, {1: 5, 2: 100}, budget, 4) == 5 + 91 * 100
    for parts, message in (({1: [1]}, "derived from others"), ({1: [2] * 5000}, "more than 4096")):
        with pytest.raises(LimitError, match=message):
            headers_heif._decoded(1, items._replace(parts=parts), {}, budget, 4)
    with pytest.raises(ImageError, match="a picture coded as 'av01', which is not read"):
        cost_of(data.replace(b"hvc1", b"av01"))


def test_a_small_avif_that_is_scaled_to_the_size_in_its_boxes():
    """Found by the fuzz: 445 MB for 36 megapixels."""
    data = seeds()["AVIF alpha"]
    with pytest.raises(ImageError, match=r"height 6769, width 5268: .* takes about .* MB"):
        cost_of(with_sides(data, (37, 29), (5268, 6769)))


def test_a_jpeg_2000_of_more_bit_planes_takes_longer():
    """Each is three more passes over a block, which may have no bytes at all."""
    data = bytearray(seeds()["JPEG2000"])
    before = cost_of(bytes(data)).nanoseconds
    at = data.index(b"\xff\x5c") + 4
    data[at] |= 7 << 5  # guard bits
    assert cost_of(bytes(data)).nanoseconds > before
    data[at - 4 : at - 4] = b"\xff\x5e\0\5\0\0\x1f"  # a region of interest
    pixels = 3 * 37 * 29
    assert cost_of(bytes(data)).nanoseconds - before > (0.55 * 91 - 20) * pixels


def test_the_committed_run_is_of_a_hundred_thousand_files_and_clean():
    result = json.loads(RESULTS.read_text())
    assert result["cases"] >= 100_000 and result["failures"] == []
    assert not result["commit"].endswith("dirty")
    total = sum(sum(row["outcomes"].values()) for row in result["formats"].values())
    assert total == result["cases"] and result["formats"]["HEIF"]["outcomes"]["read"]


# The worker


def test_a_worker_gives_the_same_pixels():
    values = np.random.default_rng(3).integers(0, 256, (150, 70, 4), dtype=np.uint8)
    data = encode(Image.fromarray(values), "PNG")
    options = {"background": (9, 8, 7)}
    np.testing.assert_array_equal(
        load_image_in_worker(data, **options), load_image(data, **options)
    )


def test_a_workers_pixels_are_held_once_beside_the_image():
    data = encode(Image.new("RGB", (3000, 3000)), "PNG")
    tracemalloc.start()
    load_image_in_worker(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 27e6 < peak < 30e6  # Pillow's own pixels are not counted


def test_a_worker_tells_what_load_image_does():
    with pytest.raises(ImageError, match=r"^image 2 .*run-length"):
        load_image_in_worker(run_length_bmp(9000), name=2)
    with pytest.raises(ImageError, match=r"^image 2 is over the pixel limit"):
        load_image_in_worker(encode(Image.new("L", (9, 9)), "PNG"), name=2, max_pixels=80)


LOADERS = {
    "time": ("while True: pass", r"^image 5: .*1 s of CPU time"),
    "sleep": ("import time; time.sleep(99)", r"^image 5: .*more than 4 s"),
    "memory": ("bytearray(2_000_000_000)", r"^image 5: .*too much memory"),
    "crash": ("import os; os.abort()", r"^image 5: .*ended with code -6"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits of processes")
@pytest.mark.parametrize("fault", LOADERS)
def test_a_decoder_that_does_not_end_well_ends_its_process_only(fault, monkeypatch):
    """The worker's own code, with a decoder that misbehaves in the place of load_image."""
    code, message = LOADERS[fault]
    body = (
        "import sys, hrvlm.images.worker as w\n"
        "w.CPU_SECONDS = 1\n"
        f"def load_image(*a, **k):\n    {code}\n"
        "w.load_image = load_image\n"
        "w.main()\n"
    )
    run = subprocess.run

    def misbehaving(command, **options):
        return run([sys.executable, "-c", body, command[-1]], **options)

    monkeypatch.setattr(worker.subprocess, "run", misbehaving)
    monkeypatch.setattr(worker, "CPU_SECONDS", 1)
    monkeypatch.setattr(worker, "WALL_SECONDS", 4 if fault == "sleep" else 60)
    started = time.monotonic()
    with pytest.raises(ImageError, match=message):
        load_image_in_worker(encode(Image.new("L", (9, 9)), "PNG"), name=5)
    assert time.monotonic() - started < 60
