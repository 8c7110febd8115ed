"""What the commands show to people: one table each, and a line or two below it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import console, note, printable

if TYPE_CHECKING:
    from ..checkpoints.convert import CheckpointInfo
    from ..encoder.cost import Plan
    from ..inference.chat import Generated
    from ..inference.encode import EncodeResult
    from ..inference.evaluate import Scores
    from ..measuring.encoder import BenchReport
    from ..measuring.generation import BenchResult
    from ..reader.demo import DemoResult
    from ..verification.verify import Report


_ORDER = "sizes and grids are height x width"
_STRETCH = "stretch is how far the aspect ratio is from the image's own"


def show_encoded(result: EncodeResult) -> None:
    """Sizes, grids and times of ``hrvlm encode``."""
    _print_table(
        ["image", "size", "resized", "stretch", "patch grid", "patches", "time", "share"],
        [
            (
                image.path,
                _grid(image.size),
                _grid((image.geometry.height, image.geometry.width)),
                f"{image.stretch:.2f}x",
                _grid(image.geometry.patch_grid),
                image.geometry.num_patches,
                _seconds(image.seconds),
                f"{image.share:.0%}",
            )
            for image in result.images
        ],
    )
    patches = sum(image.geometry.num_patches for image in result.images)
    passes, seconds = len(result.pass_seconds), sum(result.pass_seconds)
    _print(f"{_ORDER}; {_STRETCH}")
    _print(
        f"{_count(len(result.images), 'image')}, {_count(patches, 'patch', 'patches')} in "
        f"{_count(passes, 'packed pass', 'packed passes')}: "
        f"{_seconds(seconds)} (an image's time is its share of the pass's FLOPs)"
    )
    attention = f"attention by {result.attention_backend} (backend {result.backend})"
    _print(f"{result.model}, {result.dtype} on {result.device}, {attention}")
    written = [image.features for image in result.images if image.features]
    if written:
        _print(f"written to {written[0].parent}")


def show_plan(plan: Plan) -> None:
    """Grids, FLOPs and memory of ``hrvlm plan``."""
    projector = plan.factor > 1
    rows: list[Sequence[object]] = [
        (
            image.name,
            _grid((image.height, image.width)),
            _grid((image.geometry.height, image.geometry.width)),
            f"{image.stretch:.2f}x",
            _grid(image.geometry.patch_grid),
            *([_grid(image.geometry.token_grid)] if projector else []),
            image.geometry.num_tokens,
            quantity(image.cost.gemm, "FLOP"),
            quantity(image.cost.attention, "FLOP"),
        )
        for image in plan.images
    ]
    if len(rows) > 1:
        cost = plan.cost
        total = quantity(cost.gemm, "FLOP"), quantity(cost.attention, "FLOP")
        rows.append(("all, packed", *[""] * (4 + projector), plan.visual_tokens, *total))
    headers = ["image", "size", "resized", "stretch", "patch grid"]
    counted = ["token grid", "tokens"] if projector else ["patches"]
    _print_table([*headers, *counted, "GEMMs", "attention"], rows)
    arch = plan.architecture
    _print(f"{_ORDER}; {_STRETCH}")
    unit = arch.patch_size * plan.factor
    _print(
        f"sides are multiples of {unit} px, patch size {arch.patch_size} * factor {plan.factor}, "
        "for a projector; --factor 1 plans the encoder alone, as hrvlm encode runs it"
        if projector
        else f"the encoder alone: sides are multiples of the patch size, {unit} px"
    )
    _print(
        f"{plan.packed_tokens} packed tokens with {arch.num_prefix_tokens} prefix tokens an image"
    )
    _print(
        f"{arch.name}, {quantity(arch.num_parameters, '')} parameters, {plan.dtype}: "
        f"weights {quantity(plan.weight_bytes, 'B', base=1024)}, "
        f"activations of a forward {quantity(plan.activation_bytes, 'B', base=1024)}, "
        f"{quantity(plan.cost.total, 'FLOP')}"
    )


def show_generated(result: Generated) -> None:
    """Counts and speed of ``hrvlm generate``, on stderr: stdout has the text."""
    first = result.first_token_seconds
    begun = "" if first is None else f", the first after {_seconds(first)}"
    note(
        f"{result.prompt_tokens} prompt tokens, {result.new_tokens} new in "
        f"{_seconds(result.seconds)} ({result.tokens_per_second:.1f} tokens/s{begun})"
    )
    for doubt in result.doubts.values():
        note(f"doubtful: {doubt}")


def show_demo(result: DemoResult) -> None:
    """What ``hrvlm train --demo`` did."""
    _print(
        f"{result.font}, new to the reader: {result.error_before:.1%} of the characters wrong "
        f"before, {result.error_after:.1%} after {result.steps} steps on {result.images} images "
        f"({result.held_out} other lines read)\nmodel: {result.model}\nloss: {result.loss_curve}"
    )


def show_scores(scores: Scores, out: Path) -> None:
    """Metrics of ``hrvlm evaluate``."""
    rates = {
        "character error rate": (scores.cer, f"{_count(scores.characters, 'character')}"),
        "exact match": (scores.exact_match, _count(scores.answered, "answer")),
        "VQA accuracy": (scores.vqa_accuracy, _count(scores.vqa_questions, "answer")),
    }
    _print_table(
        ["metric", "", "over"],
        [(n, "-" if rate is None else f"{rate:.2%}", of) for n, (rate, of) in rates.items()],
    )
    missed = f", {len(scores.bad)} could not be asked" if scores.bad else ""
    _print(f"{_count(scores.questions, 'question')}{missed}; the answers are in {out}")


def show_bench(report: BenchReport) -> None:
    """Times, rates and ratios of ``hrvlm bench``."""
    rows = [
        (
            case.name,
            case.images,
            case.tokens,
            rival.name,
            _seconds(rival.median_s),
            f"{_seconds(rival.p20_s)} to {_seconds(rival.p80_s)}",
            f"{rival.images_per_second:.1f}",
            quantity(case.flops / rival.median_s, "FLOP/s"),
            "-" if rival.memory_bytes is None else quantity(rival.memory_bytes, "B", base=1024),
            "" if rival.ratio is None else f"{rival.ratio:.2f}x",
        )
        for case in report.cases
        for rival in case.rivals
    ]
    headers = ["images", "", "tokens", "who", "median", "20 % to 80 %", "images/s", "rate"]
    _print_table([*headers, "memory", "as long as hrvlm"], rows)
    machine = report.machine
    threads = f", {_count(machine['threads'], 'thread')}" if machine["type"] == "cpu" else ""
    _print(f"{report.model}, {report.dtype} on {machine['device']}{threads}")
    _print(
        f"attention by {report.backend}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}; transformers takes mixed sizes one by one"
    )
    _print("they took turns; memory is the peak beside weights and images")


def show_generate_bench(result: BenchResult) -> None:
    """Times and memory of ``hrvlm bench-generate``."""
    headers = ["size", "image tokens", "prompt tokens", "prepare", "first token", "tokens/s"]
    _print_table(
        [*headers, "peak memory"],
        [
            (
                _grid(row.size),
                row.image_tokens,
                row.prompt_tokens,
                _seconds(row.prepare_seconds),
                _seconds(row.first_token_seconds),
                f"{row.tokens_per_second:.1f}",
                "-" if row.peak_bytes is None else quantity(row.peak_bytes, "B", base=1024),
            )
            for row in result.rows
        ],
    )
    threads = "" if result.threads is None else f", {_count(result.threads, 'thread')}"
    _print(
        "sizes are height x width; the first token comes after the preparation, and tokens/s "
        f"counts the others; medians of {_count(result.repeats, 'run')} of {result.new_tokens} new "
        "tokens"
    )
    _print(f"{result.model}, {result.dtype} on {result.device}{threads}, batch of 1")


def show_trained(result: Mapping[str, Any]) -> None:
    """Metrics of ``hrvlm train``, and where the model is."""
    rows = [(name, f"{value:.4g}") for name, value in result["metrics"].items()]
    _print_table(["metric", ""], rows)
    if skipped := result.get("skipped"):
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        note(f"rows left out: {reasons} (see {result['output_dir']}/data_report.json)")
    if "output_dir" in result:
        _print(f"{_count(result['steps'], 'step')}; the model is in {result['output_dir']}")


def summarize_converted(directory: Path, info: CheckpointInfo) -> dict[str, Any]:
    """What ``hrvlm convert`` wrote, read back from the files."""
    from safetensors import safe_open

    count = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            count += len(stored.keys())
    return {
        "directory": str(directory),
        "layout": info.layout,
        "prefix": info.prefix,
        "tensors": count,
        "left_out": list(info.left_out),
        "added": list(info.added),
        "config": json.loads((directory / "config.json").read_text(encoding="utf-8")),
    }


def show_converted(summary: dict[str, Any]) -> None:
    """The result of ``hrvlm convert``."""
    prefix = f" under {summary['prefix']!r}" if summary["prefix"] else ""
    _print(f"recognised: {summary['layout']} layout{prefix}")
    for name in ("left_out", "added"):
        if summary[name]:
            _print(f"{name.replace('_', ' ')}: {', '.join(summary[name])}")
    config = summary["config"]
    _print(
        f"config: hidden_size {config['hidden_size']}, {config['num_hidden_layers']} layers, "
        f"{config['num_attention_heads']} heads, MLP {config['intermediate_size']}"
        f"{' gated' if config['use_gated_mlp'] else ''}, patch {config['patch_size']}, "
        f"{config['num_register_tokens']} registers, {config['dtype']}"
    )
    _print(f"wrote {summary['tensors']} tensors to {summary['directory']}")


def show_report(report: Report) -> None:
    """Errors and limits of ``hrvlm verify``."""
    columns = ["op", "backend", "dtype", "what", "nearest to its limit"]
    _print_table(
        [*columns, "error", "eager's", "of limit", ""],
        [
            (
                check.op,
                check.backend,
                check.dtype,
                check.what,
                check.message or check.where,
                "" if check.message else f"{check.error:.1e}",
                "" if check.message else f"{check.baseline:.1e}",
                "" if check.message else f"{check.used:.0%}",
                "ok" if check.passed else "FAILED",
            )
            for check in report.checks
        ],
        left=len(columns),
    )
    _print("errors are relative to float64; the limit is 2x the error of eager in the same dtype,")
    _print("whole, per segment and in the worst row (RoPE: rounding of each element)")
    for skip in report.skipped:
        ops = f" for {', '.join(skip.ops)}" if skip.ops else ""
        _print(f"not run: {skip.backend} in {skip.dtype}{ops}: {skip.reason}")
    failed = sum(not check.passed for check in report.checks)
    verdict = f"{failed} of {len(report.checks)} checks FAILED" if failed else "all checks passed"
    _print(f"{report.device}: {verdict}")


def show_diagnosis(found: dict[str, Any]) -> None:
    """The findings of ``hrvlm doctor``."""
    lines = {
        "hrvlm": found["hrvlm"],
        "python": f"{found['python']} on {found['platform']}",
        **{name: version or "absent" for name, version in found["packages"].items()},
        **{
            f"extra: {extra}": ", ".join(f"{n} {v or 'absent'}" for n, v in names.items())
            for extra, names in found["extras"].items()
        },
        "CUDA": found["cuda"] or found["hip"] or "torch is built without",
        "driver": found["driver"] or "none found",
        **{
            f"GPU {i}": f"{gpu['name']}, capability {gpu['capability']}, "
            f"{quantity(gpu['memory_bytes'], 'B', base=1024)}"
            for i, gpu in enumerate(found["gpus"])
        },
        "CPU": f"{found['cpu']['cores']} cores, {found['cpu']['threads']} threads for torch, "
        f"{found['cpu']['capability']}",
    }
    if found["triton_interpreter"]:
        lines["TRITON_INTERPRET"] = "1: kernels run in the interpreter, which is for tests"
    _print_table(["", ""], list(lines.items()), left=2, header=False)
    _print_table(
        ["backend", "op", "what runs"],
        [
            (backend, op, what)
            for backend, ops in found["backends"].items()
            for op, what in ops.items()
        ],
        left=3,
    )
    for problem in found["problems"]:
        _print(f"PROBLEM: {problem}")


def quantity(value: float, unit: str, *, base: int = 1000) -> str:
    """A number with a prefix: ``1.53 TFLOP``; with base 1024, ``82.1 MiB``."""
    prefixes = ("", "K", "M", "G", "T", "P") if base == 1024 else ("", "k", "M", "G", "T", "P")
    power = 0
    while abs(value) >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    digits = f"{value:.0f}" if power == 0 or value >= 100 else f"{value:.3g}"
    infix = "i" if base == 1024 and power else ""
    return f"{digits} {prefixes[power]}{infix}{unit}"


def _grid(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _print(line: str) -> None:
    console().print(printable(line), markup=False, soft_wrap=True)


def _print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1, header: bool = True
) -> None:
    """Print a table on stdout; the first `left` columns are text, the others numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        show_header=header,
        collapse_padding=True,
    )
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console().print(table)
