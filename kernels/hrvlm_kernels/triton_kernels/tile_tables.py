"""Tile sizes of the kernels, by chip: data only, written by ``python -m benchmarks.tuning``.

Each row holds the tile sizes to use, then those for when they do not fit the chip; a row without a
chip is that of all chips without a row of their own. CHOSEN_BY names the GPU that decided, or says
"compiled": chosen by reading compiled code (no spills, asynchronous tensor cores), or, of the
tables that it names, "counted": by what candidates execute (docs/counted.md); neither is measured.
It also names the Triton that compiled. Another one lays out registers anew: SPILLS has, for every
release that all rows were compiled with, the tiles that spill (``python -m
benchmarks.tuning.spills``). There the next ones of their row are used.
"""

from .tilings import BlockConfig, GemmConfig, NormConfig, RopeConfig, Rows, Tiling, by_chip

CHOSEN_BY = {
    "sm_80": "attention, norms to C = 1024 (backward: 512) counted; others compiled, Triton 3.6.0",
    "sm_90": "norms to C = 1024 (backward: 512) counted; others compiled, Triton 3.6.0",
    "sm_100": "compiled, Triton 3.6.0",
    "gfx942": "compiled, Triton 3.6.0",
}

# Triton's release, then (table, *row).
SPILLS: dict[tuple[int, int], Rows[Tiling | GemmConfig]] = {
    (3, 6): {},
    (3, 8): {
        ("LINEAR_GELU", "sm_80", 4): (GemmConfig(64, 64, 16, 4, 4),),
    },
}

# varlen_attention: (head_dim rounded up, bytes of an element).
FORWARD: Rows[Tiling] = by_chip(
    {
        (32, 4): (Tiling(32, 32, 8, 2),),
        (64, 4): (Tiling(32, 32, 8, 2),),
        (80, 4): (Tiling(32, 32, 8, 2),),
        (96, 4): (Tiling(32, 32, 8, 2),),
        (128, 4): (Tiling(32, 32, 8, 2),),
        ("sm_80", 80, 2): (Tiling(128, 32, 4, 2), Tiling(64, 64, 4, 2)),
        ("sm_90", 80, 2): (
            Tiling(128, 128, 8, 2, "ahead"),
            Tiling(128, 128, 8, 2),
            Tiling(128, 64, 8, 2),
        ),
        ("sm_100", 80, 2): (Tiling(128, 128, 8, 2), Tiling(128, 64, 8, 2)),
        ("gfx942", 80, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
        ("sm_80", 96, 2): (Tiling(128, 32, 4, 2), Tiling(64, 64, 4, 2)),
        ("sm_90", 96, 2): (
            Tiling(128, 128, 8, 2, "ahead"),
            Tiling(128, 128, 8, 2),
            Tiling(128, 64, 8, 2),
        ),
        ("sm_100", 96, 2): (Tiling(128, 128, 8, 2), Tiling(128, 64, 8, 2)),
        ("gfx942", 96, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
        ("sm_80", 32, 2): (Tiling(128, 64, 4, 3), Tiling(64, 64, 4, 2)),
        ("sm_90", 32, 2): (Tiling(128, 128, 8, 3, "ahead"), Tiling(128, 64, 8, 2)),
        ("sm_100", 32, 2): (Tiling(128, 128, 8, 2), Tiling(64, 64, 4, 2)),
        ("gfx942", 32, 2): (Tiling(128, 64, 4, 2), Tiling(64, 64, 4, 2)),
        ("sm_80", 64, 2): (Tiling(128, 64, 4, 3), Tiling(64, 64, 4, 2)),
        ("sm_90", 64, 2): (Tiling(128, 128, 8, 3, "ahead"), Tiling(128, 64, 8, 2)),
        ("sm_100", 64, 2): (Tiling(128, 128, 8, 2), Tiling(64, 64, 4, 2)),
        ("gfx942", 64, 2): (Tiling(128, 64, 4, 2), Tiling(64, 64, 4, 2)),
        ("sm_80", 128, 2): (Tiling(128, 32, 4, 2), Tiling(128, 32, 8, 2), Tiling(128, 32, 8, 1)),
        ("sm_90", 128, 2): (
            Tiling(128, 128, 8, 2, "ahead"),
            Tiling(128, 64, 8, 2),
            Tiling(128, 64, 8, 1),
        ),
        ("sm_100", 128, 2): (Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2)),
        ("gfx942", 128, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    }
)

# Its kernel for short images with RoPE: rows of queries and of the image.
# Chips and heads without a row rotate k in a pass of its own.
SHORT: Rows[Tiling] = by_chip(
    {
        ("sm_80", 32, 2): (Tiling(64, 256, 4, 1),),
        ("sm_90", 32, 2): (Tiling(128, 256, 8, 1),),
        ("sm_80", 64, 2): (Tiling(64, 256, 4, 1),),
        ("sm_90", 64, 2): (Tiling(128, 256, 8, 1),),
        ("sm_100", 64, 2): (Tiling(64, 256, 8, 1),),
    }
)

# Its backward: a tile of dq has queries, one of dkdv keys.
DQ: Rows[Tiling] = by_chip(
    {
        (32, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
        ("sm_90", 32, 2): (Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2)),
        (64, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
        ("sm_80", 64, 2): (Tiling(128, 32, 4, 2), Tiling(64, 32, 4, 2)),
        ("sm_90", 64, 2): (Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2)),
        (32, 4): (Tiling(32, 32, 8, 2),),
        ("gfx942", 32, 4): (Tiling(32, 32, 4, 2),),
        (64, 4): (Tiling(32, 32, 8, 2),),
        ("gfx942", 64, 4): (Tiling(32, 32, 4, 2),),
        (80, 4): (Tiling(32, 16, 8, 2),),
        ("gfx942", 80, 4): (Tiling(32, 32, 4, 2),),
        (96, 4): (Tiling(32, 32, 8, 2),),
        ("gfx942", 96, 4): (Tiling(32, 32, 4, 2),),
        (128, 4): (Tiling(32, 32, 8, 2),),
        ("gfx942", 128, 4): (Tiling(32, 32, 4, 2),),
        ("sm_80", 80, 2): (Tiling(128, 32, 8, 2),),
        ("sm_90", 80, 2): (Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2)),
        ("sm_100", 80, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
        ("gfx942", 80, 2): (Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2)),
        ("sm_80", 96, 2): (Tiling(128, 32, 8, 2), Tiling(128, 16, 8, 2)),
        ("sm_90", 96, 2): (Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2)),
        ("sm_100", 96, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
        ("gfx942", 96, 2): (Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 2)),
        ("sm_80", 128, 2): (Tiling(128, 32, 8, 2), Tiling(128, 16, 8, 2)),
        ("sm_90", 128, 2): (Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2)),
        ("sm_100", 128, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
        ("gfx942", 128, 2): (Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 2)),
    }
)

