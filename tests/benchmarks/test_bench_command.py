"""``hrvlm bench`` and the mixed draw."""

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.case import MIXED_GRIDS, MIXED_LENGTHS, MIXED_SIZES
from hrvlm.cli import app
from hrvlm.commands.bench import show
from hrvlm.measuring.encoder import OURS, PEER, BenchOptions, bench, image_sets, mixed_grids

TINY = BenchOptions("vits16", sizes=(32, 48), tokens=30, mixed=3, seconds=0.0, layers=1)


def test_the_mixed_draw_is_fixed_and_as_documented():
    assert MIXED_GRIDS[:4] == [(57, 20), (27, 13), (53, 35), (12, 43)]
    assert len(MIXED_SIZES) == 64 and sum(MIXED_LENGTHS) == 63669 and max(MIXED_LENGTHS) == 3909
    longer, shorter = [max(size) for size in MIXED_SIZES], [min(size) for size in MIXED_SIZES]
    assert min(longer) >= 224 and max(longer) <= 1024
    assert all(4 * a >= b for a, b in zip(shorter, longer, strict=True))
    assert any(h > 2 * w for h, w in MIXED_SIZES) and any(w > 2 * h for h, w in MIXED_SIZES)
    assert mixed_grids(8) == MIXED_GRIDS[:8]


def test_rivals_get_the_same_images_and_take_turns(capsys):
    seen = []
    report = bench(torch.device("cpu"), TINY, on_case=seen.append)
    assert [case.name for case in report.cases] == ["32x32", "48x48", "mixed"]
    assert tuple(seen) == report.cases and report.backend == "sdpa"
    for case in report.cases:
        assert [r.name for r in case.rivals] == [PEER, OURS]
        theirs, ours = case.rivals
        assert theirs.sdpa == "flash"  # which a CPU has too
        assert theirs.ratio > 0 and ours.ratio is None and case.difference < 1e-5
        assert ours.images_per_second == pytest.approx(case.images / ours.median_s)
    assert report.cases[0].images == round(30 / 9) and report.cases[0].tokens == 27
    show(report)
    shown = capsys.readouterr().out
    assert all(f"{case.rivals[0].ratio:.2f}x" in shown for case in report.cases)
    assert "vits16, 1 layers, random weights, float32 on" in shown


def test_results_that_differ_give_no_times(monkeypatch):
    from hrvlm.encoder import cpu_blocks

    def wrong_scale(*inputs):
        *tensors, scale = inputs
        return attention(*tensors, 2 * scale)

    attention = cpu_blocks.attention
    monkeypatch.setattr(cpu_blocks, "attention", wrong_scale)
    with pytest.raises(RuntimeError, match="32x32: hrvlm and transformers differ by"):
        bench(torch.device("cpu"), TINY)


def test_sets_of_images_and_what_is_refused():
    assert list(image_sets(BenchOptions(mixed=0), 16, 5)) == ["224x224", "768x768", "1024x1024"]
    longer = {max(grid) for grid in image_sets(TINY, 16, 5)["mixed"]}
    assert longer <= {2, 3}
    for wrong, message in [
        ({"sizes": ()}, "at least one"),
        ({"sizes": (40,)}, "40 is not a positive multiple of 16"),
        ({"mixed": -1}, "mixed=-1: expected at least 0"),
        ({"seconds": float("nan")}, "seconds=nan: expected at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            image_sets(BenchOptions(**wrong), 16, 5)
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        bench(torch.device("cpu"), TINY, dtype=torch.float16)


def test_the_command_prints_one_json_document():
    arguments = ["bench", "--device=cpu", "--size=32", "--tokens=9", "--mixed=2", "--seconds=0"]
    arguments += ["--layers=2"]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [case["name"] for case in found["cases"]] == ["32x32", "mixed"]
    assert found["machine"]["type"] == "cpu" and found["dtype"] == "float32"
    assert found["model"] == "vits16, 2 layers, random weights"
    assert CliRunner().invoke(app, ["bench", "--device=cpu", "--size=33"]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "--device=cpu", "--layers=0"]).exit_code == 2
