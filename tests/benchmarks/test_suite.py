"""The rules of the suites: the gate, what gets no number, turns, and the result file."""

import json
import re
import time

import pytest
import torch

from benchmarks.case import OURS, Case, Prepared, Rival, Unavailable
from benchmarks.suite import SuiteRun, finite, slug, worst_difference
from hrvlm.measuring.timing import Timing, median_ratio, take_turns
from hrvlm.verification import cases
from tests.benchmarks.test_suites import settings
from tests.kernels.helpers import CountingBackend

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def rival(name, compute=lambda: [X], **options):
    return Rival(name, lambda: compute, **options)


def case_of(*rivals, op="", **options):
    prepared = Prepared(rivals, lambda: [X])
    return Case("case", "group", op, {"images": "x"}, lambda: prepared, torch.float32, **options)


@pytest.fixture
def run(tmp_path):
    return SuiteRun("rules", settings(tmp_path), budget_s=1e9)


def no_numbers(result):
    numbers = ("median_s", "p20_s", "p80_s", "ratio", "flops_per_second", "bytes_per_second")
    return all(getattr(r, name) is None for r in result.rivals for name in numbers)


def test_a_red_gate_prints_no_number(run, monkeypatch):
    monkeypatch.setattr(cases, "rope_2d", lambda q, k, *_, **__: (q + 0, k + 0))
    result = run.measure(case_of(rival(OURS, role="ours"), rival("peer"), op="rope_2d"))
    assert result.status == "gate failed" and "rope_2d forward" in result.reason
    assert no_numbers(result)
    assert json.loads(run.path.read_text())["gates"][0]["failure"] == result.reason


def test_a_wrong_result_of_ours_prints_no_number(run):
    result = run.measure(case_of(rival(OURS, lambda: [X * 1.01], role="ours"), rival("peer")))
    assert result.status == "gate failed" and "off by 1.0e-02" in result.reason
    assert no_numbers(result)


def test_peers_without_a_number_have_a_reason(run):
    def unavailable():
        raise Unavailable("it is not installed")

    def fails():
        raise RuntimeError("first line\nsecond line")

    def exhausts():
        raise torch.OutOfMemoryError("much")

    result = run.measure(
        case_of(
            rival(OURS, role="ours"),
            rival("same"),
            rival("wrong", lambda: [X + 1]),
            rival("other shape", lambda: [X[:2]]),
            rival("nan", lambda: [X * float("nan")]),
            rival("raises", fails),
            rival("too large", exhausts),
            Rival("absent", unavailable),
            rival("compiled", compiles=True),
            rival("rare", full_only=True),
            rival("bound", lambda: [X + 5], role="bound"),
            flops=10**6,
            bytes=10**6,
        )
    )
    by_name = {r.name: r for r in result.rivals}
    statuses = {name: r.status for name, r in by_name.items()}
    assert statuses == {
        OURS: "measured",
        "same": "measured",
        "wrong": "differs",
        "other shape": "differs",
        "nan": "differs",
        "raises": "failed",
        "too large": "out of memory",
        "absent": "unavailable",
        "compiled": "left out",
        "rare": "left out",
        "bound": "measured",
    }
    assert by_name["raises"].reason == "RuntimeError: first line"
    assert by_name["absent"].reason == "it is not installed"
    assert by_name["bound"].difference is None and by_name["bound"].ratio > 0
    measured = by_name["same"]
    assert measured.flops_per_second == pytest.approx(10**6 / measured.median_s)
    share = measured.flops_per_second / run.ceilings.flops_per_second
    assert measured.share_of_product == pytest.approx(share)
    assert all(r.reason for r in result.rivals if r.status != "measured")


def test_time_runs_out_for_what_compiles_first(tmp_path):
    late = SuiteRun("late", settings(tmp_path, compiled=True), budget_s=1e9)
    late.compiling_deadline = time.monotonic()
    rivals = rival(OURS, role="ours"), rival("compiled", compiles=True)
    result = late.measure(case_of(*rivals))
    assert result.status == "measured" and result.rivals[1].status == "left out"
    late.deadline = time.monotonic()
    result = late.measure(case_of(*rivals))
    assert (result.status, result.reason) == ("left out", "the suite's time was used up")
    full = SuiteRun("full", settings(tmp_path, compiled=True, full=True), budget_s=0)
    assert full.measure(case_of(*rivals)).rivals[1].status == "measured"


