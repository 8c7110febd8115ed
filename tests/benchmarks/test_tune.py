"""benchmarks.tuning without a GPU: candidates that compile, the gate, the choice and the file."""

import json
import os
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch
import triton
from triton import CompilationError
from triton.runtime.errors import PTXASError

from benchmarks.case import Settings
from benchmarks.tuning import __main__ as tune
from benchmarks.tuning import attention, counted, ops, rows, table_file
from benchmarks.tuning.rows import Call, candidates_of, row
from benchmarks.tuning.worker import Worker
from hrvlm_kernels.triton_kernels import tile_tables
from hrvlm_kernels.triton_kernels.launch import architecture
from hrvlm_kernels.triton_kernels.tilings import RopeConfig, Tiling, by_chip
from tests.kernels.helpers import interpreter_only
from tests.kernels.mutations import plant

KEY = ("sm_90", 64, 2)
SWAPPED = "y[:, None], x[:, None])", "x[:, None], y[:, None])"  # x and y, in rope_2d


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    assert "there is no GPU to time on; --dry-run" in capsys.readouterr().err
    assert tune.main(["--dry-run"]) == 2
    assert "--dry-run needs --chip" in capsys.readouterr().err


def test_counted_needs_a_chip_that_the_executor_has(capsys):
    for arguments in (["--counted"], ["--counted", "--chip", "gfx942"]):
        with pytest.raises(SystemExit):
            tune.main(arguments)
        assert "--counted needs --chip, one of sm_80, sm_90" in capsys.readouterr().err


def test_what_is_chosen_by_counts():
    """The smallest bound; of those within a hundredth, the fewest instructions; then the first."""
    assert counted.best_of({"a": (100, 9), "b": (98.9, 10), "c": (120, 1)}) == "b"
    assert counted.best_of({"a": (100, 9), "b": (99.5, 10), "c": (120, 1)}) == "a"
    assert counted.best_of({"a": (100, 10), "b": (99.5, 9.99)}) == "a"
    assert counted.inside((7, 1, 2)) == [([1, 4, 7, 9, 12], 14 / 5)]
    assert counted.inside((2, 1, 1)) == [([0, 1], 1)]
    told = counted.described("compiled, Triton 3.6.0", "NORM_FORWARD")
    assert told == f"NORM_FORWARD counted; others compiled, Triton {triton.__version__}"
    assert counted.described(told, "DQ").startswith("DQ, NORM_FORWARD counted; others")


def test_a_dry_run_compiles_every_candidate(capsys, monkeypatch):
    few = replace(ops.OPS["dq"], candidates=lambda key: [Tiling(32, 16, 4, 2)])
    monkeypatch.setitem(ops.OPS, "dq", few)
    arguments = ["--dry-run", "--chip", "sm_90", "--op", "dq", "--head-dim", "64", "--bytes", "4"]
    assert tune.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # the row of the table, and the candidate
    assert all("('sm_90', 64, 4)" in line and "registers" in line for line in lines)
    assert lines[0].endswith("clean")


def test_what_does_not_compile_clean_is_told():
    op = ops.OPS["forward"]
    verdict, _ = tune.compiled(op, KEY, Tiling(128, 128, 4, 2), "sm_90")
    assert "C75" in verdict or "spills" in verdict  # ptxas' advisory; what 3.8 says before it
    verdict, resources = tune.compiled(op, KEY, Tiling(128, 64, 8, 2), "sm_90")
    assert verdict == "clean" and "0 spilled" in resources


def test_shipped_configurations_are_candidates():
    for op in ops.OPS.values():
        for key, configs in getattr(tile_tables, op.table).items():
            found = candidates_of(op, key)
            assert set(configs) <= set(found) and len(found) == len(set(found))


