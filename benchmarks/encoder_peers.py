"""Other ways to encode images with DINOv3's weights: a function per peer.

All share one set of random weights. Each takes :class:`~benchmarks.encoder_models.Models` and patch
grids and returns the module with a function that gives the features of all tokens, packed
``[T, C]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hrvlm
from benchmarks import attention_peers
from benchmarks.case import Outputs, Run, Unavailable
from benchmarks.encoder_models import Grids, Models
from hrvlm.encoder import layers
from hrvlm.images.patches import pack_images, patchify
from hrvlm_kernels import PackedGrids, reference, rope_2d, varlen_attention

# Its name in transformers and hrvlm, and in timm.
_PATCH_WEIGHT = re.compile(r"patch_embed(dings|\.proj)\.weight$")


class Encode(NamedTuple):
    """A way to encode a set of images.

    Attributes:
        module: Whose parameters are trained.
        features: Computes the features of all tokens ``[T, C]``.
    """

    module: nn.Module
    features: Callable[[], Tensor]


MakeEncode = Callable[[Models, Grids], Encode]


def one_batch(
    model: nn.Module, models: Models, grids: Grids, *, compiled: bool = False, mode: str = "default"
) -> Encode:
    """`model` on images of one size, as a batch; `compiled` for this one shape."""
    batch = torch.stack(models.images(grids))
    run = torch.compile(model, mode=mode, dynamic=False) if compiled else model
    return Encode(model, lambda: run(batch).last_hidden_state.flatten(0, 1))


def timm_batch(models: Models, grids: Grids, *, compiled: bool = False) -> Encode:
    """The model of timm, whose features are a tensor."""
    batch = torch.stack(models.images(grids))
    model: Any = models.timm
    run = model.forward_features
    if compiled:
        run = torch.compile(run, dynamic=False)
    return Encode(model, lambda: run(batch).flatten(0, 1))


def by_block(models: Models) -> nn.Module:
    """The model of transformers with each block compiled by itself, once for any size.

    The whole model compiled takes minutes on a CPU, for each size.
    """
    model: Any = models.twin("sdpa")
    for block in model.model.layer:
        block.compile(dynamic=True)
    return model


def accelerated(models: Models, grids: Grids) -> Encode:
    """The model of transformers with hrvlm.accelerate."""
    model = models.twin("sdpa")
    hrvlm.accelerate(model, backend=models.backend)
    return one_batch(model, models, grids)


def ours_compiled(models: Models, grids: Grids) -> Encode:
    """Our encoder under torch.compile, on packed patches and a layout made beforehand."""
    ours = models.ours
    batch = torch.stack(models.images(grids))
    packed = PackedGrids.from_grids(
        grids, num_prefix_tokens=ours.num_prefix_tokens, device=models.device
    )
    run = torch.compile(ours, dynamic=False)

    def features() -> Tensor:
        patches = patchify(batch, ours.patch_size).flatten(0, 1)
        return run(patches, grids=packed).packed_last_hidden_state

    return Encode(ours, features)


def flash_only(models: Models, grids: Grids, *, compiled: bool = False) -> Encode:
    """The model of transformers with torch's flash kernel, where it would take cuDNN's.

    A module of its own: torch.compile keeps what it made for another one's attention.
    """
    encode = one_batch(models.twin("sdpa"), models, grids, compiled=compiled)

    def features() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return encode.features()

    return Encode(encode.module, features)


UNIFORM: dict[str, MakeEncode] = {
    "transformers, sdpa": lambda m, g: one_batch(m.sdpa, m, g),
    "transformers, sdpa flash": flash_only,
    "transformers, sdpa flash + compile": lambda m, g: flash_only(m, g, compiled=True),
    "transformers, eager": lambda m, g: one_batch(m.twin("eager"), m, g),
    "transformers, sdpa + compile": lambda m, g: one_batch(m.sdpa, m, g, compiled=True),
    "timm": timm_batch,
    "timm + compile": lambda m, g: timm_batch(m, g, compiled=True),
    "transformers + hrvlm.accelerate": accelerated,
    "hrvlm + compile": ours_compiled,
    "hrvlm, packed from a list": lambda m, g: pack(m, g),
}


def ours_graphed(models: Models, grids: Grids) -> Encode:
    """Our encoder replayed from a CUDA graph; forward only."""
    if models.device.type != "cuda":
        raise Unavailable(f"CUDA graphs need a GPU, not {models.device.type!r}")
    ours, p = models.ours, models.ours.patch_size
    batch = torch.stack(models.images(grids))
    graphed = ours.graphed([[(hp * p, wp * p) for hp, wp in grids]])
    return Encode(ours, lambda: graphed(batch).last_hidden_state.flatten(0, 1))


LATENCY: dict[str, MakeEncode] = {
    "transformers, sdpa": UNIFORM["transformers, sdpa"],
    "transformers, sdpa + compile": UNIFORM["transformers, sdpa + compile"],
    "transformers, sdpa + compile reduce-overhead": lambda m, g: one_batch(
        m.sdpa, m, g, compiled=True, mode="reduce-overhead"
    ),
    "hrvlm.graphed": ours_graphed,
}
MAX_AUTOTUNE: dict[str, MakeEncode] = {
    "transformers, sdpa + compile max-autotune": lambda m, g: one_batch(
        m.sdpa, m, g, compiled=True, mode="max-autotune"
    ),
}


POOLED = ("hrvlm.graphed", "reduce-overhead", "max-autotune")  # CUDA graphs have their own memory


def pack(models: Models, grids: Grids) -> Encode:
    """Ours: a list of images of any sizes in one pass."""
    images, ours = models.images(grids), models.ours
    return Encode(ours, lambda: ours(images).packed_last_hidden_state)


def one_by_one(
    models: Models, grids: Grids, *, model: nn.Module | None = None, compiled: bool = False
) -> Encode:
    """transformers, an image at a time; `compiled` for all sizes at once."""
    images, model = models.images(grids), model or models.sdpa
    run = torch.compile(model, dynamic=True) if compiled else model
    return Encode(model, lambda: torch.cat([run(x[None]).last_hidden_state[0] for x in images]))


def timm_one_by_one(models: Models, grids: Grids) -> Encode:
    """The model of timm, an image at a time."""
    images, model = models.images(grids), models.timm
    encode: Any = model.forward_features
    return Encode(model, lambda: torch.cat([encode(x[None])[0] for x in images]))


def grouped(models: Models, grids: Grids) -> Encode:
    """transformers, a batch for each size that occurs; the batches are stacked beforehand."""
    images, model = models.images(grids), models.sdpa
    members: dict[tuple[int, int], list[int]] = {}
    for i, grid in enumerate(grids):
        members.setdefault(grid, []).append(i)
    batches = [torch.stack([images[i] for i in group]) for group in members.values()]
    order = [i for group in members.values() for i in group]
    place = {i: position for position, i in enumerate(order)}

    def forward() -> Tensor:
        parts = [part for x in batches for part in model(x).last_hidden_state.unbind()]
        return torch.cat([parts[place[i]] for i in range(len(grids))])

    return Encode(model, forward)


def padded(models: Models, grids: Grids, *, compiled: bool = False) -> Encode:
    """The blocks of transformers on a batch padded to the longest image, with a mask.

    Its model takes no mask with pixels, so the embedding is done on packed patches and the tokens
    are laid out with padding after each image. Each image has its own cos and sin. `compiled` are
    the blocks, where the time goes.
    """
    model, prefix = models.sdpa, 1 + models.config.num_register_tokens
    images = models.images(grids)
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=prefix, device=models.device)
    longest = -(-packed.max_seqlen // 16) * 16  # the kernels that take masks want aligned rows
    lengths = torch.tensor(packed.lengths, device=models.device)
    valid = torch.arange(longest, device=models.device) < lengths[:, None]  # [B, longest]
    rows = valid.flatten().nonzero()[:, 0]
    angles = reference.rope_angles(packed.coords, model.rope_embeddings.inv_freq).tile(2)
    laid_out = angles.new_zeros(valid.numel(), angles.shape[1]).index_copy(0, rows, angles)
    # Prefix tokens have none there: their rows are cut off.
    laid_out = laid_out.unflatten(0, valid.shape)[:, None, prefix:]
    positions = laid_out.cos().to(models.dtype), laid_out.sin().to(models.dtype)
    mask = valid[:, None, None, :]
    starts = torch.arange(len(packed), device=models.device)[:, None] * longest
    prefix_rows = (starts + torch.arange(prefix, device=models.device)).flatten()
    patch_rows = rows[packed.patch_rows().long()]
    embeddings = model.embeddings
    project = embeddings.patch_embeddings
    blocks = torch.compile(model.model, dynamic=False) if compiled else model.model

    def forward() -> Tensor:
        patches, _ = pack_images(images, models.config.patch_size)
        tokens = F.linear(patches, project.weight.flatten(1), project.bias)
        first = torch.cat((embeddings.cls_token[0], embeddings.register_tokens[0]))
        x = tokens.new_zeros(valid.numel(), tokens.shape[1])
        x = x.index_copy(0, patch_rows, tokens)
        x = x.index_copy(0, prefix_rows, first.repeat(len(packed), 1)).unflatten(0, valid.shape)
        x = blocks(x, positions, attention_mask=mask).last_hidden_state
        return model.norm(x).flatten(0, 1)[rows]

    return Encode(model, forward)


def with_attention(make: Callable[[PackedGrids], attention_peers.Attention]) -> MakeEncode:
    """Our encoder with an attention of others in place of ours, and our RoPE before it."""

    def build(models: Models, grids: Grids) -> Encode:
        images, ours = models.images(grids), models.ours
        prefix = 1 + models.config.num_register_tokens
        packed = PackedGrids.from_grids(grids, num_prefix_tokens=prefix, device=models.device)
        attend = make(packed)

        def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, rope: Any, **__: Any) -> Tensor:
            return attend(*rope_2d(q, k, *rope), v)

        def forward() -> Tensor:
            layers.varlen_attention = attention  # type: ignore[assignment]
            try:
                return ours(images).packed_last_hidden_state
            finally:
                layers.varlen_attention = varlen_attention

        return Encode(ours, forward)

    return build


def per_segment_sdpa(models: Models, grids: Grids) -> Encode:
    """Our encoder with a call of scaled_dot_product_attention for each image."""
    images, ours = models.images(grids), models.ours

    def forward() -> Tensor:
        chosen, ours.backend = ours.backend, "sdpa"
        try:
            return ours(images).packed_last_hidden_state
        finally:
            ours.backend = chosen

    return Encode(ours, forward)


MIXED: dict[str, MakeEncode] = {
    "transformers, one by one": one_by_one,
    "transformers, grouped by size": grouped,
    "transformers, padded with a mask": padded,
    "transformers, one by one + compile": lambda m, g: one_by_one(m, g, compiled=True),
    "transformers, padded + compile": lambda m, g: padded(m, g, compiled=True),
    "hrvlm with torch varlen_attn": with_attention(attention_peers.torch_varlen),
    "hrvlm with flash-attn": with_attention(attention_peers.flash_attn_2),
    "hrvlm with flash-attn-4": with_attention(attention_peers.flash_attn_4),
    "hrvlm with FlexAttention": with_attention(attention_peers.flex_attention),
    "hrvlm with SDPA, image by image": per_segment_sdpa,
}


# On a CPU, where compiling by the block has to do.
CPU_UNIFORM: dict[str, MakeEncode] = {
    "transformers, sdpa": UNIFORM["transformers, sdpa"],
    "transformers, eager": UNIFORM["transformers, eager"],
    "transformers, sdpa + compile by block": lambda m, g: one_batch(by_block(m), m, g),
    "timm": timm_batch,
}
CPU_MIXED: dict[str, MakeEncode] = {
    "transformers, one by one": one_by_one,
    "transformers, eager, one by one": lambda m, g: one_by_one(m, g, model=m.twin("eager")),
    "transformers, one by one + compile by block": lambda m, g: one_by_one(m, g, model=by_block(m)),
    "timm, one by one": timm_one_by_one,
}


def attention_alone(models: Models, grids: Grids) -> Run:
    """The attention of all layers and nothing else, RoPE included, on random q, k and v."""
    config = models.config
    prefix, heads = 1 + config.num_register_tokens, config.num_attention_heads
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=prefix, device=models.device)
    shape = packed.total_tokens, 3, heads, config.hidden_size // heads
    q, k, v = torch.randn(shape, device=models.device, dtype=models.dtype).unbind(1)
    inv_freq = models.sdpa.rope_embeddings.inv_freq
    rope = packed.coords, inv_freq

    def forward() -> Outputs:
        with torch.no_grad():
            for _ in range(config.num_hidden_layers):
                out = varlen_attention(q, k, v, packed, rope=rope, backend=models.backend)
        return [out]

    return forward


def products_alone(models: Models, grids: Grids) -> Run:
    """The matrix products of all layers and nothing else."""
    ours = models.ours
    prefix = 1 + models.config.num_register_tokens
    tokens = sum(prefix + hp * wp for hp, wp in grids)
    products = [
        (module, torch.randn(tokens, module.in_features, device=models.device, dtype=models.dtype))
        for module in ours.layer[0].modules()
        if isinstance(module, nn.Linear)
    ]

    def forward() -> Outputs:
        with torch.no_grad():
            for _ in range(models.config.num_hidden_layers):
                out = [module(x) for module, x in products]
        return out[:1]

    return forward


def inference(encode: Encode) -> Run:
    """The forward, without gradients."""

    def run() -> Outputs:
        with torch.no_grad():
            return [encode.features()]

    return run


def training(encode: Encode) -> Run:
    """A forward and a backward from a random gradient of the features, as one step.

    In eval mode: transformers' model would draw random RoPE scales otherwise. The result is the
    features and the gradient of the patch embedding's weight.
    """
    module = encode.module
    weight = next(p for name, p in module.named_parameters() if _PATCH_WEIGHT.search(name))
    generator = torch.Generator(weight.device).manual_seed(2)
    cotangent: list[Tensor] = []

    def run() -> Outputs:
        features = encode.features()
        if not cotangent:
            noise = torch.randn(features.shape, generator=generator, device=weight.device)
            cotangent.append(noise.to(features.dtype))
        features.backward(cotangent[0])
        grad = weight.grad
        if grad is None:
            raise RuntimeError("the patch embedding got no gradient")
        # What the next round finds allocated would be missing in its peak.
        for parameter in module.parameters():
            parameter.grad = None
        return [features.detach(), grad]

    return run
