r"""The reader beside tesseract and RapidOCR: character error rates on the same pictures.

    pip install -r tests/real/requirements.txt
    apt-get install tesseract-ocr poppler-utils bash-doc developers-reference fonts-liberation \
      fonts-freefont-ttf
    python -m recipes.reader.peers            (--card-only: from the last results)

Seven kinds of pictures, the same for all three: text drawn as in the reader's training, with seeds
that it has not seen; short lines in fonts of the system, the same light on dark, longer lines,
several lines; lines and paragraphs of PDF documents at 150 dpi, whose text layer is the truth.
Tesseract is told whether there is one line (`--psm 7`) or a block of text (`--psm 6`); RapidOCR
runs as installed; the reader runs in float32, greedily, and answers here also where
`hrvlm generate` refuses or doubts.

An error is an edit from what was read to what is written, runs of white space counted as one space.
Writes benchmarks/results/reader_peers.json, and from it the table in the reader's card.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.reporting.tables import fill
from benchmarks.suite import commit_here
from hrvlm.drawn_text.drawing import render
from hrvlm.drawn_text.words import phrase
from hrvlm.files import write_text
from hrvlm.inference.chat import Chat, GenerateOptions, load_vlm
from hrvlm.inference.text_metrics import edit_distance
from hrvlm.machine import describe_device, pick_device
from hrvlm.reader.model import DOUBT_BELOW, PROMPT, reader_path, why_not_read
from hrvlm.reader.score import HELD_OUT
from recipes.reader.score import CARD

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reader_peers.json"
START, END = "<!-- peers:start -->", "<!-- peers:end -->"
SEED = 4_000_000
SAMPLES = 32
SYSTEM_FONTS = [  # 14 that the reader has not seen
    f"{folder}/{family}{style}.ttf"
    for folder, families, styles in (
        (
            "liberation",
            ("LiberationSans", "LiberationSerif", "LiberationMono", "LiberationSansNarrow"),
            ("-Regular", "-Bold"),
        ),
        ("freefont", ("FreeSans", "FreeSerif", "FreeMono"), ("", "Bold")),
    )
    for family in families
    for style in styles
]
FONT_FOLDER = Path("/usr/share/fonts/truetype")
DOCUMENTS = (  # of Debian's bash-doc and developers-reference
    Path("/usr/share/doc/bash-doc/bashref.pdf"),
    Path("/usr/share/developers-reference/developers-reference.pdf"),
)
DPI = 150
_MARGIN = 8  # pixels around a line or block


class Picture(NamedTuple):
    """A picture and what is written on it."""

    kind: str
    image: Image.Image
    text: str


def pictures(samples: int) -> Iterator[Picture]:
    """All of them, the same wherever the same fonts and documents are installed."""
    for index in range(samples):
        drawn = render(SEED, index, HELD_OUT["line"])
        yield Picture("own lines", drawn.image, drawn.text)
    kinds = {
        "short lines, system fonts": (1, (4, 20), False),
        "light on dark": (1, (4, 20), True),
        "25 to 40 characters": (1, (25, 40), False),
        "several lines": (4, (8, 24), False),
    }
    for kind, (lines, characters, light) in kinds.items():
        rng = random.Random(f"{SEED} {kind}")
        for index in range(samples):
            font = FONT_FOLDER / SYSTEM_FONTS[index % len(SYSTEM_FONTS)]
            yield _written(kind, font, rng, lines, characters, light)
    yield from _from_documents(samples)


def _written(
    kind: str,
    font_file: Path,
    rng: random.Random,
    lines: int,
    characters: tuple[int, int],
    light: bool,
) -> Picture:
    """Text in a font of the system, level, without noise."""
    font = ImageFont.truetype(str(font_file), rng.randint(14, 32))
    fewest, most = characters
    texts = []
    while len(texts) < lines:
        text = phrase(rng, most)[:most].strip()
        if len(text) >= fewest:
            texts.append(text)
    step = round(1.1 * sum(font.getmetrics()))
    width = round(max(font.getlength(text) for text in texts)) + 2 * _MARGIN
    ink, ground = ((235, 235, 235), (30, 34, 40)) if light else ((20, 20, 20), (250, 250, 250))
    image = Image.new("RGB", (width, lines * step + 2 * _MARGIN), ground)
    draw = ImageDraw.Draw(image)
    for row, text in enumerate(texts):
        draw.text((_MARGIN, _MARGIN + row * step), text, font=font, fill=ink)
    return Picture(kind, image, "\n".join(texts))


def _from_documents(samples: int) -> Iterator[Picture]:
    """Lines and paragraphs of PDF pages, ASCII only, with the text layer's words."""
    found: dict[str, list[Picture]] = {"lines of PDFs": [], "paragraphs of PDFs": []}
    rng = random.Random(SEED)
    for document in DOCUMENTS:
        pages = int(_pdf_fact(document, "Pages"))
        for page in sorted(rng.sample(range(8, pages - 8), 12)):
            sheet = _page(document, page)
            for block in _blocks(document, page):
                if len(block) >= 3:
                    found["paragraphs of PDFs"].append(_cut("paragraphs of PDFs", sheet, block))
                for line in block:
                    if len(line[1]) >= 8:
                        found["lines of PDFs"].append(_cut("lines of PDFs", sheet, [line]))
    for kind, candidates in found.items():
        readable = [picture for picture in candidates if picture.text.isascii()]
        if len(readable) < samples:
            raise ValueError(f"{kind}: the documents have {len(readable)} of {samples} samples")
        yield from random.Random(f"{SEED} {kind}").sample(readable, samples)


