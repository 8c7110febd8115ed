"""Key names of DINOv3 ViT checkpoints, and how a checkpoint's layout is recognised by them.

Canonical names are those of transformers' files. The names of Meta's follow dinov3's
``models/vision_transformer.py``, ``layers/attention.py`` and ``layers/ffn_layers.py``; timm's
follow ``timm/models/eva.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, get_args

Layout = Literal["transformers", "transformers_memory", "fused", "meta", "timm"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

# Canonical module or tensor: its name in (Meta's, timm's) layout; None where that layout has no
# such thing.
OUTER = {
    "embeddings.cls_token": ("cls_token", "cls_token"),
    "embeddings.mask_token": ("mask_token", None),
    "embeddings.register_tokens": ("storage_tokens", "reg_token"),
    "embeddings.patch_embeddings": ("patch_embed.proj", "patch_embed.proj"),
    "norm": ("norm", "norm"),
}
BLOCK = {
    "norm1": ("norm1", "norm1"),
    "attention.o_proj": ("attn.proj", "attn.proj"),
    "layer_scale1.lambda1": ("ls1.gamma", "gamma_1"),
    "norm2": ("norm2", "norm2"),
    "layer_scale2.lambda1": ("ls2.gamma", "gamma_2"),
}
MLP = {
    "mlp.up_proj": ("mlp.fc1", "mlp.fc1"),
    "mlp.down_proj": ("mlp.fc2", "mlp.fc2"),
}
GATED_MLP = {
    "mlp.gate_proj": ("mlp.w1", "mlp.fc1_g"),
    "mlp.up_proj": ("mlp.w2", "mlp.fc1_x"),
    "mlp.down_proj": ("mlp.w3", "mlp.fc2"),
}
# timm's unfused variant (qkv_fused=False): only read, never written.
_TIMM_UNFUSED = {f"attn.{n}_proj": f"attention.{n}_proj" for n in "qkv"}

_COLUMN: dict[Layout, int] = {"meta": 0, "timm": 1}
_ANCHORS = ("embeddings.patch_embeddings.weight", "patch_embed.proj.weight")
_MARKERS: dict[Layout, str] = {
    "meta": r"storage_tokens$|rope_embed\.periods$|blocks\.\d+\.(ls[12]\.gamma$|mlp\.w[123]\.)",
    "timm": r"reg_token$|blocks\.\d+\.(gamma_[12]$|mlp\.fc1_[gx]\.|attn\.[qv]_bias$)",
}
_LAYER_KEY = re.compile(r"(?:blocks|layer|model\.layer)\.(\d+)\.(.+)")
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped(key: str) -> str:
    """`key` without the names that torch.compile, FSDP1 and checkpoint wrappers put into it."""
    return _WRAPPERS.sub("", key)


def split_layer(key: str) -> tuple[int | None, str]:
    """(Layer index, rest of the key), or (None, key) outside the layers, in any layout."""
    match = _LAYER_KEY.fullmatch(key)
    return (int(match[1]), match[2]) if match else (None, key)


def find_prefix(keys: Iterable[str]) -> str:
    """What precedes the encoder's own keys: the prefix of its patch embedding.

    A DINO training state holds a student and its averaged teacher: the teacher is taken, as for
    Meta's evaluation.

    Raises:
        ValueError: no patch embedding of a DINOv3 ViT, or several encoders.
    """
    ends = tuple((key, anchor) for key in keys for anchor in _ANCHORS)
    prefixes = sorted(
        {
            key.removesuffix(anchor)
            for key, anchor in ends
            if key == anchor or key.endswith(f".{anchor}")
        }
    )
    if len(prefixes) > 1:
        teachers = [prefix for prefix in prefixes if "teacher" in prefix.split(".")]
        prefixes = teachers if len(teachers) == 1 else prefixes
    if not prefixes:
        raise ValueError(
            "not the checkpoint of a DINOv3 ViT: no key ends in "
            + " or ".join(_ANCHORS)
            + " (its patch embedding)"
        )
    if len(prefixes) > 1:
        names = ", ".join(map(repr, prefixes))
        raise ValueError(f"several encoders, under the prefixes {names}: pass the keys of one")
    return prefixes[0]


def layout_of(keys: Iterable[str]) -> Layout:
    """The layout of keys that have no prefix and no wrappers.

    Raises:
        ValueError: the keys fit none, or Meta's and timm's equally.
    """
    keys = list(keys)
    if any(key == _ANCHORS[0] for key in keys):
        if any(re.search(r"layer\.\d+\.attention\.qkv\.weight$", key) for key in keys):
            return "fused"
        return (
            "transformers_memory"
            if any(key.startswith("model.layer.") for key in keys)
            else "transformers"
        )
    found: list[Layout] = [
        layout for layout, marker in _MARKERS.items() if any(re.match(marker, key) for key in keys)
    ]
    if len(found) != 1:
        what = "keys of both" if found else "none of the keys of either"
        raise ValueError(
            f"layout: {what} Meta's (storage_tokens, blocks.N.ls1.gamma) and timm's (reg_token, "
            "blocks.N.gamma_1)"
        )
    return found[0]


def canonical_name(rest: str, layout: Layout) -> str:
    """Canonical name of a key without its layer index; unknown names come back as they are."""
    if layout not in _COLUMN:
        return rest
    return _renamed(rest, _READ[layout])


def own_name(rest: str, layout: Layout, *, gated: bool) -> str | None:
    """Meta's or timm's name of a canonical one; None where the layout has no such tensor."""
    column = _COLUMN[layout]
    table = OUTER | BLOCK | (GATED_MLP if gated else MLP)
    module, _, leaf = rest.rpartition(".")
    if rest in table:
        return table[rest][column]
    return f"{table[module][column]}.{leaf}"


def _reading_table(layout: Layout) -> dict[str, str]:
    pairs = [*OUTER.items(), *BLOCK.items(), *MLP.items(), *GATED_MLP.items()]
    table = {
        own: canonical for canonical, names in pairs if (own := names[_COLUMN[layout]]) is not None
    }
    return table | (_TIMM_UNFUSED if layout == "timm" else {})


def _renamed(rest: str, table: dict[str, str]) -> str:
    if rest in table:
        return table[rest]
    module, _, leaf = rest.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else rest


_READ: dict[Layout, dict[str, str]] = {layout: _reading_table(layout) for layout in _COLUMN}
