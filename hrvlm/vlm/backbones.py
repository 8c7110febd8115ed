"""Building the vision-language model from pretrained parts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..checkpoints.damage import naming_damaged_files
from ..checkpoints.foreign import is_foreign
from ..checkpoints.preprocessor import stored_normalization
from ..checkpoints.strict import load_strictly
from ..encoder.packed_encoder import PackedEncoder
from ..encoder.plain_modules import cast_parameters, is_float
from ..encoder.vision_transformer import encoder_class, load_file, without_mask_token
from .config import VLMConfig, check_options
from .part_configs import ENCODERS, architecture_of
from .tokenizer import get_tokenizer
from .tower_classes import LEFT_OUT, OF_TWO_TOWERS, leave_out, tower_class

if TYPE_CHECKING:
    from .vision_language_model import VisionLanguageModel


def join(
    model_class: type[VisionLanguageModel],
    vision: str | PreTrainedModel,
    language: str | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase,
    dtype: torch.dtype | str | None,
    options: dict[str, Any],
) -> VisionLanguageModel:
    """Do what :meth:`VisionLanguageModel.from_backbones` says."""
    dtype = _dtype_of_all(dtype=dtype, torch_dtype=options.pop("torch_dtype", None))
    check_options(options)
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
    if getattr(tokenizer, "image_token", None) is None:
        raise ValueError("tokenizer: it has no image_token; make it with hrvlm.get_tokenizer")
    encoder, decoder = load_vision(vision), load_language(language)
    embeddings: Any = decoder.get_input_embeddings()
    text_config = copy.deepcopy(decoder.config)  # the caller's model changes when all is checked
    if grows := len(tokenizer) > embeddings.num_embeddings:
        text_config.get_text_config().vocab_size = len(tokenizer)
    if isinstance(vision, str) and "image_mean" not in options and not is_foreign(vision):
        stored = stored_normalization(vision)
        options |= {"image_mean": stored.mean, "image_std": stored.std} if stored else {}
    config = VLMConfig(
        vision_config=encoder.config,
        text_config=text_config,
        image_token_id=tokenizer.image_token_id,
        **(names | options),
    )
    with torch.device("meta"):
        model = model_class(config)
    if grows:
        decoder.resize_token_embeddings(len(tokenizer))
    model.vision_encoder, model.decoder = without_mask_token(encoder), decoder
    config.text_config = decoder.config
    model.MP.to_empty(device=_device_of(decoder)).reset_parameters()
    cast_parameters(model, decoder.dtype if dtype is None else dtype)
    model.generation_config = copy.deepcopy(decoder.generation_config)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _dtype_of_all(**names: Any) -> torch.dtype | None:
    """What is given by one of the names, or by both alike."""
    given = {name: value for name, value in names.items() if value is not None}
    found = {_floating_point(name, value) for name, value in given.items()}
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(f'{name}={value!r}' for name, value in given.items())}: two names of "
            "one option, expected one of them, or one value"
        )
    return found.pop() if found else None


def _floating_point(name: str, value: Any) -> torch.dtype:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(
            f"{name}={value!r}: expected a floating-point torch.dtype or the name of one, or None"
        )
    return found


def _device_of(model: PreTrainedModel) -> torch.device:
    """Where its parameters are, but those which are offloaded."""
    devices = (p.device for p in model.parameters() if not p.is_meta)
    return next(devices, torch.device("cpu"))


def new_encoder(config: VLMConfig) -> PreTrainedModel:
    """The encoder that a config says, with random weights."""
    vision = config.vision_config
    if tower := tower_class(vision):
        leave_out(vision)
        return tower(vision)
    if vision._attn_implementation != "eager":  # the encoder has its own backends
        vision._attn_implementation = "sdpa"
    return without_mask_token(encoder_class(vision)(vision))


def load_vision(source: str | PreTrainedModel) -> PreTrainedModel:
    """The encoder for `source`; weights of a loaded model are shared where their layout allows.

    A tower of transformers is taken as it is, unless it has parts that :func:`leave_out` names.

    Raises:
        TypeError: `source` is a model of another kind.
        ValueError: the checkpoint is of another kind, its weights do not fit, or it is damaged.
    """
    if isinstance(source, PackedEncoder):
        return source
    if isinstance(source, (DINOv3ViTModel, Dinov2Model, Dinov2WithRegistersModel)):
        return _refilled(encoder_class(source.config), source)
    tower = tower_class(source.config) if isinstance(source, PreTrainedModel) else None
    if tower is not None and isinstance(source, tower):
        return _refilled(tower, source) if leave_out(copy.deepcopy(source.config)) else source
    if not isinstance(source, str):
        raise TypeError(
            "vision: expected a name, a DINOv3Encoder, a DINOv2Encoder, or the DINOv3ViTModel, "
            "Dinov2Model, Dinov2WithRegistersModel or a vision tower of transformers (siglip2, "
            f"pixtral, smolvlm, qwen2_5_vl, ...), got {type(source).__name__}"
        )
    if is_foreign(source):
        return load_file(source)[0]
    with naming_damaged_files(source):
        whole = AutoConfig.from_pretrained(source)
    config = getattr(whole, "vision_config", whole)
    architecture = architecture_of(config)
    if architecture is None:
        raise ValueError(f"vision={source!r}: expected {ENCODERS}, got {config.model_type}")
    tower = tower_class(config)
    if tower is None:
        return encoder_class(config).from_pretrained(source)
    if config is whole or whole.model_type in ("siglip", "siglip2"):  # with both their towers
        leave_out(config)
        load: Any = tower.from_pretrained
        return load_strictly(load, source, config=config, not_needed=(*LEFT_OUT, *OF_TWO_TOWERS))
    model = load_strictly(AutoModel.from_pretrained, source, not_needed=("lm_head.",))
    return load_vision(next(module for module in model.modules() if isinstance(module, tower)))


def check_causal(config: PreTrainedConfig, said: str) -> None:
    """Raise ValueError unless it is the config of a causal language model; `said` names it."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{said}: expected a causal language model, got {config.model_type!r}")


def load_language(source: str | PreTrainedModel) -> PreTrainedModel:
    """The causal language model for `source`.

    Raises:
        TypeError: `source` is a model that cannot generate text.
        ValueError: the checkpoint is of another kind, its weights do not fit, or it is damaged.
    """
    if isinstance(source, str):
        try:
            return load_strictly(AutoModelForCausalLM.from_pretrained, source)
        except ValueError as error:
            if not str(error).startswith("Unrecognized configuration class"):
                raise
        check_causal(AutoConfig.from_pretrained(source), f"language={source!r}")
    if (
        not isinstance(source, PreTrainedModel)
        or not source.can_generate()
        or type(source.config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        or source.config.is_encoder_decoder
    ):
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
    leave_out(config)
    with torch.device("meta"):
        model = model_class(config)
    state = source.state_dict()
    state = {key: value for key, value in state.items() if not key.startswith(LEFT_OUT)}
    model.load_state_dict(state, assign=True)
    buffers = dict(source.named_buffers())
    for name, buffer in list(model.named_buffers()):  # no state has frequencies, say
        if buffer.is_meta and name in buffers:
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner).register_buffer(own, buffers[name], persistent=False)
    return model.train(source.training)
