"""Draws all pictures but the photograph, whose source is in README.md.

    python examples/draw.py

Everything on them is made up. The font is the one that Pillow carries (Aileron, CC0), so that the
pictures come out the same wherever Pillow is the same.
"""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
INK, GREY, PALE = (32, 34, 40), (110, 116, 128), (226, 229, 235)

ABSTRACT = (
    "Tidal gauges along the northern inlets record water levels every six minutes, yet most "
    "forecasts still assume a rectangular basin. We compare four seasons of readings with a model "
    "that follows the true outline of each inlet and find that the error of the high-water mark "
    "falls from 11.4 to 4.7 centimetres."
)
BODY = (
    "The inlets differ in shape more than in size. Two of them are long and narrow, one is almost "
    "round, and the fourth is split by a sandbank that is dry at low water. A grid of squares has "
    "to cover all four, and most of its cells lie on land.",
    "We therefore cut each outline into strips along the current. A strip is as wide as the "
    "channel is at that place, and its length follows from the speed of the water. Nothing is "
    "padded: where the channel ends, the strips end.",
    "Readings were taken between March and November. Gauges two and five were out of service for "
    "nine days after the storm of 4 October; their gaps are left open and not interpolated.",
    "Table 1 gives the mean absolute error for each inlet. The round basin gains least, as one "
    "would expect: a square is a fair picture of it. The narrow ones gain most.",
)
TABLE = (
    ("Inlet", "Length", "Gauges", "Before", "After"),
    ("Skerry Sound", "14.2 km", "6", "13.1 cm", "4.2 cm"),
    ("Lang Voe", "11.8 km", "4", "12.6 cm", "4.9 cm"),
    ("Round Haven", "3.1 km", "3", "6.0 cm", "5.1 cm"),
    ("Twin Mouth", "7.5 km", "5", "13.9 cm", "4.6 cm"),
)
GOODS = (
    ("Rye bread 750 g", 1, 3.45),
    ("Oat milk 1 l", 3, 1.89),
    ("Apples, loose", 2, 2.10),
    ("Olive oil 500 ml", 1, 8.75),
    ("Tomatoes 400 g", 4, 1.15),
    ("Basil, pot", 1, 2.25),
    ("Parmesan 200 g", 1, 5.60),
    ("Spaghetti 500 g", 2, 1.35),
    ("Dark chocolate", 3, 1.99),
    ("Dish soap", 1, 2.49),
    ("Paper towels", 1, 3.20),
    ("Coffee beans 1 kg", 1, 14.90),
    ("Yoghurt 4 x 125 g", 2, 1.75),
    ("Carrots 1 kg", 1, 1.30),
)


LINES = {
    "total": ("Total $42.80", 22, (20, 20, 20), (250, 250, 250)),
    "notice": ("Harbour closed", 28, (255, 244, 214), (24, 44, 92)),
    "date": ("2031-05-14 09:58", 18, (30, 30, 30), (214, 228, 220)),
    "way": ("Way out", 24, (255, 255, 255), (176, 32, 40)),
}
# Rows of one piece, or of one on the left and one on the right, or of a name and a field.
TEXTS = {
    "slip": (
        (("Corner Market",), ("2 Oat milk", "3.78"), ("Rye bread", "3.45"), ("Basil", "2.25"),
         ("Total", "9.48")),
        18, (34, 34, 38), (248, 246, 240),
    ),
    "form": (
        (("Name:", "M. Haldane"), ("Berth:", "B14"), ("Arrival:", "14/05/2031"),
         ("Time:", "09:58")),
        17, (24, 40, 70), (232, 238, 244), 96,
    ),
    "notes": (
        (("Ferry to Skerry",), ("departs at 17:40",), ("from Pier 3",)),
        20, (236, 232, 214), (30, 58, 52),
    ),
}  # fmt: skip


def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font in `size` pixels."""
    return ImageFont.load_default(size)


def wrap(draw: ImageDraw.ImageDraw, text: str, face: ImageFont.FreeTypeFont, width: int) -> list:
    """Break `text` into lines of at most `width` pixels."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if draw.textlength(longer, font=face) > width:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line]


def paragraph(draw, xy, text, face, width, leading, fill=INK) -> int:
    """Draw wrapped text and return the y below it."""
    x, y = xy
    for line in wrap(draw, text, face, width):
        draw.text((x, y), line, font=face, fill=fill)
        y += leading
    return y


