"""Small files that would cost gigabytes or many seconds, were they read without limits."""

import io
import struct
import zlib

from PIL import Image


def encode(image, name, **options):
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def chunk(tag, data):
    body = tag + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png_with(*chunks):
    """An 8x8 picture with these chunks after its header."""
    data = encode(SMALL, "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def jpeg_with(*segments, at=2):
    data = encode(SMALL, "JPEG")
    written = b"".join(
        b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body
        for marker, body in segments
    )
    return data[:at] + written + data[at:]


def exif_of_overlapping_tags(tags, length):
    """A directory of so many tags, all of which point at the same `length` bytes."""
    start = 8 + 2 + 12 * tags + 4
    entries = b"".join(struct.pack("<HHII", 40000 + i, 7, length, start) for i in range(tags))
    return b"II*\0" + struct.pack("<IH", 8, tags) + entries + bytes(4) + bytes(length)


def tiff(width, height, *, tags=(), extra=b"", compression=1):
    """A grey TIFF of one strip of zeros; `tags` are (tag, type, count, value)."""
    rows = [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression)),
        *((262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 64)),
    ]
    rows = sorted({row[0]: row for row in [*rows, *tags]}.values())
    directory = struct.pack("<H", len(rows)) + b"".join(struct.pack("<HHII", *r) for r in rows)
    data = bytes(64) + extra
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


def run_length_bmp(side):
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 1, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 58) + header + bytes(4) + b"\0\2\1\0" * 500


def gif_of_comments(count):
    head, tail = b"GIF89a\1\0\1\0\x80\0\0" + bytes(6), b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
    return head + b"!\xfe\1c\0" * count + tail


def animated(name, width, height, frames):
    images = [Image.new("RGB", (width, height), (i, 0, 0)) for i in range(frames)]
    options = {"lossless": True, "quality": 0} if name == "WEBP" else {}
    return encode(images[0], name, save_all=True, append_images=images[1:], **options)


