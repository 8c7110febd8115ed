"""The vision-language model: encoder, projector, and any causal language model of transformers.

    pixel_values [N, 3*p*p] + image_grid_hw [images, 2]
        -> vision_encoder -> packed tokens [T, C] -> MP -> image features [sum of tokens, C_lm]
        -> into the embeddings, at the placeholders of input_ids -> decoder -> logits

The parts have nanoVLM's names (`models/vision_language_model.py`). Which image belongs to which
sample follows from the placeholders: see `placeholders.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple

from hrvlm_kernels import PackedGrids

from ..checkpoints.strict import StrictModel
from ..encoder.vision_transformer import DINOv3Encoder, without_mask_token
from ..images.patches import unpatchify
from .backbones import join
from .config import VLMConfig
from .modality_projector import ModalityProjector
from .output import CACHE_NAME, ImageFeatures, VLMOutput, name_cache
from .placeholders import (
    Grid,
    as_grids,
    check_context,
    check_vocabulary,
    count_batch,
    count_tokens,
    images_per_sample,
)

Grids = Tensor | Sequence[Sequence[int]]


class VisionLanguageModel(StrictModel, GenerationMixin):
    """A language model that sees images of any size.

    Made by ``VisionLanguageModel(config)`` with random weights, by :meth:`from_backbones` from
    pretrained parts, or by ``from_pretrained``. Samples may have any number of images, or none.

    Args:
        config: Sizes and options. ``attn_implementation`` concerns the language model (and siglip);
            DINOv3Encoder has its own backends, see ``vision_config.backend``.
    """

    config_class = VLMConfig
    config: VLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VLMConfig):
        super().__init__(config)
        self.vision_encoder = _new_encoder(config)
        self.MP = ModalityProjector(config)
        self.decoder = AutoModelForCausalLM.from_config(config.text_config)
        # One object, so that a resized vocabulary, for one, is known in both places.
        config.text_config = self.decoder.config
        self.post_init()

    @classmethod
    def from_backbones(
        cls,
        vision: str | PreTrainedModel,
        language: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> VisionLanguageModel:
        """Join a pretrained encoder and a pretrained language model by a new projector.

        Args:
            vision: Hub id or directory of a DINOv3 or SigLIP checkpoint, or a loaded DINOv3Encoder,
                DINOv3ViTModel or SiglipVisionModel.
            language: Hub id or directory of a causal LM, or a loaded one. Loaded parts become parts
                of the new model; they are not copied.
            tokenizer: Hub id or directory, read by :func:`hrvlm.vlm.processors.get_tokenizer`, or a
                tokenizer with an ``image_token``. The vocabulary grows to hold its tokens.
            dtype: Of all parts; default: the language model's.
            **options: Attributes of :class:`~hrvlm.vlm.config.VLMConfig`, as ``max_img_size``.

        Raises:
            TypeError: a loaded model is of another kind.
            ValueError: an option is unknown, or the tokenizer has no image token.
        """
        return join(cls, vision, language, tokenizer, dtype, options)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, whose loading makes a parameter to train of the mask token too."""
        loaded: Any = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        without_mask_token(model.vision_encoder)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ModalityProjector):
            for weight in module.parameters():
                init.normal_(weight, std=0.02)

    def get_input_embeddings(self) -> nn.Embedding:
        """The language model's."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the language model's."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's."""
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the language model's."""
        self.decoder.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resize the language model's vocabulary; see transformers' method of this name."""
        return self.decoder.resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )

    def get_image_features(
        self, pixel_values: Tensor, image_grid_hw: Grids, **kwargs: Any
    ) -> ImageFeatures:
        """Encode and project images.

        Args:
            pixel_values: Packed patches ``[N, 3*p*p]`` of all images.
            image_grid_hw: Patch grid (hp, wp) of each image.
            **kwargs: Ignored; transformers passes its own here.

        Raises:
            ValueError: the patches or grids do not fit each other or the model.
        """
        grids = as_grids(image_grid_hw)
        tokens = count_tokens(grids, self.config.mp_pixel_shuffle_factor, self.config.mp_append_cls)
        if self.config.vit_architecture == "siglip":
            hidden = self._encode_squares(pixel_values, grids)
            features = self.MP(hidden).flatten(0, 1)
        else:
            output = self.vision_encoder(pixel_values, grids=grids)
            hidden, packed = output.packed_last_hidden_state, output.packed
            if self.config.mp_handle_special_tokens:
                features = self.MP(hidden, packed=packed)
            else:
                patches_only = PackedGrids.from_grids(grids, device=hidden.device)
                features = self.MP(output.packed_patches, packed=patches_only)
        return ImageFeatures(last_hidden_state=hidden, pooler_output=features.split(tokens))

    def _encode_squares(self, pixel_values: Tensor, grids: list[Grid]) -> Tensor:
        """Packed patches of square images through SigLIP, whose positions are for one size."""
        p, side = self.config.vit_patch_size, self.config.vision_config.image_size
        n = side // p
        for i, grid in enumerate(grids):
            if grid != (n, n):
                raise ValueError(
                    f"image {i}: patch grid {grid[0]}x{grid[1]}, but siglip has positions for "
                    f"{n}x{n} only: every image must be {side}x{side} pixels"
                )
        width = 3 * p * p
        if tuple(pixel_values.shape) != (len(grids) * n * n, width):
            raise ValueError(
                f"pixel_values: {tuple(pixel_values.shape)}, expected "
                f"{(len(grids) * n * n, width)} for {len(grids)} images of {n}x{n} patches"
            )
        images = unpatchify(pixel_values.view(len(grids), n * n, width), (n, n), p)
        return self.vision_encoder(images).last_hidden_state

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Grids | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> VLMOutput:
        """Predict the next tokens of texts with images in them.

        The placeholders, the context and the vocabulary are checked before anything runs; this
        reads a few numbers per sample back from the device, once a forward.

        Args:
            input_ids: ``[B, L]``; B = 0 is an emptied batch, whose loss is 0 and has a gradient of
                0 for every parameter of the language model.
            attention_mask: ``[B, L]``, 0 at padding.
            position_ids: ``[B, L]``, as the language model takes them.
            cache: A cache from an earlier call.
            inputs_embeds: ``[B, L, C_lm]`` instead of `input_ids`, with the images already in.
            pixel_values: Packed patches ``[N, 3*p*p]`` of all images; None or no rows if none.
            image_grid_hw: Patch grid (hp, wp) of each image: an int tensor or pairs of ints.
            labels: ``[B, L]`` aligned with `input_ids` (the language model shifts them), -100 where
                there is no loss.
            use_cache: Whether to return a cache.
            logits_to_keep: As in transformers: how many last positions get logits; 0 is all.
            past_key_values: The other name of `cache`: that of transformers before 5.24.
            **kwargs: Passed to the language model, and by it to the loss (``num_items_in_batch``).

        Raises:
            ValueError: placeholders do not match the images, a sample with images exceeds the
                context, a token id is outside the vocabulary, or arguments contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if input_ids is not None and input_ids.shape[0] == 0:
            return self._forward_empty(input_ids, labels)
        grids = _grids_of(pixel_values, image_grid_hw)
        named = name_cache({"cache": cache, "past_key_values": past_key_values})
        cached = named[CACHE_NAME].get_seq_length() if named else 0
        if input_ids is not None and (grids or not cached) and not torch.compiler.is_compiling():
            self._images_per_sample(input_ids, attention_mask, grids)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = None
        if grids and pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values go with input_ids, which hold the placeholders")
            features = torch.cat(self.get_image_features(pixel_values, grids).pooler_output)
            features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            placeholders = input_ids.eq(self._image_token_id()).unsqueeze(-1)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders, features)
        elif not cached:
            inputs_embeds = self._touch_encoder(inputs_embeds)
        outputs = self.decoder(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **named,
            **kwargs,
        )
        return VLMOutput(
            loss=outputs.loss,
            logits=outputs.logits,
            cache=outputs.get(CACHE_NAME),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )

    def _images_per_sample(
        self, input_ids: Tensor, attention_mask: Tensor | None, grids: list[Grid]
    ) -> list[int]:
        """How many images each sample has, after checking all that forward promises."""
        config = self.config
        if input_ids.shape[1] == 0 and not grids:
            return [0] * input_ids.shape[0]
        if grids:
            self._image_token_id()
        counts = count_batch(input_ids, attention_mask, config.image_token_id)
        check_vocabulary(counts, input_ids, config.text_config.get_text_config().vocab_size)
        tokens = count_tokens(grids, config.mp_pixel_shuffle_factor, config.mp_append_cls)
        numbers = images_per_sample(counts.placeholders, grids, tokens)
        check_context(counts, numbers, grids, config.lm_max_position_embeddings)
        return numbers

    def _image_token_id(self) -> int:
        if self.config.image_token_id is None:
            raise ValueError("config.image_token_id is None: set it to use images")
        return self.config.image_token_id

    def _touch_encoder(self, inputs_embeds: Tensor) -> Tensor:
        """Add nothing, by way of encoder and projector, when training on several devices.

        A rank whose batch has no image would leave their parameters out of its graph, and DDP and
        FSDP wait for them.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.training and distributed):
            return inputs_embeds
        p, s = self.config.vit_patch_size, self.config.mp_pixel_shuffle_factor
        side = (self.config.square_size or p * s) // p
        black = torch.zeros(side * side, 3 * p * p, device=inputs_embeds.device)
        features = torch.cat(self.get_image_features(black, [(side, side)]).pooler_output)
        return inputs_embeds + (0 * features.float().sum()).to(inputs_embeds)

    def _forward_empty(self, input_ids: Tensor, labels: Tensor | None) -> VLMOutput:
        """No samples: no logits, and a loss of 0 that still reaches the parameters."""
        token = input_ids.new_zeros(1, 1)
        embeds = self._touch_encoder(self.get_input_embeddings()(token))
        logits = self.decoder(inputs_embeds=embeds, use_cache=False).logits
        return VLMOutput(
            loss=None if labels is None else 0 * logits.float().sum(),
            logits=logits.new_zeros(0, input_ids.shape[1], logits.shape[2]),
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a cache may have either of its names."""
        return super().generate(*args, **name_cache(kwargs))  # type: ignore[misc]

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers; the grids go when the pixels do, after the first step."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if "pixel_values" not in inputs:
            inputs.pop("image_grid_hw", None)
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each sample for beams or several sequences, with its images, which are packed."""
        pixels = model_kwargs.pop("pixel_values", None)
        grid_hw = model_kwargs.pop("image_grid_hw", None)
        grids = _grids_of(pixels, grid_hw)
        if grids and expand_size > 1 and pixels is not None:
            if input_ids is None:
                raise ValueError("pixel_values go with input_ids, which hold the placeholders")
            numbers = self._images_per_sample(input_ids, model_kwargs.get("attention_mask"), grids)
            images = iter(range(len(grids)))
            own = [[next(images) for _ in range(number)] for number in numbers]
            order = [i for sample in own for i in sample * expand_size]
            patches = pixels.split([hp * wp for hp, wp in grids])
            pixels, grid_hw = torch.cat([patches[i] for i in order]), [grids[i] for i in order]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size,
            is_encoder_decoder,
            input_ids,  # type: ignore[arg-type]
            **model_kwargs,
        )
        if pixels is not None:
            model_kwargs |= {"pixel_values": pixels, "image_grid_hw": grid_hw}
        return input_ids, model_kwargs


def _new_encoder(config: VLMConfig) -> DINOv3Encoder | SiglipVisionModel:
    if config.vit_architecture == "siglip":
        config.vision_config.vision_use_head = False  # its pooling would be left without gradients
        return SiglipVisionModel(config.vision_config)
    config.vision_config._attn_implementation = "sdpa"  # the encoder has its own backends
    return without_mask_token(DINOv3Encoder(config.vision_config))


def _grids_of(pixel_values: Tensor | None, image_grid_hw: Grids | None) -> list[Grid]:
    """The grids as ints; empty if there are no images.

    Raises:
        ValueError: pixels come without grids, or grids without pixels.
    """
    rows = 0 if pixel_values is None else pixel_values.shape[0]
    grids = [] if image_grid_hw is None else as_grids(image_grid_hw)
    if bool(rows) != bool(grids):
        raise ValueError(
            f"pixel_values has {rows} patches and image_grid_hw {len(grids)} images: "
            "expected both, or neither"
        )
    return grids
