"""The configuration of the vision-language model: an encoder, a projector and a language model."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from os import PathLike
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from hrvlm_kernels.packed_tables import is_int

from ..checkpoints.damage import naming_damaged_files
from ..files import read_mapping
from ..images.geometry import positive_int, square_side, true_or_false
from ..images.processor import (
    IMAGENET,
    Normalization,
    check_normalization,
    known_normalization,
)
from .part_configs import (
    ENCODERS,
    LM_NAMES,
    OWN,
    VIT_NAMES,
    architecture_of,
    as_config,
    checked,
    names_with_one_value,
    text_from_names,
    vision_from_names,
)
from .tower_classes import merged_patches

_OWN_NAMES = (
    "image_token_id",
    "mp_pixel_shuffle_factor",
    "mp_handle_special_tokens",
    "mp_append_cls",
    "max_img_size",
    "allow_upscale",
    "vit_model_type",
    "lm_model_type",
    "lm_tokenizer",
    "lm_chat_template",
    "image_mean",
    "image_std",
    "vlm_extra_tokens",
)
_ALIASES = {"resize_to_max_side_len": "allow_upscale", "vit_num_registers": "vit_n_registers"}
_ONE_VALUE = {  # names whose only right value changes nothing, and why there is no other
    "mp_image_token_length": (
        1,
        "an image has no fixed number of tokens any more; the count follows its token grid, "
        "gh * gw (leave the name out, or set it to 1)",
    ),
    "vit_use_sincos_pos": (
        False,
        "no encoder here has a table of sines and cosines: dinov3 rotates q and k (vit_use_rope), "
        "siglip has learned positions (leave the name out, or set it to False)",
    ),
    "vit_cls_flag": (
        False,
        "the CLS token is never all that is left of an image; mp_append_cls hands it to the "
        "language model after its tokens (leave the name out, or set it to False)",
    ),
    "lm_use_tokens": (
        False,
        "a language model of transformers takes embeddings (leave the name out, or set it to "
        "False)",
    ),
    "lm_attn_scaling": (
        1.0,
        "a language model of transformers scales by its own config (leave the name out, or set it "
        "to 1.0)",
    ),
    "vlm_load_backbone_weights": (
        False,
        "VisionLanguageModel(config) is random, from_backbones pretrained (leave the name out, or "
        "set it to False)",
    ),
}
_GONE = {  # nanoVLM's names that have no place here, and what is instead
    "lm_base_vocab_size": "the whole vocabulary is lm_vocab_size; from_backbones enlarges it",
    "extra_token_amount": "the whole vocabulary is lm_vocab_size; from_backbones enlarges it",
    "lm_max_length": "rows of packed samples are data.sequence_packing of a training config",
    "vlm_checkpoint_path": "an argument of save_pretrained and from_pretrained",
    "hf_repo_name": "an argument of push_to_hub",
}
_OF_PARTS = {  # what from_backbones is not told, but finds
    "vision_config": "encoder",
    "text_config": "language model",
    "image_token_id": "tokenizer",
}
_OPTIONS = (
    *(name for name in _OWN_NAMES if name not in _OF_PARTS),
    "allow_fp16",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)
_NAMES = (
    "vit_architecture",
    *_ONE_VALUE,
    *VIT_NAMES,
    *LM_NAMES,
    *_OWN_NAMES,
    *_ALIASES,
)


@strict
class VLMConfig(PreTrainedConfig):
    """Sizes and options of a :class:`~hrvlm.vlm.vision_language_model.VisionLanguageModel`.

    Attributes:
        vision_config: Of the encoder: a ``DINOv3ViTConfig`` (whose ``use_rope=False`` switches the
            rotation off, whose ``backend`` chooses the kernels and whose ``allow_fp16`` lets it run
            in float16), a ``Dinov2Config`` or ``Dinov2WithRegistersConfig`` (``backend`` too), or
            that of a vision tower of transformers, as ``Siglip2VisionConfig``,
            ``PixtralVisionConfig`` or ``Qwen2_5_VLVisionConfig`` (``tower_classes.py`` says which).
        text_config: Of the language model: the config of any causal LM of transformers.
        image_token_id: The placeholder's id in the LM's vocabulary; needed to run with images.
        mp_pixel_shuffle_factor: s: s x s patches make one token.
        mp_handle_special_tokens: Whether the projector drops CLS and registers itself; else it is
            given patches only. What comes out is the same.
        mp_append_cls: Whether a separately projected CLS token follows each image's tokens; an
            image then has gh * gw + 1 of them.
        max_img_size: Longer side of an image, in pixels, at most.
        allow_upscale: Whether small images are enlarged to `max_img_size`.
        vit_model_type: Hub id or directory that the encoder comes from.
        lm_model_type: Hub id or directory that the language model comes from.
        lm_tokenizer: Hub id or directory of the tokenizer.
        lm_chat_template: Chat template that replaces the tokenizer's.
        image_mean: Mean of the pixels that the encoder was trained with, for red, green and blue;
            by default what `vit_model_type` and the architecture say. Needed for an architecture of
            which none is known here.
        image_std: Their standard deviation, likewise.
        vlm_extra_tokens: Named special tokens to add, ``{"image_token": ...}`` among them.

    Raises:
        ValueError: a value is out of range, does not fit the architecture, or is a misspelt name.
    """

    model_type = "hrvlm"
    # AutoConfig stands for any config: transformers' idiom, beyond its own annotation.
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # type: ignore[dict-item]
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "image_hidden_states",
        "image_outputs",
    ]

    vision_config: Any = None
    text_config: Any = None
    image_token_id: int | None = None
    mp_pixel_shuffle_factor: int = 4
    mp_handle_special_tokens: bool = True
    mp_append_cls: bool = False
    max_img_size: int = 2048
    allow_upscale: bool = True
    vit_model_type: str | None = None
    lm_model_type: str | None = None
    lm_tokenizer: str | None = None
    lm_chat_template: str | None = None
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None
    vlm_extra_tokens: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the configs of the parts from dictionaries, and check that all fit together."""
        allow_fp16 = kwargs.pop("allow_fp16", None)
        _refuse_misspelt(kwargs)
        self.vision_config = as_config(self.vision_config, "vision_config", "dinov3_vit")
        self.text_config = as_config(self.text_config, "text_config", "llama")
        self.vision_config = getattr(self.vision_config, "vision_config", self.vision_config)
        super().__post_init__(**kwargs)
        if allow_fp16 is not None:
            self.allow_fp16 = true_or_false("allow_fp16", allow_fp16)
        self._check()

    def _check(self) -> None:
        vision = self.vision_config
        for name in ("mp_handle_special_tokens", "mp_append_cls", "allow_upscale"):
            true_or_false(name, getattr(self, name))
        for name in ("vit_model_type", "lm_model_type", "lm_tokenizer", "lm_chat_template"):
            if not isinstance(text := getattr(self, name), str | None):
                raise ValueError(f"{name}={text!r:.60}: expected a text")
        if (token := self.image_token_id) is not None:
            if not is_int(token, 0):
                raise ValueError(f"image_token_id={token!r:.60}: expected a token id")
            self.image_token_id = token = int(token)
            tokens = getattr(self.text_config.get_text_config(), "vocab_size", None)
            if tokens is not None and token >= tokens:
                raise ValueError(
                    f"image_token_id={token}: outside the vocabulary, lm_vocab_size "
                    f"(text_config.vocab_size) is {tokens}"
                )
        if not isinstance(self.vlm_extra_tokens, Mapping | None):
            raise ValueError(
                f"vlm_extra_tokens={self.vlm_extra_tokens!r:.60}: expected names with their tokens"
            )
        s = positive_int("mp_pixel_shuffle_factor", self.mp_pixel_shuffle_factor)
        limit = positive_int("max_img_size", self.max_img_size)
        self.mp_pixel_shuffle_factor, self.max_img_size = s, limit  # numpy's as Python's
        if architecture_of(vision) is None:
            raise ValueError(
                f"vision_config.model_type={vision.model_type!r}: expected that of {ENCODERS}"
            )
        unit = self.vit_patch_size * s
        if limit < unit:
            raise ValueError(
                f"max_img_size={limit}: expected at least one token, "
                f"patch size * factor = {self.vit_patch_size} * {s} = {unit}"
            )
        if self.mp_append_cls and not self.mp_handle_special_tokens:
            raise ValueError("mp_append_cls=True needs mp_handle_special_tokens=True")
        self._check_normalization()
        if self.vit_architecture != "dinov3":
            self._check_others(unit)

    def _check_normalization(self) -> None:
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError(
                f"image_mean={self.image_mean}, image_std={self.image_std}: expected both or none"
            )
        _ = self.normalization

    @property
    def normalization(self) -> Normalization:
        """Mean and std of the encoder's pixels: the config's, else those of its family."""
        if self.image_mean is not None and self.image_std is not None:
            return check_normalization(self.image_mean, self.image_std)
        known = known_normalization(f"{self.vit_architecture} {self.vit_model_type or ''}")
        if known is None and self.vit_architecture not in OWN:
            raise ValueError(
                f"image_mean=None: no mean and std of {self.vit_architecture} is known here; give "
                "image_mean and image_std, as its image processor has them"
            )
        return known or IMAGENET

    def _check_others(self, unit: int) -> None:
        if self.vit_architecture == "siglip" and self.vision_config.image_size % unit:
            raise ValueError(
                f"vision_config.image_size={self.vision_config.image_size}: expected a multiple of "
                f"patch size * mp_pixel_shuffle_factor = {unit}"
            )
        if getattr(self.vision_config, "use_rope", False):
            why = names_with_one_value(self.vision_config)["vit_use_rope"][1]
            raise ValueError(f"vit_use_rope=True: {why}")
        if self.mp_append_cls and not self.num_prefix_tokens:
            raise ValueError(f"mp_append_cls=True: {self.vit_architecture} has no CLS token")

    @property
    def vit_architecture(self) -> str:
        """The encoder: "dinov3", "dinov2", or a tower of transformers: "siglip", "pixtral" ..."""
        name = architecture_of(self.vision_config)
        assert name is not None
        return name

    @property
    def vit_patch_size(self) -> int:
        """Side of a patch in pixels; of what a tower with a merger of its own makes one token of.

        Qwen2.5-VL's 2 x 2 patches of 14 pixels are one of 28.
        """
        side = square_side("vision_config.patch_size", self.vision_config.patch_size)
        return side * merged_patches(self.vision_config)

    @property
    def vit_hidden_dim(self) -> int:
        """Channels of the encoder's tokens, after a merger of its own if it has one."""
        vision = self.vision_config
        return getattr(vision, "out_hidden_size", vision.hidden_size)

    @property
    def allow_fp16(self) -> bool:
        """Whether the encoder runs in float16, which DINOv3's activations overflow."""
        return bool(getattr(self.vision_config, "allow_fp16", False))

    @allow_fp16.setter
    def allow_fp16(self, allow: bool) -> None:
        self.vision_config.allow_fp16 = allow

    @property
    def vit_use_rope(self) -> bool:
        """Whether the encoder rotates q and k by the patches' positions."""
        return self.vit_architecture == "dinov3" and getattr(self.vision_config, "use_rope", True)

    @property
    def vit_img_size(self) -> int | None:
        """Side of the squares, in pixels, that the encoder was made for; only siglip is bound."""
        size = getattr(self.vision_config, "image_size", None)
        return size if size is None or isinstance(size, int) else max(size)

    @property
    def square_size(self) -> int | None:
        """Side of every image, in pixels, of an encoder with one size (siglip); else None."""
        return self.vit_img_size if self.vit_architecture == "siglip" else None

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and registers in front of each image's patches."""
        if self.vit_architecture not in OWN:
            return 0
        return 1 + getattr(self.vision_config, "num_register_tokens", 0)

    @property
    def lm_hidden_dim(self) -> int:
        """Channels of the language model's embeddings."""
        return self.text_config.get_text_config().hidden_size

    @property
    def lm_max_position_embeddings(self) -> int | None:
        """Tokens that the language model's context holds; None if its config sets no limit."""
        return getattr(self.text_config.get_text_config(), "max_position_embeddings", None)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; without a config OSError is raised, and a damaged one is named."""
        with naming_damaged_files(pretrained_model_name_or_path, kwargs, all_errors=True):
            fields, options = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not fields:
            raise OSError(f"{pretrained_model_name_or_path}: there is no config.json in it")
        return fields, options

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but the config of another kind of model raises ValueError."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"a config of {kind!r}, expected one of a vision-language model, {cls.model_type!r}"
                "; VisionLanguageModel.from_backbones makes such a model of an encoder and a "
                "language model"
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> VLMConfig:
        """Read a file of nanoVLM's names; see :meth:`from_names`.

        Raises:
            ValueError: as :meth:`from_names`, or the file is not a mapping.
        """
        return cls.from_names(read_mapping(path))

    @classmethod
    def from_names(cls, names: Mapping[str, Any]) -> VLMConfig:
        """Build a config from nanoVLM's names.

        ``vit_architecture`` is "dinov3" (default), "dinov2", or a vision tower of transformers:
        "siglip", "siglip2", "pixtral", "idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl" and others.
        ``vit_*`` and ``lm_*`` set sizes; with ``vit_model_type`` or ``lm_model_type`` they change
        those of the checkpoint named there, and without, those of DINOv3 ViT-S/16, DINOv2 ViT-S/14,
        transformers' own (SigLIP at 512 pixels) or a Llama with SmolLM2's sizes. The rest are the
        attributes of this class;
        ``resize_to_max_side_len`` is `allow_upscale`, ``vit_num_registers`` is ``vit_n_registers``.
        ``vit_img_size`` limits the images of siglip alone.

        Raises:
            ValueError: a name is unknown (the nearest one, or what replaced it, is named), a value
                does not fit, or two names of one option differ.
        """
        if not isinstance(names, Mapping):
            raise ValueError(f"names: expected a mapping of names to values, got {names!r:.60}")
        for name in names:
            if name not in _NAMES:
                raise ValueError(_unknown(name))
        _refuse_other_values(names)
        said = {_ALIASES.get(name, name): name for name in names}
        given = checked(_without_aliases(names), said)
        try:
            return cls(
                vision_config=vision_from_names(given, said),
                text_config=text_from_names(given),
                **{name: given[name] for name in _OWN_NAMES if name in given},
            )
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a name that is no attribute for from_backbones to set."""
    for name in options:
        if name in _OF_PARTS:
            raise ValueError(f"{name!r} is no option: it is that of the {_OF_PARTS[name]}")
    others = {name: value for name, value in options.items() if name not in _OPTIONS}
    _refuse_misspelt(others)
    for name in others:
        near = get_close_matches(name, _OPTIONS, n=1)
        expected = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(_OPTIONS)}"
        raise ValueError(f"unknown option {name!r}: {expected}")


