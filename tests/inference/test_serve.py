"""A server of transformers in a process of its own, asked about an image over HTTP."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_serve_available

from hrvlm.inference.chat import GenerateOptions, start_chat
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


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="transformers[serving] is not installed")
def test_transformers_serve_answers_about_an_image(tmp_path):
    model = tmp_path / "vlm"
    model_of().save_pretrained(model)
    processor_of().save_pretrained(model)
    picture(60, 40).save(tmp_path / "a.png")
    port, log = free_port(), tmp_path / "log.txt"
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    command = [sys.executable, "-c", "from hrvlm.cli import app; app()", "serve", str(model)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    image = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": "What is it?"},
    ]
    body = {
        "model": str(model),
        "max_tokens": 6,
        "messages": [{"role": "user", "content": content}],
    }
    bad = {
        "a stranger's path": (str(tmp_path / "a.png"), "not base64"),
        "no image": ("data:," + base64.b64encode(b"x" * 90).decode(), "not an image"),
        "a bomb": ("data:," + base64.b64encode(run_length_bmp(9000)).decode(), "run-length BMP"),
    }
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        wait_until_healthy(server, url, log)
        whole = json.loads(request(f"{url}/v1/chat/completions", body))
        pieces = request(f"{url}/v1/chat/completions", body | {"stream": True})
        refused = {}
        for case, (image, _) in bad.items():
            content[0]["image_url"]["url"] = image
            with pytest.raises(urllib.error.HTTPError) as error:
                request(f"{url}/v1/chat/completions", body)
            refused[case] = (error.value.code, error.value.read().decode())
        assert request(f"{url}/health")
    finally:
        server.terminate()
        server.wait(timeout=30)
    for case, (_, message) in bad.items():
        code, text = refused[case]
        assert code == 400 and "image 0" in text and message in text, (case, code, text)
    options = GenerateOptions(max_new_tokens=6)
    expected = start_chat(str(model), [tmp_path / "a.png"], options, device="cpu").ask(
        "What is it?"
    )
    assert whole["choices"][0]["message"]["content"] == expected.text
    assert whole["usage"]["prompt_tokens"] == expected.prompt_tokens
    chunks = [json.loads(line[6:]) for line in pieces.splitlines() if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    # A stream leaves out the bytes at its end that are no whole character yet.
    assert "".join(deltas).rstrip("\ufffd") == expected.text.rstrip("\ufffd")
