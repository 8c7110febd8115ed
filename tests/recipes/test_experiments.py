"""The experiments on reading run, in a few steps, and write what they say they write."""

import json
import sys

import pytest

from recipes import resolution, rope_ablation


def run_main(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    module.main()


@pytest.mark.slow
def test_resolution(tmp_path, monkeypatch):
    results, plot = tmp_path / "results.json", tmp_path / "plot.svg"
    options = ("--steps", 1, "--samples", 2, "--seeds", 0, "--results", results, "--plot", plot)
    run_main(resolution, monkeypatch, *options)
    runs = json.loads(results.read_text())["runs"]
    kinds = [(run["max_img_size"], run["steps"]) for run in runs]
    assert kinds == [(224, 1), (224, 10), (768, 1)]
    assert all(run["cer"] > 0 and sum(map(sum, run["by_height"].values())) > 0 for run in runs)
    assert "768, 1 steps" in plot.read_text()


@pytest.mark.slow
def test_ablation(tmp_path, monkeypatch):
    results = tmp_path / "results.json"
    run_main(rope_ablation, monkeypatch, "--steps", 1, "--seeds", 0, "--results", results)
    runs = json.loads(results.read_text())["runs"]
    assert [run["use_rope"] for run in runs] == [True, False]
    assert all(0 <= run["right"] <= 1 and run["characters"] > 100 for run in runs)


def test_what_the_experiments_found():
    """The committed results say what the documents say of them."""
    ablation = json.loads(rope_ablation.RESULTS.read_text())["runs"]
    with_rope = [run["right"] for run in ablation if run["use_rope"]]
    without = [run["right"] for run in ablation if not run["use_rope"]]
    assert min(with_rope) > max(without) + 0.03
    sizes = json.loads(resolution.RESULTS.read_text())["runs"]
    small = [run["cer"] for run in sizes if run["max_img_size"] == 224]
    large = [run["cer"] for run in sizes if run["max_img_size"] == 768]
    assert len(small) == 6 and len(large) == 3
    assert max(large) < 0.6 * min(small)
    page = resolution.PAGE.read_text(encoding="utf-8")
    assert resolution.table(sizes) in page
    assert rope_ablation.table(ablation) in page
    assert resolution.PLOT.read_text(encoding="utf-8") == resolution.plot(sizes)
