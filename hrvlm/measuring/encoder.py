"""``hrvlm bench``: the encoder against transformers' DINOv3ViTModel, on the machine at hand.

Both have the same random weights, get the same random pixels and have to agree before any time is
taken. They take turns in one process (:mod:`hrvlm.measuring.timing`). Images of one size are a
batch for both; images of mixed sizes go through the encoder as one pack, and through transformers
one by one, its only exact way. The benchmarks of the repository have the other peers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hrvlm_kernels.backends import resolve

from ..encoder.cost import Architecture, forward_cost
from ..machine import default_dtype, describe_device, torch_dtype
from .attention_kernel import sdpa_of
from .timing import Timing, median_ratio, peak_memory, take_turns

if TYPE_CHECKING:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    from ..encoder.vision_transformer import DINOv3Encoder

OURS, PEER, COMPILED = "hrvlm", "transformers", "transformers, compiled"
# The largest relative difference of two correct encoders: rounding differs, and in bfloat16 it adds
# up over the blocks. A wrong position or a token of another image gives 0.1 and more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class BenchOptions:
    """What to run.

    Attributes:
        model: Key of :data:`hrvlm.checkpoints.family.CONFIGS`.
        sizes: Side of the square images of each uniform batch, in pixels.
        tokens: About how many tokens make a batch.
        mixed: Number of images of mixed sizes, whose longer sides go from the smallest to the
            largest of `sizes`.
        compiled: Also time torch.compile of transformers' model.
        seconds: How long the rounds of one comparison may take.
        layers: Number of blocks; default: the model's.
    """

    model: str = "vitb16"
    sizes: tuple[int, ...] = (224, 768, 1024)
    tokens: int = 32768
    mixed: int = 32
    compiled: bool = False
    seconds: float = 3.0
    layers: int | None = None


# Sizes that a laptop does in seconds.
ON_CPU = BenchOptions("vits16", sizes=(224, 320, 448), tokens=800, mixed=4, seconds=3.0)


@dataclass(frozen=True)
class Measurement:
    """One way to run one set of images.

    Attributes:
        name: Who ran.
        median_s: Seconds for all images.
        p20_s: A fifth of the rounds were faster.
        p80_s: A fifth of the rounds were slower.
        images_per_second: By the median.
        memory_bytes: Peak beside weights and input; None without a GPU.
        ratio: How many times faster hrvlm is, median over the rounds; None for hrvlm itself.
        sdpa: The kernel that torch's scaled_dot_product_attention chose, if it ran.
    """

    name: str
    median_s: float
    p20_s: float
    p80_s: float
    images_per_second: float
    memory_bytes: int | None
    ratio: float | None
    sdpa: str | None


@dataclass(frozen=True)
class BenchCase:
    """One set of images.

    Attributes:
        name: "224x224" or "mixed".
        images: How many.
        tokens: Prefix tokens included.
        flops: Of the matrix products and attention in one forward (:mod:`hrvlm.encoder.cost`).
        difference: Relative difference of the results.
        rivals: Who ran, hrvlm last.
    """

    name: str
    images: int
    tokens: int
    flops: int
    difference: float
    rivals: tuple[Measurement, ...]


@dataclass(frozen=True)
class BenchReport:
    """All comparisons of a run.

    Attributes:
        model: What was run.
        dtype: Of weights and activations.
        backend: What ran the attention.
        machine: Device and versions (:func:`hrvlm.machine.describe_device`).
        cases: In order.
    """

    model: str
    dtype: str
    backend: str
    machine: dict[str, Any]
    cases: tuple[BenchCase, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bench(
    device: torch.device,
    options: BenchOptions | None = None,
    *,
    dtype: torch.dtype | None = None,
    on_case: Callable[[BenchCase], None] | None = None,
) -> BenchReport:
    """Time the encoder against transformers on `device`.

    Args:
        device: Where to run.
        options: Default: :data:`ON_CPU` on the CPU, else ``BenchOptions()``.
        dtype: float32 or bfloat16; default: bfloat16 on a GPU, float32 on the CPU.
        on_case: Called after each comparison.

    Raises:
        ValueError: an unknown model or dtype, or a size that is no multiple of the patch size.
        RuntimeError: the results of two rivals differ: there are no times then.
    """
    from ..checkpoints.family import get_config
    from ..checkpoints.sizes import patch_size_of

    if options is None:
        options = ON_CPU if device.type == "cpu" else BenchOptions()
    if dtype is None:
        dtype = torch_dtype(default_dtype(device))
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype}")
    config = get_config(options.model)
    if options.layers is not None:
        if options.layers < 1:
            raise ValueError(f"layers={options.layers}: expected at least 1")
        config = get_config(options.model, num_hidden_layers=options.layers)
    sets = image_sets(options, patch_size_of(config), 1 + config.num_register_tokens)
    theirs, ours = random_pair(config, device, dtype)
    cases = []
    with torch.inference_mode():
        for name, grids in sets.items():
            case = _compare(name, grids, theirs, ours, options)
            cases.append(case)
            if on_case:
                on_case(case)
    example = torch.empty(0, dtype=dtype, device=device)
    label = f"{options.model}, {config.num_hidden_layers} layers, random weights"
    return BenchReport(
        model=label,
        dtype=str(dtype).removeprefix("torch."),
        backend=resolve("varlen_attention", "auto", example),
        machine=describe_device(device),
        cases=tuple(cases),
    )


def image_sets(
    options: BenchOptions, patch_size: int, num_prefix_tokens: int
) -> dict[str, list[tuple[int, int]]]:
    """The patch grids of each set of images, by its name.

    Raises:
        ValueError: there is no size, one is not a positive multiple of `patch_size`, or a number
            is out of range.
    """
    for name, least in (("tokens", 1), ("mixed", 0), ("seconds", 0)):
        if not (value := getattr(options, name)) >= least:
            raise ValueError(f"{name}={value}: expected at least {least}")
    if not options.sizes:
        raise ValueError("sizes: expected at least one, got none")
    sets = {}
    for size in options.sizes:
        if size < 1 or size % patch_size:
            raise ValueError(f"sizes: {size} is not a positive multiple of {patch_size} pixels")
        side = size // patch_size
        count = max(1, round(options.tokens / (num_prefix_tokens + side * side)))
        sets[f"{size}x{size}"] = [(side, side)] * count
    if options.mixed:
        shortest, longest = (pick(options.sizes) // patch_size for pick in (min, max))
        sets["mixed"] = mixed_grids(options.mixed, shortest=shortest, longest=longest)
    return sets


def mixed_grids(
    count: int, *, shortest: int = 14, longest: int = 64, seed: int = 0
) -> list[tuple[int, int]]:
    """A fixed draw of patch grids with aspect ratios from 1:4 to 4:1.

    The longer side is uniform over `shortest` to `longest` patches, the ratio is ``4 ** v`` with v
    uniform, and half the images stand upright.

    Returns:
        `count` grids (height, width), the same on every machine.
    """
    draw, grids = random.Random(seed), []
    for _ in range(count):
        u, v, w = draw.random(), draw.random(), draw.random()
        long = shortest + int((longest - shortest + 1) * u)
        short = max(round(long / 4**v), -(-long // 4))
        grids.append((long, short) if w < 0.5 else (short, long))
    return grids


def random_pair(
    config: DINOv3ViTConfig, device: torch.device, dtype: torch.dtype, *, seed: int = 0
) -> tuple[DINOv3ViTModel, DINOv3Encoder]:
    """The model of transformers ("sdpa") and ours with the same random weights.

    Made on the device: the CPU would take minutes to draw those of the largest model.
    """
    from transformers import DINOv3ViTModel

    from ..encoder.vision_transformer import DINOv3Encoder

    with torch.device("meta"):
        theirs = DINOv3ViTModel._from_config(config, attn_implementation="sdpa", dtype=dtype)
        ours = DINOv3Encoder._from_config(config, dtype=dtype)
    for model in (theirs, ours):
        model.to_empty(device=device)
        model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            _fill(name, parameter, generator)
    restore_frequencies(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Weights that keep the size of activations: every block then counts in the result."""
    if parameter.ndim > 1 and "token" not in name:
        parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    elif "norm" in name and name.endswith("weight"):
        parameter.normal_(1, 0.1, generator=generator)
    else:
        parameter.normal_(0, 0.3, generator=generator)


