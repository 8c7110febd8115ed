"""``hrvlm plan``."""

import json

from tests.commands.helpers import run


def test_plan_table_and_json():
    table = run("plan", "640x960", "100x200", "--max-img-size", "960").stdout
    assert "40x60" in table and "10x15" in table and "all, packed" in table
    assert "height x width" in table and "multiples of 64 px" in table and "--factor 1" in table
    alone = run("plan", "640x960", "100x200", "--factor", "1").stdout
    assert "token" not in alone.partition("\n")[0] and "multiples of the patch size" in alone
    assert alone.splitlines()[3].split()[:6] == [
        "100x200",
        "100x200",
        "112x208",
        "1.08x",
        "7x13",
        "91",
    ]
    document = json.loads(run("plan", "640x960", "--max-img-size", "960", "--json").stdout)
    assert document["images"][0]["patch_grid"] == [40, 60]
    assert document["tokens"] == 150
    assert document["flops"] == document["gemm_flops"] + document["attention_flops"]
    small = json.loads(run("plan", "100x200", "--json").stdout)["images"][0]
    large = json.loads(run("plan", "100x200", "--upscale", "--json").stdout)["images"][0]
    assert small["resized"] == [128, 256] and large["resized"] == [512, 1024]