DKDV: Rows[Tiling] = by_chip(
    {
        (32, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
        ("sm_90", 32, 2): (Tiling(128, 64, 8, 3), Tiling(64, 32, 4, 2)),
        ("gfx942", 32, 2): (Tiling(64, 32, 4, 2), Tiling(64, 16, 4, 2)),
        (32, 4): (Tiling(32, 32, 8, 2),),
        ("gfx942", 32, 4): (Tiling(32, 16, 4, 2),),
        (64, 4): (Tiling(32, 32, 8, 2),),
        ("gfx942", 64, 4): (Tiling(32, 16, 4, 2),),
        (80, 4): (Tiling(32, 32, 8, 2),),
        ("gfx942", 80, 4): (Tiling(32, 16, 4, 2),),
        (96, 4): (Tiling(32, 32, 8, 2),),
        ("gfx942", 96, 4): (Tiling(32, 16, 4, 2),),
        (128, 4): (Tiling(32, 32, 8, 2),),
        ("gfx942", 128, 4): (Tiling(32, 16, 4, 2),),
        ("sm_80", 64, 2): (Tiling(128, 32, 4, 2), Tiling(64, 32, 4, 2)),
        ("sm_90", 64, 2): (Tiling(128, 64, 8, 3), Tiling(64, 32, 4, 2)),
        ("sm_100", 64, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
        ("gfx942", 64, 2): (Tiling(64, 32, 4, 2), Tiling(64, 16, 4, 2)),
        ("sm_80", 80, 2): (Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 2)),
        ("sm_90", 80, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
        ("sm_100", 80, 2): (Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2)),
        ("gfx942", 80, 2): (Tiling(64, 16, 4, 2),),
        ("sm_80", 96, 2): (Tiling(128, 32, 8, 2), Tiling(128, 16, 8, 2)),
        ("sm_90", 96, 2): (Tiling(128, 32, 8, 3), Tiling(64, 32, 4, 2)),
        ("sm_100", 96, 2): (Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2)),
        ("gfx942", 96, 2): (Tiling(64, 16, 4, 2),),
        ("sm_80", 128, 2): (Tiling(128, 32, 8, 2), Tiling(128, 16, 8, 2)),
        ("sm_90", 128, 2): (Tiling(128, 32, 8, 3), Tiling(128, 16, 8, 2)),
        ("sm_100", 128, 2): (Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 2)),
        ("gfx942", 128, 2): (Tiling(64, 16, 4, 2),),
    }
)