def _pdf_fact(document: Path, name: str) -> str:
    facts = subprocess.run(["pdfinfo", document], check=True, capture_output=True, text=True).stdout
    return next(row.split()[-1] for row in facts.splitlines() if row.startswith(f"{name}:"))


def _page(document: Path, page: int) -> Image.Image:
    """A page at `DPI`."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["pdftoppm", "-r", DPI, "-f", page, "-l", page, "-png", "-singlefile", document]
        subprocess.run([*map(str, command), f"{folder}/page"], check=True)
        with Image.open(f"{folder}/page.png") as image:
            return image.convert("RGB")


Box = tuple[float, float, float, float]


def _blocks(document: Path, page: int) -> Iterator[list[tuple[Box, str]]]:
    """Each block of a page: the boxes (points) and texts of its lines."""
    command = ["pdftotext", "-f", page, "-l", page, "-bbox-layout", document, "-"]
    xhtml = subprocess.run([*map(str, command)], check=True, capture_output=True).stdout
    space = "{http://www.w3.org/1999/xhtml}"
    for block in ElementTree.fromstring(xhtml).iter(f"{space}block"):
        lines = []
        for line in block.iter(f"{space}line"):
            left, top, right, bottom = (
                float(line.attrib[key]) for key in ("xMin", "yMin", "xMax", "yMax")
            )
            words = [word.text or "" for word in line.iter(f"{space}word")]
            lines.append(((left, top, right, bottom), " ".join(words)))
        yield lines


def _cut(kind: str, sheet: Image.Image, lines: Sequence[tuple[Box, str]]) -> Picture:
    boxes = np.array([box for box, _ in lines]) * DPI / 72
    left, top = boxes[:, :2].min(0)
    right, bottom = boxes[:, 2:].max(0)
    # Lines stand close to each other: no margin above and below that shows their neighbours.
    box = (max(0, round(left) - _MARGIN), round(top), round(right) + _MARGIN, round(bottom))
    return Picture(kind, sheet.crop(box), "\n".join(text for _, text in lines))


def tesseract(picture: Picture) -> str:
    """What tesseract reads."""
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        picture.image.save(file.name)
        mode = "6" if "\n" in picture.text else "7"
        command = ["tesseract", file.name, "-", "--psm", mode, "-l", "eng"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def rapidocr() -> Callable[[Picture], str]:
    """What RapidOCR reads, its boxes in its own order."""
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.log_level": "error"})

    def read(picture: Picture) -> str:
        pixels = np.ascontiguousarray(np.asarray(picture.image)[..., ::-1])
        return " ".join(engine(pixels).txts or ())

    return read


def measured(samples: int, *, peers: bool) -> list[dict[str, Any]]:
    """By kind: characters wrong of each reader; what the one of hrvlm refuses and doubts."""
    processor, vlm = load_vlm(reader_path(), dtype="float32")
    options = GenerateOptions(doubt_below=DOUBT_BELOW)
    others = {"tesseract": tesseract, "rapidocr": rapidocr()} if peers else {}
    rows: dict[str, dict[str, Any]] = {}
    for picture in pictures(samples):
        answer = Chat(processor, vlm, [picture.image], options).ask(PROMPT)
        read = {"reader": answer.text} | {name: other(picture) for name, other in others.items()}
        row = rows.setdefault(
            picture.kind,
            {"set": picture.kind, "samples": 0, "characters": 0}
            | {"errors": dict.fromkeys(read, 0)}
            | {"reader": {"refused": 0, "doubtful": 0, "taken": {"characters": 0, "errors": 0}}},
        )
        written = _plain(picture.text)
        errors = {name: edit_distance(_plain(text), written) for name, text in read.items()}
        row["samples"] += 1
        row["characters"] += len(written)
        for name, wrong in errors.items():
            row["errors"][name] += wrong
        if why_not_read(picture.image):
            row["reader"]["refused"] += 1
        elif answer.doubts:
            row["reader"]["doubtful"] += 1
        else:
            row["reader"]["taken"]["characters"] += len(written)
            row["reader"]["taken"]["errors"] += errors["reader"]
    return list(rows.values())


def _plain(text: str) -> str:
    return " ".join(text.split())


def table(report: dict[str, Any]) -> str:
    """The results as the card shows them."""
    titles = ("pictures", "reader", "tesseract", "RapidOCR")
    titles += ("the reader refuses", "it doubts", "wrong in the rest")
    head = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    rows = []
    for row in report["sets"]:
        rates = [f"{row['errors'][name] / row['characters']:.1%}" for name in row["errors"]]
        reader = row["reader"]
        taken = reader["taken"]
        rest = f"{taken['errors'] / taken['characters']:.1%}" if taken["characters"] else "-"
        of = f"of {row['samples']}"
        cells = row["set"], *rates, f"{reader['refused']} {of}", f"{reader['doubtful']} {of}", rest
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([*head, *rows])


def fill_card(report: dict[str, Any]) -> None:
    """Put the table between the card's markers."""
    write_text(CARD, fill(CARD.read_text(encoding="utf-8"), table(report), START, END))