def document() -> Image.Image:
    """A page of a report, A4 at 150 dpi."""
    page = Image.new("RGB", (1240, 1754), (253, 252, 249))
    draw = ImageDraw.Draw(page)
    left, width = 130, 980
    draw.text((left, 100), "COASTAL NOTES  ·  VOL. 12", font=font(22), fill=GREY)
    draw.line((left, 140, left + width, 140), fill=INK, width=3)
    y = paragraph(draw, (left, 175), "Water levels in irregular inlets", font(58), width, 66)
    draw.text((left, y + 8), "M. Haldane, P. Osei and R. Lindqvist", font=font(28), fill=GREY)
    y = paragraph(draw, (left + 60, y + 80), ABSTRACT, font(25), width - 120, 38, (70, 74, 84))
    draw.text((left, y + 34), "1  Method", font=font(36), fill=INK)
    y += 96
    for text in BODY:
        y = paragraph(draw, (left, y), text, font(26), width, 39) + 20
    y += 14
    columns = (0, 330, 520, 690, 860)
    for row, cells in enumerate(TABLE):
        if row % 2:
            draw.rectangle((left, y - 8, left + width, y + 38), fill=(241, 240, 235))
        for x, cell in zip(columns, cells, strict=True):
            draw.text((left + 14 + x, y), cell, font=font(25), fill=INK if row else GREY)
        y += 46
        if row == 0:
            draw.line((left, y - 10, left + width, y - 10), fill=INK, width=2)
    draw.text((left, y + 12), "Table 1. Error of the high-water mark.", font=font(22), fill=GREY)
    draw.text((left + width // 2 - 12, 1672), "47", font=font(24), fill=GREY)
    return page


def dashboard() -> Image.Image:
    """A wide screenshot of a monitoring page."""
    random.seed(7)
    screen = Image.new("RGB", (1920, 640), (246, 247, 250))
    draw = ImageDraw.Draw(screen)
    draw.rectangle((0, 0, 239, 640), fill=(27, 31, 44))
    draw.text((32, 28), "harbour", font=font(34), fill="white")
    for i, name in enumerate(("Overview", "Berths", "Cranes", "Weather", "Invoices", "Settings")):
        y = 110 + 62 * i
        if i == 0:
            draw.rounded_rectangle((16, y - 12, 224, y + 38), 10, fill=(52, 60, 88))
        draw.ellipse((34, y + 4, 48, y + 18), fill=(110, 160, 255) if i == 0 else (90, 96, 114))
        draw.text((64, y), name, font=font(23), fill="white" if i == 0 else (160, 166, 182))
    draw.text((280, 30), "Overview", font=font(38), fill=INK)
    draw.text((1560, 42), "Thu 14 May, 09:42 UTC", font=font(24), fill=GREY)
    cards = (
        ("Ships in port", "38", "+3 today", (46, 160, 103)),
        ("Mean wait", "2 h 10 min", "-18 min", (46, 160, 103)),
        ("Containers moved", "1,284", "74 % of plan", (214, 140, 30)),
        ("Open alerts", "2", "1 critical", (208, 68, 64)),
    )
    for i, (title, value, note, colour) in enumerate(cards):
        x = 280 + 405 * i
        draw.rounded_rectangle((x, 100, x + 380, 236), 14, fill="white", outline=PALE, width=2)
        draw.text((x + 24, 116), title, font=font(22), fill=GREY)
        draw.text((x + 24, 148), value, font=font(44), fill=INK)
        draw.text((x + 24, 202), note, font=font(20), fill=colour)
    chart(draw, (280, 262, 1280, 612))
    berths(draw, (1305, 262, 1875, 612))
    return screen


def chart(draw: ImageDraw.ImageDraw, box: tuple) -> None:
    """Two curves over a day."""
    x0, y0, x1, y1 = box
    draw.rounded_rectangle(box, 14, fill="white", outline=PALE, width=2)
    draw.text((x0 + 24, y0 + 18), "Traffic, last 24 hours", font=font(24), fill=INK)
    left, right, top, bottom = x0 + 70, x1 - 30, y0 + 70, y1 - 46
    for i in range(5):
        y = bottom - (bottom - top) * i / 4
        draw.line((left, y, right, y), fill=(238, 240, 244), width=2)
        draw.text((x0 + 24, y - 11), str(15 * i), font=font(18), fill=GREY)
    for hour in range(0, 25, 4):
        x = left + (right - left) * hour / 24
        draw.text((x - 20, bottom + 12), f"{hour:02d}:00", font=font(18), fill=GREY)
    for colour, phase, height in (((72, 120, 230), 0.0, 0.62), ((236, 142, 68), 1.4, 0.4)):
        points = []
        for i in range(97):
            wave = height + 0.22 * math.sin(i / 15 + phase) + random.uniform(-0.03, 0.03)
            points.append((left + (right - left) * i / 96, bottom - (bottom - top) * wave))
        draw.line(points, fill=colour, width=4, joint="curve")


def berths(draw: ImageDraw.ImageDraw, box: tuple) -> None:
    """A list of ships with bars."""
    x0, y0, x1, _ = box
    draw.rounded_rectangle(box, 14, fill="white", outline=PALE, width=2)
    draw.text((x0 + 24, y0 + 18), "Berths", font=font(24), fill=INK)
    ships = (("Aurora", 0.92), ("Kittiwake", 0.61), ("Meridian", 0.34), ("Sable", 0.78))
    for i, (name, share) in enumerate(ships):
        y = y0 + 74 + 68 * i
        draw.text((x0 + 24, y), f"{i + 1:02d}  {name}", font=font(23), fill=INK)
        draw.text((x1 - 84, y), f"{share:.0%}", font=font(21), fill=GREY)
        bar = (x0 + 24, y + 34, x1 - 24, y + 46)
        draw.rounded_rectangle(bar, 6, fill=(236, 238, 243))
        end = bar[0] + (bar[2] - bar[0]) * share
        draw.rounded_rectangle((*bar[:2], end, bar[3]), 6, fill=(72, 120, 230))


def receipt() -> Image.Image:
    """A long receipt on slightly uneven paper."""
    random.seed(3)
    paper = Image.new("RGB", (480, 1800), (250, 249, 245))
    draw = ImageDraw.Draw(paper)
    for y in range(1800):
        shade = 246 + round(3 * math.sin(y / 90)) + random.randint(-1, 1)
        draw.line((0, y, 480, y), fill=(shade, shade, shade - 4))
    y = 70
    for text, size in (("CORNER MARKET", 40), ("18 Wharf Lane", 24), ("Tel. 555 0142", 24)):
        draw.text((240, y), text, font=font(size), fill=INK, anchor="ma")
        y += size + 16
    y = rule(draw, y + 14)
    draw.text((36, y), "14 May    09:58", font=font(23), fill=INK)
    draw.text((444, y), "No. 004417", font=font(23), fill=INK, anchor="ra")
    y = rule(draw, y + 52)
    total = 0.0
    for name, count, price in GOODS:
        total += count * price
        draw.text((36, y), name, font=font(25), fill=INK)
        draw.text((444, y), f"{count * price:.2f}", font=font(25), fill=INK, anchor="ra")
        draw.text((60, y + 32), f"{count} x {price:.2f}", font=font(20), fill=GREY)
        y += 76
    y = rule(draw, y + 6)
    draw.text((36, y), "TOTAL", font=font(38), fill=INK)
    draw.text((444, y), f"{total:.2f}", font=font(38), fill=INK, anchor="ra")
    draw.text((36, y + 62), "Card ending 0093", font=font(23), fill=INK)
    y = rule(draw, y + 116)
    x = 60
    while x < 420:
        width = random.choice((2, 3, 5))
        draw.rectangle((x, y + 4, x + width, y + 96), fill=INK)
        x += width + random.choice((3, 4, 6))
    draw.text((240, y + 116), "Thank you!", font=font(30), fill=INK, anchor="ma")
    return paper


def rule(draw: ImageDraw.ImageDraw, y: int) -> int:
    """A dashed line across the receipt; returns the y below it."""
    for x in range(36, 444, 14):
        draw.line((x, y, x + 7, y), fill=GREY, width=2)
    return y + 22


def line(text: str, size: int, ink: tuple, ground: tuple) -> Image.Image:
    """One line of text with a little air around it."""
    face = font(size)
    width, height = round(face.getlength(text)) + 16, sum(face.getmetrics()) + 8
    picture = Image.new("RGB", (width, height), ground)
    ImageDraw.Draw(picture).text((8, 4), text, font=face, fill=ink)
    return picture


def rows(
    pieces: tuple, size: int, ink: tuple, ground: tuple, column: int | None = None
) -> Image.Image:
    """Several lines; the second piece of each is in a box at `column`, or on the right."""
    face, width = font(size), 256
    step = sum(face.getmetrics()) + (4 if column is None else 8)
    picture = Image.new("RGB", (width, step * len(pieces) + 12), ground)
    draw = ImageDraw.Draw(picture)
    for i, (left, *right) in enumerate(pieces):
        y = 6 + step * i
        draw.text((6, y), left, font=face, fill=ink)
        for text in right:
            x = width - 6 - face.getlength(text)
            if column is not None:
                x = column + 5
                draw.rectangle((column, y - 3, width - 5, y + step - 6), outline=GREY)
            draw.text((x, y), text, font=face, fill=ink)
    return picture


if __name__ == "__main__":
    for make in (document, dashboard, receipt):
        make().save(HERE / f"{make.__name__}.png", optimize=True)
    for name, (text, size, ink, ground) in LINES.items():
        line(text, size, ink, ground).save(HERE / f"line_{name}.png", optimize=True)
    for name, arguments in TEXTS.items():
        rows(*arguments).save(HERE / f"text_{name}.png", optimize=True)
    upright = line("Platform 9", 26, INK, (246, 240, 220))
    upright.transpose(Image.Transpose.ROTATE_90).save(HERE / "sideways.png", optimize=True)
