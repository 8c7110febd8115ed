"""`transformers serve` with our models: its server, its command line, our classes made known.

The server of transformers 5.17 finds classes by name in two places that registration with the Auto
classes does not reach: the table of multimodal models, and transformers' own namespace. It answers
500 or 422 to a request that is wrong, passes over fields that it does not honour, and decodes
images where it should listen to others.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hrvlm_kernels.packed_tables import is_int

if TYPE_CHECKING:
    from ..vlm.processors import VLMProcessor

Refusal = Callable[[str, Any], str | None]

_IMAGE_TYPES = ("image_url", "input_image")


def _is_number(least: float, most: float) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and least <= v <= most


def _is_count(least: int) -> Callable[[Any], bool]:
    return lambda v: is_int(v, least)


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
    )


_TOKENS = (_is_count(1), "a whole number of at least 1")
_PENALTY = (_is_number(-2, 2), "a number from -2 to 2")
# What the fields of a request are to be: the server hands them on to Python and to transformers.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), _TOKENS),
    "temperature": (_is_number(0, 100), "a number from 0 on"),
    "top_p": (_is_number(1e-9, 1), "a number above 0, and up to 1"),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), _PENALTY),
    "seed": (_is_count(0), "a whole number from 0 on"),
    "n": (lambda v: v == 1, "1: one answer to a request"),
    "stream": (lambda v: isinstance(v, bool), "true or false"),
    "stop": (_is_stop, "a text or a list of texts"),
    "response_format": (lambda v: v == {"type": "text"}, '{"type": "text"}'),
    "text": (lambda v: v == {"format": {"type": "text"}}, '{"format": {"type": "text"}}'),
    "logprobs": (lambda v: v is False, "false: an answer is text alone"),
    "top_logprobs": (lambda v: is_int(v, 0) and v == 0, "0: an answer is text alone"),
    "modalities": (lambda v: v == ["text"], '["text"]'),
    "logit_bias": (lambda v: isinstance(v, dict), "an object"),
    "tools": (lambda v: isinstance(v, list), "a list"),
    "generation_config": (lambda v: isinstance(v, str) and v[:1] == "{", "an object as text"),
}


def register_for_serving(*, fetch: bool = False, refuse: Refusal = lambda *_: None) -> None:
    """Let the server of transformers load a VisionLanguageModel, in this process.

    Images that a client sends are decoded in workers (`worker.py`); files of the server's own
    are not read for a client, and addresses in the network only with `fetch`: the server may reach
    what the client may not. `refuse` is told the model and a picture, and says why that model is
    not asked about it, or None.

    The name goes into the server's table of models that take images. Auto classes that walk through
    that table would look for a module of transformers, so this is for a process that only serves.
    """
    from transformers import AutoModelForMultimodalLM
    from transformers.cli.serving import server
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.models.auto import modeling_auto

    from ..vlm.config import VLMConfig
    from ..vlm.processors import VLMProcessor
    from ..vlm.vision_language_model import VisionLanguageModel

    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[VLMConfig.model_type] = (
        VisionLanguageModel.__name__
    )
    AutoModelForMultimodalLM.register(VLMConfig, VisionLanguageModel, exist_ok=True)
    VLMProcessor.fetched = _decoded_before  # type: ignore[assignment, method-assign]
    handlers: tuple[Any, ...] = (ChatCompletionHandler, ResponseHandler)
    for handler in handlers:
        handler.handle_request = _naming_bad_requests(handler.handle_request, fetch, refuse)
    app: Any = server
    app.build_server = _saying_what_is_wrong(app.build_server)
    manager: Any = ModelManager
    if hasattr(manager, "get_gen_models"):  # later ones list the served model
        manager.get_gen_models = _models(manager.get_gen_models)


def _naming_bad_requests(
    handle: Callable[..., Awaitable[Any]], fetch: bool, refuse: Refusal
) -> Callable[..., Awaitable[Any]]:
    """A handler that decodes the images of a request first, and answers 400 if it is wrong."""
    decoding = asyncio.Semaphore(os.cpu_count() or 1)

    async def handle_request(handler: Any, body: dict[str, Any], request_id: str) -> Any:
        from fastapi import HTTPException

        try:
            _check_fields(body)
            if "input" not in body:
                _check_messages(body.get("messages"))
            _, model, processor = handler._resolve_model(body)
            for index, part in enumerate(_image_parts(body.get("messages") or body.get("input"))):
                async with decoding:  # the loop goes on with the requests of others
                    image = await asyncio.to_thread(_decoded, processor, index, part, fetch)
                if reason := refuse(model.config.name_or_path, image):
                    raise ValueError(f"image {index}: {reason}")
                part["image_url"] = {"url": image}
            return await handle(handler, body, request_id)
        except KeyError as error:
            raise HTTPException(400, f"the request lacks {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise HTTPException(400, str(error)) from error

    return handle_request


def _saying_what_is_wrong(build: Callable[..., Any]) -> Callable[..., Any]:
    """A maker of servers that answer 400 where FastAPI and transformers answer 422."""

    def build_server(*args: Any, **kwargs: Any) -> Any:
        from fastapi import HTTPException
        from fastapi.exception_handlers import http_exception_handler
        from fastapi.exceptions import RequestValidationError

        async def answer(request: Any, error: Any) -> Any:
            if isinstance(error, RequestValidationError):
                first = error.errors()[0]
                why = first.get("ctx", {}).get("error", "")
                why = why and f" ({why}, character {first['loc'][-1]})"
                error = HTTPException(400, f"the body of the request: {first['msg']}{why}")
            elif error.status_code == 422:
                error.status_code = 400
            return await http_exception_handler(request, error)

        app = build(*args, **kwargs)
        for kind in (HTTPException, RequestValidationError):
            app.add_exception_handler(kind, answer)
        return app

    return build_server


def _check_fields(body: dict[str, Any]) -> None:
    for name, (fits, expected) in _FIELDS.items():
        if (value := body.get(name)) is not None and not fits(value):
            raise ValueError(f"{name}={value!r:.60}: expected {expected}")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: expected a list of messages, got {messages!r:.60}")
    for m, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {m}: expected an object with a role, got {message!r:.60}")
        content = message.get("content")
        if not isinstance(content, str | list | None):
            raise ValueError(f"message {m}: expected a text or a list, got {content!r:.60}")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise ValueError(f"message {m}: expected parts with a type, got {part!r:.60}")
            if part["type"] == "image":  # which the server would leave out
                raise ValueError(
                    f'message {m}: expected an image as {{"type": "image_url", "image_url": '
                    f'{{"url": ...}}}}, got {part!r:.60}'
                )
        if not isinstance(message.get("tool_calls"), list | None):
            raise ValueError(f"message {m}: tool_calls: expected a list")


def _image_parts(messages: Any) -> Iterator[dict[str, Any]]:
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") in _IMAGE_TYPES:
                yield part


def _decoded(processor: VLMProcessor, index: int, part: dict[str, Any], fetch: bool) -> Any:
    """A stranger's image: by URL or base64 only, decoded in a worker."""
    from ..images.fetch import fetch_image, is_text_image, is_url
    from ..images.formats import ImageError
    from ..images.worker import load_image_in_worker

    given = part.get("image_url")
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str) or not is_text_image(url):
        raise ImageError(f"image {index}: expected a URL or a data URI, got {url!r:.60}")
    if is_url(url) and not fetch:
        raise ImageError(
            f"image {index} is a URL, {url!r:.100}: this server fetches none (hrvlm serve --fetch)"
        )
    data = fetch_image(url, f"image {index}")
    return load_image_in_worker(data, name=index, **processor.reading_options())


