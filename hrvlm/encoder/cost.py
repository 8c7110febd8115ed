"""What images will cost before any weights are loaded: tokens, memory, floating-point operations.

With T packed tokens (prefix tokens included) in segments of n_i, N patches, hidden size C, L
blocks, an MLP of width M with m matrices (2, or 3 when gated) and patches of p x p pixels:

    GEMM FLOPs       2 N (3 p^2) C  +  L (2 T C (3C + C)  +  2 m T C M)
    attention FLOPs  L * 4 C * sum n_i^2                         q k^T and the product with v

A multiply-add counts as two; norms, softmax, activations and RoPE (each linear in T and small
beside the GEMMs) are left out. This is what ``torch.utils.flop_counter`` counts. Memory of a
forward without gradients, in elements of the weights' dtype:

    weights       one per parameter
    activations   T * max(9 C, 3 C + (2 or, gated, 3) M)  +  N (3 p^2)

for the widest moment of a block. In the attention: x, norm(x), qkv (3 C), the rotated q and k
(2 C), the heads' output and its projection. In the MLP: the block's input, the attention's result,
its norm, and two tensors of width M, three when gated. The input patches are kept to the end. Score
matrices are never stored, as in the fused attention backends; "eager" stores them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..images.geometry import Geometry, positive_int, token_grid
from ..machine import DTYPE_BYTES, check_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SIZE = re.compile(r"(\d{1,9})\s*[xX×]\s*(\d{1,9})")  # noqa: RUF001  (people paste this sign)


@dataclass(frozen=True)
class Architecture:
    """The sizes of an encoder that its cost depends on."""

    name: str
    hidden_size: int
    num_layers: int
    mlp_size: int
    gated_mlp: bool
    patch_size: int
    num_prefix_tokens: int  # CLS and registers
    qkv_biases: int  # how many of q, k and v have one
    proj_bias: bool
    mlp_bias: bool
    num_positions: int = 0  # learned ones, that of CLS among them

    @classmethod
    def from_config(cls, config: PreTrainedConfig, name: str = "") -> Architecture:
        """The sizes of an encoder's configuration."""
        from ..checkpoints.sizes import sizes_of

        sizes = sizes_of(config)
        return cls(
            name=name or config.model_type,
            hidden_size=sizes.hidden_size,
            num_layers=sizes.num_hidden_layers,
            mlp_size=sizes.intermediate_size,
            gated_mlp=sizes.use_gated_mlp,
            patch_size=sizes.patch_size,
            num_prefix_tokens=sizes.num_prefix_tokens,
            qkv_biases=sizes.query_bias + sizes.key_bias + sizes.value_bias,
            proj_bias=sizes.proj_bias,
            mlp_bias=sizes.mlp_bias,
            num_positions=sizes.positions.count if sizes.positions else 0,
        )

    @property
    def num_parameters(self) -> int:
        """Parameters of an encoder of these sizes, mask token included."""
        c, m = self.hidden_size, self.mlp_size
        ups = 2 if self.gated_mlp else 1
        attention = 4 * c * c + self.qkv_biases * c + self.proj_bias * c
        mlp = (ups + 1) * c * m + self.mlp_bias * (ups * m + c)
        norms_and_scales = 2 * 2 * c + 2 * c
        embeddings = (3 * self.patch_size**2 + 1) * c + (self.num_prefix_tokens + 1) * c
        embeddings += self.num_positions * c
        return embeddings + self.num_layers * (attention + mlp + norms_and_scales) + 2 * c

    @property
    def patch_values(self) -> int:
        """Numbers in a patch, 3 p^2."""
        return 3 * self.patch_size**2


class Cost(NamedTuple):
    """FLOPs of a forward.

    Attributes:
        gemm: of the matrix products with weights.
        attention: of q k^T and of the product with v.
    """

    gemm: int
    attention: int

    @property
    def total(self) -> int:
        """Both."""
        return self.gemm + self.attention


@dataclass(frozen=True)
class PlannedImage:
    """One image of a plan."""

    name: str
    height: int
    width: int
    geometry: Geometry
    cost: Cost

    @property
    def stretch(self) -> float:
        """See :meth:`Geometry.stretch`."""
        return self.geometry.stretch(self.height, self.width)