@interpreter_only
@pytest.mark.parametrize(
    ("name", "config", "kernel", "bug"),
    [
        ("forward", Tiling(64, 64, 1, 1), "varlen_attention", ("peak + tl.log2(total)", "peak")),
        ("rope", RopeConfig(2, 4, 1), "rope_2d", SWAPPED),
    ],
)
def test_the_gate_is_red_for_a_wrong_kernel(name, config, kernel, bug, monkeypatch, tmp_path):
    key = ("interpreter", 32, 4)
    monkeypatch.setattr(attention, "GATE_LENGTHS", (5, 65))
    monkeypatch.setitem(ops.OPS, name, replace(ops.OPS[name], calls=lambda key, device: []))
    assert ops.trouble(name, key, config, "cpu") is None
    plant(monkeypatch, tmp_path, kernel, *bug)
    assert "AssertionError" in ops.trouble(name, key, config, "cpu")


@interpreter_only
def test_the_gate_of_short_images_rotates_inside_attention():
    sizes = {"lengths": (5, 65), "head_dim": 32, "rope": True}
    rows.verified("varlen_attention", torch.float16, "cpu", **sizes)


def test_what_hangs_dies_or_raises_costs_itself_alone():
    with closing(Worker(5)) as worker:
        assert worker.failure(os.path.realpath, "/") == "/"
        first = worker._child[0].pid
        assert worker.failure(os.getenv, "no such variable") is None
        assert worker._child[0].pid == first
        assert worker.failure(int, "x").startswith("ValueError: invalid literal")
        assert worker.failure(os.getenv, "no such variable") is None  # in a new process
        assert worker._child[0].pid != first
        assert worker.failure(os.abort) == "its process died (exit code -6)"
        worker.timeout_s = 0.5
        assert worker.failure(time.sleep, 60) == "not done after 0.5 s"
        worker.timeout_s = 5
        assert worker.failure(time.sleep, 0) is None


@pytest.mark.parametrize("error", [PTXASError("log"), CompilationError("", None, "why")])
def test_what_triton_can_t_compile_is_a_candidate_that_fails(error, monkeypatch):
    def gate(key, device):
        raise error

    monkeypatch.setitem(ops.OPS, "rope", replace(ops.OPS["rope"], gate=gate))
    why = ops.trouble("rope", KEY, RopeConfig(4, 8, 4), "cpu")
    assert why.startswith(type(error).__name__) and why.endswith(("log", "why"))


def test_results_are_written_as_the_suites_write_theirs(monkeypatch, tmp_path, capsys):
    """With a worker that is this process: the patched op is not known to another one."""
    slow, fast, wrong = (RopeConfig(n, 8, 4) for n in (2, 4, 8))
    key = ("sm_90", 64, 2)

    def gate(key, device):
        assert (wrong,) != tile_tables.ROPE[key], "wrong"

    def run():
        time.sleep(0.02 if tile_tables.ROPE[key] == (slow,) else 0.001)

    calls = [Call("n=8", run, flops=10**6), Call("n=9", run)]
    op = replace(
        ops.OPS["rope"], gate=gate, candidates=lambda key: [slow, fast, wrong],
        calls=lambda key, device: calls,
    )  # fmt: skip
    monkeypatch.setitem(ops.OPS, "rope", op)
    monkeypatch.setattr(Worker, "failure", lambda self, function, *args: function(*args))
    monkeypatch.setitem(tile_tables.ROPE, key, (slow,))
    settings = Settings(
        torch.device("cpu"), small=True, min_rounds=3, max_rounds=3, results=tmp_path, commit="c0"
    )
    arguments = [("rope", op, key)], "sm_90", tmp_path / "tables.py", settings
    assert tune.tune(*arguments) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("*  rope")
    row_text = ", ".join(map(rows.short, (fast, slow)))
    assert f'("sm_90", 64, 2): ({row_text}),' in (tmp_path / "tables.py").read_text()

    (path,) = tmp_path.glob("tune-*-c0.json")
    result = json.loads(path.read_text())
    assert result["machine"]["commit"] == "c0" and result["ceilings"]["flops_per_second"] > 0
    assert [case["name"] for case in result["cases"]] == [
        "rope sm_90 64 2, n=8", "rope sm_90 64 2, n=9",
    ]  # fmt: skip
    rivals = {rival["name"]: rival for rival in result["cases"][0]["rivals"]}
    chosen, other = (rivals[rows.short(config)] for config in (fast, slow))
    assert (chosen["role"], other["role"]) == ("ours", "peer") and other["ratio"] > 2
    assert 0 < other["p20_s"] <= other["median_s"] <= other["p80_s"]
    assert chosen["flops_per_second"] == pytest.approx(1e6 / chosen["median_s"])
    assert rivals[rows.short(wrong)]["reason"].startswith("AssertionError: wrong")

    with monkeypatch.context() as patch:  # the same row again, on the same commit: its cases anew
        patch.setitem(ops.OPS, "rope", replace(op, calls=lambda key, device: calls[:1]))
        tune.tune([("rope", ops.OPS["rope"], key)], *arguments[1:])
    assert len(json.loads(path.read_text())["cases"]) == 1


