"""`hrvlm embed` on a real Ray cluster: all rows, right, and after kills the same."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from hrvlm.embed.config import EmbedConfig, Resources
from hrvlm.embed.rows import read_parts
from hrvlm.embed.run import embed
from hrvlm.embed.store import Store, part_name
from tests.embed.pictures import processor_of, write_model, write_pictures

COUNT, ROWS = 1000, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    broken = write_pictures(folder / "pictures", COUNT)
    return folder, write_model(folder / "model"), broken


def config_of(folder, out, rows_per_part=ROWS):
    return EmbedConfig(
        str(folder / "pictures"),
        str(folder / out),
        model=str(folder / "model"),
        max_img_size=48,
        rows_per_part=rows_per_part,
        max_tokens_per_pass=120,
    )


@pytest.fixture(scope="module")
def whole(cluster, folder):
    """An undisturbed run: what was planned, told and reported."""
    plans, told, steps = [], [], set()

    def tell(images):
        told.append(images)
        steps.update(process.title for process in ray_processes("Encoder"))

    report = embed(
        config_of(folder[0], "whole"),
        on_plan=lambda plan: plans.append(plan) or True,
        on_images=tell,
    )
    assert steps and not any("decode" in title for title in steps), "not side by side"
    return plans[0], told, report


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_every_image_has_a_row_and_broken_ones_their_error(folder, whole):
    folder, encoder, broken = folder
    plan, told, report = whole
    assert (plan.images, plan.waiting, plan.parts) == (COUNT, COUNT, COUNT // ROWS)
    assert plan.seconds > 0 and plan.tokens > COUNT * 5
    assert told == [ROWS] * (COUNT // ROWS)
    assert report.rows == report.images == report.written == COUNT and not report.failed
    (kind, (count, name, error)), *others = report.bad.items()
    assert not others and count == len(broken) == COUNT // 20
    assert kind == "ImageError: is truncated or corrupt" and name in broken and name in error

    store = Store(str(folder / "whole"))
    rows = read_parts(store, store.read_manifest(), ["id", "row", "error", "cls", "mean"])
    rows = rows.to_pylist()
    assert [row["row"] for row in rows] == list(range(COUNT))
    names = sorted(
        str(p.relative_to(folder / "pictures")) for p in (folder / "pictures").rglob("*.png")
    )
    assert [row["id"] for row in rows] == names
    assert [row["id"] for row in rows if row["error"]] == broken
    assert all((row["cls"] is None) == (row["error"] is not None) for row in rows)
    process = processor_of(48)
    for row in [row for row in rows if not row["error"]][::37]:
        with torch.inference_mode():
            alone = encoder([process(folder / "pictures" / row["id"])[0]])
        torch.testing.assert_close(torch.tensor(row["cls"]), alone.cls[0])
        torch.testing.assert_close(torch.tensor(row["mean"]), alone.patches[0].mean(0))


def ray_processes(name):
    """Those of Ray whose title says that they do this."""
    for process in psutil.process_iter(["cmdline"]):
        process.title = " ".join(process.info["cmdline"] or [])
        if process.title.startswith("ray::") and name in process.title:
            yield process


def killing(names, ending, killed):
    """Kill the first process of each step that is seen at work."""
    while len(killed) < len(names) and not ending.is_set():
        for name in names:
            for process in [] if name in killed else ray_processes(name):
                process.kill()
                killed.append(name)
                break
        time.sleep(0.02)


def test_after_kills_of_driver_actor_and_worker_the_files_are_the_same(cluster, folder, whole):
    folder = folder[0]
    config, out = config_of(folder, "killed"), folder / "killed"
    driver = subprocess.Popen(
        [sys.executable, "-m", "hrvlm", "embed", config.input, "--out", config.out,
         "--model", config.model, "--max-img-size", "48", "--rows-per-part", str(ROWS),
         "--max-tokens-per-pass", "120", "--address", cluster],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(["kernels", "."])},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    until = time.monotonic() + 300
    while not (out / part_name(2)).exists():
        assert driver.poll() is None, driver.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = len(list(out.glob("part-*.parquet")))
    assert 0 < before < COUNT // ROWS
    left = out / f".{part_name(24)}.77.part"  # as a killed writer leaves it
    left.write_bytes(b"half")

    killed, ending = [], threading.Event()
    steps = ("Map(decode_part)", "MapWorker(Map(Encoder)).submit")
    thread = threading.Thread(target=killing, args=(steps, ending, killed))
    thread.start()
    try:
        report = embed(config, Resources())
    finally:
        ending.set()
        thread.join()
    assert set(killed) == set(steps)
    assert report.rows == COUNT and report.written == COUNT - before * ROWS
    assert contents(out) == contents(folder / "whole")


def test_a_complete_run_does_nothing_and_another_is_refused_by_name(folder, whole):
    folder = folder[0]
    config = config_of(folder, "whole")
    report = embed(config)
    assert report.rows == COUNT and report.written == 0 and report.plan is None
    with pytest.raises(ValueError, match=r"another run \(max_tokens_per_pass: 120 there, 99 now\)"):
        embed(EmbedConfig(**{**vars(config), "max_tokens_per_pass": 99}))
    assert pq.read_metadata(folder / "whole" / part_name(0)).num_rows == ROWS
