"""Key names of DINOv3 and DINOv2 checkpoints, and how a layout is recognised by them.

Canonical names are those of transformers' files of DINOv3, for DINOv2 too. The names of Meta's
follow dinov3's ``models/vision_transformer.py``, ``layers/attention.py`` and
``layers/ffn_layers.py``, and their counterparts in dinov2; timm's follow ``timm/models/eva.py`` and
``vision_transformer.py``; the last are those of transformers' ``Dinov2Model``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

Layout = Literal["transformers", "transformers_memory", "fused", "meta", "timm"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Family = Literal["dinov3", "dinov2"]

# Canonical module or tensor: its name in (Meta's, timm's, transformers') layout; None where that
# layout has no such thing. transformers' own names for DINOv3 are the canonical ones.
Names: TypeAlias = dict[str, tuple[str | None, str | None, str | None]]

_DINOV3: Names = {
    "embeddings.cls_token": ("cls_token", "cls_token", None),
    "embeddings.mask_token": ("mask_token", None, None),
    "embeddings.register_tokens": ("storage_tokens", "reg_token", None),
    "embeddings.patch_embeddings": ("patch_embed.proj", "patch_embed.proj", None),
    "norm": ("norm", "norm", None),
    "norm1": ("norm1", "norm1", None),
    "norm2": ("norm2", "norm2", None),
    "attention.o_proj": ("attn.proj", "attn.proj", None),
    "layer_scale1.lambda1": ("ls1.gamma", "gamma_1", None),
    "layer_scale2.lambda1": ("ls2.gamma", "gamma_2", None),
}
_DINOV2: Names = {
    "embeddings.cls_token": ("cls_token", "cls_token", "embeddings.cls_token"),
    "embeddings.mask_token": ("mask_token", None, "embeddings.mask_token"),
    "embeddings.register_tokens": ("register_tokens", "reg_token", "embeddings.register_tokens"),
    "embeddings.position_embeddings": (
        "pos_embed",
        "pos_embed",
        "embeddings.position_embeddings",
    ),
    "embeddings.patch_embeddings": (
        "patch_embed.proj",
        "patch_embed.proj",
        "embeddings.patch_embeddings.projection",
    ),
    "norm": ("norm", "norm", "layernorm"),
    "norm1": ("norm1", "norm1", "norm1"),
    "norm2": ("norm2", "norm2", "norm2"),
    "attention.q_proj": (None, None, "attention.attention.query"),
    "attention.k_proj": (None, None, "attention.attention.key"),
    "attention.v_proj": (None, None, "attention.attention.value"),
    "attention.o_proj": ("attn.proj", "attn.proj", "attention.output.dense"),
    "layer_scale1.lambda1": ("ls1.gamma", "ls1.gamma", "layer_scale1.lambda1"),
    "layer_scale2.lambda1": ("ls2.gamma", "ls2.gamma", "layer_scale2.lambda1"),
}
_MLP: dict[Family, Names] = {
    "dinov3": {
        "mlp.up_proj": ("mlp.fc1", "mlp.fc1", None),
        "mlp.down_proj": ("mlp.fc2", "mlp.fc2", None),
    },
    "dinov2": {
        "mlp.up_proj": ("mlp.fc1", "mlp.fc1", "mlp.fc1"),
        "mlp.down_proj": ("mlp.fc2", "mlp.fc2", "mlp.fc2"),
    },
}
GATE_AND_UP = "mlp.gate_and_up"  # one matrix in all layouts of DINOv2, the gate's rows first
_GATED_MLP: dict[Family, Names] = {
    "dinov3": {
        "mlp.gate_proj": ("mlp.w1", "mlp.fc1_g", None),
        "mlp.up_proj": ("mlp.w2", "mlp.fc1_x", None),
        "mlp.down_proj": ("mlp.w3", "mlp.fc2", None),
    },
    "dinov2": {
        GATE_AND_UP: ("mlp.w12", "mlp.fc1", "mlp.weights_in"),
        "mlp.down_proj": ("mlp.w3", "mlp.fc2", "mlp.weights_out"),
    },
}
NAMES: dict[Family, Names] = {"dinov3": _DINOV3, "dinov2": _DINOV2}
# timm's unfused variant (qkv_fused=False): only read, never written.
_TIMM_UNFUSED = {f"attn.{n}_proj": f"attention.{n}_proj" for n in "qkv"}

_COLUMN: dict[Layout, int] = {"meta": 0, "timm": 1, "transformers": 2}
_ANCHORS = (
    "embeddings.patch_embeddings.weight",
    "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.weight",
)
_POSITIONS = ("embeddings.position_embeddings", "pos_embed")
_MARKERS: dict[Layout, str] = {
    "meta": r"storage_tokens$|rope_embed\.periods$|blocks\.\d+\.(ls[12]\.gamma$|mlp\.w[123]\.)",
    "timm": r"reg_token$|blocks\.\d+\.(gamma_[12]$|mlp\.fc1_[gx]\.|attn\.[qv]_bias$)",
}
# Meta's training of DINOv2 divides the blocks into chunks, blocks.<chunk>.<block>.
_LAYER_KEY = re.compile(r"(?:blocks(?:\.\d+)?|(?:model\.|encoder\.)?layer)\.(\d+)\.(.+)")
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
        ValueError: no patch embedding of a DINO ViT, or several encoders.
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
            "not the checkpoint of a DINOv3 or DINOv2 ViT: no key ends in "
            + " or ".join(_ANCHORS)
            + " (its patch embedding)"
        )
    if len(prefixes) > 1:
        names = ", ".join(map(repr, prefixes))
        raise ValueError(f"several encoders, under the prefixes {names}: pass the keys of one")
    return prefixes[0]


def family_of(keys: Iterable[str]) -> Family:
    """Whose ViT it is, by keys that have no prefix and no wrappers."""
    return "dinov2" if any(key in _POSITIONS for key in keys) else "dinov3"


def layout_of(keys: Iterable[str]) -> Layout:
    """The layout of keys that have no prefix and no wrappers.

    Raises:
        ValueError: the keys fit none, or Meta's and timm's equally.
    """
    keys = list(keys)
    if any(key in _ANCHORS[:2] for key in keys):
        if any(re.fullmatch(r"layer\.\d+\.attention\.qkv\.weight", key) for key in keys):
            return "fused"
        in_memory = r"model\.layer\.|encoder\.layer\.\d+\.attention\.[qkvo]_proj\."
        return (
            "transformers_memory"
            if any(re.match(in_memory, key) for key in keys)
            else "transformers"
        )
    if family_of(keys) == "dinov2":
        theirs = r"mask_token$|register_tokens$|blocks\.(\d+\.)+mlp\.w12\."
        return "meta" if any(re.match(theirs, key) for key in keys) else "timm"
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


def canonical_name(rest: str, layout: Layout, family: Family = "dinov3") -> str:
    """Canonical name of a key without its layer index; unknown names come back as they are."""
    layout = "transformers" if layout == "transformers_memory" else layout
    return _renamed(rest, _READ.get((family, layout), {}))


def own_name(rest: str, layout: Layout, family: Family = "dinov3", *, gated: bool) -> str | None:
    """A layout's name of a canonical one; None where the layout has no such tensor."""
    column = _COLUMN[layout]
    table = NAMES[family] | (_GATED_MLP if gated else _MLP)[family]
    module, _, leaf = rest.rpartition(".")
    return table[rest][column] if rest in table else f"{table[module][column]}.{leaf}"