def main() -> None:
    """Read every picture, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="Two of each kind; writes nothing.")
    parser.add_argument("--reader-only", action="store_true", help="The others' as measured last.")
    parser.add_argument("--card-only", action="store_true", help="Only write the card's table.")
    args = parser.parse_args()
    last = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if args.card_only:
        fill_card(last)
        return
    for program in ("tesseract", "pdfinfo", "pdftoppm", "pdftotext"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is not found; see `python -m recipes.reader.peers --help`")
    machine = describe_device(pick_device("cpu")) | {"commit": commit_here()}
    sets = measured(2 if args.small else SAMPLES, peers=not args.reader_only)
    if args.reader_only:
        for row, before in zip(sets, last["sets"], strict=True):
            assert (row["set"], row["characters"]) == (before["set"], before["characters"])
            row["errors"] = before["errors"] | row["errors"]
        report = last | {"machine": machine, "sets": sets}
    else:
        facts = {"commit": machine["commit"], "tesseract": _tesseract_version()}
        peers = facts | {"rapidocr": version("rapidocr")}
        report = {"machine": machine, "peers": peers, "dpi": DPI, "sets": sets}
    print(table(report))
    if not args.small:
        write_text(RESULTS, json.dumps(report, indent=1) + "\n")
        fill_card(report)


def _tesseract_version() -> str:
    shown = subprocess.run(["tesseract", "--version"], capture_output=True, text=True, check=True)
    return shown.stdout.split()[1]


if __name__ == "__main__":
    main()