def _decoded_before(processor: VLMProcessor, index: int, image: Any) -> Any:
    """The images of a request are pictures by now; what is not one came by another way."""
    from PIL import Image

    from ..images.formats import ImageError

    if not isinstance(image, Image.Image):
        raise ImageError(f"image {index}: expected a URL or a data URI in image_url")
    side = processor.square_size
    return image if side is None else processor.squared(index, image, side)


def _models(in_cache: Callable[..., list[dict[str, Any]]]) -> Callable[..., list[dict[str, Any]]]:
    """The model that is served, and those of the cache, where there is one."""

    def models(manager: Any, cache_dir: str | None = None) -> list[dict[str, Any]]:
        from huggingface_hub import CacheNotFound

        try:
            found = in_cache(cache_dir)
        except CacheNotFound:
            found = []
        if manager.force_model and manager.force_model not in [model["id"] for model in found]:
            found.insert(0, {"id": manager.force_model, "object": "model", "owned_by": ""})
        return found

    return models


def serve(arguments: Sequence[str], refuse: Refusal = lambda *_: None) -> None:
    """Run ``transformers serve`` with these arguments, until it is stopped.

    ``--fetch`` among them is ours: images of clients that are URLs are fetched; `refuse` as in
    :func:`register_for_serving`.

    Raises:
        ImportError: the server's dependencies are not installed (``pip install 'hrvlm[serve]'``).
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("the server needs more packages: pip install 'hrvlm[serve]'")
    register_for_serving(fetch="--fetch" in arguments, refuse=refuse)
    arguments = [argument for argument in arguments if argument != "--fetch"]
    from transformers.cli.transformers import app

    app(["serve", *arguments], prog_name="transformers")