def canonical_keys_of_dinov2(key: str) -> tuple[str, ...]:
    """Of a key of transformers' DINOv2, in a file or in memory: two for gate and up in one."""
    index, rest = split_layer(key)
    head = "" if index is None else f"layer.{index}."
    if rest.startswith("mlp.weights_in."):
        leaf = rest.rpartition(".")[2]
        return f"{head}mlp.gate_proj.{leaf}", f"{head}mlp.up_proj.{leaf}"
    return (head + canonical_name(rest, "transformers", "dinov2"),)


def dinov2_key(rest: str) -> str:
    """Transformers' name of a canonical one outside the MLP; unknown ones come back as they are."""
    module, _, leaf = rest.rpartition(".")
    name = NAMES["dinov2"].get(module, (None, None, None))[2]
    return f"{name}.{leaf}" if name else rest


def _reading_table(family: Family, layout: Layout) -> dict[str, str]:
    column, pairs = _COLUMN[layout], (NAMES[family] | _MLP[family]).items()
    table = {own: canonical for canonical, names in pairs if (own := names[column]) is not None}
    for canonical, names in _GATED_MLP[family].items():
        if (own := names[column]) is not None:
            # Its halves are told apart by the number of rows, see tensors.py.
            table[own] = "mlp.up_proj" if canonical == GATE_AND_UP else canonical
    return table | (_TIMM_UNFUSED if layout == "timm" else {})


def _renamed(rest: str, table: dict[str, str]) -> str:
    if rest in table:
        return table[rest]
    module, _, leaf = rest.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else rest


_READ: dict[tuple[Family, Layout], dict[str, str]] = {
    (family, layout): _reading_table(family, layout)
    for family in get_args(Family)
    for layout in _COLUMN
    if (family, layout) != ("dinov3", "transformers")
}
