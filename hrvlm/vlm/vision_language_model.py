"""The vision-language model: encoder, projector, and any causal language model of transformers.

    pixel_values [N, 3*p*p] + image_grid_hw [images, 2]
        -> vision_encoder -> packed tokens [T, C] -> MP -> image features [sum of tokens, C_lm]
        -> into the embeddings, at the placeholders of input_ids -> decoder -> logits

The parts have nanoVLM's names (`models/vision_language_model.py`). Which image belongs to which
sample follows from the placeholders: see `placeholders.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple

from ..checkpoints.strict import StrictModel
from ..encoder.plain_modules import is_plain
from ..encoder.vision_transformer import DINOv2Encoder, DINOv3Encoder, without_mask_token
from ..images.geometry import positive_int
from .backbones import check_causal, join, new_encoder
from .config import VLMConfig
from .generation import PackedGenerationMixin
from .headless import HeadlessVLM
from .image_embedding import (
    Grids,
    ImageEmbedding,
    check_attentions,
    check_is_tensor,
    check_labels,
    check_mask,
    check_positions,
    is_beginning,
)
from .image_plan import ImagePlan, Output
from .modality_projector import ModalityProjector
from .output import CACHE_NAME, ImageFeatures, VLMOutput, name_cache
from .placeholders import IGNORE_INDEX, as_grids, count_tokens
from .tower_classes import tower_class
from .vision_towers import encode


class VisionLanguageModel(StrictModel, PackedGenerationMixin, ImageEmbedding):
    """A language model that sees images of any size.

    Made by ``VisionLanguageModel(config)`` with random weights, by :meth:`from_backbones` from
    pretrained parts, or by ``from_pretrained``. Samples may have any number of images, or none.

    Args:
        config: Sizes and options. ``attn_implementation`` concerns the language model (and siglip);
            DINOv3Encoder has its own backends, see ``vision_config.backend``.
    """

    config_class = VLMConfig
    config: VLMConfig
    base_model_prefix = "headless"
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
        check_causal(config.text_config, "text_config")
        # First of all: tools take the first model among the parts for the language model.
        self.decoder = AutoModelForCausalLM.from_config(config.text_config)
        self.vision_encoder = new_encoder(config)
        self.has_tower = tower_class(config.vision_config) is not None  # one of transformers
        self.MP = ModalityProjector(config)
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
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> VisionLanguageModel:
        """Join a pretrained encoder and a pretrained language model by a new projector.

        Args:
            vision: Hub id or directory of a checkpoint of DINOv3, DINOv2, SigLIP or SigLIP2
                (NaFlex), or of a model whose vision tower is taken (Pixtral, SmolVLM, Qwen2.5-VL
                and others: see ``tower_classes.py``); or a loaded encoder: a DINOv3Encoder, a
                DINOv2Encoder, or the vision model of transformers.
            language: Hub id or directory of a causal LM, or a loaded one. Loaded parts become parts
                of the new model; they are not copied.
            tokenizer: Hub id or directory, read by :func:`hrvlm.vlm.tokenizer.get_tokenizer`, or a
                tokenizer with an ``image_token``. The vocabulary grows to hold its tokens.
            dtype: Of all parts, or its name; default: the language model's. ``torch_dtype`` is
                transformers' other name of it; with both, the values are the same.
            **options: Attributes of :class:`~hrvlm.vlm.config.VLMConfig`, as ``max_img_size``.

        Raises:
            TypeError: a loaded model is of another kind.
            ValueError: an option is unknown, a checkpoint is of another kind, or the tokenizer has
                no image token.
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
        """Resize the language model's vocabulary; see transformers' method of this name.

        Raises:
            ValueError: `new_num_tokens` is no positive int.
        """
        if new_num_tokens is not None:
            new_num_tokens = positive_int("new_num_tokens", new_num_tokens)
        return self.decoder.resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_grid_hw: Grids,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        with_last_hidden_state: bool = True,
        **kwargs: Any,
    ) -> ImageFeatures:
        """Encode and project images.

        Args:
            pixel_values: Packed patches ``[N, 3*p*p]`` of all images.
            image_grid_hw: Patch grid (hp, wp) of each image.
            output_attentions: Return the encoder's attention weights: siglip's, with "eager"
                attention; the encoders of this package refuse. Default: the ``vision_config``'s.
            output_hidden_states: Return the encoder's hidden states. Default likewise.
            with_last_hidden_state: False where the features are enough: `last_hidden_state` is
                None then, and the projector may apply the encoder's last norm.
            **kwargs: ``return_dict=False`` for a tuple; others are ignored, transformers passes its
                own here.

        Raises:
            TypeError: the patches are no tensor.
            ValueError: the patches or grids do not fit each other or the model, or the encoder has
                no such attention weights.
        """
        check_is_tensor("pixel_values", pixel_values)
        plan = self.plan_of(image_grid_hw)
        flags = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": True,
        }
        self.encode_images(pixel_values, plan, flags, with_last_hidden_state)
        assert plan.output is not None
        return plan.output

    @torch.compiler.disable
    def plan_of(self, image_grid_hw: Grids) -> ImagePlan:
        """What the host knows of images with these patch grids."""
        grids, factor = as_grids(image_grid_hw), self.config.mp_pixel_shuffle_factor
        return ImagePlan(grids, count_tokens(grids, factor, self.config.mp_append_cls), factor)

    def encode_images(
        self,
        pixel_values: Tensor,
        plan: ImagePlan,
        flags: dict[str, bool | None],
        with_last_hidden_state: bool,
    ) -> Tensor:
        """The projected features of all images, packed; the plan keeps what is said of them."""
        encoder: Any = self.vision_encoder
        hidden: Any
        attentions: Any = None
        if self.has_tower:
            hidden, states, attentions = encode(
                encoder, pixel_values, plan.grids, self.config.vit_patch_size, flags
            )
            rows = hidden.flatten(0, 1) if hidden.ndim == 3 else hidden
            features = self.MP(rows, packed=plan.layout(0, hidden.device))
        else:
            later = not with_last_hidden_state and self._projector_takes_norm()
            whole = self.config.mp_handle_special_tokens  # the projector gets the same layout
            layout = plan.layout(encoder.num_prefix_tokens, pixel_values.device, shuffled=whole)
            output = encoder(pixel_values, grids=layout, final_norm=not later, **flags)
            hidden, packed = output.packed_last_hidden_state, output.packed
            states = output.packed_hidden_states
            if later:
                features = self.MP(hidden, packed=packed, norm=encoder.norm)
                hidden = None
            elif whole:
                features = self.MP(hidden, packed=packed)
            else:
                features = self.MP(output.packed_patches, packed=plan.layout(0, hidden.device))
        plan.keep(
            features,
            last_hidden_state=hidden if with_last_hidden_state else None,
            hidden_states=states,
            attentions=attentions,
        )
        return features

    def _projector_takes_norm(self) -> bool:
        """Whether the encoder may leave its last norm to the projector, unseen by any hook."""
        encoder, projector = self.vision_encoder, self.MP
        return (
            self.config.mp_handle_special_tokens
            and (is_plain(encoder, DINOv3Encoder) or is_plain(encoder, DINOv2Encoder))
            and type(projector) is ModalityProjector
            and projector.takes_norm(encoder.norm)
        )

    @property
    def headless(self) -> HeadlessVLM:
        """The model up to the last hidden state; see :class:`~hrvlm.vlm.headless.HeadlessVLM`."""
        return HeadlessVLM(self)

    @property
    def vocab_size(self) -> int:
        """Rows of the language model's embeddings, as its config says."""
        return self.config.text_config.get_text_config().vocab_size

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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> VLMOutput:
        """Predict the next tokens of texts with images in them.

        The placeholders, the context and the vocabulary are checked before anything runs; this
        reads a few numbers per sample back from the device, once a forward with images or without
        a cache.

        Args:
            input_ids: ``[B, L]``; B = 0 is an emptied batch, whose loss is 0 and has a gradient of
                0 for every parameter of the language model.
            attention_mask: ``[B, L]``, 0 at padding.
            position_ids: ``[B, L]``, as the language model takes them.
            cache: A cache from an earlier call.
            inputs_embeds: ``[B, L, C_lm]`` instead of `input_ids`. With `pixel_values`, the rows
                that equal the embedding of the image token are the placeholders; without, the
                images are already in.
            pixel_values: Packed patches ``[N, 3*p*p]`` of all images; None or no rows if none.
            image_grid_hw: Patch grid (hp, wp) of each image: an int tensor or pairs of ints.
            labels: ``[B, L]`` aligned with `input_ids` (the language model shifts them), -100 where
                there is no loss.
            use_cache: Whether to return a cache.
            logits_to_keep: As in transformers: how many last positions get logits; 0 is all.
            past_key_values: The other name of `cache`: that of transformers before 5.24.
            output_attentions: Return the language model's attention weights, which only its "eager"
                attention has. Default: the config's, or that of its ``text_config``.
            output_hidden_states: Return the language model's hidden states. Default likewise.
            **kwargs: ``return_dict=False`` for a tuple; others are passed to the language model,
                and by it to the loss (``num_items_in_batch``).

        Raises:
            ValueError: placeholders do not match the images, a sample with images exceeds the
                context, a token id is outside the vocabulary, arguments contradict each other, or
                attention weights are asked for that the language model does not compute.
        """
        if not torch.compiler.is_compiling():
            check_positions(position_ids, logits_to_keep, inputs_embeds, input_ids)
        if isinstance(input_ids, Tensor) and input_ids.shape[0] == 0:
            return self._forward_empty(input_ids, labels)
        said = None
        if labels is not None and isinstance(logits_to_keep, int) and not logits_to_keep:
            check_labels(labels, inputs_embeds if input_ids is None else input_ids)
            labels = labels.long()
            said = labels if kwargs.get("ignore_index", IGNORE_INDEX) == IGNORE_INDEX else None
        outputs, make, others = self.run(
            VLMOutput,
            self.decoder,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_hw=image_grid_hw,
            labels=labels,
            checked_labels=said,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        return make(loss=outputs.loss, logits=outputs.logits, **others)

    def run(
        self,
        kind: Callable[..., Output],
        decoder: nn.Module,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Grids | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        checked_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Callable[..., Output], dict[str, Any]]:
        """What `decoder`, the language model or its body, makes of texts with images.

        `checked_labels` are those that have to be in the vocabulary.

        Returns:
            Its output; what makes an output of the `kind`, and the fields that one of ours has with
            a head and without.
        """
        named = name_cache({"cache": cache, "past_key_values": past_key_values})
        flags = self._requested(output_attentions, output_hidden_states)
        begins = is_beginning(named.get(CACHE_NAME), input_ids)
        embeds, features, plan = self.embed(
            input_ids,
            attention_mask,
            inputs_embeds,
            pixel_values,
            image_grid_hw,
            labels=checked_labels,
            begins=begins,
            output_hidden_states=flags["output_hidden_states"],
        )
        # Once more, so that a graph of the language model knows that the two are equally long: else
        # Inductor writes a check of bounds that its C++ does not compile (torch 2.11).
        check_mask(attention_mask, embeds, begins)
        outputs = decoder(
            attention_mask=attention_mask,
            inputs_embeds=embeds,
            return_dict=True,
            **named,
            **flags,
            **kwargs,
        )
        check_attentions(flags["output_attentions"], outputs.attentions, "text_config")
        fields = {
            "cache": outputs.get(CACHE_NAME),
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
            "image_hidden_states": features,
        }
        return outputs, kind if plan is None else partial(plan.told, kind), fields

    def _requested(
        self, output_attentions: bool | None, output_hidden_states: bool | None
    ) -> dict[str, bool]:
        """What the language model is to return beside its output: as asked, else by config."""
        given = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        configs = (self.config, self.config.text_config)
        return {
            name: any(getattr(c, name, False) for c in configs) if value is None else value
            for name, value in given.items()
        }

    def _forward_empty(self, input_ids: Tensor, labels: Tensor | None) -> VLMOutput:
        """No samples: no logits, and a loss of 0 that still reaches the parameters."""
        token = input_ids.new_zeros(1, 1)
        embeds = self.touch_encoder(self.get_input_embeddings()(token))
        logits = self.decoder(inputs_embeds=embeds, use_cache=False).logits
        return VLMOutput(
            loss=None if labels is None else 0 * logits.float().sum(),
            logits=logits.new_zeros(0, input_ids.shape[1], logits.shape[2]),
        )
