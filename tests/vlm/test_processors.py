import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from hrvlm.data.rows import messages_of
from hrvlm.images.processor import IMAGENET, SAT493M, SIGLIP
from hrvlm.training.samples import SampleMaker
from hrvlm.vlm.processors import VLMProcessor
from hrvlm.vlm.tokenizer import CHAT_TEMPLATE, IMAGE_TOKEN, get_image_string, get_tokenizer
from tests.tiny import (
    FACTOR,
    PATCH,
    config_of,
    picture,
    processor_of,
    siglip_config_of,
    tokenizer_of,
    vision_config_of,
)

UNIT = PATCH * FACTOR


@pytest.fixture(scope="module")
def processor():
    return processor_of()


# The tokenizer


def test_get_tokenizer_teaches_the_image_token(tmp_path):
    tokenizer_of(image_token=None).save_pretrained(tmp_path)
    tokenizer = get_tokenizer(str(tmp_path))
    assert tokenizer.image_token == IMAGE_TOKEN
    assert tokenizer("a<|image|>b")["input_ids"].count(tokenizer.image_token_id) == 1
    assert tokenizer.padding_side == "left"
    named = get_tokenizer(str(tmp_path), {"image_token": "<img>", "global_image_token": "<all>"})
    assert named.image_token == "<img>" and named.global_image_token == "<all>"
    assert named("<img><all>")["input_ids"] == [named.image_token_id, named.global_image_token_id]
    templated = get_tokenizer(str(tmp_path), chat_template="{{ messages }}")
    assert templated.chat_template == "{{ messages }}" and tokenizer.chat_template is None


def test_get_tokenizer_keeps_an_image_token_that_is_there(tmp_path):
    tokenizer_of(image_token="<picture>").save_pretrained(tmp_path)
    assert get_tokenizer(str(tmp_path)).image_token == "<picture>"


def test_get_tokenizer_finds_a_padding_token(tmp_path):
    tokenizer = tokenizer_of(image_token=None)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    del fields["pad_token"]
    file.write_text(json.dumps(fields))
    assert get_tokenizer(str(tmp_path)).pad_token == "<eos>"
    del fields["eos_token"]
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="neither pad_token nor eos_token"):
        get_tokenizer(str(tmp_path))


# The string


@pytest.mark.parametrize("append_cls", [False, True])
def test_an_image_string_has_a_token_for_each_place(append_cls):
    tokenizer, grids = tokenizer_of(), [(10, 15), (1, 1), (3, 7)]
    text = get_image_string(tokenizer, grids, append_cls=append_cls)
    assert text == IMAGE_TOKEN * (150 + 1 + 21 + 3 * append_cls)
    ids = tokenizer(text)["input_ids"]
    assert ids == [tokenizer.image_token_id] * (172 + 3 * append_cls)
    assert get_image_string(tokenizer, []) == ""


def test_grid_tokens_appear_where_the_vocabulary_has_them():
    tokenizer = tokenizer_of(grid_tokens=2)
    text = get_image_string(tokenizer, [(2, 3)])
    i = IMAGE_TOKEN
    assert text == (f"<row_1_col_1>{i}<row_1_col_2>{i}{i}<row_2_col_1>{i}<row_2_col_2>{i}{i}")
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.image_token_id) == 6 and len(ids) == 10
    tokenizer.add_tokens(["<row_1_col_3>"])
    assert "<row_1_col_3>" in get_image_string(tokenizer, [(2, 3)])


@pytest.mark.parametrize("grid", [(0, 3), (2, -1), (2,), (2.0, 3)])
def test_a_bad_grid_is_named(grid):
    with pytest.raises(ValueError, match="image 1: a token grid is two positive ints"):
        get_image_string(tokenizer_of(), [(1, 1), grid])


def test_a_tokenizer_without_an_image_token_is_refused():
    with pytest.raises(ValueError, match=r"no image_token; make it with hrvlm.get_tokenizer"):
        get_image_string(tokenizer_of(image_token=None), [(1, 1)])
    with pytest.raises(ValueError, match="no image_token"):
        processor_of(tokenizer_of(image_token=None))


# The processor


