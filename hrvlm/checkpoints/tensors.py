"""Moves the tensors of a checkpoint to canonical keys and back; see `convert.py`.

Canonical keys are those of transformers' files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dinov2
from .architecture import architecture, expected_shapes
from .differences import compare, group_keys
from .files import flatten_tensors
from .keys import (
    LAYOUTS,
    Family,
    Layout,
    canonical_name,
    family_of,
    find_prefix,
    layout_of,
    own_name,
    split_layer,
    unwrapped,
)

# Recomputed (RoPE), used in training alone, or a head on top of the encoder.
_LEFT_OUT = re.compile(r"(rope_embed|rope_embeddings|rope|local_cls_norm|projectors|head)\.")
_QKV_KEY = re.compile(
    r"(?:attn|attention)\.(?:qkv\.(weight|bias)|(?:qkv(?:_bias)?\.)?([qkv])_bias)"
)


_JOINED = ("meta", "timm")  # q, k and v in one


@dataclass(frozen=True)
class CheckpointInfo:
    """What was found in a checkpoint, and what became of it.

    Attributes:
        layout: One of ``transformers``, ``transformers_memory``, ``fused``, ``meta``, ``timm``.
        prefix: What preceded the encoder's keys.
        left_out: Keys that were not carried over: RoPE buffers, masks, training-only norms, heads,
            other modules.
        added: Canonical keys that the layout lacks and which were made (timm has no mask token:
            zeros).
    """

    layout: Layout
    prefix: str
    left_out: tuple[str, ...]
    added: tuple[str, ...]

    def __str__(self) -> str:
        """A line for people."""
        line = f"{self.layout} layout" + (f" under {self.prefix!r}" if self.prefix else "")
        for title, keys in (("left out", self.left_out), ("added", self.added)):
            line += f"; {title}: {', '.join(group_keys(keys))}" if keys else ""
        return line


@dataclass(frozen=True)
class Reading:
    """A checkpoint under canonical keys, and Meta's RoPE periods where it had them."""

    family: Family
    tensors: dict[str, Tensor]
    periods: Tensor | None
    info: CheckpointInfo


def check_layout(layout: str) -> None:
    """Raise ValueError unless `layout` is the name of one."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")


def read(
    state_dict: Mapping[str, Any], layout: Layout | None = None, *, strict: bool = True
) -> Reading:
    """The encoder in `state_dict`, complete if `strict`, under canonical keys.

    Raises:
        ValueError: the layout is unknown, keys are missing, unexpected, of the wrong shape or no
            strings, a weight is no floating-point tensor, or CLS has a norm of its own.
    """
    if layout is not None:
        check_layout(layout)
    tensors = {unwrapped(key): tensor for key, tensor in flatten_tensors(state_dict).items()}
    prefix = find_prefix(tensors)
    inner = {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }
    family, found = family_of(inner), layout or layout_of(inner)
    _check_cls_norm(inner)
    canonical = _canonical(inner, found, family)
    if family == "dinov3" and found in ("meta", "timm"):
        _settle_key_bias(
            canonical, {split_layer(key)[0] for key in inner if key.endswith(".bias_mask")}
        )
    if family == "dinov2" or found == "timm":
        _unpack_gated_mlp(canonical)
    added = _add_absent(canonical, found, family)
    _check_dtypes(canonical)
    differences = compare(canonical, expected_shapes(architecture(canonical)))
    if strict and differences:
        raise ValueError(
            f"checkpoint in the {found} layout, under transformers' keys:\n{differences}"
        )
    left_out = tuple(
        key
        for key in tensors
        if not key.startswith(prefix) or _is_left_out(key.removeprefix(prefix))
    )
    info = CheckpointInfo(found, prefix, left_out, added)
    return Reading(family, canonical, inner.get("rope_embed.periods"), info)


def write(canonical: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Complete canonical weights under the keys of `layout`, without Meta's RoPE periods.

    Raises:
        ValueError: the layout can't express the biases of q, k and v.
    """
    family = family_of(canonical)
    if family == "dinov3" and layout == "transformers":
        return dict(canonical)
    if family == "dinov3" and layout == "transformers_memory":
        return {
            f"model.{key}" if key.startswith("layer.") else key: tensor
            for key, tensor in canonical.items()
        }
    if family == "dinov2" and layout != "fused":
        joined: dict[str, Tensor] = {}
        for i in range(architecture(canonical).num_hidden_layers if layout in _JOINED else 0):
            own = _joined_qkv(canonical, f"layer.{i}.", "meta")
            joined |= {f"blocks.{i}.{name}": tensor for name, tensor in own.items()}
        return dinov2.write(canonical, layout, joined)
    gated = "layer.0.mlp.gate_proj.weight" in canonical
    out: dict[str, Tensor] = {}
    for key, tensor in canonical.items():
        index, rest = split_layer(key)
        if rest == "attention.q_proj.weight":
            head = f"layer.{index}." if layout == "fused" else f"blocks.{index}."
            out |= {
                head + name: joined
                for name, joined in _joined_qkv(canonical, f"layer.{index}.", layout).items()
            }
        elif rest.startswith(("attention.q_proj.", "attention.k_proj.", "attention.v_proj.")):
            continue
        elif layout == "fused":
            out[key] = tensor
        elif tensor.numel() and (name := own_name(rest, layout, gated=gated)) is not None:
            out[name if index is None else f"blocks.{index}.{name}"] = tensor
    if layout == "meta":
        out["mask_token"] = out["mask_token"].flatten(0, 1)
    return out


def _is_left_out(key: str) -> bool:
    return bool(_LEFT_OUT.match(key)) or key.startswith("cls_norm.") or key.endswith(".bias_mask")


