"""Kills at random moments, shards, an actor that keeps dying, a full disk: `make test-scale`.

The kills are four times five, each time of another folder. What they did is written to
``benchmarks/results/scale_kills.json``.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.suite import commit_here
from hrvlm.embed.config import Resources
from hrvlm.embed.run import embed
from hrvlm.embed.store import part_name
from tests.embed.here import rows_of
from tests.embed.on_ray.test_run import (
    DECODING,
    ENCODING,
    WRITING,
    config_of,
    contents,
    ray_processes,
)
from tests.embed.pictures import write_model, write_pictures

REPORT = Path(__file__).parents[3] / "benchmarks" / "results" / "scale_kills.json"
KILLS, COUNT, ROWS, SEEDS = 5, 1000, 10, (17, 18, 19, 20)
PARTS = COUNT // ROWS
VICTIMS = ("driver", DECODING, ENCODING, WRITING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    write_pictures(folder / "pictures", COUNT, sides=(200, 400))  # long enough to decode
    write_model(folder / "model")
    return folder


def small_parts(folder, out):
    return config_of(folder, out, rows_per_part=ROWS)


@pytest.fixture(scope="module")
def whole(cluster, folder):
    """The files of an undisturbed run."""
    assert embed(small_parts(folder, "whole")).rows == COUNT
    return contents(folder / "whole")


def driver_of(config, cluster):
    """`hrvlm embed` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "hrvlm", "embed", config.input, "--out", config.out,
         "--model", config.model, "--max-img-size", "48", "--rows-per-part", str(ROWS),
         "--max-tokens-per-pass", "120", "--address", cluster],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(["kernels", "."])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def parts_in(out):
    return len(list(out.glob("part-*.parquet")))


def moment(chance, out, driver, victim):
    """Wait for a random one: in the time that a run takes to start, or after some of its parts.

    Decoders are far ahead of the parts: theirs is within a second of the first that is at work.
    """
    before, started = parts_in(out), time.monotonic()
    if victim == DECODING:
        at_work(victim, driver)
        time.sleep(chance.random())
        return
    wanted, seconds = chance.randrange(1, 40), chance.uniform(0, 40)
    start_only = chance.random() < 0.25
    while driver.poll() is None:
        waited = time.monotonic() - started
        if waited > seconds if start_only else parts_in(out) - before >= wanted:
            return
        time.sleep(0.01)


def at_work(victim, driver):
    """The first process that is seen at it; None if the run ends before."""
    while driver.poll() is None:
        for process, _ in ray_processes(victim):
            return process
        time.sleep(0.002)
    return None


@pytest.mark.parametrize("seed", SEEDS)
def test_kills_lose_nothing_and_double_nothing(cluster, folder, whole, seed):
    chance, kills, runs = random.Random(seed), [], 0
    while len(kills) < KILLS:
        runs += 1
        out = folder / f"killed-{seed}-{runs}"
        config = small_parts(folder, out.name)
        while parts_in(out) < PARTS:
            driver = driver_of(config, cluster)
            while driver.poll() is None and len(kills) < KILLS:
                victim = chance.choice(VICTIMS)
                moment(chance, out, driver, victim)
                process = driver.pid if victim == "driver" else at_work(victim, driver)
                if driver.poll() is not None:
                    break
                done = parts_in(out)
                os.kill(process, signal.SIGKILL)
                if victim == "driver":
                    driver.wait()
                kills.append({"killed": victim, "run": runs, "parts_done": done})
                print(kills[-1], flush=True)
            driver.wait()
            assert driver.returncode in (0, -signal.SIGKILL), driver.stderr.read()
        assert contents(out) == whole, f"after {kills}"
        print(f"run {runs}: {PARTS} parts are those of the undisturbed run", flush=True)
    told = {"runs": runs, "images": COUNT, "parts": PARTS, "kills": kills, "equal_bytes": True}
    report(f"kills, seed {seed}", told)


def test_shards_in_folders_of_their_own_are_the_whole_when_put_together(cluster, folder, whole):
    for i in (1, 0):
        result = embed(small_parts(folder, f"shard-{i}"), Resources(shard=(i, 2)))
        assert result.rows == result.images == COUNT // 2 and not result.failed
    for path in (folder / "shard-1").glob("part-*"):
        path.rename(folder / "shard-0" / path.name)
    assert contents(folder / "shard-0") == whole
    again = embed(small_parts(folder, "shard-0"))
    assert (again.rows, again.written) == (COUNT, 0)
    report("shards", {"shards": 2, "rows": again.rows, "equal_bytes": True})


def test_an_actor_that_keeps_dying_ends_in_a_run_with_care(cluster, folder, whole):
    killed = []

    def poison(ending):
        while not ending.is_set() and len(killed) < 6:
            for process, _ in ray_processes(f"{ENCODING}.submit"):
                if process not in killed:
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
            time.sleep(0.01)

    ending = threading.Event()
    thread = threading.Thread(target=poison, args=(ending,))
    thread.start()
    try:
        result = embed(small_parts(folder, "poisoned"))
    finally:
        ending.set()
        thread.join()
    assert len(killed) >= 4 and result.rows == COUNT and not result.failed
    columns = ("id", "error", "mean")
    for whole_row, row in zip(
        rows_of(folder / "whole", *columns), rows_of(folder / "poisoned", *columns), strict=True
    ):
        assert (whole_row["id"], whole_row["error"] is None) == (row["id"], row["error"] is None)
        if row["error"] is None:
            np.testing.assert_allclose(whole_row["mean"], row["mean"], rtol=1e-5, atol=1e-6)
    report("poisoned_actor", {"kills": len(killed), "rows": result.rows, "failed": 0})


@pytest.mark.skipif(os.getuid() != 0, reason="only root mounts a file system")
def test_after_a_full_disk_the_same_command_goes_on(cluster, folder, whole):
    out = folder / "full"
    out.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(out)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OSError, match="full: No space left on device"):
            embed(small_parts(folder, "full"))
        before = parts_in(out)
        assert 0 < before < PARTS and (out / part_name(0)).exists()
        subprocess.run(["mount", "-o", "remount,size=8m", str(out)], check=True)
        result = embed(small_parts(folder, "full"))
        assert result.rows == COUNT and contents(out) == whole
    finally:
        subprocess.run(["umount", "--lazy", str(out)], check=True)
    report("full_disk", {"parts_before": before, "rows": result.rows, "equal_bytes": True})


def report(name, values):
    """Keep what a test did."""
    kept = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    where = {"commit": commit_here(), "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count()}
    kept[name] = values | where
    REPORT.write_text(json.dumps(kept, indent=2) + "\n")
