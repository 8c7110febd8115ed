"""Markdown of result files: a table for each group of cases, and what has no number and why."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.case import OURS
from benchmarks.reporting import scaling
from benchmarks.suite import slug
from hrvlm.commands.tables import quantity

Result = dict[str, Any]
NOT_YET = "not yet measured on a GPU"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"


def suite_section(result: Result, charts: dict[str, str]) -> list[str]:
    """Everything about one result file."""
    parts = [provenance(result)]
    for label, cases in grouped(result).items():
        parts.append(f"**{label}**")
        if any(case["status"] == "measured" for case in cases):
            parts.append(times(result, cases))
            if any(r["memory_bytes"] for case in cases for r in case["rivals"]):
                parts.append(memory(cases))
        else:
            parts.append("No number.")
    if missing := without_number(result["cases"]):
        parts += ["Without a number:", "\n".join(missing)]
    parts += [picture(name, title_of(name)) for name in charts if name.endswith(key_of(result))]
    return parts


def provenance(result: Result) -> str:
    """Where and with what the numbers were taken."""
    m, c = result["machine"], result["ceilings"]
    versions = [f"{name} {m[name]}" for name in ("torch", "triton", "transformers", "timm")]
    device = m["device"]
    if m["type"] == "cpu":
        if not any("threads" in case["parameters"] for case in result["cases"]):
            device += f", {_threads(m)}"
        if m.get("load") is not None:
            device += f" (load {m['load']} on {m['cores']} cores when it began)"
    elif m["driver"]:
        device += f", driver {m['driver']}"
    gates = result["gates"]
    failed = [gate["op"] for gate in gates if gate["failure"]]
    verdict = f"GATE FAILED: {', '.join(failed)}" if failed else "all gates passed"
    if not gates:
        verdict = "results compared with one another"
    commit = f"commit {m['commit']}, {m['date'][:10]}"
    if any("commit" in case for case in result["cases"]):
        commit += " (columns that name another one are of that)"
    return (
        f"{device}; {', '.join(versions)}; {commit}; {verdict}. "
        f"Ceilings: copy {quantity(c['copy_bytes_per_second'], 'B/s')}, "
        f"product of {c['product']} {quantity(c['flops_per_second'], 'FLOP/s')}."
    )


def grouped(result: Result) -> dict[str, list[dict[str, Any]]]:
    """The cases of each table, by its title."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in result["cases"]:
        model = case["parameters"].get("model")
        label = f"ViT-{model}, {case['group']}" if model else case["group"]
        groups.setdefault(label, []).append(case)
    return groups


