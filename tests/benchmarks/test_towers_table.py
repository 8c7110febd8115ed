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