def _unknown(name: str) -> str:
    if name in _GONE:
        return f"unknown name {name!r}, nanoVLM's: {_GONE[name]}"
    nearest = get_close_matches(name, _NAMES, n=1, cutoff=0.0)[0]
    return f"unknown name {name!r}: did you mean {nearest!r}?"


def _refuse_other_values(names: Mapping[str, Any]) -> None:
    for name, (only, why) in _ONE_VALUE.items():
        value = names.get(name, only)
        if type(value) is not type(only) or value != only:
            raise ValueError(f"{name}={value!r}: {why}")


def _without_aliases(names: Mapping[str, Any]) -> dict[str, Any]:
    """The options by their first name."""
    given: dict[str, Any] = {}
    for name, value in names.items():
        first = _ALIASES.get(name, name)
        if first in given and given[first] != value:
            other = next(n for n in names if n != name and _ALIASES.get(n, n) == first)
            raise ValueError(
                f"{other}={names[other]!r} and {name}={value!r}: two names of one option, "
                "expected one of them, or one value"
            )
        given[first] = value
    return given


def _refuse_misspelt(kwargs: dict[str, Any]) -> None:
    """Transformers keeps whatever keyword a config is given; a misspelt one would be lost on us."""
    _refuse_other_values(kwargs)
    for name in _ONE_VALUE:
        kwargs.pop(name, None)
    for name in kwargs:
        if hasattr(PreTrainedConfig, name):
            continue
        if name in _NAMES:
            raise ValueError(
                f"{name!r} is a name of VLMConfig.from_names and from_yaml; "
                "here it belongs in vision_config or text_config"
            )
        if (
            name in _GONE
            or name.startswith(("vit_", "lm_", "mp_"))
            or get_close_matches(name, _OWN_NAMES, n=1, cutoff=0.8)
        ):
            raise ValueError(_unknown(name))
