"""A server of transformers in a process of its own, asked about an image over HTTP."""

import asyncio
import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from transformers.utils.import_utils import is_serve_available

from hrvlm.images.formats import ImageError
from hrvlm.inference import serve
from hrvlm.inference.chat import GenerateOptions, start_chat
from hrvlm.reader import model as reader
from hrvlm.vlm.tokenizer import IMAGE_TOKEN
from tests.images.bombs import run_length_bmp
from tests.tiny import model_of, picture, processor_of

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def request(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    message = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(message, timeout=60) as answer:
        return answer.read().decode()


def wait_until_healthy(server, url, log):
    for _ in range(1200):
        assert server.poll() is None, log.read_text()
        try:
            return request(f"{url}/health")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def data_uri(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def question(text, *urls):
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address and model of a server without a cache of models."""
    folder = tmp_path_factory.mktemp("serve")
    model = folder / "vlm"
    model_of().save_pretrained(model)
    processor_of().save_pretrained(model)
    port, log = free_port(), folder / "log.txt"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    environment |= {"HF_HOME": str(folder / "nothing")}
    command = [sys.executable, "-c", "from hrvlm.cli import app; app()", "serve", str(model)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}", str(model)
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(server, messages, **options):
    url, model = server
    body = {"model": model, "max_tokens": 6, "messages": messages} | options
    return request(f"{url}/v1/chat/completions", body)


def refusal(server, messages):
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(server, messages)
    return error.value.code, error.value.read().decode()


needs_server = pytest.mark.skipif(
    not is_serve_available(), reason="transformers[serving] is not installed"
)


@pytest.mark.slow
@needs_server
def test_transformers_serve_answers_about_an_image(server, tmp_path):
    picture(60, 40).save(tmp_path / "a.png")
    messages = question("What is it?", data_uri((tmp_path / "a.png").read_bytes()))
    whole = json.loads(ask(server, messages))
    pieces = ask(server, messages, stream=True)
    options = GenerateOptions(max_new_tokens=6)
    chat = start_chat(server[1], [tmp_path / "a.png"], options, device="cpu")
    expected = chat.ask("What is it?")
    assert whole["choices"][0]["message"]["content"] == expected.text
    assert whole["usage"]["prompt_tokens"] == expected.prompt_tokens
    chunks = [json.loads(line[6:]) for line in pieces.splitlines() if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    # A stream leaves out the bytes at its end that are no whole character yet.
    assert "".join(deltas).rstrip("\ufffd") == expected.text.rstrip("\ufffd")


@pytest.mark.slow
@needs_server
def test_the_served_model_is_listed_without_a_cache(server):
    url, model = server
    assert [entry["id"] for entry in json.loads(request(f"{url}/v1/models"))["data"]] == [model]


class OnePicture(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png(picture(9, 5)))

    def log_message(self, *args):
        pass


def test_an_address_is_asked_only_by_a_server_that_fetches(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), OnePicture) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        part = {"image_url": {"url": f"http://127.0.0.1:{running.server_port}/a.png"}}
        image = serve._decoded(processor_of(), 0, part, fetch=True)
        with pytest.raises(ImageError, match="image 0 is a URL"):
            serve._decoded(processor_of(), 0, part, fetch=False)
        running.shutdown()
    assert image.tobytes() == picture(9, 5).convert("RGB").tobytes()


GARBAGE = {
    "a stranger's path": (question("?", "/etc/hostname"), "image 0.*expected a URL"),
    "an address": (question("?", "http://127.0.0.1:1/a.png"), "image 0 is a URL.*--fetch"),
    "no image": (question("?", data_uri(b"x" * 90)), "image 0.*not an image"),
    "a bomb": (question("?", data_uri(run_length_bmp(9000))), "image 0.*run-length BMP"),
    "the second": (question("?", data_uri(png(picture(9, 9))), "no"), "image 1.*expected a URL"),
    "no messages": (None, "messages: expected a list"),
    "no role": ([{"content": "hi"}], "message 0: expected an object with a role"),
    "no part": ([{"role": "user", "content": ["hi"]}], "message 0: expected parts with a type"),
    "no text": ([{"role": "user", "content": [{"type": "text"}]}], "lacks 'text'"),
    "a part to be left out": (
        [{"role": "user", "content": [{"type": "image", "image": "/etc/hostname"}]}],
        "message 0: expected an image as .*image_url",
    ),
    "an image token": (question(IMAGE_TOKEN), "the text contains the image token"),
}


@pytest.mark.slow
@needs_server
@pytest.mark.parametrize("case", GARBAGE)
def test_a_wrong_request_is_400_with_the_reason(server, case):
    messages, message = GARBAGE[case]
    code, text = refusal(server, messages)
    assert code == 400 and re.search(message, text), (code, text)


@pytest.mark.slow
@needs_server
@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("chat/completions", b'{"messages": ', "the body of the request: JSON decode error .*char"),
        ("chat/completions", b"[]", "the body of the request: .*valid dictionary"),
        ("chat/completions", b'{"messages": [{"role": "user"}], "foo": 1}', "fields.*foo"),
        ("responses", b'{"input": 5}', "'input' must be a string or list"),
    ],
)
def test_a_body_of_another_form_is_400_with_the_reason(server, path, body, message):
    url, _ = server
    asked = urllib.request.Request(f"{url}/v1/{path}", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(asked, timeout=60)
    text = json.loads(error.value.read())["detail"]
    assert error.value.code == 400 and re.search(message, text), text


@needs_server
def test_the_reader_refuses_pages_as_generate_does():
    from fastapi import HTTPException

    model = SimpleNamespace(config=SimpleNamespace(name_or_path=reader.reader_path()))
    handler = SimpleNamespace(_resolve_model=lambda body: (None, model, processor_of()))

    async def handle(handler, body, request_id):
        return [part["image_url"]["url"].size for part in body["messages"][0]["content"][:-1]]

    ask = serve._naming_bad_requests(handle, fetch=False, refuse=reader.refusal)

    def answer(*size):
        body = {"messages": question("Read.", data_uri(png(picture(*size))))}
        return asyncio.run(ask(handler, body, ""))

    assert answer(500, 300) == [(500, 300)]
    with pytest.raises(HTTPException) as error:
        answer(600, 400)
    assert error.value.status_code == 400
    assert error.value.detail.startswith("image 0: 400 x 600 px (height x width) is more than")
    model.config.name_or_path = "another"
    assert answer(600, 400) == [(600, 400)]


WRONG_FIELDS = {
    "response_format": {"type": "json_object"},
    "logprobs": True,
    "top_logprobs": 3,
    "modalities": ["audio"],
    "max_tokens": "x",
    "temperature": -1,
    "top_p": 7,
    "seed": "x",
    "n": 2,
    "stream": "x",
    "stop": 3,
    "logit_bias": "x",
    "generation_config": "x",
}


@pytest.mark.slow
@needs_server
def test_a_wrong_field_is_named_and_a_stop_ends_the_answer(server):
    for name, value in WRONG_FIELDS.items():
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(server, question("?"), **{name: value})
        text = json.loads(error.value.read())["detail"]
        assert error.value.code == 400 and text.startswith(f"{name}={value!r}: expected"), text
    fine = {"response_format": {"type": "text"}, "logprobs": False}
    (whole,) = json.loads(ask(server, question("?"), max_tokens=60, **fine))["choices"]
    text = whole["message"]["content"]
    letter = next(c for c in text[1:] if c.isascii() and c.isprintable())
    (stopped,) = json.loads(ask(server, question("?"), max_tokens=60, stop=[letter]))["choices"]
    assert stopped["finish_reason"] == "stop"
    assert text.startswith(stopped["message"]["content"]) and stopped["message"]["content"] != text


@pytest.mark.slow
@needs_server
def test_clients_do_not_disturb_each_other(server):
    """Eight at once, images of mixed sizes; two of them send what can't be read."""
    sizes = [(40, 60), (200, 16), (33, 127)]
    asked = [question(f"What is {n}?", data_uri(png(picture(*s)))) for n, s in enumerate(sizes)]
    asked[2] += [{"role": "assistant", "content": "It."}, *asked[0]]  # two images
    quiet = [json.loads(ask(server, messages))["choices"][0]["message"] for messages in asked]
    assert len({answer["content"] for answer in quiet}) > 1
    bad = [GARBAGE["no image"][0], GARBAGE["a bomb"][0]]

    def client(n):
        return refusal(server, bad[n - 6])[0] if n >= 6 else json.loads(ask(server, asked[n % 3]))

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(client, range(8)))
    assert [answer["choices"][0]["message"] for answer in answers[:6]] == quiet * 2
    assert answers[6:] == [400, 400]
    assert request(f"{server[0]}/health")
