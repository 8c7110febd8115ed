"""``hrvlm generate``."""

import json
from base64 import b64encode

import pytest
from PIL import Image

from hrvlm.drawn_text.drawing import render
from hrvlm.reader.model import why_not_read
from tests.commands.helpers import error_of, run


def test_generate_streams_text_and_reports_speed(images, vlm):
    pictures = ("--image", images / "a_turned.jpg", "--image", images / "b_wide.png")
    arguments = ("generate", "--model", vlm, *pictures, "--prompt", "What is this?")
    arguments += ("--max-new-tokens", 6)
    streamed = run(*arguments)
    assert streamed.exit_code == 0, streamed.output
    assert "6 new in" in streamed.stderr and "tokens/s" in streamed.stderr
    result = run(*arguments, "--json")
    document = json.loads(result.stdout)
    assert document["new_tokens"] == 6 and document["first_token_seconds"] > 0
    assert document["text"] == streamed.stdout.removesuffix("\n")
    assert document["prompt_tokens"] > len("What is this?")
    beams = json.loads(run(*arguments, "--num-beams", 2, "--json").stdout)
    assert beams["new_tokens"] == 6 and beams["first_token_seconds"] is None


def test_generate_refuses_what_is_no_such_model(images, model, vlm):
    arguments = ("generate", "--prompt", "x", "--image", images / "b_wide.png", "--model")
    assert "is of type 'dinov3_vit', expected 'hrvlm'" in error_of(run(*arguments, model))
    assert "notes.txt" in error_of(run(*arguments, vlm, "--image", images / "notes.txt"))
    assert "image token" in error_of(run(*arguments, vlm, "--prompt", "<|image|>"))
    address = "https://example.org/a.png"
    refused = error_of(run(*arguments, vlm, "--image", address))
    assert f"{address}: addresses are fetched only with --fetch" in refused
    both = error_of(run("generate", "--model", vlm, "--chat", "--image", "-"))
    assert "standard input is where --chat reads the questions" in both
    assert "named more than once" in error_of(run(*arguments, vlm, "--image", "-", "--image", "-"))


def test_the_reader_refuses_pages_with_the_reason_and_answers_the_rest(tmp_path):
    line, page = tmp_path / "line.png", tmp_path / "page.png"
    render(5, 0).image.save(line)
    Image.new("RGB", (641, 40), "white").save(page)
    result = run("generate", "--image", line, "--image", page)
    assert result.exit_code == 2 and not result.stdout
    message = result.stderr.splitlines()[-1]
    assert f"error: {page}: 40 x 641 px (height x width) is more than the reader" in message
    assert "320 x 512, or 64 x 640 for a line" in message and "--model" in message
    each = run("generate", "--each", "--image", page, "--image", line, "--json")
    assert each.exit_code == 2 and "1 of 2 images were refused" in each.stderr
    refused, answered = json.loads(each.stdout)["answers"]
    assert refused.keys() == {"image", "refused"} and "40 x 641" in refused["refused"]
    assert answered["image"] == str(line) and answered["text"]
    text = run("generate", "--each", "--image", page, "--image", line)
    assert text.exit_code == 2 and text.stdout == f"{line}: {answered['text']}\n"
    assert f"{page}: refused: 40 x 641 px" in text.stderr


def test_an_image_may_be_a_data_uri(tmp_path):
    render(5, 0).image.save(tmp_path / "line.png")
    uri = "data:image/png;base64," + b64encode((tmp_path / "line.png").read_bytes()).decode()
    document = json.loads(run("generate", "--image", uri, "--json").stdout)
    assert document["text"] and document["images"] == [f"{uri[:40]}..."]
    refused = run("generate", "--image", "data:image/png;base64,%" + "A" * 5000)
    wrong = refused.stderr.splitlines()[-1]
    assert refused.exit_code == 2 and wrong.startswith("error: data:image/png")
    assert "not base64" in wrong and len(wrong) < 600


@pytest.mark.parametrize(
    ("height", "width", "read"),
    [(320, 512, True), (321, 9, False), (64, 640, True), (65, 513, False), (9, 641, False)],
)
def test_the_largest_picture_of_the_reader(height, width, read):
    assert (why_not_read(Image.new("L", (width, height))) is None) == read
