"""The charts of a set of result files, by name: ``<kind>-<suite>-<device>``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.case import OURS
from benchmarks.reporting import scaling
from benchmarks.reporting.tables import images_of, key_of, memory_points, times_of_parts
from hrvlm.charts import Axis, Series, bar_chart, line_chart
from hrvlm.encoder.cost import named_architecture

Result = dict[str, Any]
PIXELS = (224, 320, 448, 640, 768, 1024, 1536, 2048)
# Groups whose ratios are shown; the tables have the rest.
IN_BARS = {
    "encoder": ("forward", "mixed forward", "forward + backward", "mixed forward + backward"),
    "varlen_attention": ("forward, D=64", "backward, D=64", "forward with RoPE, D=64"),
    "rope_2d": ("forward, D=64", "backward, D=64"),
    "pixel_shuffle_linear": ("forward, N=C", "forward, N=4C", "backward, N=C"),
    "fused_ops": ("residual_layer_norm, backward", "swiglu, backward", "normalize_patchify"),
    "cpu_encoder": ("forward, float32, 1 thread", "forward, bfloat16, 1 thread"),
    "processing": ("decode, resize, normalise, patchify",),
}


def all_charts(results: Sequence[Result]) -> dict[str, str]:
    """Every chart that the results allow; the counted FLOPs need none."""
    charts = {"flops": flops_chart()}
    for result in results:
        made = {
            "throughput": throughput_chart(result),
            "ratios": ratio_chart(result),
            "memory": memory_chart(result),
            "parts": parts_chart(result),
        }
        charts |= {f"{kind}-{key_of(result)}": chart for kind, chart in made.items() if chart}
    return charts


def flops_chart(name: str = "vitl16") -> str:
    """Counted FLOPs of one image: matrix products and attention."""
    architecture = named_architecture(name)
    costs = [(size, scaling.cost_of(architecture, size)) for size in PIXELS]
    return line_chart(
        f"A forward of {name}, one square image",
        Axis("side of the image in pixels", log=True, ticks=PIXELS),
        Axis("GFLOPs", log=True),
        [
            Series("matrix products", tuple((x, cost.gemm / 1e9) for x, cost in costs)),
            Series("attention", tuple((x, cost.attention / 1e9) for x, cost in costs)),
        ],
    )


def throughput_chart(result: Result) -> str | None:
    """Images a second of every rival at each size, for the model with the most sizes."""
    cases = [c for c in result["cases"] if c["group"] == "forward" and c["status"] == "measured"]
    by_model: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        by_model.setdefault(case["parameters"]["model"], []).append(case)
    if not by_model:
        return None
    model, cases = max(by_model.items(), key=lambda item: len(item[1]))
    cases.sort(key=_pixels)
    lines: dict[str, list[tuple[float, float]]] = {OURS: []}
    for case in cases:
        for rival in case["rivals"]:
            if rival["median_s"] and rival["role"] in ("ours", "peer"):
                rate = case["parameters"]["count"] / rival["median_s"]
                lines.setdefault(rival["name"], []).append((_pixels(case), rate))
    series = [Series(name, tuple(line)) for name, line in lines.items() if len(line) > 1]
    if not series:
        return None
    return line_chart(
        f"ViT-{model}, forward, {result['machine']['device']}",
        Axis("side of the images in pixels", log=True, ticks=tuple(map(_pixels, cases))),
        Axis("images a second", log=True),
        series,
    )


def ratio_chart(result: Result) -> str | None:
    """How many times longer each peer takes."""
    bars = []
    for case in result["cases"]:
        model = case["parameters"].get("model", "L")
        if case["group"] not in IN_BARS.get(result["suite"], (case["group"],)) or model not in (
            "L",
            "S",
        ):
            continue
        for rival in case["rivals"]:
            if rival["ratio"] and rival["role"] == "peer":
                label = f"{images_of(case)}: {rival['name']}"
                if "threads" in case["parameters"]:
                    label = f"{case['dtype']}, {label}"
                if case["parameters"].get("direction", "forward") != "forward":
                    label = label.replace(":", f", {_short(case['parameters']['direction'])}:", 1)
                bars.append((label, rival["ratio"]))
    if not bars:
        return None
    title = f"{result['suite']}, {result['machine']['device']}"
    return bar_chart(title, "times as long as hrvlm", bars)


def memory_chart(result: Result) -> str | None:
    """Peak memory of one growing image."""
    growing = [c for c in result["cases"] if c["group"] == "growing"]
    lines = {n: p for n, p in memory_points(growing).items() if len(p) > 1}
    if not lines:
        return None
    return line_chart(
        f"ViT-L, forward + backward of one image, {result['machine']['device']}",
        Axis("tokens"),
        Axis("peak beside weights, GiB"),
        [Series(name, tuple((x, y / 2**30) for x, y in line)) for name, line in lines.items()],
    )


def parts_chart(result: Result) -> str | None:
    """Measured time of attention and of the matrix products, of one growing image."""
    growing = [c for c in result["cases"] if c["group"] == "growing"]
    parts = list(times_of_parts(growing))
    if len(parts) < 2:
        return None
    return line_chart(
        f"ViT-L, forward of one image, {result['machine']['device']}",
        Axis("tokens", log=True, ticks=tuple(tokens for tokens, _, _ in parts)),
        Axis("milliseconds", log=True),
        [
            Series("matrix products of all layers", tuple((n, 1e3 * p) for n, _, p in parts)),
            Series("attention of all layers", tuple((n, 1e3 * a) for n, a, _ in parts)),
        ],
    )


def _pixels(case: dict[str, Any]) -> int:
    return int(case["parameters"]["images"].split()[0])


def _short(direction: str) -> str:
    return {"forward + backward": "fwd + bwd", "forward with RoPE": "with RoPE"}.get(
        direction, direction
    )
