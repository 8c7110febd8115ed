"""Tile sizes of the kernels, by chip: data only, written by ``python -m benchmarks.tuning``.

Each row holds the tile sizes to use, then those for when they do not fit the chip. CHOSEN_BY names
the GPU that decided, or says "compiled": chosen by reading compiled code (no spills, asynchronous
tensor cores), not yet measured on a GPU. It also names the Triton that compiled. Another one lays
out registers anew: SPILLS has, for every release that all rows were compiled with, the tiles that
spill (``python -m benchmarks.tuning.spills``). There the next ones of their row are used.
"""

from .tilings import BlockConfig, GemmConfig, NormConfig, RopeConfig, Tiling

CHOSEN_BY = {
    "sm_80": "compiled, Triton 3.6.0",
    "sm_90": "compiled, Triton 3.6.0",
    "sm_100": "compiled, Triton 3.6.0",
    "gfx942": "compiled, Triton 3.6.0",
}

# Triton's release, then (table, *row).
SPILLS: dict[tuple[int, int], dict[tuple[str | int, ...], tuple[Tiling, ...]]] = {
    (3, 6): {},
    (3, 8): {
        ("FORWARD", "sm_80", 64, 2): (Tiling(128, 64, 4, 3),),
        ("FORWARD", "sm_80", 128, 2): (Tiling(128, 64, 8, 3), Tiling(128, 32, 8, 2)),
        ("FORWARD", "sm_90", 128, 2): (Tiling(128, 64, 8, 2),),
    },
}

# varlen_attention: (chip, head_dim rounded up, bytes of an element).
FORWARD: dict[tuple[str, int, int], tuple[Tiling, ...]] = {
    ("sm_80", 32, 2): (Tiling(128, 64, 4, 3), Tiling(64, 64, 4, 2)),
    ("sm_80", 32, 4): (Tiling(32, 32, 8, 2),),
    ("sm_80", 64, 2): (Tiling(128, 64, 4, 3), Tiling(64, 64, 4, 2)),
    ("sm_80", 64, 4): (Tiling(32, 32, 8, 2),),
    ("sm_80", 128, 2): (Tiling(128, 64, 8, 3), Tiling(128, 32, 8, 2), Tiling(128, 32, 8, 1)),
    ("sm_80", 128, 4): (Tiling(32, 32, 8, 2),),
    ("sm_90", 32, 2): (Tiling(128, 128, 8, 3, "ahead"), Tiling(128, 64, 8, 2)),
    ("sm_90", 32, 4): (Tiling(32, 32, 8, 2),),
    ("sm_90", 64, 2): (Tiling(128, 128, 8, 3, "ahead"), Tiling(128, 64, 8, 2)),
    ("sm_90", 64, 4): (Tiling(32, 32, 8, 2),),
    ("sm_90", 128, 2): (
        Tiling(128, 64, 8, 3, "ahead"),
        Tiling(128, 64, 8, 2),
        Tiling(128, 64, 8, 1),
    ),
    ("sm_90", 128, 4): (Tiling(32, 32, 8, 2),),
    ("sm_100", 32, 2): (Tiling(128, 128, 8, 2), Tiling(64, 64, 4, 2)),
    ("sm_100", 32, 4): (Tiling(32, 32, 8, 2),),
    ("sm_100", 64, 2): (Tiling(128, 128, 8, 2), Tiling(64, 64, 4, 2)),
    ("sm_100", 64, 4): (Tiling(32, 32, 8, 2),),
    ("sm_100", 128, 2): (Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2)),
    ("sm_100", 128, 4): (Tiling(32, 32, 8, 2),),
    ("gfx942", 32, 2): (Tiling(128, 64, 4, 2), Tiling(64, 64, 4, 2)),
    ("gfx942", 32, 4): (Tiling(32, 32, 8, 2),),
    ("gfx942", 64, 2): (Tiling(128, 64, 4, 2), Tiling(64, 64, 4, 2)),
    ("gfx942", 64, 4): (Tiling(32, 32, 8, 2),),
    ("gfx942", 128, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("gfx942", 128, 4): (Tiling(32, 32, 8, 2),),
}

