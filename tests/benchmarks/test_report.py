"""The page, the plots and the README's table made from result files."""

import json
import math
import re
from xml.etree import ElementTree

import pytest

from benchmarks import bench_encoder
from benchmarks.case import OURS
from benchmarks.reporting import __main__ as report
from benchmarks.reporting import plots, scaling, tables
from benchmarks.suite import SuiteRun
from hrvlm.charts import Axis, Series, bar_chart, line_chart
from hrvlm.encoder.cost import named_architecture
from tests.benchmarks.test_suites import settings

MARKED = f"before\n{tables.START}\nold\n{tables.END}\nafter\n"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A file of the encoder suite from this CPU; sizes and memory are put in for the plots."""
    path = tmp_path_factory.mktemp("results")
    run = SuiteRun("encoder", settings(path), budget_s=1e9)
    first, second, *_ = bench_encoder.cases(run.settings)
    run.measure(first)
    run.measure(second)
    document = json.loads(run.path.read_text())
    document["settings"]["small"] = False
    document["machine"]["type"] = "cuda"  # where the page has this suite
    uniform, mixed = document["cases"]
    cases = [mixed]
    for group, pixels in [("forward", (224, 768)), ("growing", (224, 512, 1024))]:
        for size in pixels:
            case = json.loads(json.dumps(uniform))
            tokens = 5 + (size // 16) ** 2
            case["name"], case["group"] = f"ViT-L {group}, {size} px", group
            case["parameters"] |= {"images": f"{size} px", "model": "L", "tokens": tokens}
            case["parameters"]["count"] = 1
            for rival in case["rivals"]:
                rival["memory_bytes"] = 1000 * tokens
                if rival["name"].startswith("attention"):
                    rival["median_s"] = tokens**2 / 1e9
                if rival["name"].startswith("matrix"):
                    rival["median_s"] = tokens / 1e6
            cases.append(case)
    return document | {"cases": cases}


def write_all(result, directory, readme=MARKED):
    (directory / "results").mkdir()
    (directory / "README.md").write_text(readme)
    if result:
        (directory / "results" / "encoder-x.json").write_text(json.dumps(result))
    report.main(
        [f"--{name}={directory / at}" for name, at in
         [("results", "results"), ("docs", "docs"), ("readme", "README.md")]]
    )  # fmt: skip
    return (directory / "docs" / "benchmarks.md").read_text(), (directory / "README.md").read_text()


def test_without_results_it_says_so_and_never_a_number(tmp_path):
    page, readme = write_all(None, tmp_path)
    assert page.count("**Not yet measured on a GPU.**") == len(report.GPU_SUITES)
    assert readme.count(tables.NOT_YET) == 4 and "not yet measured |" in readme
    assert not re.search(r"\d\.\d\dx", page + readme)
    assert [path.name for path in (tmp_path / "docs" / "plots").iterdir()] == ["flops.svg"]


def test_results_become_tables_plots_and_headlines(result, tmp_path):
    stale = tmp_path / "docs" / "plots" / "ratios-old.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("<svg/>")
    page, readme = write_all(result, tmp_path)
    assert not stale.exists()
    sdpa = tables.rival_of(result["cases"][1], "transformers, sdpa")
    assert f"{sdpa['ratio']:.2f}x<br>" in page
    assert result["machine"]["commit"] in page and "all gates passed" in page
    assert "hrvlm with flash-attn: unavailable: flash-attn is not installed" in page
    assert "attention passes the matrix products at 1,000 tokens" in page
    assert "memory of hrvlm against tokens" in page and "R² = 1.00000" in page
    drawn = re.findall(r"\]\((plots/[^)]+)\)", page)
    on_disk = {path.name for path in stale.parent.iterdir()}
    assert {name.removeprefix("plots/") for name in drawn} == on_disk and len(on_disk) == 5
    padded = tables.rival_of(result["cases"][0], "transformers, padded with a mask")
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "no number / no number / no number" in readme  # nothing was compiled
    assert f"| {padded['ratio']:.2f}x |" not in readme  # that was ViT-S


def test_a_red_gate_is_shown(result, tmp_path):
    red = json.loads(json.dumps(result))
    red["gates"] = [{"op": "encoder", "dtype": "bfloat16", "failure": "encoder forward: row 3"}]
    red["cases"] = red["cases"][:1]
    red["cases"][0] |= {"status": "gate failed", "reason": "encoder forward: row 3", "rivals": []}
    page, _ = write_all(red, tmp_path)
    assert "GATE FAILED: encoder" in page and "No number." in page
    assert "- everyone: gate failed: encoder forward: row 3" in page


def test_the_newest_file_of_a_suite_and_device_counts_and_small_runs_do_not(result, tmp_path):
    for name, changes in {
        "a": {"date": "2026-01-02"}, "b": {"date": "2026-01-01"}, "c": {"device": "another"},
    }.items():  # fmt: skip
        changed = result | {"machine": result["machine"] | changes}
        (tmp_path / f"encoder-{name}.json").write_text(json.dumps(changed))
    small = result | {"settings": {"small": True}, "machine": {"device": "z", "date": "9"}}
    (tmp_path / "encoder-small.json").write_text(json.dumps(small))
    loaded = report.load(tmp_path)
    assert sorted(r["machine"]["date"][:10] for r in loaded)[0] == "2026-01-02"
    assert len(loaded) == 2
    (tmp_path / "another_tool.json").write_text("[]")
    assert report.load(tmp_path) == loaded
    (tmp_path / "encoder-old.json").write_text("{}")
    with pytest.raises(ValueError, match="schema None, expected 1"):
        report.load(tmp_path)


def test_cases_that_the_newest_file_lacks_name_their_commit(result, tmp_path):
    first, second, *_ = result["cases"]
    for date, commit, cases in (
        ("2026-01-02", "new", [second]),
        ("2026-01-01", "old", [first, second]),
    ):
        machine = result["machine"] | {"date": date, "commit": commit}
        changed = result | {"machine": machine, "cases": cases}
        (tmp_path / f"encoder-{commit}.json").write_text(json.dumps(changed))
    (loaded,) = report.load(tmp_path)
    assert loaded["cases"] == [first | {"commit": "old"}, second]
    assert "commit new, 2026-01-02 (columns that name another" in tables.provenance(loaded)
    headings = [tables.heading(case) for case in loaded["cases"]]
    assert [h.endswith("<br>commit old") for h in headings] == [True, False]


def test_parts_of_a_suite_are_put_together(result, tmp_path):
    mixed, forward, *rest = result["cases"]
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    newer = forward | {"date": "newer"}
    left_out = rest[0] | {"status": "left out", "rivals": []}
    for cases in ([mixed, forward, rest[0]], [newer, left_out, rest[1]]):
        (there / "encoder-a.json").write_text(json.dumps(result | {"cases": cases}))
        report.add(there, here)
    (together,) = report.load(here)
    assert together["cases"] == [mixed, newer, rest[0], rest[1]]
    with pytest.raises(ValueError, match="no result files"):
        report.add(tmp_path, here)


@pytest.mark.parametrize("readme", ["none\n", f"{tables.END}\n{tables.START}\n", MARKED * 2])
def test_a_readme_without_the_markers_is_left_alone(readme, tmp_path, capsys):
    _, after = write_all(None, tmp_path, readme)
    assert after == readme and "not filled in" in capsys.readouterr().err


def test_the_page_in_the_repository_is_what_the_results_give():
    results = report.load(report.RESULTS)
    charts = plots.all_charts(results)
    docs = report.ROOT / "docs"
    assert (docs / "benchmarks.md").read_text() == report.page(results, charts)
    assert {path.stem: path.read_text() for path in (docs / "plots").glob("*.svg")} == charts


def test_attention_passes_the_products_where_their_flops_are_equal():
    """With M = 4C a token has 24 C^2 FLOPs of products and 4 C n of attention: n = 6 C."""
    for name in ("vits16", "vitb16", "vitl16"):
        architecture = named_architecture(name)
        at = scaling.crossing(architecture)
        side = at.pixels // 16
        assert at.tokens == 5 + side * side and at.tokens >= 6 * architecture.hidden_size
        before = scaling.cost_of(architecture, at.pixels - 16)
        assert before.attention < before.gemm
        assert 5 + (side - 1) ** 2 < 6 * architecture.hidden_size * 1.01


def test_fits_and_measured_crossings():
    fit = scaling.straight_line([1, 2, 4], [5, 7, 11])
    assert fit == pytest.approx((2, 3, 1))
    bent = scaling.straight_line([1, 2, 3, 4], [1, 4, 9, 16])
    assert bent.r_squared == pytest.approx(1 - 4 / 129)
    with pytest.raises(ValueError, match="three points"):
        scaling.straight_line([1, 2], [1, 2])
    assert scaling.measured_crossing([10, 1000], [1, 100], [10, 10]) == pytest.approx(100)
    assert scaling.measured_crossing([10, 1000], [1, 9], [10, 10]) is None


def marks(svg):
    """(x, y) of every text and mark of a chart, its width and its height."""
    root = ElementTree.fromstring(svg)
    width, height = map(float, root.get("viewBox").split()[2:])
    found = [(float(e.get("x")), float(e.get("y"))) for e in root.iter(f"{SVG}text")]
    found += [(float(e.get("cx")), float(e.get("cy"))) for e in root.iter(f"{SVG}circle")]
    return found, width, height


def test_lines_lie_where_their_numbers_say():
    points = ((1.0, 1.0), (10.0, 100.0), (100.0, 10000.0))
    svg = line_chart("a & b", Axis("x", log=True), Axis("y", log=True), [Series("n", points)])
    found, width, height = marks(svg)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in found)
    (x0, y0), (x1, y1), (x2, y2) = found[-3:]
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.2) and x1 > x0
    assert y2 - y1 == pytest.approx(y1 - y0, abs=0.2) and y1 < y0
    assert "a &amp; b" in svg
    linear = line_chart("t", Axis("x"), Axis("y"), [Series("n", ((0, 0), (5, 40), (10, 80)))])
    texts = [e.text for e in ElementTree.fromstring(linear).iter(f"{SVG}text")]
    ticks = [t for t in texts if t.isdigit()]
    assert ticks == [*map(str, range(0, 11, 2)), *map(str, range(0, 81, 20))]
    with pytest.raises(ValueError, match="above 0"):
        line_chart("t", Axis("x"), Axis("y", log=True), [Series("n", ((1.0, 0.0),))])


def test_bars_go_left_below_one_and_right_above():
    svg = bar_chart("t", "times as long", [("slower", 2.0), ("faster", 0.5), ("even", 1.0)])
    bars = [e for e in ElementTree.fromstring(svg).iter(f"{SVG}rect")][1:]
    slower, faster, even = ((float(b.get("x")), float(b.get("width"))) for b in bars)
    assert slower[1] == pytest.approx(faster[1], abs=0.2) and even[1] == 0
    assert faster[0] + faster[1] == pytest.approx(slower[0], abs=0.2)
    assert math.isclose(even[0], slower[0])
    assert "2.00x" in svg and OURS not in svg


def test_no_chart_without_points():
    with pytest.raises(ValueError, match="got none"):
        line_chart("t", Axis("x"), Axis("y"), [])
    with pytest.raises(ValueError, match="got none"):
        bar_chart("t", "x", [])
