import json

import pytest
from typer.testing import CliRunner

from hrvlm.cli import app
from hrvlm.inference import evaluate as module
from hrvlm.inference.questions import DataSource, questions_of
from tests.tiny import model_of, picture, processor_of

OPTIONS = ("--max-new-tokens", "4", "--batch-size", "2", "--device", "cpu")
PEOPLE = ["two", "2", "3", "two", "2", "2", "2", "2", "2", "2"]
ROWS = [
    {
        "images": ["a.png"],
        "texts": [{"user": "What?", "assistant": "x"}, {"user": "And?", "assistant": "yes"}],
    },
    {"image": "bad.png", "question": "q", "answer": "b"},
    {"image": "b.png", "question": "How many?", "answers": [{"answer": a} for a in PEOPLE]},
    {"images": ["a.png", "b.png"], "texts": [{"user": "Both?", "assistant": "no"}]},
    {"question": "No image?", "answer": ""},
    {"image": "a.png", "question": "long " * 200, "answer": "b"},
    {"image": "missing.png", "question": "q", "answer": "b"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, images (one of them broken), and questions about them."""
    folder = tmp_path_factory.mktemp("place")
    model_of().save_pretrained(folder / "vlm")
    processor_of().save_pretrained(folder / "vlm")
    picture(60, 40).save(folder / "a.png")
    picture(30, 64, seed=1).save(folder / "b.png")
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return folder


def run(place, out, *arguments, data="data.jsonl"):
    words = [place / data, "--model", place / "vlm", "--out", out, *OPTIONS, *arguments]
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def lines_of(out):
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """The file of an uninterrupted run, and what it printed with --json."""
    out = tmp_path_factory.mktemp("out") / "answers.jsonl"
    result = run(place, out, "--json")
    assert result.exit_code == 0, result.output
    return out, result


def test_every_question_is_answered_or_named(finished):
    out, result = finished
    lines = {line["id"]: line for line in lines_of(out)}
    assert list(lines) == ["0.0", "0.1", "1", "2", "3", "4", "5", "6"]
    assert lines["2"]["references"] == PEOPLE and lines["2"]["vqa_accuracy"] is not None
    assert lines["0.0"]["vqa_accuracy"] is None
    document = json.loads(result.stdout)
    assert (document["questions"], document["answered"], document["vqa_questions"]) == (8, 5, 1)
    reasons = {bad["id"]: bad["reason"] for bad in document["bad"]}
    assert list(reasons) == ["1", "5", "6"]
    assert "bad.png" in reasons["1"] and "missing.png" in reasons["6"]
    assert "context holds 512" in reasons["5"]  # the other question of its batch was answered
    assert all(f"not asked: {key}: " in result.stderr for key in reasons)


def test_scores_are_those_of_the_answers(finished):
    out, result = finished
    document = json.loads(result.stdout)
    answered = [line for line in lines_of(out) if "error" not in line]
    assert document["characters"] == sum(line["characters"] for line in answered) > 0
    assert document["cer"] == sum(line["edits"] for line in answered) / document["characters"]
    perfect = [
        line | {"edits": 0, "exact_match": True, "vqa_accuracy": line["vqa_accuracy"] and 1.0}
        for line in answered
    ]
    scores = module.score(perfect)
    assert (scores.cer, scores.exact_match, scores.bad) == (0, 1, ())
    assert module.score([]).cer is None


def test_batches_and_turns_do_not_change_what_is_asked(place, finished, tmp_path):
    result = run(place, tmp_path / "single.jsonl", "--batch-size", 1, "--limit", 2)
    assert result.exit_code == 0, result.output
    assert lines_of(tmp_path / "single.jsonl") == lines_of(finished[0])[:2]
    second = list(DataSource(str(place / "data.jsonl")).questions())[1]
    roles = [message["role"] for message in second.conversation(["image"])]
    assert roles == ["user", "assistant", "user"]
    assert second.turns == (("What?", "x"), ("And?", "yes")) and second.prompt == "And?"


@pytest.mark.parametrize("kept", [0.3, 0.75, 1.0])
def test_a_killed_run_goes_on_where_it_was(kept, place, finished, tmp_path, monkeypatch):
    whole = finished[0].read_bytes()
    out = tmp_path / "answers.jsonl"
    out.write_bytes(whole[: int(kept * len(whole))])  # in the midst of a line, but for the last
    beside = finished[0].with_name("answers.jsonl.run.json")
    out.with_name(beside.name).write_bytes(beside.read_bytes())
    left = whole.count(b"\n") - out.read_bytes().count(b"\n")
    asked = []
    answer = module.answer
    monkeypatch.setattr(
        module,
        "answer",
        lambda p, v, questions, *o: asked.extend(questions) or answer(p, v, questions, *o),
    )
    result = run(place, out, "--json")
    assert result.exit_code == 0, result.output
    assert len(asked) == left
    assert out.read_bytes() == whole
    before = json.loads(finished[1].stdout)
    assert json.loads(result.stdout) == before | {"predictions": str(out)}


def test_answers_of_different_runs_do_not_mix(place, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert run(place, out, "--limit", 1).exit_code == 0
    other = run(place, out, "--max-new-tokens", 3)
    assert other.exit_code == 2
    assert "another run (max_new_tokens 4, now 3)" in other.stderr
    assert run(place, out, "--max-new-tokens", 3, "--limit", 1, "--overwrite").exit_code == 0
    before = out.read_bytes()
    assert run(place, out, "--overwrite", data="missing.jsonl").exit_code == 2
    assert run(place, out, "--overwrite", "--model", place / "missing").exit_code == 2
    assert out.read_bytes() == before
    out.with_name(out.name + ".run.json").unlink()
    assert "says of which run" in run(place, out, "--limit", 1).stderr


def test_parquet_and_saved_datasets_give_what_json_lines_give(place, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {
            "images": [
                {"bytes": (place / name).read_bytes(), "path": None} for name in row["images"]
            ],
            "texts": row["texts"],
        }
        for row in (*[r for r in ROWS if "texts" in r], ROWS[0] | {"images": ["bad.png"]})
    ]
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List(
                {name: datasets.Value("string") for name in rows[0]["texts"][0]}
            ),
        }
    )
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.to_parquet(place / "data.parquet")
    dataset.save_to_disk(place / "saved")
    result = run(place, tmp_path / "parquet.jsonl", data="data.parquet")
    assert result.exit_code == 0, result.output
    assert "5 questions, 2 could not be asked" in result.stdout
    assert "row 2.1, image 0" in result.stderr
    saved = run(place, tmp_path / "saved.jsonl", data="saved")
    assert saved.exit_code == 0, saved.output
    assert (tmp_path / "saved.jsonl").read_text() == (tmp_path / "parquet.jsonl").read_text()
    as_json = run(place, tmp_path / "json.jsonl", "--limit", 2)
    assert as_json.exit_code == 0, as_json.output
    assert lines_of(tmp_path / "json.jsonl") == lines_of(tmp_path / "parquet.jsonl")[:2]


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"image": "a.png", "question": "q"}', "turn 0: expected a text in 'answer', got None"),
        ('{"texts": [{"user": "q"}]}', "turn 0: expected a text in 'assistant', got None"),
        ('{"texts": []}', "texts: no turns"),
        ('{"question": "q", "answers": []}', "turn 0: expected texts in 'answers', got []"),
        ('{"question": "q", "answers": "a"}', "turn 0: answers: expected a list, got 'a'"),
        ('{"texts": 5}', "texts: expected a list, got 5"),
        ('{"images": "a", "question": "q", "answer": ""}', "images: expected a list, got str"),
        ('{"question": "<image>", "answer": ""}', "0 images, but 1 times <image> in the texts"),
        ("5", "expected an object, got int"),
    ],
)
def test_rows_of_no_known_form_are_named(row, message, place):
    path = place / "wrong.jsonl"
    path.write_text(json.dumps(ROWS[4]) + f"\n{row}\n")
    _, wrong = DataSource(str(path)).questions()
    assert (wrong.key, wrong.problem) == ("1", message)
    path.write_text(f"{row}\n")
    with pytest.raises(ValueError) as error:
        list(DataSource(str(path)).questions())
    assert str(error.value) == f"{path}: row 0: {message}"


@pytest.mark.parametrize(
    "line, fault",
    [
        ("garbage", "Expecting value, column 1"),
        ('{"question": "Read.", "answer": "Harb', "Unterminated string starting at, column 33"),
    ],
)
def test_lines_that_are_no_json_are_named(line, fault, place):
    path = place / "cut.jsonl"
    path.write_text("\n" + json.dumps(ROWS[4]) + f"\n\n{line}")
    _, wrong = DataSource(str(path)).questions()
    assert wrong.key == "1" and wrong.problem == f"line 4: not valid JSON ({fault})"


def test_images_stand_where_the_texts_say():
    turns = [
        {"user": "<image>is a", "assistant": "yes"},
        {"user": "and <image> b?", "assistant": "no"},
    ]
    first, second = questions_of(0, {"images": ["a", "b"], "texts": turns})
    assert (first.images, second.images) == (("a",), ("a", "b"))
    image, text = first.conversation(["A"])[0]["content"]
    assert (image["image"], text["text"]) == ("A", "is a")
    kinds = [content["type"] for content in second.conversation(["A", "B"])[2]["content"]]
    assert kinds == ["text", "image", "text"]


def test_urls_are_fetched_only_where_that_is_asked_for(place, tmp_path):
    url = "http://127.0.0.1:9/a.png"  # the port of "discard", where nobody answers
    row = {"image": url, "question": "?", "answer": "a"}
    (place / "urls.jsonl").write_text(json.dumps(ROWS[4]) + "\n" + json.dumps(row) + "\n")
    for arguments, message in ((), "fetched only where"), (["--fetch"], "can't be fetched"):
        result = run(place, tmp_path / message, *arguments, data="urls.jsonl")
        assert "row 1, image 0" in result.stderr and message in result.stderr, result.output


def test_no_answer_at_all_is_an_error(place, tmp_path):
    (place / "lost.jsonl").write_text(json.dumps(ROWS[6]) + "\n")
    result = run(place, tmp_path / "answers.jsonl", data="lost.jsonl")
    assert result.exit_code == 2 and "no question could be asked" in result.stderr
    (tmp_path / "broken.jsonl").write_text('{"id": "0"}\n{}\n')
    with pytest.raises(ValueError, match="line 2: no prediction"):
        module.read_predictions(tmp_path / "broken.jsonl")
