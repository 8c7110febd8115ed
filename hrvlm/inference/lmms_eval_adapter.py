"""The model ``hrvlm`` of lmms-eval, for its tasks that generate text from images.

    lmms-eval --model hrvlm --model_args pretrained=DIRECTORY --tasks mmstar --batch_size 8

lmms-eval finds it by the entry point that pyproject.toml names; nothing of it is imported before.
Written for lmms-eval 0.7.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .chat import GenerateOptions, answer_batch, load_vlm

if TYPE_CHECKING:
    _Model = Any
else:
    try:
        from lmms_eval.api.model import lmms as _Model
    except ImportError:  # the logic below does without
        _Model = object

MAX_NEW_TOKENS = 1024  # for tasks that set no limit
_KNOWN = {"max_new_tokens", "temperature", "do_sample", "num_beams", "until"}
_SAMPLING = {"top_p", "top_k"}  # mean nothing to a greedy search
_OTHERS = {"image_aspect_ratio", "visual_cot"}  # of other models, in the files of tasks


def manifest() -> Any:
    """What lmms-eval registers: the name, and where the class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="hrvlm", chat_class_path=f"{__name__}.{HighResolutionVLM.__qualname__}"
    )


class HighResolutionVLM(_Model):
    """A VisionLanguageModel that answers lmms-eval's requests.

    Args:
        pretrained: Directory (or hub id) of a VisionLanguageModel with its processor.
        device: Default: the GPU if there is one; with several processes, each has its own.
        dtype: "float32", "bfloat16", or "auto" for the checkpoint's.
        batch_size: Requests in a batch.
        system_prompt: Put before every conversation.
        max_new_tokens: Longest answer, for tasks that set no limit.
    """

    is_simple = False  # requests come as messages

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        system_prompt: str = "",
        max_new_tokens: int = MAX_NEW_TOKENS,
    ):
        super().__init__()
        self.batch_size = int(batch_size)
        self.max_new_tokens = int(max_new_tokens)
        self.system_prompt = system_prompt
        where = device or _own_device()
        self.processor, self.model = load_vlm(pretrained, device=where, dtype=dtype)
        self.device = self.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests, in their order.

        A request's ``args`` are (context, doc_to_messages, options of generation, document id,
        task, split). Requests with equal options are batched.

        Raises:
            ValueError: a request has videos or audio, or an option that is not supported.
        """
        answers: dict[int, str] = {}
        for options, batch in _batches(requests, self.batch_size):
            conversations = [self._conversation(requests[i]) for i in batch]
            decoding, stops = self._decoding(options)
            texts = answer_batch(self.processor, self.model, conversations, decoding)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = cut_at(text, stops)
                self.cache_hook.add_partial(
                    "generate_until", (requests[i].args[0], options), answers[i]
                )
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported: raises NotImplementedError."""
        raise NotImplementedError("hrvlm answers tasks of lmms-eval that generate text only")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: raises NotImplementedError."""
        raise NotImplementedError("hrvlm answers tasks of lmms-eval with one round only")

    def _conversation(self, request: Any) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        if self.system_prompt:
            system = {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}
            messages = [system, *messages]
        return [
            {"role": m["role"], "content": [_content(c, task, doc_id) for c in m["content"]]}
            for m in messages
        ]

    def _decoding(self, options: Mapping[str, Any]) -> tuple[GenerateOptions, list[str]]:
        sampled = options.get("do_sample", True) and float(options.get("temperature") or 0) > 0
        known = _KNOWN | _OTHERS | (set() if sampled else _SAMPLING)
        if unknown := sorted(options.keys() - known):
            raise ValueError(f"generation_kwargs: {unknown} are not supported")
        stops = options.get("until") or []
        decoding = GenerateOptions(
            max_new_tokens=int(options.get("max_new_tokens") or self.max_new_tokens),
            temperature=float(options["temperature"]) if sampled else 0.0,
            num_beams=int(options.get("num_beams") or 1),
        )
        return decoding, [stops] if isinstance(stops, str) else list(stops)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings, which is left out."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))]


def _batches(requests: Sequence[Any], size: int) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
    """Options, and the indices of at most `size` requests that have them."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.args[2].items())), []).append(i)
    for indices in groups.values():
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            yield requests[batch[0]].args[2], batch


def _content(content: Mapping[str, Any], task: str, doc_id: Any) -> dict[str, Any]:
    """One part of a message, as transformers has it: lmms-eval calls an image its "url"."""
    if content["type"] == "text":
        return {"type": "text", "text": content["text"]}
    if content["type"] == "image":
        return {"type": "image", "image": content["url"]}
    raise ValueError(f"{task}, document {doc_id}: {content['type']!r} is not supported")


def _own_device() -> str | None:
    """The GPU of this process where there are several, as accelerate and torchrun number them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return None
