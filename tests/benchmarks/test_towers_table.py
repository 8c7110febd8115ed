"""The README's table of towers is what its result file gives."""

import json

from benchmarks.towers.__main__ import END, FILE, README, START, table
from benchmarks.towers.tiny import ALL, TOWERS


def test_the_table_is_that_of_the_result_file():
    result = json.loads(FILE.read_text(encoding="utf-8"))
    assert TOWERS.keys() <= result["towers"].keys() <= ALL.keys()
    shown = README.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    assert shown == table(result)


# Their own code, beside attention, reads sizes or masks back for itself.
ASKING = {"hunyuan_vl", "cosmos3_edge", "video_llama_3", "minicpmv4_6", "radio"}
ASKING |= {"siglip2", "idefics3", "smolvlm"}


def test_no_tower_waits_more_than_once_or_differs():
    for name, row in json.loads(FILE.read_text(encoding="utf-8"))["towers"].items():
        if name in ASKING:
            assert row["syncs_after"] <= row["syncs_before"], name
        else:
            assert row["syncs_after"] == 1 < row["syncs_before"], name
            assert row["syncs_sizes_on_host"] == 0, name
        assert max(row["output"], row["gradients"]) <= 2e-6, name
        assert row["rope_in_kernels"], name
        assert row["launches_after"] < row["launches_before"], name


def test_a_layer_never_waits_and_moves_less():
    for row in json.loads(FILE.read_text(encoding="utf-8"))["layers"].values():
        stock, mine = row["stock"], row["accelerated"]
        assert mine["syncs"] == 0 < stock["syncs"]
        assert mine["launches"] < stock["launches"] and mine["passes"] < stock["passes"]
