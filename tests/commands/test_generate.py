"""``hrvlm generate``."""

import json

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