def restore_frequencies(model: DINOv3ViTModel) -> None:
    """Give a model that was made without memory its RoPE frequencies, which no file holds."""
    rope: Any = model.rope_embeddings
    exponents = torch.arange(0, 1, 4 / rope.head_dim, dtype=torch.float32)
    frequencies = 1 / rope.base**exponents
    rope.inv_freq = nn.Buffer(frequencies.to(model.device), persistent=False)


def random_images(
    grids: Sequence[tuple[int, int]], patch_size: int, like: Tensor, *, seed: int = 1
) -> list[Tensor]:
    """Normal pixels ``[3, H, W]`` of images with these patch grids, in the dtype of `like`."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return [
        torch.randn(
            3, patch_size * hp, patch_size * wp,
            generator=generator, device=like.device, dtype=like.dtype,
        )
        for hp, wp in grids
    ]  # fmt: skip


def _compare(
    name: str,
    grids: Sequence[tuple[int, int]],
    theirs: DINOv3ViTModel,
    ours: DINOv3Encoder,
    options: BenchOptions,
) -> BenchCase:
    images = random_images(grids, ours.patch_size, next(ours.parameters()))
    runs = _rivals(name, images, theirs, ours, options.compiled)
    expected = torch.cat([x.flatten(0, -2) for x in runs[PEER]()])
    difference, sdpa = 0.0, {}
    for rival, run in runs.items():
        results, sdpa[rival] = sdpa_of(run)
        got = torch.cat([x.flatten(0, -2) for x in results])
        difference = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
        if not difference <= TOLERANCE[expected.dtype]:
            raise RuntimeError(
                f"{name}: {rival} and {PEER} differ by {difference:.1e}: no times are taken"
            )
    device = expected.device
    memory = {rival: peak_memory(run, device) for rival, run in runs.items()}
    timings = take_turns(runs, device, budget_s=options.seconds)
    architecture = Architecture.from_config(ours.config)
    return BenchCase(
        name=name,
        images=len(grids),
        tokens=sum(ours.num_prefix_tokens + hp * wp for hp, wp in grids),
        flops=sum(forward_cost(architecture, hp * wp).total for hp, wp in grids),
        difference=difference,
        rivals=tuple(
            _measured(rival, timing, timings[OURS], len(grids), memory[rival], sdpa[rival])
            for rival, timing in timings.items()
        ),
    )


def _rivals(
    name: str,
    images: Sequence[Tensor],
    theirs: DINOv3ViTModel,
    ours: DINOv3Encoder,
    compiled: bool,
) -> dict[str, Callable[[], list[Tensor]]]:
    inputs = [x[None] for x in images] if name == "mixed" else [torch.stack(list(images))]
    packed = list(images) if name == "mixed" else inputs[0]

    def one_by_one(model: Callable[..., Any]) -> Callable[[], list[Tensor]]:
        return lambda: [model(x).last_hidden_state for x in inputs]

    runs = {PEER: one_by_one(theirs)}
    if compiled:
        runs[COMPILED] = one_by_one(torch.compile(theirs, dynamic=name == "mixed"))
    return runs | {OURS: lambda: [ours(packed)[0]]}


def _measured(
    name: str, timing: Timing, ours: Timing, images: int, memory: int | None, sdpa: str | None
) -> Measurement:
    return Measurement(
        name=name,
        median_s=timing.median,
        p20_s=timing.quantile(0.2),
        p80_s=timing.quantile(0.8),
        images_per_second=images / timing.median,
        memory_bytes=memory,
        ratio=None if name == OURS else median_ratio(timing, ours),
        sdpa=sdpa,
    )
