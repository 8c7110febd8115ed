"""benchmarks.tuning.spills: the entry of this Triton in the tile tables."""

from functools import partial

import torch

from benchmarks.compiled import attention_jobs
from benchmarks.compiled.jobs import of_row
from benchmarks.tuning import spills, table_file
from hrvlm_kernels.triton_kernels import tile_tables
from hrvlm_kernels.triton_kernels.launch import triton_release
from hrvlm_kernels.triton_kernels.tilings import Tiling

ROW = ("FORWARD", "sm_90", 128, 2)
SPILLING, CLEAN = Tiling(128, 128, 4, 2), Tiling(128, 64, 8, 1)


def test_every_release_has_tiles_that_always_run():
    assert (3, 6) in tile_tables.SPILLS
    for rows in tile_tables.SPILLS.values():
        assert not spills.stuck(rows)


def test_a_row_without_plain_tiles_is_stuck():
    row = tile_tables.FORWARD[ROW[1:]]
    assert row[0].order == "ahead" and spills.stuck({ROW: row[1:]}) == [ROW]
    assert not spills.stuck({("SHORT", "sm_90", 64, 2): tile_tables.SHORT["sm_90", 64, 2]})


def test_what_spills_is_written(monkeypatch, tmp_path, capsys):
    def jobs(target, head_dim):
        make = partial(attention_jobs.forward_job, 128, torch.bfloat16)
        return of_row(make, [SPILLING, CLEAN], *ROW) if head_dim == 128 else ()

    monkeypatch.setattr(spills.jobs, "jobs", lambda target: ())
    monkeypatch.setattr(attention_jobs, "distinct_jobs", jobs)
    release, before = triton_release(), table_file.spills()
    out = tmp_path / "tables.py"
    assert spills.main(["--target", "sm_90", "--out", str(out)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(str(ROW)) and "spills" in line
    others = {row: t for row, t in before.get(release, {}).items() if row[1] != "sm_90"}
    wanted = before | {release: others | {ROW: (SPILLING,)}}
    tables, chosen = table_file.tables(), table_file.chosen_by()
    assert out.read_text() == table_file.render(tables, chosen, wanted)
    assert table_file.spills() == before
