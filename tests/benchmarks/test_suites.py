"""Every suite runs on the CPU with tiny inputs: GPU time is too dear to find slips in."""

import importlib
import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.case import Settings
from benchmarks.gpu_run import steps_of
from benchmarks.suite import SuiteRun

ROOT = Path(__file__).parents[2]
SUITES = {
    "encoder": 5,
    "varlen_attention": 16,
    "rope_2d": 8,
    "pixel_shuffle_linear": 12,
    "fused_ops": 6,
    "cpu_encoder": 4,
    "processing": 2,
    "training": 1,
}
# What torch itself can't do on a CPU.
IMPOSSIBLE = {
    "SDPA cuDNN": "No viable backend",
    "SDPA efficient": "No viable backend",
    "FlexAttention, document mask": "does not support backward on CPU",
}


def settings(path, **changes):
    options = {"small": True, "compiled": False, "round_s": 0.0, "min_rounds": 2, "max_rounds": 2}
    return Settings(torch.device("cpu"), results=path, **(options | changes))


@pytest.mark.parametrize("name", SUITES)
def test_every_case_gives_numbers_or_a_reason(name, tmp_path):
    suite = importlib.import_module(f"benchmarks.bench_{name}")
    assert name == suite.SUITE
    run = SuiteRun(suite.SUITE, settings(tmp_path), budget_s=1e9)
    for case in suite.cases(run.settings):
        result = run.measure(case)
        assert result.status == "measured", result
        ours = [r for r in result.rivals if r.role == "ours"]
        assert len(ours) == 1 and ours[0].median_s > 0
        for rival in result.rivals:
            if rival.status == "failed":
                assert IMPOSSIBLE[rival.name] in rival.reason
            elif rival.status == "measured":
                assert rival.median_s > 0 and rival.p20_s <= rival.median_s <= rival.p80_s
            else:
                assert rival.status in ("unavailable", "left out") and rival.reason
        peers = [r for r in result.rivals if r.role == "peer" and r.status == "measured"]
        assert all(r.ratio > 0 for r in peers)
        assert peers or result.parameters["images"] == "mixed", result.name
    written = json.loads(run.path.read_text())
    assert len(written["cases"]) == SUITES[name]
    assert all(gate["failure"] is None for gate in written["gates"])


@pytest.mark.parametrize(
    "name", ["encoder", "varlen_attention", "rope_2d", "pixel_shuffle_linear", "fused_ops"]
)
def test_names_of_full_suites_are_unique_and_sizes_as_promised(name):
    suite = importlib.import_module(f"benchmarks.bench_{name}")
    for full in (False, True):
        cases = list(suite.cases(Settings(torch.device("cuda"), full=full)))
        assert len({case.name for case in cases}) == len(cases)
        assert all(case.dtype == torch.bfloat16 for case in cases)
        assert all(case.flops or case.bytes for case in cases)


def test_every_model_size_and_peer_of_the_encoder_is_in_the_full_suite():
    from benchmarks import bench_encoder

    cases = list(bench_encoder.cases(Settings(torch.device("cuda"), full=True)))
    names = {case.name for case in cases}
    for model in ("S", "B", "L"):
        for direction in ("forward", "forward + backward"):
            assert f"ViT-{model} mixed {direction}, mixed" in names
            for size in (224, 768, 1024):
                assert f"ViT-{model} {direction}, {size} px" in names
    for model in ("H+", "7B"):
        assert {f"ViT-{model} forward, {size} px" for size in (224, 768, 1024)} <= names
    for model in ("S", "B", "L"):
        for direction in ("forward", "forward + backward"):
            for size in (224, 768, 1024):
                assert f"ViT-{model} max-autotune, {direction}, {size} px" in names
    by_name = {case.name: case.parameters for case in cases}
    assert by_name["ViT-L forward, 224 px"]["tokens"] == 326 * 201
    assert by_name["ViT-L mixed forward, mixed"]["count"] == 64


def test_every_job_of_the_full_encoder_suite_has_its_peers():
    from benchmarks import bench_encoder

    uniform = {
        "transformers, eager",
        "transformers, sdpa",
        "transformers, sdpa + compile",
        "timm + compile",
    }
    mixed = {
        "transformers, one by one",
        "transformers, one by one + compile",
        "transformers, grouped by size",
        "transformers, padded with a mask",
        "transformers, padded + compile",
        "hrvlm with torch varlen_attn",
        "hrvlm with flash-attn",
        "hrvlm with FlexAttention",
    }
    expected = {
        "forward": uniform,
        "forward + backward": uniform,
        "mixed forward": mixed,
        "mixed forward + backward": mixed,
        "one image": {"transformers, sdpa + compile reduce-overhead", "hrvlm.graphed"},
        "max-autotune, forward": {"transformers, sdpa + compile max-autotune"},
        "max-autotune, forward + backward": {"transformers, sdpa + compile max-autotune"},
    }
    for job in bench_encoder._jobs():
        assert expected.get(job.group, set()) <= set(job.peers), job
        assert (
            not set(bench_encoder.HEADLINES) & set(job.full_peers)
            or job.model != "L"
            or (job.group == "one image")
        )


def test_the_command_of_the_suites_runs(tmp_path):
    """As `make gpu` gives it, with its fixtures and pytest-benchmark beside it."""
    step = next(step for step in steps_of(tmp_path, "abc") if step.name == "training")
    command = [a.replace("bench_training", "bench_processing") for a in step.command]
    command += ["--small", "--rounds=2", "--budget=60", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("processing-*-abc.json")
    written = json.loads(path.read_text())
    assert written["settings"]["small"] and written["settings"]["rounds"] == 2
    assert {r["rounds"] for c in written["cases"] for r in c["rivals"]} <= {2, None}
    assert {case["status"] for case in written["cases"]} == {"measured"}
    assert "bench_processing" in done.stdout and "benchmark" in done.stdout
