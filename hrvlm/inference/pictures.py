"""Pictures of what an encoder sees: patch features as colours, attention as heat.

    upright input | the first three principal components as red, green, blue | CLS attention, scale

Patches are blocks, and small images are enlarged a whole number of times: nothing is blurred.

Everything is deterministic, and defined for any grid: a single patch or constant features give an
even grey, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Color = tuple[int, int, int]

BACKGROUND: Color = (250, 250, 250)
INK: Color = (32, 32, 36)
FAINT: Color = (110, 110, 118)
# Dark violet to pale yellow through red: lightness rises evenly, so it reads in grey too.
HEAT_STOPS = (
    (0, 0, 4),
    (66, 10, 104),
    (147, 38, 103),
    (221, 81, 58),
    (252, 165, 10),
    (252, 255, 164),
)
_FRAME: Color = (205, 205, 210)
_MARGIN, _LABEL = 12, 24  # pixels around the panels, and for the name above each
_BAR, _LEAST_BAR = 12, 48  # width of the scale beside the heat, and its height if there is less


def principal_components(features: Tensor, count: int = 3) -> Tensor:
    """Scores of the rows on their first principal components.

    ``scores = (x - mean) V`` with V the leading eigenvectors of ``(x - mean)^T (x - mean)``, each
    signed so that its entry of largest magnitude is positive. Computed in float64 by the smaller of
    the covariance and the Gram matrix.

    Args:
        features: ``[n, C]``, at least one row.
        count: Components wanted.

    Returns:
        ``[n, count]`` float64. Components that the data do not have (fewer rows than components,
        constant features, variance below float32's rounding) are zero.

    Raises:
        ValueError: `features` is not ``[n, C]`` with n >= 1, or not finite.
    """
    if features.ndim != 2 or not features.shape[0]:
        raise ValueError(f"features must be [n, C] with n >= 1, got {tuple(features.shape)}")
    x = features.detach().double()
    if not x.isfinite().all():
        raise ValueError("features: not finite")
    magnitude = x.square().sum()
    x = x - x.mean(0)
    n, width = x.shape
    by_rows = n < width
    values, vectors = torch.linalg.eigh(x @ x.T if by_rows else x.T @ x)  # ascending
    kept = min(count, values.shape[0])
    values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
    directions = x.T @ vectors if by_rows else vectors  # [C, kept]
    directions = directions / directions.norm(dim=0).clamp_min(1e-300)
    largest = directions.abs().argmax(0, keepdim=True)
    directions = directions * directions.gather(0, largest).sign()
    # Relative to the uncentred size: what is left of equal float32 rows is rounding, not structure.
    noise = magnitude * (4 * torch.finfo(torch.float32).eps) ** 2
    directions = directions * (values > noise)
    scores = x.new_zeros(n, count)
    scores[:, :kept] = x @ directions
    return scores


def pca_colors(features: Sequence[Tensor], *, joint: bool = False) -> list[Tensor]:
    """Patch features as colours: the first three principal components, each over its own range.

    The 1st and 99th percentiles of a component become 0 and 1. A component without variance is 0.5.

    Args:
        features: ``[C, hp, wp]`` per image (``PackedEncoderOutput.to_maps``).
        joint: One projection for all images, so that equal colours mean equal features across them;
            otherwise each image has its own, with more contrast.

    Returns:
        ``[3, hp, wp]`` float32 in [0, 1] per image.
    """
    rows = [x.flatten(1).T for x in features]
    groups = [torch.cat(rows)] if joint and rows else rows
    colors = [_spread(principal_components(group)) for group in groups]
    if joint and rows:
        colors = list(colors[0].split([r.shape[0] for r in rows]))
    return [c.T.unflatten(1, x.shape[1:]).float() for c, x in zip(colors, features, strict=True)]


def value_range(values: Tensor, low: float = 0.01, high: float = 0.99) -> tuple[float, float]:
    """Two quantiles of a tensor, or its least and largest value where these are equal."""
    ordered = values.detach().flatten().double().sort().values
    last = ordered.numel() - 1
    bottom, top = ordered[round(low * last)], ordered[round(high * last)]
    if not top > bottom:  # few values stand out of an otherwise constant map
        bottom, top = ordered[0], ordered[-1]
    return bottom.item(), top.item()


def unit_range(values: Tensor, low: float = 0.01, high: float = 0.99) -> Tensor:
    """Scale a tensor: its :func:`value_range` becomes 0 to 1, clipped, and constants become 0."""
    bottom, top = value_range(values, low, high)
    if not top - bottom > 1e-6 * values.abs().max():
        return torch.zeros_like(values, dtype=torch.float32)
    return ((values.double() - bottom) / (top - bottom)).clamp(0, 1).float()


def heat_colors(values: Tensor) -> Tensor:
    """Numbers in [0, 1] as colours from black through red to yellow: ``[...]`` to ``[..., 3]``."""
    stops = torch.tensor(HEAT_STOPS, dtype=torch.float32, device=values.device) / 255
    position = values.float().clamp(0, 1) * (len(stops) - 1)
    below = position.floor().clamp_max(len(stops) - 2).long()
    part = (position - below)[..., None]
    return stops[below] * (1 - part) + stops[below + 1] * part


def pca_picture(colors: Tensor, size: tuple[int, int]) -> Image.Image:
    """Colours ``[3, hp, wp]`` as an image of `size` (height, width), patches as sharp blocks."""
    return _to_image(colors.permute(1, 2, 0)).resize(size[::-1], Image.Resampling.NEAREST)


def attention_picture(image: Image.Image, attention: Tensor) -> Image.Image:
    """Heat of an attention map ``[hp, wp]`` as blocks over the image in grey, of its size."""
    heat = unit_range(attention.cpu())
    over = _to_image(heat_colors(heat)).resize(image.size, Image.Resampling.NEAREST)
    # Dimmed, or the dark end of the scale would be grey on white paper.
    under = image.convert("L").point(lambda grey: 0.6 * grey).convert("RGB")
    opacity = _grey(0.48 + 0.28 * heat).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(over, under, opacity)


def sheet(
    image: Image.Image,
    colors: Tensor,
    attention: Tensor | None,
    *,
    title: str,
    notes: str = "",
    size: tuple[int, int] | None = None,
    panel: int = 720,
) -> Image.Image:
    """Input, principal components and CLS attention on one page, with captions.

    Panels stand side by side; those of an image more than twice as wide as high lie one above the
    other, and are larger. The scale counts attention in even shares, 1 / (hp * wp).

    Args:
        image: Upright RGB input.
        colors: ``[3, hp, wp]`` from :func:`pca_colors`.
        attention: ``[hp, wp]``: weights of the CLS token over the patches; None where there is no
            such token, and no third panel then.
        title: First line of the caption.
        notes: Smaller lines below it.
        size: (height, width) the encoder saw, which gives the panels their shape; default: that of
            `image`.
        panel: Longest side of a panel in pixels, times 5/3 where they lie one above the other.

    Raises:
        ValueError: the two maps have different grids.
    """
    if attention is not None and colors.shape[1:] != attention.shape:
        raise ValueError(
            f"colors and attention must have one grid, "
            f"got {tuple(colors.shape[1:])} and {tuple(attention.shape)}"
        )
    height, width = size or (image.height, image.width)
    stacked = width > 2 * height
    scale = (panel * 5 / 3 if stacked else panel) / max(width, height)
    scale = math.floor(scale) if scale > 1 else scale
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    enlarged = shape[1] > image.width
    how = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    shown = image.resize(shape[::-1], how)
    panels = {
        "input": shown,
        "patch features, PCA to RGB": pca_picture(colors.cpu(), shape),
    }
    shares = []
    if attention is not None:
        panels["attention of CLS, in even shares"] = attention_picture(shown, attention)
        shares = [f"{value * attention.numel():.2f}x" for value in value_range(attention)]
    return _lay_out(panels, shares, title, notes, stacked=stacked)


def _lay_out(
    panels: dict[str, Image.Image],
    ends: Sequence[str],
    title: str,
    notes: str,
    *,
    stacked: bool,
) -> Image.Image:
    """The page; `ends` are the lowest and highest value of the last panel's scale, if any."""
    large, small = ImageFont.load_default(18), ImageFont.load_default(14)
    lines = notes.splitlines()
    names = [small.getlength(name) for name in panels]
    width, height = next(iter(panels.values())).size
    bar = max(height, _LEAST_BAR) if ends else height
    head = _MARGIN + 26 + 20 * len(lines)
    across, down = (1, len(panels)) if stacked else (len(panels), 1)
    cell_width, cell_height = max(width, math.ceil(max(names))), _LABEL + height
    beside = width
    if ends:
        beside += _MARGIN // 2 + _BAR + math.ceil(max(map(small.getlength, ends))) + 5
    text = math.ceil(max(large.getlength(title), *map(small.getlength, lines), *names))
    columns = (across - 1) * (cell_width + _MARGIN) + max(cell_width, beside)
    size = (
        max(columns, text) + 2 * _MARGIN,
        head + down * (cell_height + _MARGIN) + bar - height,
    )
    page = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN), title, fill=INK, font=large)
    for i, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + 26 + 20 * i), line, fill=FAINT, font=small)
    for i, (name, picture) in enumerate(panels.items()):
        x = _MARGIN + (0 if stacked else i * (cell_width + _MARGIN))
        y = head + (i * (cell_height + _MARGIN) if stacked else 0)
        draw.text((x, y + 4), name, fill=INK, font=small)
        frame = (x - 1, y + _LABEL - 1, x + width, y + _LABEL + height)
        draw.rectangle(frame, outline=_FRAME)  # a white page on a white ground has no edge
        page.paste(picture, (x, y + _LABEL))
    if not ends:
        return page
    x, y = x + width + _MARGIN // 2, y + _LABEL
    page.paste(_scale_bar(bar), (x, y))
    low, high = ends
    draw.text((x + _BAR + 5, y - 2), high, fill=FAINT, font=small)
    draw.text((x + _BAR + 5, y + bar - 15), low, fill=FAINT, font=small)
    return page


def _scale_bar(height: int) -> Image.Image:
    """The colours of the heat, the highest on top."""
    colors = heat_colors(torch.linspace(1, 0, height))
    return _to_image(colors[:, None].expand(-1, _BAR, -1))


def _spread(scores: Tensor) -> Tensor:
    """Each column over [0, 1]; columns of zeros become 0.5."""
    columns = [
        unit_range(c) if c.any() else torch.full_like(c, 0.5, dtype=torch.float32)
        for c in scores.unbind(1)
    ]
    return torch.stack(columns, dim=1)


def _to_image(colors: Tensor) -> Image.Image:
    return Image.fromarray(_to_bytes(colors).numpy())


def _grey(values: Tensor) -> Image.Image:
    return Image.fromarray(_to_bytes(values).numpy())


def _to_bytes(values: Tensor) -> Tensor:
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous()
