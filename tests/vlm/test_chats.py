import base64
import dataclasses

import pytest
import torch

from tests.tiny import picture, processor_of


@dataclasses.dataclass
class Message:
    role: str
    content: object
    tool_calls: list | None = None


@dataclasses.dataclass
class ImagePart:
    image_url: object
    type: str = "image_url"


class Conversation:
    def __init__(self, messages):
        self.messages = messages


class Dumped:
    """Gives its fields as pydantic's models do."""

    def __init__(self, **fields):
        self.fields = fields

    def model_dump(self):
        return self.fields


@pytest.fixture(scope="module")
def processor():
    return processor_of()


def test_messages_and_parts_may_be_objects(processor, tmp_path):
    path = tmp_path / "a.png"
    picture(20, 12).save(path)
    text = {"type": "text", "text": "What?"}
    plain = [
        {"role": "user", "content": [{"type": "image", "path": str(path)}, text]},
        {"role": "assistant", "content": "This."},
    ]
    url = {"url": f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"}
    options = {"tokenize": True, "return_dict": True}
    expected = processor.apply_chat_template([plain, plain], **options)
    objects = [
        [Message("user", [ImagePart(url), text]), Message("assistant", "This.")],
        [Dumped(role="user", content=[ImagePart(url["url"]), Dumped(**text)]), plain[1]],
    ]
    got = processor.apply_chat_template(objects, **options)
    whole = processor.apply_chat_template([Conversation(chat) for chat in objects], **options)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
        assert torch.equal(whole[name], expected[name]), name
    assert isinstance(objects[0][0].content[0], ImagePart)


def test_what_an_object_has_not_said_is_not_there(processor):
    template = "{% for m in messages %}{{ m.role }} {{ m.tool_calls is defined }}{% endfor %}"
    assert processor.apply_chat_template([Message("user", "a")], template) == "user False"


def test_objects_that_are_no_messages_are_named(processor):
    with pytest.raises(ValueError, match=r"message 0: expected .*got <object"):
        processor.apply_chat_template([object()])
    with pytest.raises(ValueError, match=r"message 0: expected .*sound"):
        processor.apply_chat_template([Message("user", [Dumped(type="sound")])])
