"""The recorded runs of benchmarks/hardening say what the documents say of them."""

import json

from benchmarks.case import RESULTS
from benchmarks.hardening import memory, packs
from benchmarks.hardening.parts import made_by


def recorded(name):
    return json.loads((RESULTS / name).read_text())


def test_a_million_cases_found_nothing():
    run = recorded("fuzz.json")
    assert run["cases"] >= 1_000_000 and run["found"] == 0


def test_an_image_had_the_same_bits_in_ten_thousand_packs():
    runs = recorded("packs.json")["runs"]
    assert sum(run["packs"] for run in runs) == 10_000
    assert all(run["images_compared"] >= 2 * run["packs"] for run in runs)
    assert not any(run["with_other_bits"] for run in runs)
    few = packs.compare(3)
    assert few["packs"] == 3 and few["images_compared"] >= 6 and not few["with_other_bits"]


def test_memory_stays_over_shapes_and_is_linear_in_tokens():
    run = recorded("memory.json")
    shapes = run["shapes"]
    assert run["made_by"]["shapes"].keys() == made_by().keys()
    assert shapes["different_shapes"] == 10_000
    assert abs(shapes["growth_in_the_second_half_mib"]) < 8
    bounds = {name: cache.cache_info().maxsize for name, cache in memory.CACHES.items()}
    assert {name: cache["bound"] for name, cache in shapes["caches"].items()} == bounds
    met = {name for name, cache in shapes["caches"].items() if cache["entries"] == cache["bound"]}
    assert met == {"layouts", "centres", "shuffled grids"}
    by_token = {(r["backend"], r["pass"], r["side"]): r["bytes_per_token"] for r in run["sides"]}
    for way in ("forward", "forward and backward"):
        assert by_token["auto", way, 2048] < 1.1 * by_token["auto", way, 448]
        assert by_token["eager", way, 1024] > 2 * by_token["eager", way, 448]
    few = memory.shapes(40, samples=2, patches=30)
    assert few["different_shapes"] == 40 > few["packs"] and len(few["samples"]) == 2
    assert few["caches"]["shuffled grids"]["entries"] > 0