def test_the_smallest_geometric_mean_wins():
    times = {"a": [1.0, 2.0, 1.5], "b": [4.0, 1.0, 1.5]}
    assert rows.geometric_means(times) == pytest.approx([2.0, 2.0**0.5, 1.5])


def test_a_row_keeps_its_last_resort():
    small, large = Tiling(64, 64, 4, 2), Tiling(128, 64, 8, 2)
    table = {KEY: (Tiling(128, 128, 8, 3), small)}
    tune.put(table, KEY, large)
    assert table[KEY] == (large, small)
    tune.put(table, KEY, small)
    assert table[KEY] == (small,)
    tune.put(table, KEY, None)
    assert KEY not in table


def test_a_row_is_seen_by_the_kernels_and_restored():
    from hrvlm_kernels.triton_kernels.varlen_attention import select_tilings

    before, forced = dict(tile_tables.FORWARD), Tiling(64, 32, 4, 2)
    with row("FORWARD", KEY, forced):
        assert select_tilings("sm_90", 64, torch.bfloat16) == (forced,)
    assert before == tile_tables.FORWARD
    assert list(before) == list(tile_tables.FORWARD)


def test_the_file_is_what_its_program_writes(tmp_path):
    tables, chosen = table_file.tables(), table_file.chosen_by()
    spills = table_file.spills()
    assert table_file.render(tables, chosen, spills) == table_file.PATH.read_text()
    tables["FORWARD"][KEY] = (Tiling(64, 64, 4, 2, "ahead"),)
    out = tmp_path / "tables.py"
    out.write_text("old")
    table_file.replace(tables, chosen | {"sm_90": "some GPU"}, spills, out)
    assert [p.name for p in tmp_path.iterdir()] == ["tables.py"]
    assert '("sm_90", 64, 2): (Tiling(64, 64, 4, 2, "ahead"),),' in out.read_text()
    assert '"sm_90": "some GPU"' in out.read_text()


def test_what_most_chips_have_is_written_once():
    rows = {("sm_80", 4): (1,), ("sm_90", 4): (2,), ("sm_100", 4): (1,), ("gfx942", 4): (1,)}
    once = {(4,): (1,), ("sm_90", 4): (2,)}
    assert table_file.folded(rows) == once and by_chip(once) == rows
    del rows["gfx942", 4]  # a chip without a row must stay without
    assert table_file.folded(rows) == rows == by_chip(rows)


@pytest.mark.gpu
def test_on_a_gpu_the_best_candidate_goes_into_the_file(monkeypatch, tmp_path, capsys):
    few = replace(ops.OPS["rope"], candidates=lambda key: [RopeConfig(4, 8, 4)])
    monkeypatch.setitem(ops.OPS, "rope", few)
    out = tmp_path / "tables.py"
    arguments = ["--op", "rope", "--head-dim", "64", "--bytes", "2", "--out", str(out)]
    arguments += ["--results", str(tmp_path)]
    assert tune.main(arguments) == 0
    marks = [line[0] for line in capsys.readouterr().out.splitlines()]
    assert marks == ["*", " "]
    assert torch.cuda.get_device_name() in out.read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ops.OPS)
def test_on_a_gpu_every_shipped_row_passes_its_gate(name):
    op, device = ops.OPS[name], torch.device("cuda", torch.cuda.current_device())
    for key in op.keys(architecture(device)):
        for config in getattr(tile_tables, op.table).get(key, ()):
            with row(op.table, key, config):
                op.gate(key, str(device))