# pixel_shuffle_linear, forward, dx and dweight: bytes of an element.
GEMM: Rows[GemmConfig] = by_chip(
    {
        (4,): (GemmConfig(64, 64, 16, 4, 4),),
        ("sm_80", 4): (GemmConfig(64, 64, 16, 4, 4), GemmConfig(32, 32, 16, 4, 2)),
        ("gfx942", 4): (GemmConfig(64, 64, 32, 4, 2), GemmConfig(32, 32, 16, 4, 2)),
        ("sm_80", 2): (GemmConfig(128, 128, 32, 8, 4), GemmConfig(64, 64, 32, 4, 2)),
        ("sm_90", 2): (GemmConfig(128, 128, 64, 8, 3),),
        ("sm_100", 2): (GemmConfig(128, 128, 64, 8, 4),),
        ("gfx942", 2): (GemmConfig(128, 128, 32, 8, 2), GemmConfig(64, 64, 32, 4, 2)),
    }
)

# For parts of a sum, where the float32 store makes ptxas hold up
# the tensor cores with the tiles above.
GEMM_PARTS: Rows[GemmConfig] = by_chip(
    {
        ("sm_90", 2): (GemmConfig(128, 64, 64, 8, 3),),
    }
)

# linear_gelu and linear_swiglu, where a GPU found them faster than torch's products and a pass:
# bytes of an element. Other chips run them when asked for by name, with the tiles of GEMM.
LINEAR_GELU: Rows[GemmConfig] = by_chip({})

LINEAR_SWIGLU: Rows[GemmConfig] = by_chip({})

# linear_rope_2d, likewise.
LINEAR_ROPE_2D: Rows[GemmConfig] = by_chip({})

# rope_2d: (head_dim rounded up, bytes of an element).
ROPE: Rows[RopeConfig] = by_chip(
    {
        (32, 2): (RopeConfig(8, 16, 4),),
        (32, 4): (RopeConfig(4, 16, 4),),
        (64, 2): (RopeConfig(4, 16, 4),),
        (64, 4): (RopeConfig(4, 8, 4),),
        (128, 2): (RopeConfig(4, 8, 4),),
        (128, 4): (RopeConfig(4, 4, 4),),
    }
)

# layer_norm_pixel_shuffle and residual_layer_norm: C rounded up.
NORM_FORWARD: Rows[NormConfig] = by_chip(
    {
        (512,): (NormConfig(4, 1),),
        ("sm_100", 512): (NormConfig(4, 4),),
        ("gfx942", 512): (NormConfig(4, 4),),
        (1024,): (NormConfig(2, 1),),
        ("sm_100", 1024): (NormConfig(2, 4),),
        ("gfx942", 1024): (NormConfig(2, 4),),
        (2048,): (NormConfig(1, 4),),
        (4096,): (NormConfig(1, 4),),
        (8192,): (NormConfig(1, 8),),
    }
)

NORM_BACKWARD: Rows[NormConfig] = by_chip(
    {
        (512,): (NormConfig(4, 4),),
        ("sm_80", 512): (NormConfig(2, 1), NormConfig(4, 4)),
        ("sm_90", 512): (NormConfig(2, 2),),
        (1024,): (NormConfig(2, 4),),
        (2048,): (NormConfig(1, 4),),
        (4096,): (NormConfig(1, 8),),
        (8192,): (NormConfig(1, 16),),
    }
)

# swiglu, forward and backward: bytes of an element.
SWIGLU: Rows[BlockConfig] = by_chip(
    {
        (2,): (BlockConfig(1024, 4),),
        (4,): (BlockConfig(1024, 4),),
    }
)

# normalize_patchify: bytes of an element of its result.
PATCHIFY: Rows[BlockConfig] = by_chip(
    {
        (2,): (BlockConfig(2048, 4),),
        (4,): (BlockConfig(2048, 4),),
    }
)
