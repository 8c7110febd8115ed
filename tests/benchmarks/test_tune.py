"""benchmarks.tune without a GPU: candidates that compile, the gate, the choice and the file."""

from dataclasses import replace

import pytest
import torch

from benchmarks import tile_table_file, tune, tune_ops
from hrvlm_kernels import tile_tables
from hrvlm_kernels.launch import architecture
from hrvlm_kernels.tilings import RopeConfig, Tiling
from tests.kernels.helpers import interpreter_only
from tests.kernels.mutations import plant

KEY = ("sm_90", 64, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    assert "there is no GPU to time on; --dry-run" in capsys.readouterr().err
    assert tune.main(["--dry-run"]) == 2
    assert "--dry-run needs --chip" in capsys.readouterr().err


def test_a_dry_run_compiles_every_candidate(capsys, monkeypatch):
    few = replace(tune_ops.OPS["dq"], candidates=lambda key: [Tiling(32, 16, 4, 2)])
    monkeypatch.setitem(tune_ops.OPS, "dq", few)
    arguments = ["--dry-run", "--chip", "sm_90", "--op", "dq", "--head-dim", "64", "--bytes", "4"]
    assert tune.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # the row of the table, and the candidate
    assert all("('sm_90', 64, 4)" in line and "registers" in line for line in lines)
    assert lines[0].endswith("clean")


def test_what_does_not_compile_clean_is_told():
    op = tune_ops.OPS["forward"]
    verdict, _ = tune.compiled(op, KEY, Tiling(128, 128, 4, 2), "sm_90")
    assert "C75" in verdict  # ptxas' advisory
    verdict, resources = tune.compiled(op, KEY, Tiling(128, 64, 8, 2), "sm_90")
    assert verdict == "clean" and "0 spilled" in resources


def test_shipped_configurations_are_candidates():
    for op in tune_ops.OPS.values():
        for key, configs in getattr(tile_tables, op.table).items():
            found = tune_ops.candidates_of(op, key)
            assert set(configs) <= set(found) and len(found) == len(set(found))


@interpreter_only
def test_the_gate_is_red_for_a_wrong_kernel(monkeypatch, tmp_path):
    key = ("interpreter", 32, 4)
    monkeypatch.setattr(tune_ops, "_GATE_LENGTHS", (5, 65))
    op = tune_ops.OPS["forward"]
    assert tune._works(op, key, Tiling(64, 64, 1, 1), "cpu")
    bug = ("peak + tl.log2(total)", "peak")
    plant(monkeypatch, tmp_path, "varlen_attention_triton", *bug)
    assert not tune._works(op, key, Tiling(64, 64, 1, 1), "cpu")


def test_the_smallest_geometric_mean_wins():
    times = {"a": [1.0, 2.0, 1.5], "b": [4.0, 1.0, 1.5]}
    assert tune.geometric_means(times) == pytest.approx([2.0, 2.0**0.5, 1.5])


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
    from hrvlm_kernels.varlen_attention_triton import select_tilings

    before, forced = dict(tile_tables.FORWARD), Tiling(64, 32, 4, 2)
    with tune_ops.row("FORWARD", KEY, forced):
        assert select_tilings("sm_90", 64, torch.bfloat16) == (forced,)
    assert before == tile_tables.FORWARD
    assert list(before) == list(tile_tables.FORWARD)


def test_the_file_is_what_its_program_writes(tmp_path):
    tables, chosen = tile_table_file.tables(), tile_table_file.chosen_by()
    assert tile_table_file.render(tables, chosen) == tile_table_file.PATH.read_text()
    tables["FORWARD"][KEY] = (Tiling(64, 64, 4, 2, "ahead"),)
    out = tmp_path / "tables.py"
    out.write_text("old")
    tile_table_file.replace(tables, chosen | {"sm_90": "some GPU"}, out)
    assert [p.name for p in tmp_path.iterdir()] == ["tables.py"]
    assert '("sm_90", 64, 2): (Tiling(64, 64, 4, 2, "ahead"),),' in out.read_text()
    assert '"sm_90": "some GPU"' in out.read_text()


@pytest.mark.gpu
def test_on_a_gpu_the_best_candidate_goes_into_the_file(monkeypatch, tmp_path, capsys):
    few = replace(tune_ops.OPS["rope"], candidates=lambda key: [RopeConfig(4, 8, 4)])
    monkeypatch.setitem(tune_ops.OPS, "rope", few)
    out = tmp_path / "tables.py"
    arguments = ["--op", "rope", "--head-dim", "64", "--bytes", "2", "--out", str(out)]
    assert tune.main(arguments) == 0
    marks = [line[0] for line in capsys.readouterr().out.splitlines()]
    assert marks == ["*", " "]
    assert torch.cuda.get_device_name() in out.read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("name", tune_ops.OPS)
def test_on_a_gpu_every_shipped_row_passes_its_gate(name):
    op, device = tune_ops.OPS[name], torch.device("cuda", torch.cuda.current_device())
    for key in op.keys(architecture(device)):
        for config in getattr(tile_tables, op.table).get(key, ()):
            assert tune._works(op, key, config, str(device)), (key, config)
