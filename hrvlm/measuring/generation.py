"""How fast a model answers, by the size of the image: first token, tokens per second, memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..images.geometry import positive_int, positive_pair
from ..inference.chat import GenerateOptions, chat_inputs, decoding, load_vlm, user_message

SIZES = ((224, 224), (448, 448), (896, 896))
PROMPT = "What does the image show?"
_RESET_PEAK = "5"  # for /proc/self/clear_refs, see proc(5)


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how often."""

    sizes: tuple[tuple[int, int], ...] = SIZES  # (height, width)
    new_tokens: int = 64
    repeats: int = 5
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        """Refuse what can't be measured, before a model is loaded."""
        if not self.sizes or not all(map(positive_pair, self.sizes)):
            raise ValueError(f"sizes must be positive (height, width), got {self.sizes}")
        if self.new_tokens < 2:
            raise ValueError(f"new_tokens must be >= 2 to have a speed, got {self.new_tokens}")
        positive_int("repeats", self.repeats)


@dataclass(frozen=True)
class Measured:
    """One image size; times are medians over the repeats, in seconds.

    Attributes:
        size: (height, width) of the image, in pixels.
        image_tokens: What the language model sees of it.
        prompt_tokens: These and the text.
        prepare_seconds: Processor: resize, normalise, tokenise, move to the device.
        first_token_seconds: From the image in memory to the first token, preparation included.
        tokens_per_second: Of the tokens after the first.
        peak_bytes: Largest over the repeats: of the GPU what torch allocated; of the CPU the
            process's resident memory (Linux), model included. None where it can't be told.
    """

    size: tuple[int, int]
    image_tokens: int
    prompt_tokens: int
    prepare_seconds: float
    first_token_seconds: float
    tokens_per_second: float
    peak_bytes: int | None


@dataclass(frozen=True)
class BenchResult:
    """All sizes, and what they ran on."""

    model: str
    device: str
    dtype: str
    threads: int | None  # of torch, on a CPU
    new_tokens: int
    repeats: int
    rows: tuple[Measured, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bench_generate(
    model: str,
    options: BenchOptions | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    on_run: Callable[[int], None] = lambda _: None,
) -> BenchResult:
    """Measure a model on noise images of the given sizes, after one run of each to warm up.

    The model resizes images as it always does (``max_img_size``), so that large sizes may end up
    with equal token counts. Exactly ``new_tokens`` tokens are generated, whatever they are.

    Raises:
        ValueError: there is no such model, or an image's tokens do not fit its context.
    """
    options = options or BenchOptions()
    processor, vlm = load_vlm(model, device=device, dtype=dtype)
    rows = []
    for height, width in options.sizes:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        rows.append(_measure(processor, vlm, Image.fromarray(pixels), options, on_run))
    on_gpu = vlm.device.type == "cuda"
    return BenchResult(
        model=model,
        device=torch.cuda.get_device_name(vlm.device) if on_gpu else str(vlm.device),
        dtype=str(vlm.dtype).removeprefix("torch."),
        threads=torch.get_num_threads() if vlm.device.type == "cpu" else None,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        rows=tuple(rows),
    )


class _Clock:
    """A streamer of `generate` that keeps the time of each call."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then token by token; they have come to the CPU, so the GPU is done."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def _measure(
    processor: Any, vlm: Any, image: Any, options: BenchOptions, on_run: Callable[[int], None]
) -> Measured:
    arguments = decoding(GenerateOptions(options.new_tokens)) | {
        "min_new_tokens": options.new_tokens
    }
    prepare, first, speed, peaks = [], [], [], []
    image_tokens = prompt_tokens = 0
    for repeat in range(options.repeats + 1):
        _reset_peak(vlm.device)
        clock = _Clock()
        start = time.perf_counter()
        inputs = chat_inputs(processor, [user_message(options.prompt, [image])]).to(vlm.device)
        prepared = time.perf_counter()
        with torch.inference_mode():
            vlm.generate(**inputs, **arguments, streamer=clock)
        prompt_tokens = inputs["input_ids"].shape[1]
        image_tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
        on_run(1)
        if repeat == 0:
            continue
        _, first_token, *_, last = clock.times
        prepare.append(prepared - start)
        first.append(first_token - start)
        speed.append((options.new_tokens - 1) / (last - first_token))
        peaks.append(_peak(vlm.device))
    known = [peak for peak in peaks if peak is not None]
    return Measured(
        size=(image.height, image.width),
        image_tokens=image_tokens,
        prompt_tokens=prompt_tokens,
        prepare_seconds=median(prepare),
        first_token_seconds=median(first),
        tokens_per_second=median(speed),
        peak_bytes=max(known) if len(known) == len(peaks) else None,
    )


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (refs := Path("/proc/self/clear_refs")).exists():
        refs.write_text(_RESET_PEAK)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.exists():
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024
