"""The README's table of towers is what its result file gives."""

import json

from benchmarks.towers.__main__ import END, FILE, README, START, TITLES, table
from benchmarks.towers.tiny import TOWERS


def test_the_table_is_that_of_the_result_file():
    result = json.loads(FILE.read_text(encoding="utf-8"))
    assert result["towers"].keys() == TITLES.keys() == TOWERS.keys()
    shown = README.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    assert shown == table(result)


def test_no_tower_waits_more_than_once_or_differs():
    for row in json.loads(FILE.read_text(encoding="utf-8"))["towers"].values():
        assert row["syncs_after"] <= 1 < row["syncs_before"]
        assert row["syncs_grids_on_host"] == 0
        assert max(row["output"], row["gradients"]) <= 3e-6
        assert row["rope_in_kernels"]
        assert row["launches_after"] < row["launches_before"]


def test_a_layer_never_waits_and_moves_less():
    for row in json.loads(FILE.read_text(encoding="utf-8"))["layers"].values():
        stock, mine = row["stock"], row["accelerated"]
        assert mine["syncs"] == 0 < stock["syncs"]
        assert mine["launches"] < stock["launches"] and mine["passes"] < stock["passes"]
