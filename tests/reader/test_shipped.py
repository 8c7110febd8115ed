"""The model that comes with the package: small, loads from the wheel's data, and reads."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hrvlm import VisionLanguageModel, VLMProcessor
from hrvlm.cli import app
from hrvlm.reader.model import reader_path
from hrvlm.reader.score import score

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "line_total.png": "Total $42.80",
    "line_notice.png": "Harbour closed",
    "line_date.png": "2031-05-14 09:58",
    "line_way.png": "Way out",
    "text_slip.png": "Corner Market\n2 Oat milk 3.78\nRye bread 3.45\nBasil 2.25\nTotal 9.48",
    "text_form.png": "Name: M. Haldane\nBerth: B14\nArrival: 14/05/2031\nTime: 09:58",
    "text_notes.png": "Ferry to Skerry\ndeparts at 17:40\nfrom Pier 3",
}


@pytest.fixture(scope="module")
def reader():
    model = VisionLanguageModel.from_pretrained(reader_path(), dtype=torch.float32).eval()
    return model, VLMProcessor.from_pretrained(reader_path())


def test_it_is_small_and_has_a_card(reader):
    folder = Path(reader_path())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25_000_000
    assert sum(p.numel() for p in reader[0].parameters()) <= 12_000_000
    assert not hasattr(reader[0], "reading_head")
    card = (folder / "README.md").read_text(encoding="utf-8")
    for word in ("character error rate", "python -m recipes.reader.train", "can't read"):
        assert word in card


def test_it_reads_single_lines(reader):
    """The whole figure is in its card; 96 lines are few, hence the margin."""
    assert score(*reader, "line", 96).error_rate <= 0.04


@pytest.mark.slow
def test_it_reads_every_layout(reader):
    """The whole figures are in its card; few samples, hence the margin."""
    assert score(*reader, "full", 60).error_rate <= 0.3


def test_it_needs_the_normalisation(reader):
    """Pixels that are only scaled to [0, 1] are read clearly worse."""
    model, processor = reader
    plain = VLMProcessor.from_pretrained(reader_path())
    plain.image_processor.do_normalize = False
    without, with_it = (score(model, each, "line", 96).error_rate for each in (plain, processor))
    assert without > 2 * with_it and without > with_it + 0.05


@pytest.mark.parametrize("name", SAYS)
def test_generate_reads_the_examples(name):
    done = CliRunner().invoke(app, ["generate", "--image", str(EXAMPLES / name), "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["text"] == SAYS[name] and answer["tokens_per_second"] > 0
    assert answer["doubts"] == {} and -0.2 <= answer["mean_log_probability"] <= 0
    assert "no --model" in done.stderr and "not pages, photographs" in done.stderr
    assert "doubtful" not in done.stderr


def test_what_it_can_not_read():
    done = CliRunner().invoke(
        app, ["generate", "--image", str(EXAMPLES / "sideways.png"), "--json"]
    )
    assert done.exit_code == 0 and json.loads(done.stdout)["text"] != "Platform 9"
    assert "below -0.20" in json.loads(done.stdout)["doubts"]["improbable"]
    shown = CliRunner().invoke(app, ["generate", "--image", str(EXAMPLES / "sideways.png")])
    assert "doubtful: the model itself found the answer improbable" in shown.stderr