# Its kernel for short images with RoPE: rows of queries and of the image.
# Chips and heads without a row rotate k in a pass of its own.
SHORT: dict[tuple[str, int, int], tuple[Tiling, ...]] = {
    ("sm_90", 32, 2): (Tiling(128, 256, 8, 1),),
    ("sm_90", 64, 2): (Tiling(128, 256, 8, 1),),
    ("sm_100", 64, 2): (Tiling(64, 256, 8, 1),),
}

# Its backward: a tile of dq has queries, one of dkdv keys.
DQ: dict[tuple[str, int, int], tuple[Tiling, ...]] = {
    ("sm_80", 32, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_80", 32, 4): (Tiling(32, 32, 8, 2),),
    ("sm_80", 64, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_80", 64, 4): (Tiling(32, 32, 8, 2),),
    ("sm_80", 128, 2): (Tiling(128, 32, 8, 2), Tiling(128, 16, 8, 2)),
    ("sm_80", 128, 4): (Tiling(32, 32, 8, 2),),
    ("sm_90", 32, 2): (Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2)),
    ("sm_90", 32, 4): (Tiling(32, 32, 8, 2),),
    ("sm_90", 64, 2): (Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2)),
    ("sm_90", 64, 4): (Tiling(32, 32, 8, 2),),
    ("sm_90", 128, 2): (Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2)),
    ("sm_90", 128, 4): (Tiling(32, 32, 8, 2),),
    ("sm_100", 32, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_100", 32, 4): (Tiling(32, 32, 8, 2),),
    ("sm_100", 64, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_100", 64, 4): (Tiling(32, 32, 8, 2),),
    ("sm_100", 128, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_100", 128, 4): (Tiling(32, 32, 8, 2),),
    ("gfx942", 32, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("gfx942", 32, 4): (Tiling(32, 32, 4, 2),),
    ("gfx942", 64, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("gfx942", 64, 4): (Tiling(32, 32, 4, 2),),
    ("gfx942", 128, 2): (Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 2)),
    ("gfx942", 128, 4): (Tiling(32, 32, 4, 2),),
}

DKDV: dict[tuple[str, int, int], tuple[Tiling, ...]] = {
    ("sm_80", 32, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_80", 32, 4): (Tiling(32, 32, 8, 2),),
    ("sm_80", 64, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_80", 64, 4): (Tiling(32, 32, 8, 2),),
    ("sm_80", 128, 2): (Tiling(128, 16, 8, 2),),
    ("sm_80", 128, 4): (Tiling(32, 32, 8, 2),),
    ("sm_90", 32, 2): (Tiling(128, 64, 8, 3), Tiling(64, 32, 4, 2)),
    ("sm_90", 32, 4): (Tiling(32, 32, 8, 2),),
    ("sm_90", 64, 2): (Tiling(128, 64, 8, 3), Tiling(64, 32, 4, 2)),
    ("sm_90", 64, 4): (Tiling(32, 32, 8, 2),),
    ("sm_90", 128, 2): (Tiling(128, 32, 8, 3), Tiling(128, 16, 8, 2)),
    ("sm_90", 128, 4): (Tiling(32, 32, 8, 2),),
    ("sm_100", 32, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_100", 32, 4): (Tiling(32, 32, 8, 2),),
    ("sm_100", 64, 2): (Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_100", 64, 4): (Tiling(32, 32, 8, 2),),
    ("sm_100", 128, 2): (Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_100", 128, 4): (Tiling(32, 32, 8, 2),),
    ("gfx942", 32, 2): (Tiling(64, 32, 4, 2), Tiling(64, 16, 4, 2)),
    ("gfx942", 32, 4): (Tiling(32, 16, 4, 2),),
    ("gfx942", 64, 2): (Tiling(64, 32, 4, 2), Tiling(64, 16, 4, 2)),
    ("gfx942", 64, 4): (Tiling(32, 16, 4, 2),),
    ("gfx942", 128, 2): (Tiling(64, 16, 4, 2),),
    ("gfx942", 128, 4): (Tiling(32, 16, 4, 2),),
}

# varlen_attention_dkdv with ATOMIC; heads without a row always take the two kernels.
ATOMIC: dict[tuple[str, int, int], tuple[Tiling, ...]] = {
    ("sm_80", 32, 2): (Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_80", 64, 2): (Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_90", 32, 2): (Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2)),
    ("sm_90", 64, 2): (Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2)),
    ("sm_100", 32, 2): (Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 2)),
    ("sm_100", 64, 2): (Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 2)),
    ("gfx942", 32, 2): (Tiling(64, 32, 4, 2), Tiling(64, 16, 4, 2)),
    ("gfx942", 64, 2): (Tiling(64, 32, 4, 2), Tiling(64, 16, 4, 2)),
}

# pixel_shuffle_linear, forward, dx and dweight: (chip, bytes of an element).
GEMM: dict[tuple[str, int], tuple[GemmConfig, ...]] = {
    ("sm_80", 2): (GemmConfig(128, 128, 32, 8, 4), GemmConfig(64, 64, 32, 4, 2)),
    ("sm_80", 4): (GemmConfig(64, 64, 16, 4, 4), GemmConfig(32, 32, 16, 4, 2)),
    ("sm_90", 2): (GemmConfig(128, 128, 64, 8, 3),),
    ("sm_90", 4): (GemmConfig(64, 64, 16, 4, 4),),
    ("sm_100", 2): (GemmConfig(128, 128, 64, 8, 4),),
    ("sm_100", 4): (GemmConfig(64, 64, 16, 4, 4),),
    ("gfx942", 2): (GemmConfig(128, 128, 32, 8, 2), GemmConfig(64, 64, 32, 4, 2)),
    ("gfx942", 4): (GemmConfig(64, 64, 32, 4, 2), GemmConfig(32, 32, 16, 4, 2)),
}

# For parts of a sum, where the float32 store makes ptxas hold up
# the tensor cores with the tiles above.
GEMM_PARTS: dict[tuple[str, int], tuple[GemmConfig, ...]] = {
    ("sm_90", 2): (GemmConfig(128, 64, 64, 8, 3),),
}

# rope_2d: (chip, head_dim rounded up, bytes of an element).
ROPE: dict[tuple[str, int, int], tuple[RopeConfig, ...]] = {
    ("sm_80", 32, 2): (RopeConfig(8, 16, 4),),
    ("sm_80", 32, 4): (RopeConfig(4, 16, 4),),
    ("sm_80", 64, 2): (RopeConfig(4, 16, 4),),
    ("sm_80", 64, 4): (RopeConfig(4, 8, 4),),
    ("sm_80", 128, 2): (RopeConfig(4, 8, 4),),
    ("sm_80", 128, 4): (RopeConfig(4, 4, 4),),
    ("sm_90", 32, 2): (RopeConfig(8, 16, 4),),
    ("sm_90", 32, 4): (RopeConfig(4, 16, 4),),
    ("sm_90", 64, 2): (RopeConfig(4, 16, 4),),
    ("sm_90", 64, 4): (RopeConfig(4, 8, 4),),
    ("sm_90", 128, 2): (RopeConfig(4, 8, 4),),
    ("sm_90", 128, 4): (RopeConfig(4, 4, 4),),
    ("sm_100", 32, 2): (RopeConfig(8, 16, 4),),
    ("sm_100", 32, 4): (RopeConfig(4, 16, 4),),
    ("sm_100", 64, 2): (RopeConfig(4, 16, 4),),
    ("sm_100", 64, 4): (RopeConfig(4, 8, 4),),
    ("sm_100", 128, 2): (RopeConfig(4, 8, 4),),
    ("sm_100", 128, 4): (RopeConfig(4, 4, 4),),
    ("gfx942", 32, 2): (RopeConfig(8, 16, 4),),
    ("gfx942", 32, 4): (RopeConfig(4, 16, 4),),
    ("gfx942", 64, 2): (RopeConfig(4, 16, 4),),
    ("gfx942", 64, 4): (RopeConfig(4, 8, 4),),
    ("gfx942", 128, 2): (RopeConfig(4, 8, 4),),
    ("gfx942", 128, 4): (RopeConfig(4, 4, 4),),
}

# layer_norm_pixel_shuffle: (chip, C rounded up).
NORM_FORWARD: dict[tuple[str, int], tuple[NormConfig, ...]] = {
    ("sm_80", 512): (NormConfig(4, 4),),
    ("sm_80", 1024): (NormConfig(2, 4),),
    ("sm_80", 2048): (NormConfig(1, 4),),
    ("sm_80", 4096): (NormConfig(1, 4),),
    ("sm_80", 8192): (NormConfig(1, 8),),
    ("sm_90", 512): (NormConfig(4, 4),),
    ("sm_90", 1024): (NormConfig(2, 4),),
    ("sm_90", 2048): (NormConfig(1, 4),),
    ("sm_90", 4096): (NormConfig(1, 4),),
    ("sm_90", 8192): (NormConfig(1, 8),),
    ("sm_100", 512): (NormConfig(4, 4),),
    ("sm_100", 1024): (NormConfig(2, 4),),
    ("sm_100", 2048): (NormConfig(1, 4),),
    ("sm_100", 4096): (NormConfig(1, 4),),
    ("sm_100", 8192): (NormConfig(1, 8),),
    ("gfx942", 512): (NormConfig(4, 4),),
    ("gfx942", 1024): (NormConfig(2, 4),),
    ("gfx942", 2048): (NormConfig(1, 4),),
    ("gfx942", 4096): (NormConfig(1, 4),),
    ("gfx942", 8192): (NormConfig(1, 8),),
}

NORM_BACKWARD: dict[tuple[str, int], tuple[NormConfig, ...]] = {
    ("sm_80", 512): (NormConfig(4, 4),),
    ("sm_80", 1024): (NormConfig(2, 4),),
    ("sm_80", 2048): (NormConfig(1, 4),),
    ("sm_80", 4096): (NormConfig(1, 8),),
    ("sm_80", 8192): (NormConfig(1, 16),),
    ("sm_90", 512): (NormConfig(4, 4),),
    ("sm_90", 1024): (NormConfig(2, 4),),
    ("sm_90", 2048): (NormConfig(1, 4),),
    ("sm_90", 4096): (NormConfig(1, 8),),
    ("sm_90", 8192): (NormConfig(1, 16),),
    ("sm_100", 512): (NormConfig(4, 4),),
    ("sm_100", 1024): (NormConfig(2, 4),),
    ("sm_100", 2048): (NormConfig(1, 4),),
    ("sm_100", 4096): (NormConfig(1, 8),),
    ("sm_100", 8192): (NormConfig(1, 16),),
    ("gfx942", 512): (NormConfig(4, 4),),
    ("gfx942", 1024): (NormConfig(2, 4),),
    ("gfx942", 2048): (NormConfig(1, 4),),
    ("gfx942", 4096): (NormConfig(1, 8),),
    ("gfx942", 8192): (NormConfig(1, 16),),
}

# swiglu, forward and backward: (chip, bytes of an element).
SWIGLU: dict[tuple[str, int], tuple[BlockConfig, ...]] = {
    ("sm_80", 2): (BlockConfig(1024, 4),),
    ("sm_80", 4): (BlockConfig(1024, 4),),
    ("sm_90", 2): (BlockConfig(1024, 4),),
    ("sm_90", 4): (BlockConfig(1024, 4),),
    ("sm_100", 2): (BlockConfig(1024, 4),),
    ("sm_100", 4): (BlockConfig(1024, 4),),
    ("gfx942", 2): (BlockConfig(1024, 4),),
    ("gfx942", 4): (BlockConfig(1024, 4),),
}

# normalize_patchify: (chip, bytes of an element of its result).
PATCHIFY: dict[tuple[str, int], tuple[BlockConfig, ...]] = {
    ("sm_80", 2): (BlockConfig(2048, 4),),
    ("sm_80", 4): (BlockConfig(2048, 4),),
    ("sm_90", 2): (BlockConfig(2048, 4),),
    ("sm_90", 4): (BlockConfig(2048, 4),),
    ("sm_100", 2): (BlockConfig(2048, 4),),
    ("sm_100", 4): (BlockConfig(2048, 4),),
    ("gfx942", 2): (BlockConfig(2048, 4),),
    ("gfx942", 4): (BlockConfig(2048, 4),),
}
