"""Text with images in it, made ready for the model: tokenizer, placeholders, chat template.

A prompt holds one image token where an image goes; the processor replaces it by as many as the
image has tokens, gh * gw of its token grid. Chats are rendered with the language model's own chat
template, even where that knows text only: see `IMAGE_PRELUDE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from os import PathLike
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.utils.import_utils import is_torchvision_available

from ..checkpoints.damage import naming_damaged_files
from ..files import save_whole
from ..images.fetch import readable
from ..images.geometry import image_token_count, positive_int, shuffled_grid, true_or_false
from ..images.pixels import load_pixels, resize_pixels
from ..images.transformers_processor import VLMImageProcessor, VLMImageProcessorPil
from .answers import Piece, answer_pieces, marked_pieces, tokens_of
from .chats import blocks, kind_of, marks_answers, naming_the_template, plain_chats
from .config import VLMConfig
from .tokenizer import CHAT_TEMPLATE, get_image_string, image_token_of, with_image_prelude


class VLMProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults of a call."""

    # Transformers' idiom, which the typing of dictionaries does not know.
    _defaults = {  # type: ignore[misc]
        "text_kwargs": {"padding": True},
        "common_kwargs": {"return_tensors": "pt"},
    }


class VLMProcessor(ProcessorMixin):
    """Images and text to the inputs of :class:`~hrvlm.VisionLanguageModel`.

    A call gives ``input_ids``, ``attention_mask``, ``pixel_values`` ``[N, 3*p*p]`` and
    ``image_grid_hw`` ``[images, 2]`` (patch grids). Images are whatever
    :func:`hrvlm.images.intake.load_image` takes, and URLs and base64 strings.

    Args:
        image_processor: :class:`~hrvlm.VLMImageProcessor` or its Pillow twin.
        tokenizer: With an ``image_token``, as :func:`get_tokenizer` makes it.
        chat_template: Default: the tokenizer's, else `CHAT_TEMPLATE`. One that does not mention
            images is preceded by `IMAGE_PRELUDE`, as is one that is set later or given to
            :meth:`apply_chat_template`; of several by name each is.
        append_cls: Whether the model appends a CLS token to each image (``mp_append_cls``).
        square_size: Side in pixels that every image is squeezed into first: for siglip, which has
            one image size.
    """

    valid_processor_kwargs = VLMProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        append_cls: bool = False,
        square_size: int | None = None,
    ):
        if not isinstance(chat_template, str | Mapping | None):
            raise TypeError(f"chat_template: expected a text, got {type(chat_template).__name__}")
        true_or_false("append_cls", append_cls)
        if square_size is not None:
            square_size = positive_int("square_size", square_size)
        self.image_token = image_token_of(tokenizer)
        self.image_token_id = tokenizer.image_token_id
        template = chat_template or tokenizer.chat_template or CHAT_TEMPLATE
        self.append_cls = append_cls
        self.square_size = square_size
        super().__init__(image_processor, tokenizer, chat_template=template)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._with_images(value) if name == "chat_template" else value)

    def _with_images(self, template: Any) -> Any:
        """A chat template, or several by name, which turn images into image tokens."""
        if isinstance(template, Mapping):
            return {name: self._with_images(one) for name, one in template.items()}
        if not isinstance(template, str):
            return template
        return with_image_prelude(template, self.image_token)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> VLMProcessor:
        """As in transformers; a damaged file is named."""
        if not isinstance(pretrained_model_name_or_path, str | PathLike):
            raise TypeError(
                f"{cls.__name__}.from_pretrained: expected a hub id or a directory, got "
                f"{type(pretrained_model_name_or_path).__name__}"
            )
        with naming_damaged_files(pretrained_model_name_or_path, kwargs, all_errors=True):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> list[str]:
        """As in transformers, but all files or none."""
        return save_whole(super().save_pretrained, save_directory, *args, **kwargs)

    @classmethod
    def from_config(
        cls, config: VLMConfig, tokenizer: PreTrainedTokenizerBase, **image_options: Any
    ) -> VLMProcessor:
        """The processor that fits a model.

        Args:
            config: The model's.
            tokenizer: The model's.
            **image_options: Options of VLMImageProcessor; mean and std are by default
                ``config.normalization``, those that the encoder was trained with.

        Raises:
            TypeError: `config` is of another kind.
        """
        if not isinstance(config, VLMConfig):
            raise TypeError(f"config: expected a VLMConfig, got {type(config).__name__}")
        mean, std = config.normalization
        options = {
            "patch_size": config.vit_patch_size,
            "pixel_shuffle_factor": config.mp_pixel_shuffle_factor,
            "max_img_size": config.square_size or config.max_img_size,
            "allow_upscale": config.allow_upscale,
            "image_mean": mean,
            "image_std": std,
        } | image_options
        # The first is faster, and can also resize on a GPU.
        image_processor = VLMImageProcessor if is_torchvision_available() else VLMImageProcessorPil
        return cls(
            image_processor(**options),
            tokenizer,
            append_cls=config.mp_append_cls,
            square_size=config.square_size,
        )

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Process texts with their images.

        Args:
            images: An image, a list of images in the order of their placeholders, or a list of
                images for each text.
            text: A text, or a list of texts, with one image token for each image.
            **kwargs: Options of the tokenizer and the image processor.

        Raises:
            TypeError: `text` is no text, as where the two are in the order of older transformers,
                or an option is unknown.
            ValueError: the image tokens in the text are not as many as the images; a sample is
                named where `images` is a list of lists.
        """
        self._check_groups(kwargs)
        # Taken from there, transformers would keep them for the calls to come.
        kwargs = dict(kwargs.pop("common_kwargs", None) or ()) | kwargs
        self._check_options(kwargs)
        texts = [text] if isinstance(text, str) else text
        if text is not None:
            if not texts:
                raise ValueError("text: expected at least one text, got none")
            if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
                raise TypeError(
                    f"text: expected a text or a list of texts, got {kind_of(text)}; images come "
                    "first: processor(images=..., text=...)"
                )
            self._check_placeholders(images, list(texts))
        elif isinstance(images, str) and self.image_token in images:
            raise TypeError("images: got a text; say which it is: processor(images=..., text=...)")
        if images is not None and not _leaves(images):
            images = None
        try:
            return super().__call__(images=images, text=text, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def _check_groups(self, options: Mapping[str, Any]) -> None:
        """Raise TypeError for a group of options that is no mapping, and for films and sounds."""
        for name in ("common_kwargs", *self._option_groups()):
            if not isinstance(group := options.get(name), Mapping | None):
                raise TypeError(
                    f"{name}: expected a mapping of options, got {type(group).__name__}"
                )
        for name in ("videos", "audio"):
            if options.get(name) is not None:
                raise TypeError(f"{name}: this processor takes images and text")

    def _option_groups(self) -> dict[str, Any]:
        """Of transformers' options those that hold options; some releases have plain ones too."""
        options = self.valid_processor_kwargs.__annotations__
        return {name: kind for name, kind in options.items() if hasattr(kind, "__annotations__")}

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Transformers logs an unknown option and leaves it out."""
        groups = self._option_groups()
        known = {"images", "text", "videos", "audio", *self.valid_processor_kwargs.__annotations__}
        known.update(self.image_processor.valid_kwargs.__annotations__)
        for group in groups.values():
            known.update(group.__annotations__)
        nested = (v for k, v in options.items() if k in groups and isinstance(v, Mapping))
        for name in (name for names in (options, *nested) for name in names):
            if name not in known:
                nearest = get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
                raise TypeError(f"unknown option {name!r}: did you mean {nearest!r}?")

    def _check_placeholders(self, images: Any, texts: list[str]) -> None:
        found = [text.count(self.image_token) for text in texts]
        nested = isinstance(images, list | tuple) and any(
            isinstance(i, list | tuple) for i in images
        )
        if nested:
            if len(images) != len(texts):
                raise ValueError(
                    f"images: {len(images)} lists of images for {len(texts)} texts; the image "
                    "tokens in the prompts should be the same as the number of images, by sample"
                )
            for sample, (own, count) in enumerate(zip(images, found, strict=True)):
                if (number := len(_leaves(own))) != count:
                    raise ValueError(
                        f"sample {sample}: the text has {count} image tokens {self.image_token!r}, "
                        f"expected {number}, one for each of its images"
                    )
        elif (number := len(_leaves(images))) != sum(found):
            raise ValueError(
                f"the text has {sum(found)} image tokens {self.image_token!r} (by sample: {found}),"
                f" expected {number}, one for each image"
            )

    def prepare_inputs_layout(  # type: ignore[override]
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> tuple[Any, Any, Any, Any]:
        """Fetch what is not at hand; opening is left to the image processor, which knows alpha."""
        if images is not None:
            images = [self.fetched(i, image) for i, image in enumerate(_leaves(images))]
        _, text, videos, audio = super().prepare_inputs_layout(text=text, **kwargs)
        return images, text, videos, audio

    def validate_inputs(  # type: ignore[override]
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> None:
        """Transformers' checks, less its count of images, which knows neither paths nor bytes.

        They were counted by sample, before they were fetched.
        """
        super().validate_inputs(images=images, text=None if images is not None else text, **kwargs)

    def fetched(self, index: int, image: Any) -> Any:
        """Image `index` of a call, for the image processor: a URL or base64 string as its bytes."""
        image = readable(image, f"image {index}", fetch=True)
        side = self.square_size
        return image if side is None else self.squared(index, image, side)

    def squared(self, index: int, image: Any, side: int) -> Image.Image:
        """Image `index` of a call, resized to the square that SigLIP's positions are made for."""
        exact = self.image_processor.exact
        pixels = load_pixels(image, name=index, exact=exact, **self.reading_options())
        pixels = resize_pixels(pixels, side, side, exact=exact)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def reading_options(self) -> dict[str, Any]:
        """`background` and `max_pixels` of the image processor, for `load_pixels`."""
        processor = self.image_processor
        return {"background": processor.background, "max_pixels": processor.max_pixels}

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        processed = self.image_processor(images, **kwargs)
        count = len(processed["image_grid_hw"])
        return processed, [self.replace_image_token(processed, i, **kwargs) for i in range(count)]

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one image, from its row of ``image_grid_hw``."""
        s = kwargs.get("pixel_shuffle_factor") or self.image_processor.pixel_shuffle_factor
        hp, wp = (int(n) for n in image_inputs["image_grid_hw"][image_idx])
        grid = shuffled_grid((hp, wp), s)
        return get_image_string(self.tokenizer, [grid], append_cls=self.append_cls)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders and patches of images of (height, width) pixels: for serving engines."""
        if image_sizes is None:
            return MultiModalData()
        if self.square_size is not None:
            image_sizes = [(self.square_size, self.square_size)] * len(image_sizes)
        s = kwargs.get("pixel_shuffle_factor") or self.image_processor.pixel_shuffle_factor
        grids = [self.image_processor.get_patch_grid(h, w, kwargs) for h, w in image_sizes]
        return MultiModalData(
            num_image_tokens=[image_token_count(grid, s, self.append_cls) for grid in grids],
            num_image_patches=[hp * wp for hp, wp in grids],
        )

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """Render a chat, and process it with ``tokenize=True``; see transformers' method.

        The content of a message is a string, or a list of ``{"type": "text", "text": ...}`` and
        ``{"type": "image", "image" | "path" | "url" | "base64": ...}``. Messages and parts may be
        objects: data classes, and pydantic's models as OpenAI's.

        Raises:
            TypeError: the conversation is no list of messages, or the template no text.
            ValueError: a message is not of that form, the chat template refuses the conversation,
                a text contains the image token, or the answers can't be found.
        """
        if not isinstance(chat_template, str | None):
            raise TypeError(f"chat_template: expected a text, got {type(chat_template).__name__}")
        conversation = plain_chats(conversation)
        for where, kind, text in blocks(conversation):
            if kind == "text" and self.image_token in text:
                raise ValueError(
                    f"{where}: the text contains the image token {self.image_token!r}; put images "
                    'into the list of contents, as {"type": "image", ...}'
                )
        masks = bool(kwargs.pop("return_assistant_tokens_mask", False))
        if masks and not (kwargs.get("tokenize") and kwargs.get("return_dict")):
            raise ValueError(
                "return_assistant_tokens_mask=True needs tokenize=True and return_dict=True"
            )
        template = self._template(chat_template)
        with naming_the_template():
            inputs: Any = super().apply_chat_template(conversation, template, **kwargs)
        if masks:
            # By transformers 5.17 padding, and images in front of an answer, misplace the marks.
            found = self._assistant_masks(conversation, inputs, template, kwargs)
            inputs["assistant_masks"] = found
        return inputs

    def _template(self, given: str | None) -> str | None:
        """The text of a template that is given, or named, or else of the processor's own."""
        known: Any = self.chat_template
        if isinstance(known, Mapping):
            named = given or ("default" if "default" in known else None)
            return known[named] if named in known else self._with_images(given)
        return known if given is None else self._with_images(given)

    def chat_pieces(
        self, chat: Any, chat_template: str | None = None, **options: Any
    ) -> list[Piece]:
        """A chat up to its last answer, rendered and cut into what is given and what is said.

        Args:
            chat: Messages.
            chat_template: As in :meth:`apply_chat_template`.
            **options: Of the template.

        Raises:
            ValueError: the template does not take the chat, or neither marks the answers nor leaves
                the beginning of a chat as it was when the chat goes on.
        """
        template = self._template(chat_template)
        if template is not None and marks_answers(template):
            options = {**self.tokenizer.special_tokens_map, **options}
            with naming_the_template():
                rendered: Any = render_jinja_template(
                    conversations=[plain_chats(chat)],
                    chat_template=template,
                    return_assistant_tokens_mask=True,
                    **options,
                )
            texts, marks = rendered
            return marked_pieces(texts[0], marks[0])

        def render(messages: Any, add_generation_prompt: bool = False) -> str:
            given = options | {"add_generation_prompt": add_generation_prompt}
            return self.apply_chat_template(messages, template, **given)

        return answer_pieces(render, chat)

    def _assistant_masks(
        self, conversation: Any, inputs: BatchFeature, template: str | None, options: dict[str, Any]
    ) -> torch.Tensor:
        """1 where a token is of an answer, in the layout of ``input_ids``; see `answers.py`."""
        used = {k: v for k, v in options.items() if k not in ("tokenize", "return_dict")}
        batched = isinstance(conversation[0], list | tuple)
        rows = torch.as_tensor(inputs["input_ids"])
        real = torch.as_tensor(inputs["attention_mask"]).bool()
        count = len(inputs.get("image_grid_hw", ()))
        images = (self.replace_image_token(inputs, i) for i in range(count))
        masks = torch.zeros_like(rows)
        for i, chat in enumerate(conversation if batched else [conversation]):
            pieces = self.chat_pieces(chat, template, **used)
            whole = self.apply_chat_template(chat, template, **used)
            pieces.append((whole[sum(len(piece) for piece, _ in pieces) :], False))
            ids, said = tokens_of(self.tokenizer, pieces, self.image_token, images)
            given = rows[i][real[i]].tolist()
            first = 0 if ids[: len(given)] == given else len(ids) - len(given)  # where it was cut
            if first < 0 or ids[first : first + len(given)] != given:
                raise ValueError(
                    f"conversation {i}: its {len(ids)} tokens are not those of the inputs, which "
                    "were tokenised with other options; so its answers can't be marked"
                )
            kept = said[first : first + len(given)]
            masks[i, real[i]] = torch.tensor(kept, dtype=masks.dtype)
        return masks


def _leaves(images: Any) -> list[Any]:
    """Nested lists of images as one flat list."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return list(images) if getattr(images, "ndim", 3) == 4 else [images]
    return [leaf for image in images for leaf in _leaves(image)]
