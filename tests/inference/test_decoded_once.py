"""On every way from a file to a model its picture is decoded, and made RGB, once."""

import pytest
from PIL import Image

from hrvlm import DINOv3Encoder
from hrvlm.images import intake, pixels
from hrvlm.images.processor import IMAGENET, get_image_processor
from hrvlm.inference.chat import chat_inputs, start_chats, user_message
from hrvlm.inference.encode import EncodeOptions, encode
from hrvlm.inference.evaluate import GenerateOptions, answer
from hrvlm.inference.loading import LoadedEncoder
from hrvlm.inference.questions import Question
from hrvlm.training.samples import SampleMaker
from tests.tiny import (
    config_of,
    model_of,
    picture,
    processor_of,
    siglip_config_of,
    vision_config_of,
)

SQUARE = config_of(siglip_config_of())


@pytest.fixture
def paths(tmp_path):
    """A JPEG that lies on its side, and a PNG with alpha."""
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(60, 40).save(tmp_path / "a.jpg", exif=turned)
    picture(30, 64).convert("RGBA").save(tmp_path / "b.png")
    return [tmp_path / "a.jpg", tmp_path / "b.png"]


@pytest.fixture
def counts(monkeypatch):
    """How often pictures were decoded, by torchvision or by Pillow, and made RGB after Pillow."""
    found = {"torchvision": 0, "Pillow": 0, "RGB": 0}

    def counted(module, name, key):
        original = getattr(module, name)

        def count(*args, **kwargs):
            result = original(*args, **kwargs)
            found[key] += result is not None
            return result

        monkeypatch.setattr(module, name, count)

    counted(pixels, "_decoded_by_torchvision", "torchvision")
    counted(intake, "decode_first_frame", "Pillow")
    counted(intake, "_to_rgb", "RGB")
    return found


def encoding(paths, tmp_path):
    encoder = DINOv3Encoder(vision_config_of()).eval()
    loaded = LoadedEncoder(encoder, "tiny", True, IMAGENET)
    encode(paths, loaded, EncodeOptions(64, out=tmp_path / "out"))


def training(paths, tmp_path):
    row = {"images": [str(path) for path in paths]}
    row["texts"] = [{"user": "What?", "assistant": "x"}]
    assert SampleMaker(processor_of())(row, "row 0") is not None


def training_with_squares(paths, tmp_path):
    row = {"images": [path.read_bytes() for path in paths]}
    row["texts"] = [{"user": "What?", "assistant": "x"}]
    assert SampleMaker(processor_of(config=SQUARE))(row, "row 0") is not None


def evaluating(paths, tmp_path):
    question = Question("0", tuple(paths), (("What?", "x"),), ("x",))
    (line,) = answer(processor_of(), model_of(), [question], GenerateOptions(max_new_tokens=1))
    assert "error" not in line


def generating(paths, tmp_path):
    model_of().save_pretrained(tmp_path / "vlm")
    processor_of().save_pretrained(tmp_path / "vlm")
    (chat,) = start_chats(str(tmp_path / "vlm"), [paths], GenerateOptions(1), device="cpu")
    for prompt in ("What?", "And?"):
        chat.ask(prompt)


def processing(paths, tmp_path):
    chat_inputs(processor_of(), [user_message("What?", paths)])


def processing_squares(paths, tmp_path):
    chat_inputs(processor_of(config=SQUARE), [user_message("What?", paths)])


def one_by_one(paths, tmp_path):
    for path in paths:
        get_image_processor(64, vit_patch_size=8)(path)


WAYS = (
    encoding,
    training,
    training_with_squares,
    evaluating,
    generating,
    processing,
    processing_squares,
    one_by_one,
)


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_is_decoded_once(way, paths, counts, tmp_path):
    way(paths, tmp_path)
    assert counts["torchvision"] + counts["Pillow"] == 2
    assert counts["RGB"] == counts["Pillow"] >= 1  # one has alpha


def test_only_a_plain_picture_is_taken_as_it_is():
    plain = picture(8, 8)
    assert intake.upright_rgb(plain) is plain
    turned, keyed = plain.copy(), plain.copy()
    turned.getexif()[0x0112] = 3
    keyed.info["transparency"] = plain.getpixel((0, 0))
    for image in (turned, keyed, plain.convert("RGBA"), plain.convert("L")):
        assert intake.upright_rgb(image) is not image
    assert intake.upright_rgb(turned).getpixel((0, 0)) == plain.getpixel((7, 7))
    assert intake.upright_rgb(keyed).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(intake.ImageError, match="max_pixels"):
        intake.upright_rgb(plain, max_pixels=63)
