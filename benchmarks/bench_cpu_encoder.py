"""The encoder's torch path on the CPU against transformers' DINOv3ViTModel.

    python -m benchmarks.bench_cpu_encoder              # medians and the ratio of one run
    python -m pytest benchmarks/bench_cpu_encoder.py    # the same under pytest-benchmark

A uniform batch and images of mixed sizes, which transformers takes one by one: it has no other
exact way. ViT-S/16 with random weights.
"""

from __future__ import annotations

import argparse

import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from benchmarks.interleaved import interleave, median_ratio
from hrvlm import DINOv3Encoder

# Patch grids of the mixed batch: 64 to 640 px, aspect ratios 1:4 to 4:1.
MIXED = [(14, 14), (6, 24), (20, 30), (10, 40), (32, 8), (4, 4), (14, 20), (24, 24)]
UNIFORM = [(14, 14)] * 8
SUITES = {"uniform": UNIFORM, "mixed": MIXED}


def make_models(layers: int) -> tuple[DINOv3ViTModel, DINOv3Encoder]:
    """Both models with the same random ViT-S/16 weights, `layers` deep."""
    torch.manual_seed(0)
    config = DINOv3ViTConfig(num_register_tokens=4, num_hidden_layers=layers)
    theirs = DINOv3ViTModel(config).eval()
    ours = DINOv3Encoder(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make_images(grids: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Random normalised images with these patch grids."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 16 * hp, 16 * wp, generator=generator) for hp, wp in grids]


def make_rivals(suite: str, layers: int) -> dict:
    """The two ways to encode the suite's images, after checking that they agree."""
    theirs, ours = make_models(layers)
    images = make_images(SUITES[suite])
    if suite == "uniform":
        batch = torch.stack(images)
        rivals = {"transformers": lambda: [theirs(batch).last_hidden_state.flatten(0, 1)]}
    else:
        rivals = {"transformers": lambda: [theirs(x[None]).last_hidden_state[0] for x in images]}
    rivals["hrvlm"] = lambda: ours(images).last_hidden_state
    expected, got = torch.cat(rivals["transformers"]()), rivals["hrvlm"]()
    error = ((got - expected).norm() / expected.norm()).item()
    if not error <= 1e-5:
        raise AssertionError(f"{suite}: hrvlm and transformers differ by {error:.1e}: no timing")
    return rivals


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("rival", ["transformers", "hrvlm"])
def bench_cpu_encoder(benchmark, suite, rival):
    benchmark.group = f"cpu encoder, {suite}"
    with torch.inference_mode():
        run = make_rivals(suite, layers=2)[rival]
        benchmark.pedantic(run, rounds=3, warmup_rounds=1)


def main() -> None:
    """Print a line per suite: medians and how many times faster hrvlm is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(
        f"ViT-S/16, {args.layers} layers, float32, {torch.get_num_threads()} threads, "
        f"{args.rounds} rounds in turn"
    )
    with torch.inference_mode():
        for suite, grids in SUITES.items():
            timings = interleave(make_rivals(suite, args.layers), rounds=args.rounds)
            ratio = median_ratio(timings["transformers"], timings["hrvlm"])
            tokens = sum(hp * wp for hp, wp in grids)
            medians = ", ".join(
                f"{name} {timing.median * 1e3:.0f} ms" for name, timing in timings.items()
            )
            print(f"{suite:8} {len(grids)} images, {tokens} patches: {medians}; ratio {ratio:.2f}x")


if __name__ == "__main__":
    main()
