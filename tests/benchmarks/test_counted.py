"""The bound, loops of machine code, samples of programs, and the page of counted work."""

import json
import math

import pytest
import torch

from benchmarks.case import RESULTS
from benchmarks.counted import attention, linear, page, peers, rates, results, textbook
from benchmarks.counted.case import first, share_of_the_busiest, spread
from benchmarks.counted.rows import parts_of_a_tile
from benchmarks.counted.sass import Code
from hrvlm_kernels.triton_kernels.tilings import Tiling

PIPES = ("fma", "alu", "mufu", "convert", "shuffle", "issue")


def work(**instructions):
    return rates.Work(
        instructions=dict.fromkeys(PIPES, 0) | instructions,
        flops={"wgmma": 8192, "mma": 0}, wavefronts=3, shared_bytes=256, l2_bytes=640,
        dram_bytes=0,
    )  # fmt: skip


def test_the_bound_is_the_unit_that_needs_most():
    """On an H100: 2 clocks of tensor cores, 5 of shared memory, 10 of L2, and 8 exps take 16."""
    clocks = work(mufu=8, issue=40).clocks(90)
    assert {name: clocks[name] for name in ("tensor", "shared", "l2", "mufu", "issue")} == {
        "tensor": 2, "shared": 5, "l2": 10, "mufu": 16, "issue": 10,
    }  # fmt: skip
    assert rates.limit(clocks) == ("mufu", 16)
    assert rates.limit(work(issue=80).clocks(90)) == ("issue", 20)
    assert work().clocks(80)["tensor"] == 4


def test_device_memory_of_the_data_sheet():
    """A millisecond of a chip is its bandwidth over a thousand."""
    for chip, bytes_ in ((80, 1.555e9), (90, 3.35e9)):
        need = rates.Work(dict.fromkeys(PIPES, 0), {"wgmma": 0, "mma": 0}, 0, 0, 0, bytes_)
        name, clocks = rates.limit(need.clocks(chip))
        assert name == "dram"
        assert rates.microseconds(clocks, chip) == pytest.approx(1000)


@pytest.mark.parametrize("programs", [1, 2, 3, 8, 1000])
@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize(
    "sample", [spread(3), first, peers.heads_last, peers.middle_and_last, parts_of_a_tile]
)
def test_samples_add_up_to_the_grid(sample, programs, heads):
    total = programs * heads
    parts = sample((programs, heads, 1))
    assert sum(len(chosen) * weight for chosen, weight in parts) == total
    assert all(0 <= program < total for chosen, _ in parts for program in chosen)


@pytest.mark.parametrize("tiles", [1, 2, 3, 8, 33])
def test_the_middle_tiles_stand_for_all_under_a_causal_mask(tiles):
    work = [5 + 3 * i for i in range(tiles - 1)] + [17]
    parts = peers.middle_and_last((tiles, 2, 1))
    assert sum(work[i] * weight for chosen, weight in parts for i in chosen) == 2 * sum(work)


def test_parts_of_a_sum_are_those_of_one_tile():
    ((chosen, weight),) = parts_of_a_tile((10, 4, 1))
    assert list(chosen) == [0, 10, 20, 30] and weight == 10


def test_idle_multiprocessors_of_a_launch_that_is_alone():
    """Ten tiles on 132 multiprocessors; in twelve parts, some have one program and some none."""
    assert share_of_the_busiest((10, 1, 1), 90) == pytest.approx(13.2)
    assert share_of_the_busiest((10, 12, 1), 90) == pytest.approx(1.1)
    assert share_of_the_busiest((133, 1, 1), 90) == pytest.approx(264 / 133)
    assert share_of_the_busiest((108, 2, 1), 80) == 1


@pytest.mark.parametrize("n", [70, 128])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_the_textbook_attention_is_attention(n, head_dim):
    q, k, v = torch.randn(3, n, 2, head_dim)
    out, lse = torch.zeros_like(q), torch.zeros(2, n)
    textbook.start_flash_attention_2(q, k, v, out, lse, Tiling(64, 32, 4, 2))
    scores = torch.einsum("ihd,jhd->hij", q, k) * head_dim**-0.5
    torch.testing.assert_close(out, torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
    torch.testing.assert_close(lse * math.log(2), scores.logsumexp(-1))


@pytest.mark.parametrize("size", attention.PACKS)
def test_every_pack_is_counted(size):
    """Forward and backward, rotated or not, and rotated in the product; heads of 80 as they are."""
    names = {
        later.name
        for laters in (
            attention.forwards(90), attention.backwards(), linear.rotations(90),
            linear.attention_of_rotated(90),
        )
        for later in laters
    }  # fmt: skip
    for direction in ("forward", "backward"):
        for d in (64, 80, 128):
            assert (f"attention {direction}", f"{size} D={d}", "shipped") in names
        for d in (64, 128):
            assert (f"attention {direction} with RoPE", f"{size} D={d}", "shipped") in names
    for d in (64, 128):
        assert ("attention forward with RoPE", f"{size} D={d}", linear.ROTATED) in names
        for variant in ("shipped", linear.PASS):
            assert ("linear_rope_2d", f"{size} C={16 * d} D={d}", variant) in names


def test_loops():
    """An outer loop 1-4, an inner one 2-3; block 6 is a slow way that only jumps back into it."""
    successors = [[1], [2], [3, 6], [2, 4], [1, 5], [], [3, 6]]
    code = Code([["HGMMA"]] * 7, successors)
    assert code.loops() == [{1, 2, 3, 4, 6}, {2, 3, 6}, {6}]
    assert code.innermost() == [None, 1, 2, 2, 1, None, 6]
    assert code.in_loops(("HG",), [1, 10, 100, 100, 10, 1, 7]) == {1: 20, 2: 200, 6: 7}


def test_rows_are_added_and_replaced_by_their_ops(tmp_path):
    path = tmp_path / "counted-sm_90.json"
    row = {"op": "swiglu", "size": "F=8", "variant": "shipped", "role": "ours", "commit": "c0"}
    rows = [row, row | {"op": "rope_2d"}]
    path.write_text(json.dumps({"rows": rows}))
    assert results.others(path, ("swi",)) == rows[1:]
    assert results.others(path, ()) == rows and results.others(path, ("",)) == []
    assert results.name_of(row) == ("swiglu", "F=8", "shipped")


def test_the_page_names_what_one_chip_lacks(tmp_path):
    document = json.loads((RESULTS / "counted-sm_90.json").read_text())
    (tmp_path / "counted-sm_90.json").write_text(json.dumps(document))
    document |= {"chip": "sm_80", "rows": [r for r in document["rows"] if r["op"] != "rope_2d"]}
    (tmp_path / "counted-sm_80.json").write_text(json.dumps(document))
    old = page.render(tmp_path).partition("## sm_80")[2]
    assert "not yet here: rope_2d: D=64, D=128." in old


def test_the_page_is_made_of_the_result_files():
    assert (page.DOCS / page.NAME).read_text(encoding="utf-8") == page.render(RESULTS)
    for path in RESULTS.glob("counted-*.json"):
        document = json.loads(path.read_text())
        assert document["device"] is None and document["rows"]
        names = [results.name_of(row) for row in document["rows"]]
        assert len(set(names)) == len(names)
        assert not any(row["commit"].endswith(("dirty", "unknown")) for row in document["rows"])