def jpeg_of_scans(count):
    data = encode(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


def avif_of_another_size(side):
    """A flat picture of `side` pixels square whose container says 16 x 16."""
    data = encode(Image.new("RGB", (side, side)), "AVIF", speed=10)
    says = struct.pack(">II", side, side)
    assert data.count(says) == 1
    return data.replace(says, struct.pack(">II", 16, 16))


def box(name, data):
    return struct.pack(">I4s", len(data) + 8, name) + data


def avif_of_items(items, mdat=b""):
    """A picture that is 16 x 16 by its property, with this list of items."""
    size = box(b"iprp", box(b"ipco", box(b"ispe", struct.pack(">III", 0, 16, 16))))
    meta = box(b"meta", bytes(4) + size + box(b"iloc", bytes(4) + items))
    return box(b"ftyp", b"avif\0\0\0\0avifmif1") + meta + box(b"mdat", mdat)


def avif_of_slices_without_bytes(count):
    item = struct.pack(">HHH", 1, 0, 65_535)
    return avif_of_items(bytes(2) + struct.pack(">H", count) + item * count)


def avif_of_one_place(count, units):
    """Items that all lie in the same place."""
    head = b"\x44\0" + struct.pack(">H", count)
    item = struct.pack(">HHHII", 1, 0, 1, 0, 2 * units)
    start = len(avif_of_items(head + item * count))
    item = struct.pack(">HHHII", 1, 0, 1, start, 2 * units)
    return avif_of_items(head + item * count, b"\x12\0" * units)


def avif_whose_picture_is_a_film(side, frames):
    data = animated("AVIF", side, side, frames)
    length, mdat = data.index(b"iloc") + 22, data.rindex(b"mdat") + 4
    (start,) = struct.unpack_from(">I", data, length - 4)
    end = mdat - 8 + struct.unpack_from(">I", data, mdat - 8)[0]
    return data[:length] + struct.pack(">I", end - start) + data[length + 4 :]


def tiff_of_one_strip(count):
    """A progressive JPEG strip that is in the file once and in its list many times."""
    strip = encode(Image.effect_noise((1000, 16), 99), "JPEG", progressive=True)
    lists = [struct.pack(f"<{count}I", *[value] * count) for value in (8, len(strip))]
    start = 8 + len(strip)
    rows = [
        *((256, 4, 1, 1000), (257, 4, 1, 16 * count), (258, 3, 1, 8), (259, 3, 1, 7)),
        *((262, 3, 1, 1), (273, 4, count, start), (277, 3, 1, 1), (278, 4, 1, 16)),
        (279, 4, count, start + 4 * count),
    ]
    directory = struct.pack("<H", len(rows)) + b"".join(struct.pack("<HHII", *r) for r in rows)
    body = strip + b"".join(lists)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory + bytes(4)


def tiff_of_one_tag(count, values):
    """A list of offsets of 8 bytes each, that many times."""
    entry = struct.pack("<HHQQ", 273, 16, values, 16)
    data = bytes(8 * values)
    head = b"II+\0" + struct.pack("<HHQ", 8, 0, 16 + len(data))
    return head + data + struct.pack("<Q", count) + entry * count + bytes(8)


def jpeg2000_of_precincts(side, levels, first, others, layers=1):
    """A picture of a single colour in precincts of 2^first at the lowest level, 2^others above."""
    image = Image.new("RGB", (64, 64))
    options = {"num_resolutions": levels + 1, "precinct_size": (64, 64)}
    data = bytearray(encode(image, "JPEG2000", no_jp2=True, **options))
    style = data.index(b"\xff\x52") + 4
    data[8:16] = data[24:32] = struct.pack(">II", side, side)
    data[style + 2 : style + 4] = struct.pack(">H", layers)
    data[style + 10 : style + 11 + levels] = bytes([first * 17, *[others * 17] * levels])
    return bytes(data)


def jpeg_of_fill_bytes(segments):
    data = encode(SMALL, "JPEG")
    return data[:2] + (b"\xff" * 60_000 + b"\xfe\0\2") * segments + data[2:]


def jpeg_of_fill_bytes_after_a_scan():
    data = encode(SMALL, "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + b"\xff" * 60_000 + b"\0" + data[start:]


SMALL = Image.new("RGB", (8, 8), (9, 99, 200))
TEXT = zlib.compress(bytes(1 << 20))

# What opens: the metadata is passed over, and only the first frame is decoded.
DISARMED = {
    "PNG, a hundred texts of a megabyte": png_with(*[chunk(b"zTXt", b"k\0\0" + TEXT)] * 100),
    "PNG, a profile of gigabytes": png_with(chunk(b"iCCP", b"p\0\0" + TEXT * 50)),
    "PNG, EXIF of overlapping tags": png_with(
        chunk(b"eXIf", exif_of_overlapping_tags(4000, 900_000))
    ),
    "PNG, EXIF in two hundred texts": png_with(
        *[chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\n" * (1 << 20)))] * 200
    ),
    "JPEG, fill bytes": jpeg_of_fill_bytes(4),
    "JPEG, fill bytes after a scan": jpeg_of_fill_bytes_after_a_scan(),
    "JPEG, EXIF of overlapping tags": jpeg_with(
        (0xE1, b"Exif\0\0" + exif_of_overlapping_tags(2500, 30_000))
    ),
    "JPEG, EXIF in many parts": jpeg_with(*[(0xE1, b"Exif\0\0" + bytes(65_000))] * 300),
    "JPEG, a profile in many parts": jpeg_with(
        *[(0xE2, b"ICC_PROFILE\0\1\xff" + bytes(60_000))] * 255
    ),
    "TIFF, overlapping tags": tiff(
        8, 8, extra=bytes(1 << 20), tags=[(40000 + i, 7, 1 << 20, 72) for i in range(4000)]
    ),
    "TIFF, a directory that is its own next": tiff(8, 8)[:-4] + struct.pack("<I", 72),
    "WebP, 60 frames": animated("WEBP", 400, 300, 60),
    "AVIF, 30 frames": animated("AVIF", 64, 64, 30),
    "GIF, 200 frames": animated("GIF", 300, 200, 200),
    "PNG, 100 frames": animated("PNG", 200, 100, 100),
    "GIF, a thousand comments": gif_of_comments(1000),
}

# What is refused by its header, and what the error says.
REFUSED = {
    "GIF, 500 000 comments": (gif_of_comments(500_000), "GIF file: more than 4096 blocks"),
    "GIF, a million parts of comments": (
        b"GIF89a\1\0\1\0\0\0\0" + (b"!\xfe" + b"\1c" * 4000 + b"\0") * 250,
        "GIF file: more than 65536 blocks of metadata",
    ),
    "PNG, a million chunks": (png_with(chunk(b"teSt", b"") * 1_000_000), "PNG file: 4097 chunks"),
    "PNG, pixels in a million chunks": (
        png_with(chunk(b"IDAT", b"") * 1_000_000),
        "PNG file: .* are in",
    ),
    "JPEG, 100 000 segments": (
        jpeg_with(*[(0xFE, b"")] * 100_000),
        "JPEG file: more than 4096 segments",
    ),
    "JPEG, 6000 scans": (jpeg_of_scans(6000), "JPEG file: more than 4096 segments"),
    "TIFF, a tile of gigabytes": (
        tiff(8, 8, tags=[(322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 8), (273, 0, 0, 0)]),
        "TIFF file: 1 parts of 60000 x 60000 pixels for 8 x 8",
    ),
    "TIFF, a million strips": (
        tiff(16, 60_000, extra=bytes(4 << 20), tags=[(278, 4, 1, 1), (273, 4, 1_000_000, 72)]),
        "TIFF file: tag 273 has 1000000 values",
    ),
    "TIFF, one strip of everything": (
        tiff(60_000, 2_900, compression=8, tags=[(258, 3, 1, 8), (277, 3, 1, 8)]),
        "TIFF file: .* MB, more than",
    ),
    "TIFF, strips and a tile of gigabytes": (
        tiff(8, 8, compression=8, tags=[(322, 4, 1, 40_000), (323, 4, 1, 40_000)]),
        "truncated or corrupt",
    ),
    "TIFF, a list many times": (tiff_of_one_tag(2000, 100_000), "TIFF header .*height 0, width 0"),
    "TIFF, one strip many times": (tiff_of_one_strip(1200), "TIFF file: .* takes up to .* s, more"),
    "TIFF, LZMA": (tiff(8, 8, compression=34925), "TIFF header .*compression 34925 is not read"),
    "BMP, run-length": (
        run_length_bmp(13_000),
        "BMP file: run-length BMP is read up to 1500000 samples",
    ),
    "PPM as text": (b"P2 12000 12000 255\n" + b"1 " * 1000, "PPM file: PPM as text"),
    "PPM of comments": (b"P3 500 500 255\n" + b"1#\n" * 900_000, "PPM file: more than 4096 comm"),
    "PPM of 100 steps": (b"P6 9000 9000 100\n", "PPM file: PPM .* 100 steps"),
    "PPM, a comment of megabytes": (
        b"P6\n#" + b"c" * (1 << 22) + b"\n2 2 255\n" + bytes(12),
        "4096 bytes",
    ),
    "WebP of a few kilobytes": (
        encode(Image.new("RGB", (7000, 7000)), "WEBP", lossless=True, quality=0, method=0),
        "WebP file: height 7000, width 7000: to decode it takes about",
    ),
    "AVIF larger than it says": (
        avif_of_another_size(2400),
        "AVIF file: coded pictures of 5760000 pixels",
    ),
    "AVIF, slices without bytes": (
        avif_of_slices_without_bytes(300),
        "AVIF file: more than 4096 items and slices",
    ),
    "AVIF, one item many times": (
        avif_of_one_place(1000, 4000),
        "AVIF file: more than 4096 units in its coded pictures",
    ),
    "AVIF, a picture of a hundred frames": (
        avif_whose_picture_is_a_film(512, 100),
        "AVIF file: coded pictures of [0-9]+ pixels for one of 512 x 512",
    ),
    "JPEG 2000, precincts of a pixel": (
        jpeg2000_of_precincts(1500, 0, 0, 0),
        "JPEG 2000 file: .* takes about [0-9]{4} MB",
    ),
    "JPEG 2000, precincts of a pixel in the quarter": (
        jpeg2000_of_precincts(1500, 1, 0, 6),
        "JPEG 2000 file: .* takes about [0-9]{4} MB",
    ),
    "JPEG 2000, small precincts in layers": (
        jpeg2000_of_precincts(2200, 5, 4, 4, layers=64),
        "JPEG 2000 file: .* takes about [0-9]+ MB",
    ),
    "one row": (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 170_000_000, 1, 16, 6, 0, 0, 0)),
        "PNG file: .*more than 65535 pixels a side",
    ),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIF header"),
    **{
        name: (encode(SMALL, name), "not an image of a format that is read")
        for name in ("TGA", "PCX", "SGI", "ICO", "ICNS", "EPS", "DDS", "QOI", "DIB")
    },
}