def _check_dtypes(canonical: Mapping[str, Tensor]) -> None:
    for key, tensor in canonical.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{key}: expected a floating-point tensor, got {tensor.dtype}")


def _check_cls_norm(inner: Mapping[str, Tensor]) -> None:
    for leaf in ("weight", "bias"):
        own = inner.get(f"cls_norm.{leaf}")
        if own is not None and not torch.equal(own, inner.get(f"norm.{leaf}", own.new_empty(0))):
            raise ValueError(
                f"cls_norm.{leaf} differs from norm.{leaf}: CLS and registers have a norm of their "
                "own (untie_cls_and_patch_norms), which transformers' DINOv3 can't express"
            )


def _canonical(inner: Mapping[str, Tensor], layout: Layout, family: Family) -> dict[str, Tensor]:
    canonical: dict[str, Tensor] = {}
    for key, tensor in inner.items():
        if _is_left_out(key):
            continue
        index, rest = split_layer(key)
        head = "" if index is None else f"layer.{index}."
        if index is not None and (match := _QKV_KEY.fullmatch(rest)):
            canonical |= {
                f"{head}attention.{name}": part for name, part in _split_qkv(match, tensor)
            }
        else:
            canonical[head + canonical_name(rest, layout, family)] = tensor
    return canonical


def _split_qkv(match: re.Match[str], tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    leaf, name = match.groups()
    if name is not None:
        yield f"{name}_proj.bias", tensor
        return
    if not tensor.ndim or tensor.shape[0] % 3:
        raise ValueError(
            f"{match.string}: the rows of {[*tensor.shape]} are not q, k and v of equal size"
        )
    for name, part in zip("qkv", tensor.chunk(3), strict=True):
        yield f"{name}_proj.{leaf}", part


def _settle_key_bias(canonical: dict[str, Tensor], masked: set[int | None]) -> None:
    """Drop the bias of k if it counts for nothing in all layers (masked, zero or NaN)."""
    found = {
        key: tensor for key, tensor in canonical.items() if key.endswith("attention.k_proj.bias")
    }
    kept = {}
    for key, tensor in found.items():
        ignored = split_layer(key)[0] in masked
        kept[key] = torch.zeros_like(tensor) if ignored else tensor.where(~tensor.isnan(), 0)
    if any(tensor.any() for tensor in kept.values()):
        canonical |= kept
    else:
        for key in found:
            del canonical[key]


def _unpack_gated_mlp(canonical: dict[str, Tensor]) -> None:
    """Split gate and up where they are one matrix, the gate's rows first.

    So timm's GluMlp has them (``fc1``, ``gate_last=False``), and DINOv2 in all layouts.
    """
    for key in [key for key in canonical if key.endswith("mlp.up_proj.weight")]:
        head = key.removesuffix("up_proj.weight")
        down = canonical.get(f"{head}down_proj.weight")
        up = canonical[key]
        if down is None or not up.ndim or down.ndim < 2 or up.shape[0] != 2 * down.shape[1]:
            continue
        for leaf in ("weight", "bias"):
            if f"{head}up_proj.{leaf}" in canonical:
                gate, up = canonical[f"{head}up_proj.{leaf}"].chunk(2)
                canonical |= {f"{head}gate_proj.{leaf}": gate, f"{head}up_proj.{leaf}": up}


def _add_absent(canonical: dict[str, Tensor], layout: Layout, family: Family) -> tuple[str, ...]:
    """What transformers' model has as a tensor and other layouts may leave away."""
    mask = "embeddings.mask_token"
    weight = canonical["embeddings.patch_embeddings.weight"]
    width = weight.shape[0] if weight.ndim else 0  # which is another shape
    added = {}
    if family == "dinov2":
        if layout == "timm":
            dinov2.position_of_cls(canonical)
            added[mask] = weight.new_zeros(1, weight.shape[0])
        canonical |= added
        return tuple(added)
    if layout in ("meta", "timm") and "embeddings.register_tokens" not in canonical:
        added["embeddings.register_tokens"] = weight.new_empty(1, 0, width)
    if layout == "timm" and mask not in canonical:
        added[mask] = weight.new_zeros(1, 1, width)
    if layout == "meta" and mask in canonical and canonical[mask].ndim == 2:
        canonical[mask] = canonical[mask][:, None]
    canonical |= added
    return tuple(added)


def _joined_qkv(canonical: Mapping[str, Tensor], head: str, layout: Layout) -> dict[str, Tensor]:
    """The q, k and v projections of one layer, as `layout` has them."""
    weight = torch.cat([canonical[f"{head}attention.{n}_proj.weight"] for n in "qkv"])
    bias = {
        n: b for n in "qkv" if (b := canonical.get(f"{head}attention.{n}_proj.bias")) is not None
    }
    if layout == "fused":
        return {"attention.qkv.weight": weight} | {
            f"attention.qkv_bias.{n}_bias": b for n, b in bias.items()
        }
    allowed: tuple[set[str], ...] = (set(), {"q", "v"}) + (
        ({"q", "k", "v"},) if layout == "meta" else ()
    )
    if set(bias) not in allowed:
        raise ValueError(
            f"layout {layout!r} can't express a model with biases of {' and '.join(bias)} only"
        )
    joined = {"attn.qkv.weight": weight}
    if layout == "timm":
        return joined | {f"attn.{n}_bias": b for n, b in bias.items()}
    if bias:
        zeros = torch.zeros_like(bias["q"])
        joined["attn.qkv.bias"] = torch.cat([bias["q"], bias.get("k", zeros), bias["v"]])
    if bias and "k" not in bias:
        joined["attn.qkv.bias_mask"] = torch.cat([zeros + 1, zeros, zeros + 1])
    return joined
