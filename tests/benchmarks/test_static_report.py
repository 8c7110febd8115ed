"""benchmarks.compiled: what the committed report says was expected."""

from benchmarks.compiled.__main__ import LEADS, OUT, VARIANTS


def test_a_lead_stands_beside_the_variant_it_was_for():
    table = OUT.read_text().split("## Orders of the attention forward on sm_90")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| "][1:]
    variants = [(order, head_dim, f"128x{step}") for head_dim, order, step in VARIANTS]
    assert [(order, int(d), tile) for order, d, tile, *_ in rows] == variants
    assert [row[-1] for row in rows] == [LEADS.get(variant, "-") for variant in variants]
    assert set(LEADS) <= set(variants)
