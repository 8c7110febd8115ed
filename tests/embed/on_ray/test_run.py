"""`hrvlm embed` on a real Ray cluster: after three kills all rows are there, right and the same."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from hrvlm.embed.config import EmbedConfig
from hrvlm.embed.run import _Progress, embed
from hrvlm.embed.store import part_name
from tests.embed.here import rows_of, run_here
from tests.embed.pictures import processor_of, write_model, write_pictures

COUNT, ROWS = 1000, 40
DECODING, ENCODING, WRITING = (
    "Map(decode_part)",
    "MapWorker(Map(Encoder))",
    "MapWorker(Map(Writer))",
)
OLDER = frozenset(os.listdir("/proc"))  # than the cluster: they need not be looked at


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    broken = write_pictures(folder / "pictures", COUNT, sides=(100, 200))
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


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def ray_processes(name):
    """Process id and title of those of Ray whose title says that they do this."""
    found = set(os.listdir("/proc")) - OLDER  # psutil takes ten times as long
    for process in filter(str.isdecimal, found):
        try:
            title = Path("/proc", process, "cmdline").read_text()
        except OSError:
            continue
        if title.startswith("ray::") and name in title:
            yield int(process), title


def killing(names, ending, killed):
    """Kill the first process of each step that is seen at work."""
    while len(killed) < len(names) and not ending.is_set():
        for name in names:
            for process, _ in [] if name in killed else ray_processes(name):
                os.kill(process, signal.SIGKILL)
                killed.append(name)
                break
        time.sleep(0.03)


@pytest.fixture(scope="module")
def killed(cluster, folder):
    """A run whose driver is killed, and one that goes on while a decoder and the encoder are."""
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
    until = time.monotonic() + 900
    while not (out / part_name(2)).exists():
        assert driver.poll() is None, driver.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)
    steps = [title for _, title in ray_processes("Encoder")]
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert steps and not any("decode" in title for title in steps), "not side by side"
    before = len(list(out.glob("part-*.parquet")))
    left = out / f".{part_name(24)}.77.part"  # as a killed writer leaves it
    left.write_bytes(b"half")

    plans, told, arrived, victims, ending = [], [], [], [], threading.Event()
    kinds = (DECODING, f"{ENCODING}.submit")
    thread = threading.Thread(target=killing, args=(kinds, ending, victims))
    thread.start()
    add = _Progress.add

    def noted(progress, part, out):
        arrived.append((time.time(), part.get("started", 0.0)))
        add(progress, part, out)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Progress, "add", noted)
            report = embed(
                config, on_plan=lambda plan: plans.append(plan) or True, on_images=told.append
            )
    finally:
        ending.set()
        thread.join()
    assert set(victims) == set(kinds)
    return SimpleNamespace(plan=plans[0], told=told, arrived=arrived, report=report, before=before)


def test_ray_listens_to_this_machine_alone(cluster):
    connections = getattr(psutil.Process, "net_connections", None) or psutil.Process.connections
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {
        connection.laddr.ip
        for process in processes
        for connection in connections(process, kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening and listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert len(processes) > 3 and cluster.startswith("127.0.0.1:")


def test_parts_are_written_and_told_while_others_are_still_encoded(killed):
    assert killed.arrived[0][0] < max(started for _, started in killed.arrived)


def test_every_image_has_a_row_and_broken_ones_their_error(folder, killed):
    folder, encoder, broken = folder
    plan, report, left = killed.plan, killed.report, COUNT - killed.before * ROWS
    assert 0 < left < COUNT
    assert (plan.images, plan.waiting, plan.parts) == (COUNT, left, left // ROWS)
    assert plan.seconds > 0 and plan.tokens > left * 5
    assert killed.told == [ROWS] * (left // ROWS)
    assert report.rows == report.images == COUNT and report.written == left and not report.failed
    (kind, (count, name, error)), *others = report.bad.items()
    assert not others and count == len(broken) == COUNT // 20
    assert kind == "ImageError: is truncated or corrupt" and name in broken and name in error

    rows = rows_of(folder / "killed", "id", "row", "error", "cls", "mean")
    assert [row["row"] for row in rows] == list(range(COUNT))
    pictures = folder / "pictures"
    assert [row["id"] for row in rows] == sorted(
        str(path.relative_to(pictures)) for path in pictures.rglob("*.png")
    )
    assert [row["id"] for row in rows if row["error"]] == broken
    assert all((row["cls"] is None) == (row["error"] is not None) for row in rows)
    process = processor_of(48)
    for row in [row for row in rows if not row["error"]][::37]:
        with torch.inference_mode():
            alone = encoder([process(pictures / row["id"])[0]])
        torch.testing.assert_close(torch.tensor(row["cls"]), alone.cls[0])
        torch.testing.assert_close(torch.tensor(row["mean"]), alone.patches[0].mean(0))


def test_the_files_are_byte_for_byte_those_of_the_same_steps_in_one_process(folder, killed):
    folder = folder[0]
    run_here(config_of(folder, "here"))
    assert contents(folder / "killed") == contents(folder / "here")


def test_a_complete_run_does_nothing_and_another_is_refused_by_name(folder, killed):
    config = config_of(folder[0], "killed")
    report = embed(config)
    assert report.rows == COUNT and report.written == 0 and report.plan is None
    with pytest.raises(ValueError, match=r"another run \(max_tokens_per_pass: 120 there, 99 now\)"):
        embed(EmbedConfig(**{**vars(config), "max_tokens_per_pass": 99}))