def test_a_headline_compiles_as_long_as_its_case_runs(tmp_path):
    late = SuiteRun("late", settings(tmp_path, compiled=True), budget_s=1e9)
    late.compiling_deadline = time.monotonic()
    rivals = rival(OURS, role="ours"), rival("compiled", compiles=True, headline=True)
    assert late.measure(case_of(*rivals)).rivals[1].status == "measured"


def test_a_peer_that_is_not_there_costs_the_compiled_ones_nothing(tmp_path):
    run, backend = SuiteRun("r", settings(tmp_path, compiled=True), budget_s=1e9), CountingBackend()

    def compiled():
        double = torch.compile(lambda x: x * 2 / 2, backend=backend)
        return lambda: [double(X)]

    def unavailable():
        raise Unavailable("it is not installed")

    def fails():
        raise RuntimeError("no")

    compiling = Rival("compiled", compiled, compiles=True)
    others = Rival("absent", unavailable), Rival("broken", fails)
    result = run.measure(case_of(rival(OURS, role="ours"), compiling, *others))
    assert [r.status for r in result.rivals] == ["measured", "measured", "unavailable", "failed"]
    assert backend.graphs == 1


def test_nan_is_no_result_whatever_the_tolerance(run):
    nan = rival("nan", lambda: [X * float("nan")])
    other = rival("other", lambda: [X + 5])
    result = run.measure(case_of(rival(OURS, role="ours"), nan, other, tolerance=float("inf")))
    assert [r.status for r in result.rivals] == ["measured", "differs", "measured"]


def test_memory_that_runs_out_when_all_take_turns_costs_one_case(run):
    calls = []

    def exhausts_later():
        calls.append(None)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("much")
        return [X]

    result = run.measure(case_of(rival(OURS, exhausts_later, role="ours")))
    assert (result.status, result.reason) == ("left out", "no memory for all its rivals at once")
    assert no_numbers(result)


def test_what_is_compiled_has_as_many_threads_as_its_case(tmp_path, monkeypatch):
    """The code for a number of threads is found again, that for another is not."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    x = torch.randn(1000, 1000)

    def compiled():
        torch.compiler.reset()
        return torch.compile(lambda: [x.sin().cos()])()

    for threads in (1, 2, 1):
        suite = SuiteRun("rules", settings(tmp_path), budget_s=1e9)
        ours = Prepared((rival(OURS, compiled, role="ours"),))
        case = Case("case", "group", "", {}, lambda ours=ours: ours, X.dtype, threads=threads)
        suite.measure(case)
    codes = [p.read_text() for p in (tmp_path / "inductor").rglob("*.cpp")]
    numbers = {n for code in codes for n in re.findall(r"num_threads\((\d+)\)", code)}
    assert numbers == {"2"} and len([c for c in codes if "cos" in c]) == 2


def test_ours_is_handed_on_warm(run):
    handed = []
    run.measure(case_of(rival(OURS, role="ours")), on_ours=lambda ours: handed.append(ours()))
    assert handed == [None]


def test_rounds_start_with_another_rival_each():
    order = []
    rivals = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = take_turns(rivals, torch.device("cpu"), min_rounds=3, max_rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(len(timing.seconds) == 3 for timing in timings.values())


def test_medians_quantiles_and_ratios():
    slow, fast = Timing((4.0, 2.0, 9.0)), Timing((1.0, 2.0, 3.0))
    assert slow.median == 4 and slow.quantile(0.2) == 2 and slow.quantile(0.8) == 9
    assert median_ratio(slow, fast) == 3  # of 4, 1 and 3; the medians' would be 2


def test_the_file_names_what_the_numbers_depend_on(tmp_path):
    run = SuiteRun("rules", settings(tmp_path, commit="abc1234"), budget_s=1)
    run.measure(case_of(rival(OURS, role="ours")))
    torch_version = torch.__version__.partition("+")[0]
    parts = run.path.stem.split("-")
    assert parts[0] == "rules" and parts[2] == torch_version and parts[-1] == "abc1234"
    machine = json.loads(run.path.read_text())["machine"]
    known = {"device", "driver", "torch", "triton", "transformers", "commit", "date", "threads"}
    assert known <= machine.keys()
    assert [path.name for path in tmp_path.iterdir()] == [run.path.name]


def test_small_helpers():
    assert slug("NVIDIA H100 80GB HBM3, 2.11.0+cu130") == "nvidia_h100_80gb_hbm3_2.11.0_cu130"
    assert finite({"a": [float("inf"), 1.5], "b": (float("nan"),)}) == {
        "a": [None, 1.5],
        "b": [None],
    }
    assert worst_difference([X, X * 2], [X, X]) == pytest.approx(1.0)
    assert worst_difference([X], [X, X]) == float("inf")
