"""Building the vision-language model from pretrained parts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DINOv3ViTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ..checkpoints.damage import naming_damaged_files
from ..checkpoints.foreign import is_foreign
from ..checkpoints.strict import load_strictly
from ..encoder.plain_modules import cast_parameters, is_float
from ..encoder.vision_transformer import DINOv3Encoder, without_mask_token
from .config import VLMConfig
from .tokenizer import get_tokenizer

if TYPE_CHECKING:
    from .vision_language_model import VisionLanguageModel

# What a checkpoint of SigLIP has besides the vision tower without its pooling head.
_OF_SIGLIP = ("text_model.", "logit_scale", "logit_bias", "vision_model.head.", "head.")


def join(
    model_class: type[VisionLanguageModel],
    vision: str | PreTrainedModel,
    language: str | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase,
    dtype: torch.dtype | None,
    options: dict[str, Any],
) -> VisionLanguageModel:
    """Do what :meth:`VisionLanguageModel.from_backbones` says."""
    names = {
        name: part
        for name, part in zip(
            ("vit_model_type", "lm_model_type", "lm_tokenizer"),
            (vision, language, tokenizer),
            strict=True,
        )
        if isinstance(part, str)
    }
    if isinstance(tokenizer, str):
        tokenizer = get_tokenizer(
            tokenizer, options.get("vlm_extra_tokens"), options.get("lm_chat_template")
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: expected a floating-point torch.dtype, or None")
    if getattr(tokenizer, "image_token", None) is None:
        raise ValueError("tokenizer: it has no image_token; make it with hrvlm.get_tokenizer")
    encoder, decoder = load_vision(vision), load_language(language)
    embeddings: Any = decoder.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        decoder.resize_token_embeddings(len(tokenizer))
    config = VLMConfig(
        vision_config=encoder.config,
        text_config=decoder.config,
        image_token_id=tokenizer.image_token_id,
        **(names | options),
    )
    with torch.device("meta"):
        model = model_class(config)
    model.vision_encoder, model.decoder = without_mask_token(encoder), decoder
    config.text_config = decoder.config
    model.MP.to_empty(device=_device_of(decoder)).reset_parameters()
    cast_parameters(model, decoder.dtype if dtype is None else dtype)
    model.generation_config = copy.deepcopy(decoder.generation_config)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _device_of(model: PreTrainedModel) -> torch.device:
    """Where its parameters are, but those which are offloaded."""
    devices = (p.device for p in model.parameters() if not p.is_meta)
    return next(devices, torch.device("cpu"))


def new_encoder(config: VLMConfig) -> DINOv3Encoder | SiglipVisionModel:
    """The encoder that a config says, with random weights."""
    if config.vit_architecture == "siglip":
        config.vision_config.vision_use_head = False  # its pooling would be left without gradients
        return SiglipVisionModel(config.vision_config)
    if config.vision_config._attn_implementation != "eager":  # the encoder has its own backends
        config.vision_config._attn_implementation = "sdpa"
    return without_mask_token(DINOv3Encoder(config.vision_config))


def load_vision(source: str | PreTrainedModel) -> DINOv3Encoder | SiglipVisionModel:
    """The encoder for `source`; weights of a loaded model are shared where their layout allows.

    Raises:
        TypeError: `source` is a model of another kind.
        ValueError: the checkpoint is of another kind, its weights do not fit, or it is damaged.
    """
    if isinstance(source, DINOv3Encoder):
        return source
    if isinstance(source, DINOv3ViTModel):
        return _refilled(DINOv3Encoder, source)
    if isinstance(source, SiglipVisionModel):
        return _refilled(SiglipVisionModel, source)
    if not isinstance(source, str):
        raise TypeError(
            "vision: expected a name, a DINOv3Encoder, a DINOv3ViTModel or a SiglipVisionModel, "
            f"got {type(source).__name__}"
        )
    if is_foreign(source):
        return DINOv3Encoder.from_pretrained(source)
    with naming_damaged_files(source):
        config = AutoConfig.from_pretrained(source)
    config = getattr(config, "vision_config", config)
    if config.model_type == "dinov3_vit":
        return DINOv3Encoder.from_pretrained(source)
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
        return load_strictly(
            SiglipVisionModel.from_pretrained, source, config=config, not_needed=_OF_SIGLIP
        )
    raise ValueError(f"vision={source!r}: expected dinov3_vit or siglip, got {config.model_type}")


def load_language(source: str | PreTrainedModel) -> PreTrainedModel:
    """The causal language model for `source`.

    Raises:
        TypeError: `source` is a model that cannot generate text.
        ValueError: the weights do not fit, or a file is damaged.
    """
    if isinstance(source, str):
        return load_strictly(AutoModelForCausalLM.from_pretrained, source)
    if not isinstance(source, PreTrainedModel) or not source.can_generate():
        raise TypeError(
            f"language: expected a name or a causal language model, got {type(source).__name__}"
        )
    return source


def _refilled(model_class: Any, source: PreTrainedModel) -> Any:
    """A `model_class` with the weights of `source`, which is left as it is.

    Raises:
        ValueError: the weights are elsewhere, or are those of a quantiser.
    """
    for name, parameter in source.named_parameters():
        if parameter.is_meta or not is_float(parameter):
            raise ValueError(
                f"vision: {name} of the {type(source).__name__} is {parameter.dtype} on "
                f"{parameter.device}; expected weights that are neither quantised nor offloaded"
            )
    config = copy.deepcopy(source.config)
    if isinstance(config, SiglipVisionConfig):
        config.vision_use_head = False
    with torch.device("meta"):
        model = model_class(config)
    wanted = {f"{name}." for name, _ in model.named_children()}
    state = {
        key: value
        for key, value in source.state_dict().items()
        if key.startswith(("model.", *wanted))
    }
    model.load_state_dict(state, assign=True)
    return model.train(source.training)
