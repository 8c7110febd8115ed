"""What of the encoder goes into a graph: a batch of one size, or a pack of mixed sizes.

    batch  pixel_values [B, 3, H, W]                      -> last_hidden_state [B, P + hp*wp, C]
    pack   pixel_values [N, 3*p*p], grids [images, 2]     -> packed_last_hidden_state [T, C]

and of both pooler_output, the CLS token of each image. Every size is free. A pack's graph holds
a mask ``[T, T]``, so its memory grows with the square of all tokens together; eager and compiled
code has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..encoder.packed_encoder import PackedEncoder

Sizes = Sequence[tuple[int, int]]  # patch grids; of a batch, equal ones


class BatchGraph(nn.Module):
    """The encoder of a batch; see the top of this file."""

    inputs: tuple[str, ...] = ("pixel_values",)
    outputs: tuple[str, ...] = ("last_hidden_state", "pooler_output")
    # What is traced, and then what the file is checked on.
    example: Sizes = ((4, 6),) * 2
    checks: tuple[Sizes, ...] = (((2, 3),), ((3, 2),) * 2, ((7, 5),) * 3, ((2, 11),) * 5)

    def __init__(self, encoder: PackedEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Both outputs."""
        out: Any = self.encoder(pixel_values, return_dict=True)
        return out.last_hidden_state, out.pooler_output

    def dynamic_shapes(self) -> dict[str, Any]:
        """For torch.export: every size is free, sides are whole patches."""
        p = self.encoder.patch_size
        rows, columns = Dim("rows", min=1), Dim("columns", min=1)
        return {"pixel_values": {0: Dim("batch", min=1), 2: p * rows, 3: p * columns}}

    def random_inputs(self, sizes: Sizes) -> tuple[Tensor, ...]:
        """Noise as images of these patch grids."""
        p, (hp, wp) = self.encoder.patch_size, sizes[0]
        channels = self.encoder.config.num_channels
        return (torch.randn(len(sizes), channels, hp * p, wp * p, generator=_generator()),)


class PackGraph(BatchGraph):
    """The encoder of a mixed pack; see the top of this file."""

    inputs = ("pixel_values", "grids")
    outputs = ("packed_last_hidden_state", "pooler_output")
    example: Sizes = ((4, 6), (2, 2), (3, 1))
    checks: tuple[Sizes, ...] = (((2, 3),), ((3, 2), (2, 7)), ((1, 4), (5, 5), (2, 2), (6, 3)))

    def forward(self, pixel_values: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Both outputs."""
        out: Any = self.encoder(pixel_values, grids=grids, return_dict=True)
        return out.packed_last_hidden_state, out.pooler_output

    def dynamic_shapes(self) -> dict[str, Any]:
        """For torch.export: patches and images are free."""
        return {"pixel_values": {0: Dim("patches", min=1)}, "grids": {0: Dim("images", min=1)}}

    def random_inputs(self, sizes: Sizes) -> tuple[Tensor, ...]:
        """Noise as patches of images of these patch grids."""
        width = self.encoder.config.num_channels * self.encoder.patch_size**2
        rows = sum(hp * wp for hp, wp in sizes)
        return torch.randn(rows, width, generator=_generator()), torch.tensor(sizes)


GRAPHS = {"batch": BatchGraph, "pack": PackGraph}


def graph_of(encoder: PackedEncoder, form: str) -> BatchGraph:
    """The graph of that name for an encoder.

    Raises:
        TypeError: it is no encoder of this package.
        ValueError: there is none, or the encoder is not in float32 on the CPU.
    """
    if form not in GRAPHS:
        raise ValueError(f"form={form!r}: expected one of {', '.join(GRAPHS)}")
    if not isinstance(encoder, PackedEncoder):
        raise TypeError(
            f"encoder: expected a DINOv3Encoder or DINOv2Encoder, got {type(encoder).__name__}"
        )
    for name, parameter in encoder.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(
                f"encoder: {name} is {parameter.dtype} on {parameter.device}; graphs are made of a "
                "float32 encoder on the CPU"
            )
    return GRAPHS[form](encoder).eval()


def export_program(encoder: PackedEncoder, form: str = "batch") -> ExportedProgram:
    """``torch.export.export`` of an encoder for any size.

    A program of torch itself checks that a side has at least two patches, which is how it tells
    sizes that are free from those that are 1.

    Args:
        encoder: In float32 on the CPU.
        form: "batch" or "pack".

    Raises:
        ValueError: as :func:`graph_of`.
    """
    graph = graph_of(encoder, form)
    example = graph.random_inputs(graph.example)
    with torch.no_grad():
        return torch.export.export(graph, example, dynamic_shapes=graph.dynamic_shapes())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
