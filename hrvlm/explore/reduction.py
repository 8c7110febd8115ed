"""Features made small enough for a page: 64 principal components of each patch, in int8.

The page shows cosine similarity, so what is kept is the direction of a feature, u = x / |x|:

    u ~ V z,  cos(x, y) ~ z_x . z_y        V: leading eigenvectors of sum(u u^T), z in int8

The components are about the origin, as the angle is: the mean is among them. What is lost of a
similarity is the product of what is lost of the two directions, and of rounding z. The result says
how much that is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COMPONENTS = 64
_LEVELS = 127  # of int8, to either side
_PAIRS = 2**25  # similarities that are compared with what they were before
_ROWS = 8192  # that are worked on at a time


@dataclass(frozen=True)
class Reduced:
    """Features of n patches.

    Attributes:
        values: ``[n, k]`` int8.
        scales: ``[k]`` float32: the coordinates of a patch are ``values * scales``.
        width: Channels that there were.
        variance_kept: Share of the variance of the directions that lies in the k components.
        largest_error: Of the similarities of `compared` patches, evenly spread, with all others.
        compared: All patches if these are few, else so many that it takes a second.
    """

    values: Tensor
    scales: Tensor
    width: int
    variance_kept: float
    largest_error: float
    compared: int

    def coordinates(self) -> Tensor:
        """``[n, k]`` float32; the similarity of two patches is the product of their rows."""
        return self.values.float() * self.scales


def reduce_features(features: Tensor, components: int = COMPONENTS) -> Reduced:
    """Features ``[n, C]`` as k = min(`components`, C) coordinates each; see the top of this file.

    Raises:
        ValueError: `features` is not ``[n, C]`` with n >= 1, or not finite.
    """
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"features must be [n, C] with n >= 1, got {tuple(features.shape)}")
    directions = features.detach().float().cpu()
    if not directions.isfinite().all():
        raise ValueError("features: not finite")
    directions = torch.nn.functional.normalize(directions, dim=1)
    n, width = directions.shape
    mean = directions.double().mean(0)
    scatter = torch.zeros(width, width, dtype=torch.float64)
    for rows in directions.split(_ROWS):
        around = rows - mean.float()
        scatter += (around.T @ around).double()
    moment = scatter + n * torch.outer(mean, mean)
    basis = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :components]
    variance = float(scatter.trace())
    kept = float((scatter @ basis * basis).sum()) / variance if variance > 1e-12 * n else 1.0
    coordinates = directions @ basis.float()
    largest = coordinates.abs().amax(0)
    scales = torch.where(largest > 0, largest, 1) / _LEVELS
    values = (coordinates / scales).round().to(torch.int8)
    error, compared = _largest_error(directions, values.float() * scales)
    return Reduced(values, scales, width, min(1.0, kept), error, compared)


def _largest_error(directions: Tensor, coordinates: Tensor) -> tuple[float, int]:
    n = len(directions)
    compared = min(n, max(1, _PAIRS // n))
    chosen = torch.arange(compared) * n // compared
    largest = 0.0
    for own in chosen.split(256):
        similarity = coordinates[own] @ coordinates.T
        similarity[torch.arange(len(own)), own] = 1  # the page knows that of a patch and itself
        lost = directions[own] @ directions.T - similarity.clamp(-1, 1)
        lost[torch.arange(len(own)), own] = 0
        largest = max(largest, float(lost.abs().max()))
    return largest, compared