@pytest.mark.parametrize("append_cls", [False, True])
def test_each_image_gets_the_tokens_of_its_grid(append_cls):
    config = config_of(mp_append_cls=append_cls)
    processor = processor_of(config=config)
    images = [picture(UNIT * 3, UNIT * 2), picture(UNIT, UNIT), picture(UNIT * 2, UNIT * 4)]
    out = processor(images=images, text=["<|image|> a <|image|>", "no image", "b<|image|>"])
    assert next(iter(out)) == "input_ids"
    assert out["image_grid_hw"].tolist() == [[4, 6], [2, 2], [8, 4]]
    assert out["pixel_values"].shape == (24 + 4 + 32, 3 * PATCH**2)
    counts = (out["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert counts == [6 + 1 + 2 * append_cls, 0, 8 + append_cls]
    assert (out["attention_mask"][1] == 0).sum() > 0 and out["attention_mask"][1, 0] == 0


def test_the_pixels_are_those_of_the_image_processor(processor):
    images = [picture(50, 30), picture(20, 64)]
    out = processor(images=images, text="<|image|><|image|>")
    assert torch.equal(out["pixel_values"], processor.image_processor(images)["pixel_values"])


def test_images_alone_and_text_alone(processor):
    assert set(processor(images=picture(20, 20))) == {"pixel_values", "image_grid_hw"}
    assert set(processor(text="hello")) == {"input_ids", "attention_mask"}
    assert set(processor(text=["a", "b"], images=[[], []])) == {"input_ids", "attention_mask"}


def test_all_kinds_of_images_are_taken(processor, tmp_path):
    image = picture(UNIT, UNIT)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    text64 = base64.b64encode(data).decode()
    sources = [
        image,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        data,
        io.BytesIO(data),
        np.asarray(image),
        torch.from_numpy(np.array(image)),
        text64,
        f"data:image/png;base64,{text64}",
    ]
    out = processor(images=sources, text=IMAGE_TOKEN * len(sources))
    first, *others = out["pixel_values"].split(4)
    assert len(others) == len(sources) - 1
    assert all(torch.equal(first, other) for other in others)


def test_an_array_of_images_counts_as_several(processor):
    batch = np.stack([np.asarray(picture(UNIT, UNIT, seed)) for seed in range(2)])
    out = processor(images=batch, text="<|image|><|image|>")
    assert out["image_grid_hw"].tolist() == [[2, 2], [2, 2]]


def test_transparent_files_are_laid_on_white(processor, tmp_path):
    Image.new("RGBA", (UNIT, UNIT), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    out = processor(images=str(tmp_path / "clear.png"))
    white = processor(images=Image.new("RGB", (UNIT, UNIT), "white"))
    assert torch.equal(out["pixel_values"], white["pixel_values"])


def test_a_string_that_is_nothing_is_refused(processor):
    with pytest.raises(FileNotFoundError, match="absent"):
        processor(images="absent.png")
    with pytest.raises(ValueError, match="no such file, and not base64"):
        processor(images="/a/long/path/" + "x" * 80 + ".png")


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("<|image|><|image|>", 1, r"2 image tokens.*\[2\].*expected 1"),
        ("none", 1, "0 image tokens.*expected 1"),
        ("<|image|>", 0, "1 image tokens.*expected 0"),
        (["<|image|>", "<|image|>"], 3, r"2 image tokens.*\[1, 1\].*expected 3"),
    ],
)
def test_placeholders_and_images_must_be_as_many(processor, text, count, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=[picture(20, 20)] * count or None)


def test_lists_of_images_are_counted_by_sample(processor):
    image = picture(20, 20)
    with pytest.raises(ValueError, match=r"sample 0: the text has 2 image tokens.*expected 1"):
        processor(text=["<|image|><|image|>", "<|image|>"], images=[[image], [image, image]])
    with pytest.raises(ValueError, match="1 lists of images for 2 texts"):
        processor(text=["<|image|>", "a"], images=[[image]])


def test_a_truncated_image_is_refused(processor):
    with pytest.raises(ValueError, match=r"[Mm]ismatch"):
        processor(text="<|image|>", images=picture(64, 64), truncation=True, max_length=3)


def test_serving_engines_learn_the_number_of_tokens(processor):
    sizes = [(UNIT * 2, UNIT * 3), (20, 64), (500, 10)]
    data = processor._get_num_multimodal_tokens(image_sizes=sizes)
    images = [picture(w, h) for h, w in sizes]
    out = processor(images=images, text=["<|image|>"] * 3)
    assert data.num_image_tokens == (out["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert data.num_image_patches == [hp * wp for hp, wp in out["image_grid_hw"].tolist()]
    assert processor._get_num_multimodal_tokens().num_image_tokens is None
    types = processor(images=images[:1], text="a<|image|>", return_mm_token_type_ids=True)
    assert types["mm_token_type_ids"].tolist() == [[0] + [1] * 6]


def test_a_processor_for_siglip_makes_squares():
    config = config_of(siglip_config_of(), max_img_size=512)
    processor = VLMProcessor.from_config(config, tokenizer_of())
    out = processor(images=[picture(100, 20), picture(7, 9)], text="<|image|><|image|>")
    assert out["image_grid_hw"].tolist() == [[4, 4], [4, 4]]
    assert processor._get_num_multimodal_tokens([(20, 100)]).num_image_tokens == [4]
    assert tuple(processor.image_processor.image_mean) == SIGLIP.mean


def test_from_config_takes_geometry_and_statistics_from_the_model():
    config = config_of(vision_config_of(), vit_model_type="facebook/dinov3-vitl16-pretrain-sat493m")
    processor = VLMProcessor.from_config(config, tokenizer_of(), background=(0, 0, 0))
    image = processor.image_processor
    assert (image.patch_size, image.pixel_shuffle_factor, image.max_img_size) == (8, 2, 64)
    assert tuple(image.image_mean) == SAT493M.mean and tuple(image.background) == (0, 0, 0)
    processor = VLMProcessor.from_config(config_of(), tokenizer_of())
    assert tuple(processor.image_processor.image_std) == IMAGENET.std


def test_saving_and_loading_keeps_everything(tmp_path):
    processor = processor_of(config=config_of(mp_append_cls=True))
    processor.save_pretrained(tmp_path)
    config_of().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VLMProcessor and loaded.append_cls
    assert loaded.chat_template == processor.chat_template
    image_processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(image_processor) is type(processor.image_processor)
    image = picture(UNIT * 2, UNIT * 3)
    ours, theirs = (p(images=image, text="x<|image|>y") for p in (processor, loaded))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# Chats

CHAT = [
    {"role": "system", "content": "be brief"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "see "},
            {"type": "image", "image": picture(UNIT * 2, UNIT)},
            {"type": "text", "text": " and "},
            {"type": "image", "image": picture(UNIT, UNIT)},
        ],
    },
]
RENDERED = (
    "<|im_start|>system\nbe brief<|im_end|>\n"
    "<|im_start|>user\nsee <|image|> and <|image|><|im_end|>\n"
    "<|im_start|>assistant\n"
)


def test_a_chat_of_strings_and_lists_is_rendered(processor):
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == RENDERED


def test_a_template_for_text_only_learns_images():
    template = (
        "{% for m in messages %}[{{ m.role | upper }}: {{ m['content'] | trim }}]{% endfor %}"
    )
    processor = processor_of(tokenizer_of(image_token='<"pic\\">', chat_template=template))
    chat = [CHAT[1], {"role": "assistant", "content": "ok"}]
    text = processor.apply_chat_template(chat)
    assert text == '[USER: see <"pic\\"> and <"pic\\">][ASSISTANT: ok]'


def test_a_template_for_parts_of_text_gets_one_with_the_images_in_it():
    template = "{% for m in messages %}[{{ m['content'][0]['text'] }}]{% endfor %}"
    processor = processor_of(tokenizer_of(chat_template=template))
    question = [{"type": "image"}, {"type": "text", "text": "What"}, {"type": "text", "text": "?"}]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": question[1:2]}]
    assert processor.apply_chat_template(chat) == f"[{processor.image_token}What?][What]"


def test_a_template_that_is_set_later_is_used_and_learns_images_too(tmp_path):
    template = "{% for m in messages %}[{{ m['content'] + '' }}]{% endfor %}"
    processor, chat, rendered = processor_of(), [CHAT[1]], "[see <|image|> and <|image|>]"
    assert processor.apply_chat_template(chat, template) == rendered
    assert processor.apply_chat_template(chat, chat_template=template) == rendered
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == RENDERED
    processor.chat_template = template
    assert processor.apply_chat_template(chat) == rendered
    processor.save_pretrained(tmp_path / "one")
    assert VLMProcessor.from_pretrained(tmp_path / "one").chat_template == processor.chat_template
    processor.chat_template = {"default": template, "short": "{{ messages[0]['content'] }}"}
    assert processor.apply_chat_template(chat) == rendered
    assert processor.apply_chat_template(chat, "short") == rendered[1:-1]
    processor.save_pretrained(tmp_path / "two")
    loaded = VLMProcessor.from_pretrained(tmp_path / "two")
    assert loaded.chat_template == processor.chat_template
    assert loaded.apply_chat_template(chat, "short") == rendered[1:-1]


def test_a_template_that_knows_images_is_kept():
    template = (
        "{% for m in messages %}{% for b in m.content %}{{ b.type }} {% endfor %}{% endfor %}"
    )
    template += "{# image #}"
    processor = processor_of(tokenizer_of(chat_template=template))
    assert processor.chat_template == template
    assert processor.apply_chat_template([CHAT[1]]) == "text image text image "


def test_the_default_template_is_chatml(processor):
    assert processor.chat_template.endswith(CHAT_TEMPLATE)


def test_messages_without_content_are_left_to_the_template():
    template = (
        "{% for m in messages %}{{ m.content is defined }} {{ m.content is none }}{% endfor %}"
    )
    tokenizer = tokenizer_of(chat_template=template)
    chat = [{"role": "assistant", "content": None}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered in ("True True", "False False")  # transformers 5.24 drops the key
    assert processor_of(tokenizer).apply_chat_template(chat) == rendered


def test_a_tokenized_chat_has_its_images(processor, tmp_path):
    CHAT[1]["content"][3]["image"].save(tmp_path / "b.png")
    chat = [CHAT[0], {"role": "user", "content": list(CHAT[1]["content"])}]
    chat[1]["content"][3] = {"type": "image", "path": str(tmp_path / "b.png")}
    out = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    same = processor(
        text=RENDERED, images=[CHAT[1]["content"][1]["image"], str(tmp_path / "b.png")]
    )
    assert all(torch.equal(out[key], same[key]) for key in same)
    assert out["image_grid_hw"].tolist() == [[2, 4], [2, 2]]


def test_a_batch_of_chats_may_lack_images(processor):
    text_only = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    out = processor.apply_chat_template(
        [text_only, CHAT, text_only], tokenize=True, return_dict=True
    )
    assert (out["input_ids"] == processor.image_token_id).sum(1).tolist() == [0, 3, 0]


@pytest.mark.parametrize(
    "content", ["what is <|image|>?", [{"type": "text", "text": "what is <|image|>?"}]]
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_an_image_token_typed_in_a_chat_is_refused(processor, content, role):
    chat = [CHAT[0], {"role": role, "content": content}]
    message = r"message 1: the text contains the image token '<\|image\|>'"
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(chat)
    with pytest.raises(ValueError, match="conversation 1, message 1"):
        processor.apply_chat_template([[CHAT[0]], chat])


@pytest.mark.parametrize("prompt", [False, True])
def test_assistant_masks_mark_the_answers_of_chats_with_images(processor, prompt):
    """The tokens that training learns, and no others: with any number of images, padded or not."""
    turns = [
        {"user": "<image>What? é", "assistant": "A häuschen."},
        {"user": "?", "assistant": "x"},
    ]
    rows = [
        {"images": [picture(60, 40)], "texts": turns},
        {
            "images": [picture(16, 16), picture(32, 48)],
            "texts": [{"user": "", "assistant": "both"}],
        },
        {"images": [], "texts": turns[1:]},
    ]
    chats = [
        messages_of(row["images"], [(turn["user"], turn["assistant"]) for turn in row["texts"]])
        for row in rows
    ]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    batch = processor.apply_chat_template(chats, add_generation_prompt=prompt, **options)
    make = SampleMaker(processor)
    for i, (row, chat) in enumerate(zip(rows, chats, strict=True)):
        sample, real = make(row, "row"), batch["attention_mask"][i].bool()
        learned = sample["labels"] != -100
        mask = batch["assistant_masks"][i]
        assert not mask[~real].any()
        assert torch.equal(mask[real][: len(learned)].bool(), learned)
        assert not mask[real][len(learned) :].any()
        alone = processor.apply_chat_template(chat, add_generation_prompt=prompt, **options)
        assert torch.equal(alone["assistant_masks"][0], mask[real])
    with pytest.raises(ValueError, match="needs tokenize=True and return_dict=True"):
        processor.apply_chat_template(chats, return_assistant_tokens_mask=True)


MARKING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}[a]{% generation %}"
    "{{ m['content'] }}.{% endgeneration %}!{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("images", [0, 2])
def test_marks_of_a_template_are_used_by_masks_and_in_training(images):
    processor = processor_of(tokenizer_of(chat_template=MARKING))
    row = {
        "images": [picture(60, 40)] * images,
        "texts": [{"user": "q", "assistant": "yes"}, {"user": "and", "assistant": "no"}],
    }
    chat = messages_of(row["images"], [("q", "yes"), ("and", "no")])
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    got = processor.apply_chat_template([chat, chat[:2]], padding_side="right", **options)
    for ids, mask, said in zip(
        got["input_ids"], torch.as_tensor(got["assistant_masks"]), ("yes.no.", "yes."), strict=True
    ):
        assert processor.tokenizer.decode(ids[mask.bool()]) == said
    labels = SampleMaker(processor)(row, "row")["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == "yes.no."


@pytest.mark.parametrize(("side", "said"), [("right", "no"), ("left", "o.")])
def test_masks_of_a_chat_that_was_cut_are_those_of_what_is_left(side, said):
    processor = processor_of(tokenizer_of(chat_template=MARKING))
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "no"}]
    cut = {"truncation": True, "max_length": 13 if side == "right" else 3}
    processor.tokenizer.truncation_side = side
    got = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **cut
    )
    ids, mask = got["input_ids"][0], got["assistant_masks"][0].bool()
    assert processor.tokenizer.decode(ids[mask]) == said
    with pytest.raises(ValueError, match="tokenised with other options"):
        processor.apply_chat_template(
            [{"role": "user", "content": "x"}],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            text_pair=["and more"],
        )