@dataclass(frozen=True)
class Plan:
    """The cost of one packed forward over `images`."""

    architecture: Architecture
    dtype: str
    factor: int  # 1: the encoder alone
    images: tuple[PlannedImage, ...]

    @property
    def cost(self) -> Cost:
        """FLOPs of the whole pack: attention never crosses images, so it is their sum."""
        return Cost(
            sum(i.cost.gemm for i in self.images), sum(i.cost.attention for i in self.images)
        )

    @property
    def packed_tokens(self) -> int:
        """Rows of the packed axis, T."""
        prefix = self.architecture.num_prefix_tokens
        return sum(i.geometry.num_patches + prefix for i in self.images)

    @property
    def visual_tokens(self) -> int:
        """Tokens the language model sees."""
        return sum(i.geometry.num_tokens for i in self.images)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return self.architecture.num_parameters * DTYPE_BYTES[self.dtype]

    @property
    def activation_bytes(self) -> int:
        """Peak memory of a forward without gradients, beside the weights (top of this file)."""
        arch = self.architecture
        mlp = 3 * arch.hidden_size + (3 if arch.gated_mlp else 2) * arch.mlp_size
        widest = max(9 * arch.hidden_size, mlp)
        patches = sum(i.geometry.num_patches for i in self.images)
        elements = self.packed_tokens * widest + patches * arch.patch_values
        return elements * DTYPE_BYTES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain numbers: bytes, FLOPs, pixels as (height, width)."""
        return {
            "model": self.architecture.name,
            "dtype": self.dtype,
            "factor": self.factor,
            "parameters": self.architecture.num_parameters,
            "images": [
                {
                    "image": i.name,
                    "size": [i.height, i.width],
                    "resized": [i.geometry.height, i.geometry.width],
                    "stretch": i.stretch,
                    "patch_grid": list(i.geometry.patch_grid),
                    "token_grid": list(i.geometry.token_grid),
                    "patches": i.geometry.num_patches,
                    "tokens": i.geometry.num_tokens,
                    "gemm_flops": i.cost.gemm,
                    "attention_flops": i.cost.attention,
                }
                for i in self.images
            ],
            "packed_tokens": self.packed_tokens,
            "tokens": self.visual_tokens,
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
            "gemm_flops": self.cost.gemm,
            "attention_flops": self.cost.attention,
            "flops": self.cost.total,
        }


def make_plan(
    images: Sequence[str],
    architecture: Architecture,
    *,
    max_img_size: int,
    factor: int = 4,
    dtype: str = "bfloat16",
    allow_upscale: bool = False,
) -> Plan:
    """Plan one packed forward.

    Args:
        images: Sizes such as ``"1080x1920"`` (height x width) or image files.
        architecture: The encoder.
        max_img_size: Limit of the longer side in pixels.
        factor: The projector's pixel-shuffle factor: sides become multiples of patch size *
            factor. 1 is the encoder alone, whose images need whole patches only.
        dtype: Of weights and activations, one of :data:`hrvlm.machine.DTYPE_BYTES`.
        allow_upscale: Enlarge smaller images to `max_img_size`.

    Raises:
        ValueError: a size can't be read, a file is no image, or an option is out of range.
        OSError: a file can't be opened.
    """
    check_dtype(dtype, tuple(DTYPE_BYTES))
    planned = []
    for text in images:
        height, width = size_of(text)
        geometry = token_grid(
            height,
            width,
            max_img_size=max_img_size,
            patch_size=architecture.patch_size,
            factor=factor,
            allow_upscale=allow_upscale,
        )
        cost = forward_cost(architecture, geometry.num_patches)
        planned.append(PlannedImage(text, height, width, geometry, cost))
    return Plan(architecture, dtype, factor, tuple(planned))


def forward_cost(architecture: Architecture, num_patches: int) -> Cost:
    """FLOPs of one image of `num_patches` patches in a forward (formulas: top of this file)."""
    c, m, layers = architecture.hidden_size, architecture.mlp_size, architecture.num_layers
    tokens = num_patches + architecture.num_prefix_tokens
    matrices = 3 if architecture.gated_mlp else 2
    embed = 2 * num_patches * architecture.patch_values * c
    block = 2 * tokens * c * 4 * c + 2 * matrices * tokens * c * m
    return Cost(embed + layers * block, layers * 4 * c * tokens * tokens)


def size_of(text: str) -> tuple[int, int]:
    """Height and width of ``"HEIGHTxWIDTH"``, or of an image file, upright.

    Raises:
        ValueError: neither a size of at least 1x1 nor an image.
        OSError: the file can't be opened.
    """
    match = _SIZE.fullmatch(text.strip())
    if match:
        height, width = int(match[1]), int(match[2])
        if not height or not width:
            raise ValueError(f"{text!r}: both sides must be at least 1 pixel")
        return height, width
    if not Path(text).exists():
        raise ValueError(f"{text!r} is neither HEIGHTxWIDTH (such as 1080x1920) nor a file")
    from ..images.intake import load_image

    image = load_image(text)
    return image.height, image.width


def named_architecture(name: str, patch_size: int | None = None) -> Architecture:
    """The sizes of a model of the DINOv3 family, e.g. ``vitb16``.

    Args:
        name: A key of :data:`hrvlm.checkpoints.family.CONFIGS`.
        patch_size: Another side of a patch than the model's own.

    Raises:
        ValueError: no such model, or a patch size below 1.
    """
    from ..checkpoints.family import CONFIGS

    if name not in CONFIGS:
        raise ValueError(f"model must be one of {', '.join(CONFIGS)}; got {name!r}")
    # Not by way of DINOv3ViTConfig, whose import takes seconds: its defaults are written out here.
    sizes = {"query_bias": True, "value_bias": True, "use_gated_mlp": False} | dict(CONFIGS[name])
    return Architecture(
        name=name,
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        mlp_size=sizes["intermediate_size"],
        gated_mlp=sizes["use_gated_mlp"],
        patch_size=positive_int(
            "patch_size", sizes["patch_size"] if patch_size is None else patch_size
        ),
        num_prefix_tokens=1 + sizes["num_register_tokens"],
        qkv_biases=sizes["query_bias"] + sizes["value_bias"],
        proj_bias=True,
        mlp_bias=True,
    )
