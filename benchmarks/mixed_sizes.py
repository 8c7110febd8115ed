"""The mixed draw: 64 image sizes from 224 to 1024 px with aspect ratios from 1:4 to 4:1.

    from benchmarks.mixed_sizes import MIXED_SIZES, MIXED_GRIDS

For each image, with u, v, w uniform in [0, 1) from ``random.Random(0)``, in this order: the longer
side is ``14 + floor(51 u)`` patches of 16 px (224 to 1024 px, each as likely as the others), the
aspect ratio ``4 ** v`` (as often 1:1 to 2:1 as 2:1 to 4:1), and the image stands upright if
``w < 1/2``. The shorter side is the longer one divided by the ratio, rounded to whole patches and
never less than a quarter.
"""

from __future__ import annotations

from hrvlm.measuring.encoder import mixed_grids

PATCH_SIZE = 16
PREFIX_TOKENS = 5

MIXED_GRIDS = mixed_grids(64)
"""Patch grids (height, width)."""

MIXED_SIZES = [(PATCH_SIZE * hp, PATCH_SIZE * wp) for hp, wp in MIXED_GRIDS]
"""Pixels (height, width)."""

MIXED_LENGTHS = [PREFIX_TOKENS + hp * wp for hp, wp in MIXED_GRIDS]
"""Tokens of each image, with CLS and 4 registers."""