def test_images_and_text_in_the_other_order_are_named(processor):
    text, image = processor.image_token + "What is it?", picture(60, 40)
    for swapped in ((text, image), ([text], [image]), (text, [[image]]), (text, b"data")):
        with pytest.raises(TypeError, match=r"^text: expected.*processor\(images=\.\.\., text="):
            processor(*swapped)
    with pytest.raises(TypeError, match=r"^images: got a text"):
        processor(text)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("hello", "expected a list of messages, got str"),
        ({"role": "user"}, "expected a list of messages, got dict"),
        ([], "expected a list of messages"),
        ([[]], "conversation 0: expected a list of messages"),
        (["hello"], "message 0: expected .*role"),
        ([{"content": "hello"}], "message 0: expected .*role"),
        ([{"role": "user", "content": 5}], "message 0: expected a text or a list, got 5"),
        ([{"role": "user", "content": ["hello"]}], "message 0: expected .*'hello'"),
        ([{"role": "user", "content": [{"text": "hello"}]}], "message 0: expected .*type"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "'video'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "expected a text in 'text'"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "expected a text in"),
    ],
)
@pytest.mark.parametrize("tokenize", [False, True])
def test_what_is_no_chat_is_named(processor, conversation, message, tokenize):
    with pytest.raises((ValueError, TypeError), match=message):
        processor.apply_chat_template(conversation, tokenize=tokenize, return_dict=tokenize)


def test_a_template_that_refuses_a_chat_is_named(processor):
    template = "{{ raise_exception('roles must alternate, image') }}"
    with pytest.raises(ValueError, match=r"chat template does not take this chat: roles must"):
        processor.apply_chat_template([{"role": "user", "content": "hello"}], template)
