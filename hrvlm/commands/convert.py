"""``hrvlm convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import command
from .tables import print_line

if TYPE_CHECKING:
    from ..checkpoints.convert import CheckpointInfo


def show(summary: dict[str, Any]) -> None:
    """The result of ``hrvlm convert``."""
    prefix = f" under {summary['prefix']!r}" if summary["prefix"] else ""
    print_line(f"recognised: {summary['layout']} layout{prefix}")
    for name in ("left_out", "added"):
        if summary[name]:
            print_line(f"{name.replace('_', ' ')}: {', '.join(summary[name])}")
    config = summary["config"]
    print_line(
        f"config: hidden_size {config['hidden_size']}, {config['num_hidden_layers']} layers, "
        f"{config['num_attention_heads']} heads, MLP {summary['mlp_size']}"
        f"{' gated' if summary['gated_mlp'] else ''}, patch {config['patch_size']}, "
        f"{summary['registers']} registers, {config['dtype']}"
    )
    print_line(f"wrote {summary['tensors']} tensors to {summary['directory']}")


@command(show=show)
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint file or directory.")],
    directory: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    dtype: Annotated[
        str | None, typer.Option(help="{hrvlm.machine.DTYPE_BYTES}; default: as stored.")
    ] = None,
    pixel_statistics: Annotated[
        str | None, typer.Option(help="Mean and std of the pixels: imagenet or sat493m.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> dict[str, Any]:
    """Turn a DINOv3, DINOv2 or EUPE checkpoint into a directory.

    Meta, timm and transformers layouts are recognised by their keys; the result is in the layout of
    transformers.
    """
    from ..checkpoints.convert import convert as run
    from ..machine import torch_dtype

    stored = None if dtype is None else torch_dtype(dtype)
    try:
        info = run(
            source,
            directory,
            dtype=stored,
            pixel_statistics=pixel_statistics,
            overwrite=overwrite,
        )
    except FileExistsError as error:
        raise ValueError(f"{directory} holds a model: --overwrite replaces it") from error
    return _summary(directory, info)


def _summary(directory: Path, info: CheckpointInfo) -> dict[str, Any]:
    """What ``hrvlm convert`` wrote, read back from the files."""
    from safetensors import safe_open
    from transformers import AutoConfig

    from ..checkpoints.sizes import sizes_of

    count = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            count += len(stored.keys())
    sizes = sizes_of(AutoConfig.from_pretrained(directory))
    return {
        "directory": str(directory),
        "layout": info.layout,
        "prefix": info.prefix,
        "tensors": count,
        "left_out": list(info.left_out),
        "added": list(info.added),
        "mlp_size": sizes.intermediate_size,
        "gated_mlp": sizes.use_gated_mlp,
        "registers": sizes.num_register_tokens,
        "config": json.loads((directory / "config.json").read_text(encoding="utf-8")),
    }
