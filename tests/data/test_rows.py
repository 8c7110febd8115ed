"""Rows in all their forms, and images in all of theirs: for training and for evaluation."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from huggingface_hub import constants

from hrvlm.data.config import JsonL, data_config
from hrvlm.data.rows import plain_row
from hrvlm.data.sources import open_source
from hrvlm.inference.questions import questions_of
from hrvlm.training.samples import SampleMaker, write_report
from tests.tiny import picture, processor_of

A, B = picture(32, 16), picture(16, 48, seed=1)


def image(source=None, kind="image"):
    return {"type": "image"} | ({} if source is None else {kind: source})


def text(words):
    return {"type": "text", "text": words}


FINE_VISION = {
    "images": [A, B],
    "texts": [
        {"user": "<image>One?", "assistant": "yes"},
        {"user": "And <image>two?", "assistant": "no"},
    ],
}
SAID = ["<image>One?", "yes", "And <image>two?", "no"]
SAME = {
    "LLaVA": {
        "image": [A, B],
        "conversations": [
            {"from": name, "value": words}
            for name, words in zip(("human", "gpt") * 2, SAID, strict=True)
        ],
    },
    "LLaVA, the other words": {
        "images": [A, B],
        "conversations": [
            {"role": name, "content": words}
            for name, words in zip(("user", "assistant") * 2, SAID, strict=True)
        ],
    },
    "a chat with the images in it": {
        "messages": [
            {"role": "user", "content": [image(A), text("One?")]},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": [text("And "), image(B), text("two?")]},
            {"role": "assistant", "content": [text("no")]},
        ]
    },
    "a chat with the images beside it": {
        "images": [A, B],
        "messages": [
            {"role": "user", "content": [image() | {"text": None}, text("One?")]},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "And <image>two?"},
            {"role": "assistant", "content": "no"},
        ],
    },
    "a chat as a record of lists": {
        "images": [A, B],
        "messages": {"role": ["user", "assistant"] * 2, "content": SAID},
    },
}


@pytest.mark.parametrize("form", SAME)
def test_every_form_is_the_same_sample_and_the_same_questions(form):
    make = SampleMaker(processor_of())
    expected, got = make(FINE_VISION, "row"), make(SAME[form], form)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert questions_of(0, SAME[form]) == questions_of(0, FINE_VISION)


def test_images_without_a_place_stand_first_and_a_system_text_before_them():
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "a"}]
    row = {"images": [A], "conversations": [{"from": "system", "value": "Be brief."}, *turns]}
    ids = SampleMaker(processor_of())(row, "row")["input_ids"]
    said = processor_of().tokenizer.decode(ids).replace("<|image|>", "")
    assert said.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ")
    (question,) = questions_of(0, row)
    assert [m["role"] for m in question.conversation([A])] == ["system", "user"]
    assert question.conversation([A])[1]["content"][0] == {"type": "image", "image": A}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "reply": "b"}, r"expected 'texts'.*'messages', got \['prompt', 'reply'\]"),
        ({"messages": 5}, "messages: expected a list, got 5"),
        ({"messages": []}, r"messages: expected turns of a user and an assistant, got \[\]"),
        ({"conversations": ["hi"]}, "conversations: message 0: expected a user"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 0: .*got 'tool'"),
        ({"messages": [{"role": "user"}]}, "message 0: expected a text or a list"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"expected turns .*\['user'\]"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "got {'type': 'audio'}"),
        ({"messages": [{"role": "user", "content": [image()]}]}, "no image is left"),
        ({"messages": [{"role": "assistant", "content": [image(A)]}]}, "an image of assistant"),
        (
            {"images": [A, B], "messages": [{"role": "user", "content": "<image>?"}]},
            "2 images, but 1 places",
        ),
    ],
)
def test_what_is_wrong_with_a_chat_is_said(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plain_row(row)
    assert SampleMaker(processor_of(), None, tmp_path)(row, "row") is None
    assert write_report(tmp_path)["skipped"] == {"bad row": 1}


# Images


def png(picture_):
    stream = io.BytesIO()
    picture_.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def address(monkeypatch):
    """A server in this process that has one picture."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png(A))

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a.png"
    server.shutdown()
    server.server_close()


def test_rows_take_the_images_that_the_processor_takes(tmp_path, address):
    A.save(tmp_path / "a.png")
    coded = base64.b64encode(png(A)).decode()
    sources = ["a.png", str(tmp_path / "a.png"), "data:image/png;base64," + coded, coded, address]
    rows = [{"image": source, "question": "?", "answer": "a"} for source in sources]
    for kind in ("image", "url", "path", "base64"):
        content = [image("a.png" if kind == "path" else sources[2], kind), text("?")]
        reply = {"role": "assistant", "content": "a"}
        rows.append({"messages": [{"role": "user", "content": content}, reply]})
    wrapped = {"type": "image_url", "image_url": {"url": address}}
    rows.append({"messages": [{"role": "user", "content": [wrapped, text("?")]}, reply]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(JsonL(str(tmp_path / "rows.jsonl"), shuffle=False))
    expected = SampleMaker(processor_of())({"image": A, "question": "?", "answer": "a"}, "row")
    make = SampleMaker(processor_of(), None, tmp_path, fetch=True)
    for i in range(len(rows)):
        where, row = source[i]
        sample = make(row, where)
        assert sample is not None, rows[i]
        assert all(torch.equal(sample[name], expected[name]) for name in expected)
    for given in ({"bytes": png(A), "path": None}, png(A)):
        assert make({"image": given, "question": "?", "answer": "a"}, "bytes") is not None


def test_urls_are_fetched_only_where_that_is_asked_for(tmp_path, address):
    row = {"image": address, "question": "?", "answer": "a"}
    assert SampleMaker(processor_of(), None, tmp_path)(row, "row") is None
    (entry,) = write_report(tmp_path)["rows"]
    assert entry["reason"] == "bad image" and "is a URL" in entry["details"]
    assert "fetch: true" in entry["details"]
    sources = {"train": {"kind": "jsonl", "path": "a.jsonl"}}
    assert not data_config(sources).fetch and data_config(sources | {"fetch": True}).fetch
    with pytest.raises(ValueError, match=r"data.fetch='yes'"):
        data_config(sources | {"fetch": "yes"})
