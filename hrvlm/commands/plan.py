"""``hrvlm plan``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from .command import command
from .options import MaxImgSize, Upscale
from .tables import ORDER, STRETCH, grid, print_line, print_table, quantity

if TYPE_CHECKING:
    from ..encoder.cost import Plan


def show(plan: Plan) -> None:
    """Grids, FLOPs and memory of ``hrvlm plan``."""
    projector = plan.factor > 1
    rows: list[Sequence[object]] = [
        (
            image.name,
            grid((image.height, image.width)),
            grid((image.geometry.height, image.geometry.width)),
            f"{image.stretch:.2f}x",
            grid(image.geometry.patch_grid),
            *([grid(image.geometry.token_grid)] if projector else []),
            image.geometry.num_tokens,
            quantity(image.cost.gemm, "FLOP"),
            quantity(image.cost.attention, "FLOP"),
        )
        for image in plan.images
    ]
    if len(rows) > 1:
        cost = plan.cost
        total = quantity(cost.gemm, "FLOP"), quantity(cost.attention, "FLOP")
        rows.append(("all, packed", *[""] * (4 + projector), plan.visual_tokens, *total))
    headers = ["image", "size", "resized", "stretch", "patch grid"]
    counted = ["token grid", "tokens"] if projector else ["patches"]
    print_table([*headers, *counted, "GEMMs", "attention"], rows)
    arch = plan.architecture
    print_line(f"{ORDER}; {STRETCH}")
    unit = arch.patch_size * plan.factor
    print_line(
        f"sides are multiples of {unit} px, patch size {arch.patch_size} * factor {plan.factor}, "
        "for a projector; --factor 1 plans the encoder alone, as hrvlm encode runs it"
        if projector
        else f"the encoder alone: sides are multiples of the patch size, {unit} px"
    )
    print_line(
        f"{plan.packed_tokens} packed tokens with {arch.num_prefix_tokens} prefix tokens an image"
    )
    print_line(
        f"{arch.name}, {quantity(arch.num_parameters, '')} parameters, {plan.dtype}: "
        f"weights {quantity(plan.weight_bytes, 'B', base=1024)}, "
        f"activations of a forward {quantity(plan.activation_bytes, 'B', base=1024)}, "
        f"{quantity(plan.cost.total, 'FLOP')}"
    )


@command(show=show)
def plan(
    images: Annotated[
        list[str], typer.Argument(metavar="HEIGHTxWIDTH...", help="Sizes, or image files.")
    ],
    model: Annotated[str, typer.Option(help="{hrvlm.checkpoints.family.CONFIGS}.")] = "vitb16",
    max_img_size: MaxImgSize = 1024,
    patch_size: Annotated[int | None, typer.Option(help="Default: the model's.")] = None,
    factor: Annotated[
        int,
        typer.Option(
            help="The projector's: factor x factor patches a token; 1: the encoder alone."
        ),
    ] = 4,
    upscale: Upscale = False,
    dtype: Annotated[str, typer.Option(help="{hrvlm.machine.DTYPE_BYTES}.")] = "bfloat16",
) -> Plan:
    """Grids, tokens, memory and FLOPs of images of given sizes."""
    from ..encoder.cost import make_plan, named_architecture

    return make_plan(
        images,
        named_architecture(model, patch_size),
        max_img_size=max_img_size,
        factor=factor,
        dtype=dtype,
        allow_upscale=upscale,
    )
