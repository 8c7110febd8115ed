"""Chats and the speed of answers; `hrvlm generate` for one question is in tests/commands."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from hrvlm.cli import app
from hrvlm.inference.chat import Chat, GenerateOptions, answer_batch, chat_inputs, user_message
from hrvlm.inference.doubts import Repetition, doubts, repetition
from tests.tiny import model_of, picture, processor_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    model_of().save_pretrained(folder / "vlm")
    processor_of().save_pretrained(folder / "vlm")
    picture(60, 40).save(folder / "a.png")
    picture(30, 64, seed=1).save(folder / "b.png")
    return folder


def chat(place, lines, *arguments):
    words = ["generate", "--chat", "--model", place / "vlm", "--image", place / "a.png"]
    words += ["--image", place / "b.png", "--max-new-tokens", 5, *arguments]
    return CliRunner().invoke(app, [str(word) for word in words], input=lines)


def test_a_chat_asks_line_by_line_with_everything_before_it(place):
    result = chat(place, "And this?\n\nlast", "--prompt", "First?", "--json")
    assert result.exit_code == 0, result.output
    turns = json.loads(result.stdout)["turns"]
    assert [turn["prompt"] for turn in turns] == ["First?", "And this?", "last"]
    lengths = [turn["prompt_tokens"] for turn in turns]
    assert lengths == sorted(set(lengths))
    streamed = chat(place, "And this?\nlast\n", "--prompt", "First?")
    assert streamed.stdout == "".join(turn["text"] + "\n" for turn in turns)
    assert streamed.stderr.count("tokens/s") == 3


def test_a_question_that_cannot_be_asked_does_not_end_a_chat(place):
    result = chat(place, "an <|image|>\nlast\n", "--json")
    assert result.exit_code == 0, result.output
    assert [turn["prompt"] for turn in json.loads(result.stdout)["turns"]] == ["last"]
    assert result.stderr.count("error: ") == 1 and "image token" in result.stderr


def test_without_a_prompt_there_must_be_a_chat(place):
    result = CliRunner().invoke(app, ["generate", "--model", str(place / "vlm")])
    assert result.exit_code == 2 and "--prompt is needed" in result.stderr


def test_a_chat_is_the_conversation_asked_at_once():
    processor, vlm, images = processor_of(), model_of(), [picture(60, 40)]
    options = GenerateOptions(max_new_tokens=5)
    talk = Chat(processor, vlm, images, options)
    talk.ask("first")
    answer = talk.ask("second").text
    said = talk.messages[:3]
    assert [message["role"] for message in said] == ["user", "assistant", "user"]
    assert answer_batch(processor, vlm, [said], options) == [answer]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5}, {"num_beams": 3}])
def test_the_mean_log_probability_is_the_models(options):
    processor, vlm, image = processor_of(), model_of(), picture(60, 40)
    torch.manual_seed(3)
    talk = Chat(processor, vlm, [image], GenerateOptions(max_new_tokens=6, **options))
    kept, generate = [], vlm.generate

    def keep(*args, **kwargs):
        kept.append(generate(*args, **kwargs))
        return kept[0]

    vlm.generate = keep
    answer = talk.ask("What?")
    sequence = getattr(kept[0], "sequences", kept[0])
    inputs = chat_inputs(processor, [user_message("What?", [image])])
    inputs["input_ids"], n = sequence, answer.new_tokens
    inputs["attention_mask"] = torch.ones_like(sequence)
    with torch.no_grad():
        logits = vlm(**inputs).logits[0, -n - 1 : -1].log_softmax(-1)
    expected = logits.gather(1, sequence[0, -n:, None]).mean().item()
    assert answer.mean_log_probability == pytest.approx(expected, abs=1e-4)
    assert ("improbable" in answer.doubts) == (expected < math.log(0.1))


def test_a_repetition_is_long_enough_and_follows_itself():
    numbers = list(range(100))
    assert repetition([]) is repetition([7]) is repetition(numbers) is None
    assert repetition([*numbers, *[5] * 19]) is None
    assert repetition([5] * 20) == Repetition(1, 20)
    row = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert repetition([*numbers, *row, *row, *row[:9]]) is None  # not yet a third time
    assert repetition([*numbers, *row, *row, *row, *numbers]) == Repetition(10, 30)
    assert repetition([*row, *row, *row, 1, 2]).times == 3
    assert repetition([*row, 90, *row, 91, *row, 92]) is None  # rows that only resemble each other
    assert doubts(row * 3, -0.1, -0.2) == {
        "repeats": "the answer repeats itself: 10 tokens, 3 times in a row"
    }
    assert list(doubts(row, -0.21, -0.2)) == ["improbable"] == list(doubts(row, math.nan, -0.2))
    assert list(doubts(row * 3, -1, -0.2)) == ["repeats", "improbable"]


def test_a_batch_answers_as_one_by_one():
    processor, vlm = processor_of(), model_of()
    conversations = [
        [user_message("one", [picture(60, 40)])],
        [user_message("a longer question", [picture(16, 64, seed=1), picture(32, 32, seed=2)])],
        [user_message("no image")],
    ]
    options = GenerateOptions(max_new_tokens=6)
    together = answer_batch(processor, vlm, conversations, options)
    assert together == [answer_batch(processor, vlm, [c], options)[0] for c in conversations]
    assert answer_batch(processor, vlm, []) == []


def test_bench_generate_measures_every_size(place):
    arguments = ["bench-generate", "--model", str(place / "vlm"), "--new-tokens", "6"]
    arguments += ["--size", "32x64", "--size", "16x16", "--repeats", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    wide, small = document["rows"]
    assert (wide["size"], small["size"]) == ([32, 64], [16, 16])
    assert (wide["image_tokens"], small["image_tokens"]) == (8, 1)
    assert wide["prompt_tokens"] - small["prompt_tokens"] == 7
    for row in document["rows"]:
        assert 0 < row["prepare_seconds"] < row["first_token_seconds"]
        assert row["tokens_per_second"] > 0
    table = CliRunner().invoke(app, arguments)
    assert "32x64" in table.stdout and "medians of 2 runs of 6 new tokens" in table.stdout


def test_the_peak_of_one_size_is_not_that_of_the_one_before():
    from hrvlm.measuring.generation import _peak, _reset_peak

    device = torch.device("cpu")
    if _peak(device) is None:
        pytest.skip("only Linux tells a process's peak memory")
    _reset_peak(device)
    before = _peak(device)
    block = torch.ones(2**26)
    high = _peak(device)
    del block
    _reset_peak(device)
    assert high - before > 2**27 and high - _peak(device) > 2**27
