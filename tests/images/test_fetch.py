"""Images by URL and as text: whole, bounded, and with errors that name the image."""

import base64
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from PIL import Image

from hrvlm.data.rows import images_of
from hrvlm.images import fetch
from hrvlm.images.fetch import fetch_image, is_text_image
from hrvlm.images.formats import ImageError
from hrvlm.images.intake import load_image
from tests.tiny import processor_of


def png():
    stream = io.BytesIO()
    Image.new("RGB", (70, 70), (1, 2, 3)).save(stream, "PNG")
    return stream.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/absent.png":
            self.send_error(404)
            return
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            return
        self.send_response(200)
        if self.path == "/packed.png":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            while self.path == "/slow.png":
                self.wfile.write(b"\0")
                time.sleep(0.1)
            if self.path == "/a.png":
                self.wfile.write(png())
            while self.path == "/endless.png":  # no length is told
                self.wfile.write(bytes(1 << 16))
        except ConnectionError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_url_gives_the_file(server):
    assert fetch_image(f"{server}/a.png", "image 0") == png()
    assert fetch_image(f"{server}/moved.png", "image 0") == png()
    processor = processor_of()
    sizes = processor(images=[f"{server}/a.png", png()])["image_grid_hw"]
    assert sizes[0].tolist() == sizes[1].tolist()


def test_an_endless_file_is_given_up(server, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 10_000_000)
    with pytest.raises(ImageError, match=r"^image 4: more than 10000000 bytes at http"):
        fetch_image(f"{server}/endless.png", "image 4")


def test_a_file_of_a_byte_now_and_then_is_given_up(server, monkeypatch):
    monkeypatch.setattr(fetch, "SECONDS", 1)
    with pytest.raises(ImageError, match=r"^image 4: not here after 1 s: http"):
        fetch_image(f"{server}/slow.png", "image 4")


def test_what_comes_compressed_is_not_unpacked(server):
    with pytest.raises(ImageError, match=r"^image 4: sent compressed \(gzip\)"):
        fetch_image(f"{server}/packed.png", "image 4")


@pytest.mark.parametrize("path", ["/absent.png", ":x/", "\0"])
def test_what_can_not_be_fetched_is_named(server, path):
    with pytest.raises(ImageError, match=r"^image 1: can't be fetched"):
        fetch_image(server + path, "image 1")
    with pytest.raises(ImageError, match=r"^image 1: can't be fetched"):
        processor_of()(images=[png(), server + path])


def test_text(monkeypatch):
    text = base64.b64encode(png()).decode()
    for form in (text, f"data:image/png;base64,{text}", "data:," + "\n".join(text)):
        assert is_text_image(form) and fetch_image(form, "image 0") == png()
    assert not is_text_image("a.png")
    monkeypatch.setattr(fetch, "MAX_BYTES", 50)
    with pytest.raises(ImageError, match=r"^image 2: more than 50 bytes in base64"):
        fetch_image(text, "image 2")


def test_a_data_uri_that_is_none_is_named_shortened():
    uri = "data:image/png;base64,@" + base64.b64encode(png()).decode()
    with pytest.raises(ImageError, match=r"^image 3 \('data:.*: not base64: 'data:.*") as raised:
        load_image(uri, name=3)
    assert len(str(raised.value)) < 250


def test_an_object_with_an_image_is_one_everywhere(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    forms = [
        {"bytes": png(), "path": "gone.png"},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        {"url": uri},
    ]
    assert len(processor_of()(images=forms)["image_grid_hw"]) == 3
    assert images_of({"images": forms}) == [png(), str(tmp_path / "a.png"), uri]
    assert images_of({"image": {"url": uri}}) == [uri]
    with pytest.raises(TypeError, match=r"got dict"):
        processor_of()(images={"file": "a.png"})