def times(result: Result, cases: Sequence[dict[str, Any]]) -> str:
    """Rivals down, cases across: milliseconds, and how they compare."""
    shown = [case for case in cases if case["status"] == "measured"]
    names = {r["name"]: r["role"] for case in shown for r in case["rivals"] if r["median_s"]}
    order = sorted(names, key=lambda name: (name != OURS, names[name] != "peer"))
    lines = [
        f"| | {' | '.join(heading(case) for case in shown)} |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for name in order:
        shares = result["machine"]["type"] != "cpu"  # its speed may change from case to case
        cells = [cell(case, rival_of(case, name), shares) for case in shown]
        label = f"**{name}**" if name == OURS else name
        if names[name] in ("bound", "part"):
            label = f"*{name}*"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(case: dict[str, Any]) -> str:
    """What stands above a column."""
    p = case["parameters"]
    count = p.get("count") or p.get("segments") or p.get("samples")
    tokens = f", {p['tokens']:,} tokens" if "tokens" in p else ""
    commit = f"<br>commit {case['commit']}" if "commit" in case else ""
    return f"{images_of(case)}<br>{count} {'image' if count == 1 else 'images'}{tokens}{commit}"


def images_of(case: dict[str, Any]) -> str:
    """What the images of a case are called."""
    return str(case["parameters"].get("images", case["name"]))


def cell(case: dict[str, Any], rival: dict[str, Any] | None, shares: bool) -> str:
    """A time with what it means, in shares of the ceilings too; empty where there is none."""
    if rival is None or not rival["median_s"]:
        return ""
    low, high = milliseconds(rival["p20_s"]), milliseconds(rival["p80_s"])
    parts = [f"{milliseconds(rival['median_s'])} ms ({low}–{high})"]  # noqa: RUF001
    if rival["ratio"]:
        parts.append(f"{rival['ratio']:.2f}x")
    if rival["role"] in ("ours", "peer"):
        if count := case["parameters"].get("count") or case["parameters"].get("samples"):
            parts.append(f"{count / rival['median_s']:,.4g} images/s")
        if shares and rival["share_of_product"]:
            rate = quantity(rival["flops_per_second"], "FLOP/s")
            parts.append(f"{rate}, {rival['share_of_product']:.0%}")
        elif shares and rival["share_of_copy"]:
            rate = quantity(rival["bytes_per_second"], "B/s")
            parts.append(f"{rate}, {rival['share_of_copy']:.0%}")
    if sdpa := rival.get("sdpa"):  # older results have none
        parts.append(f"SDPA: {sdpa}")
    return "<br>".join(parts)


def memory(cases: Sequence[dict[str, Any]]) -> str:
    """Peak memory, weights and gradients included, and how it compares."""
    shown = [case for case in cases if case["status"] == "measured"]
    names = {r["name"]: None for case in shown for r in case["rivals"] if r["role"] != "part"}
    lines = [
        f"| peak memory | {' | '.join(map(images_of, shown))} |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for name in sorted(names, key=lambda name: name != OURS):
        cells = []
        for case in shown:
            mine, ours = (peak(rival_of(case, who)) for who in (name, OURS))
            ratio = f", {mine / ours:.2f}x" if mine and ours and name != OURS else ""
            cells.append(f"{mine / 2**30:.2f} GiB{ratio}" if mine else "")
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def peak(rival: dict[str, Any] | None) -> int | None:
    """Bytes at the peak, weights and gradients included."""
    if rival is None or not rival["memory_bytes"]:
        return None
    return int(rival["memory_bytes"] + rival["weight_bytes"])


def without_number(cases: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each rival and reason that there is no number, with the cases unless it is all."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        if case["status"] != "measured":
            reason = f"{case['status']}: {case['reason']}"
            found.setdefault(("everyone", reason), []).append(case["name"])
        for rival in case["rivals"]:
            if not rival["median_s"] and rival["reason"]:
                reason = f"{rival['status']}: {rival['reason']}"
                found.setdefault((rival["name"], reason), []).append(case["name"])
    asked: dict[str, int] = {"everyone": len(cases)}
    for case in cases:
        for rival in case["rivals"]:
            asked[rival["name"]] = asked.get(rival["name"], 0) + 1
    return [
        f"- {name}{_listed(where, asked[name])}: {reason}"
        for (name, reason), where in found.items()
    ]


def _listed(where: Sequence[str], asked: int) -> str:
    return "" if len(where) == asked else f" ({'; '.join(where)})"


def rival_of(case: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The rival of that name in a case."""
    return next((r for r in case["rivals"] if r["name"] == name), None)


def compared(suite: str) -> str:
    """What a suite will compare: the first line of its module."""
    module = importlib.import_module(f"benchmarks.bench_{suite}")
    return str(module.__doc__).splitlines()[0]


def measured_scaling(results: Sequence[Result]) -> list[str]:
    """Where the measured times of attention and products cross, and the memory's straight line."""
    lines = []
    for result in results:
        growing = [c for c in result["cases"] if c["group"] == "growing"]
        growing = [c for c in growing if c["status"] == "measured"]
        if len(growing) < 3:
            continue
        where = f"{result['machine']['device']}, ViT-{growing[0]['parameters']['model']}"
        parts = list(times_of_parts(growing))
        if len(parts) > 1:
            at = scaling.measured_crossing(*zip(*parts, strict=True))
            crossed = f"at {at:,.0f} tokens" if at else "not within the sizes measured"
            lines.append(f"{where}: measured, attention passes the matrix products {crossed}.")
        for name, points in memory_points(growing).items():
            if len(points) >= 3:
                fit = scaling.straight_line(*zip(*points, strict=True))
                lines.append(
                    f"{where}: memory of {name} against tokens, forward + backward: "
                    f"{fit.slope / 2**20:.3g} MiB a token, R² = {fit.r_squared:.5f}."
                )
    return lines


def times_of_parts(cases: Sequence[dict[str, Any]]) -> Iterator[tuple[float, float, float]]:
    """Tokens, seconds of attention and seconds of the matrix products, of one image."""
    for case in sorted(cases, key=lambda case: case["parameters"]["tokens"]):
        parts = [
            rival_of(case, f"{part} of all layers") for part in ("attention", "matrix products")
        ]
        seconds = [part["median_s"] for part in parts if part and part["median_s"]]
        if len(seconds) == 2:
            count = case["parameters"]["count"]
            yield case["parameters"]["tokens"] / count, seconds[0] / count, seconds[1] / count


def memory_points(cases: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Tokens and bytes beside weights of each rival, ours first."""
    points: dict[str, list[tuple[float, float]]] = {OURS: []}
    for case in sorted(cases, key=lambda case: case["parameters"]["tokens"]):
        for rival in case["rivals"]:
            if rival["memory_bytes"] and rival["role"] in ("ours", "peer"):
                at = case["parameters"]["tokens"], rival["memory_bytes"]
                points.setdefault(rival["name"], []).append(at)
    return {name: line for name, line in points.items() if line}


def headlines(results: Sequence[Result]) -> list[tuple[str, str, str]]:
    """Rows of the README's table: against whom, where, and how much longer they take."""
    compiled = "transformers, sdpa + compile"
    gpu = [
        ("encoder", "transformers + torch.compile, ViT-L, 224 / 768 / 1024 px", compiled,
         [f"ViT-L forward, {size} px" for size in (224, 768, 1024)]),
        ("encoder", "transformers padded with a mask, ViT-L, 64 images of 224 to 1024 px",
         "transformers, padded with a mask", ["ViT-L mixed forward, mixed"]),
        ("encoder", "transformers one by one, ViT-L, 64 images of 224 to 1024 px",
         "transformers, one by one", ["ViT-L mixed forward, mixed"]),
        ("varlen_attention", "torch's varlen_attn (FA2), forward, 201 / 2309 / 4101 tokens",
         "torch varlen_attn (FA2)", [f"forward, D=64, n={n}" for n in (201, 2309, 4101)]),
    ]  # fmt: skip
    files = "16 JPEG / PNG files, longer sides 624 to 1392 px,"  # benchmarks/bench_processing.py
    kinds = ["JPEG", "PNG"]
    cpu = [
        *_encoder_on_a_cpu(),
        ("processing", f"transformers' processor (torchvision), {files} to patches",
         "transformers, torchvision", kinds),
        ("processing", f"torchvision alone, {files} to patches", "torchvision alone", kinds),
    ]  # fmt: skip
    rows = [_headline(results, *row, missing=NOT_YET) for row in gpu]
    return rows + [_headline(results, *row, missing="not yet measured") for row in cpu]


def _headline(
    results: Sequence[Result], suite: str, what: str, peer: str, cases: list[str], *, missing: str
) -> tuple[str, str, str]:
    newest = max(
        (r for r in results if r["suite"] == suite),
        key=lambda r: r["machine"]["date"],
        default=None,
    )
    if newest is None:
        return what, "GPU" if "GPU" in missing else "CPU", missing
    by_name = {case["name"]: case for case in newest["cases"]}
    found = [rival_of(by_name[name], peer) if name in by_name else None for name in cases]
    ratios = [f"{r['ratio']:.2f}x" if r and r["ratio"] else "no number" for r in found]
    m = newest["machine"]
    known = next((by_name[name]["parameters"] for name in cases if name in by_name), {})
    where = m["device"] + (f", {_threads(m | known)}" if m["type"] == "cpu" else "")
    return what, where, " / ".join(ratios)


def _encoder_on_a_cpu() -> Iterator[tuple[str, str, str, list[str]]]:
    """Rows of ViT-S, each with the images, the dtypes and the directions of its numbers."""
    mixed, tiny = "8 of 128 to 640 px", "512 tiny"
    both = ("forward", "forward + backward")
    for peer in ("one by one", "one by one + compile by block"):
        for dtype in ("float32", "bfloat16"):
            what = f"transformers {peer}, ViT-S, {dtype}, 8 images of 128 to 640 px, forward / "
            yield (
                "cpu_encoder", what + "with backward", f"transformers, {peer}",
                [f"ViT-S {way}, {dtype}, 1 thread, {mixed}" for way in both],
            )  # fmt: skip
    sizes = (224, 768, 1024)
    for dtype in ("float32", "bfloat16"):
        for way, words in zip(both, ("forward", "with backward"), strict=True):
            yield (
                "cpu_encoder",
                f"transformers + compile by block, ViT-S, {dtype}, one size: 224 / 768 / 1024 px, "
                f"{words}",
                "transformers, sdpa + compile by block",
                [f"ViT-S {way}, {dtype}, 1 thread, {size} px" for size in sizes],
            )
    yield (  # where ours leads least
        "cpu_encoder",
        "transformers + compile by block, ViT-S, bfloat16, 224 px, forward / with backward",
        "transformers, sdpa + compile by block",
        [f"ViT-S {way}, bfloat16, 2 threads, 224 px" for way in both],
    )
    yield (
        "cpu_encoder",
        "transformers one by one, ViT-S, 512 images of 1 to 4 patches, float32 / bfloat16",
        "transformers, one by one",
        [f"ViT-S forward, {dtype}, 1 thread, {tiny}" for dtype in ("float32", "bfloat16")],
    )


def _threads(machine: dict[str, Any]) -> str:
    return f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"


def picture(name: str, title: str) -> str:
    """Markdown of a plot."""
    return f"![{title}](plots/{name}.svg)"


def title_of(name: str) -> str:
    """What a plot of that name shows."""
    kind = name.partition("-")[0]
    return {
        "throughput": "Images a second against the size of the image",
        "ratios": "How many times longer the others take",
        "memory": "Peak memory against tokens",
        "parts": "Attention and matrix products against tokens",
    }[kind]


def key_of(result: Result) -> str:
    """Suite and device, as in the names of plots."""
    return f"{result['suite']}-{slug(result['machine']['device'])}"


def milliseconds(seconds: float) -> str:
    """Three digits, at least."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def seed_table(head: str, shares: Mapping[str, Mapping[int, float]]) -> str:
    """Shares by what was compared and, across, by seed."""
    seeds = sorted({seed for row in shares.values() for seed in row})
    lines = [
        f"| {head} | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---" * (len(seeds) + 1) + "|",
    ]
    for name, row in shares.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[seed]:.1%}" for seed in seeds) + " |")
    return "\n".join(lines)


def fill(text: str, table: str, start: str = START, end: str = END) -> str:
    """`text` with the table between the two markers.

    Raises:
        ValueError: a marker is missing, occurs twice, or they are in the wrong order.
    """
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"expected one line {start} and, after it, one line {end}")
    head, rest = text.split(start)
    _, tail = rest.split(end)
    return f"{head}{start}\n{table}\n{end}{tail}"
