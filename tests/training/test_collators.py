import logging

import pytest
import torch

from hrvlm.images.patches import pack_images
from hrvlm.images.processor import get_image_processor
from hrvlm.training.collators import BaseCollator, VQACollator
from tests.tiny import PATCH, model_of, picture, processor_of, tokenizer_of

WIDTH = 3 * PATCH**2


def sample(ids, labels=None, grids=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    row = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids))}
    if labels is not None:
        row["labels"] = torch.tensor(labels)
    if grids:
        rows = sum(hp * wp for hp, wp in grids)
        row["pixel_values"] = torch.randn(rows, WIDTH, generator=generator)
        row["image_grid_hw"] = torch.tensor(grids)
    return row


@pytest.fixture(scope="module")
def processor():
    return processor_of()


def test_texts_are_padded_on_the_left_and_images_packed(processor):
    image = processor.image_token_id
    samples = [
        sample([5, image, 6], [-100, 7, 6], [(2, 2)], seed=1),
        sample([8], [8]),
        sample([image, image, image, 9, 10], [1, 2, 3, 9, 10], [(2, 2), (2, 4)], seed=2),
    ]
    batch = BaseCollator(processor)(samples)
    assert list(batch) == [
        "input_ids",
        "attention_mask",
        "labels",
        "pixel_values",
        "image_grid_hw",
    ]
    pad = processor.tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [
        [pad, pad, 5, image, 6],
        [pad, pad, pad, pad, 8],
        [image, image, image, 9, 10],
    ]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1] * 5]
    n = -100
    assert batch["labels"].tolist() == [[n, n, n, n, 6], [n, n, n, n, 8], [n, n, n, 9, 10]]
    assert batch["image_grid_hw"].tolist() == [[2, 2], [2, 2], [2, 4]]
    pixels = torch.cat([samples[0]["pixel_values"], samples[2]["pixel_values"]])
    assert torch.equal(batch["pixel_values"], pixels)
    assert all(batch[k].dtype == torch.long for k in batch if k != "pixel_values")


def test_the_tokenizer_decides_the_side_of_the_padding():
    tokenizer = tokenizer_of()
    tokenizer.padding_side = "right"
    batch = BaseCollator(tokenizer, pad_to_multiple_of=4)(
        [sample([5, 6], [5, 6]), sample([7], [7])]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0], [7, 0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, -100, -100], [7, -100, -100, -100]]


def test_labels_are_left_out_where_no_sample_has_them(processor):
    assert "labels" not in BaseCollator(processor)([sample([5])])
    with pytest.raises(ValueError, match="sample 1: it has no labels, but others"):
        BaseCollator(processor)([sample([5], [5]), sample([6])])
    with pytest.raises(ValueError, match="sample 1: it has no labels"):
        VQACollator(processor)([sample([5], [5]), sample([6])])


def test_over_long_samples_are_dropped_with_their_images_and_counted(processor, caplog):
    collate = VQACollator(processor, max_length=3)
    long, short = sample([5] * 4, [5] * 4, [(2, 2)]), sample([6] * 3, [6] * 3, [(2, 4)])
    with caplog.at_level(logging.WARNING):
        batch = collate([long, short, long])
    assert batch["input_ids"].tolist() == [[6, 6, 6]]
    assert batch["image_grid_hw"].tolist() == [[2, 4]] and len(batch["pixel_values"]) == 8
    assert collate.num_dropped == 2 and "dropped 2 of 3 samples" in caplog.text
    collate([long, short])
    assert collate.num_dropped == 3
    collate([short])
    assert collate.num_dropped == 3


@pytest.mark.parametrize("samples", [[], [None], [sample([5] * 9, [5] * 9, [(2, 2)])]])
def test_an_emptied_batch_is_well_defined_and_runs(processor, samples):
    batch = VQACollator(processor, max_length=4)(samples)
    assert {key: (tuple(v.shape), v.dtype) for key, v in batch.items()} == {
        "input_ids": ((0, 0), torch.long),
        "attention_mask": ((0, 0), torch.long),
        "labels": ((0, 0), torch.long),
        "pixel_values": ((0, WIDTH), torch.float32),
        "image_grid_hw": ((0, 2), torch.long),
    }
    model = model_of().train()
    out = model(**batch)
    assert out.loss.item() == 0 and out.logits.shape == (0, 0, 261)
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.decoder.parameters())


def test_none_is_skipped(processor):
    collate = VQACollator(processor)
    assert collate([None, sample([5], [5]), None])["input_ids"].tolist() == [[5]]
    assert collate.num_dropped == 0


def test_what_a_processor_returns_is_a_sample(processor):
    own = [processor(images=picture(20, 20, i), text=f"{'x' * i}<|image|>") for i in range(2)]
    batch = BaseCollator(processor)(own)
    together = processor(
        images=[picture(20, 20, i) for i in range(2)], text=["<|image|>", "x<|image|>"]
    )
    assert all(torch.equal(batch[key], together[key]) for key in together)


def test_images_of_the_function_are_packed(processor):
    load = get_image_processor(64, vit_patch_size=PATCH, pixel_shuffle_factor=2)
    images = [load(picture(30, 20)), load(picture(9, 50))]
    row = {"input_ids": [5], "images": images}
    batch = BaseCollator(processor)([row, {"input_ids": [6], "images": []}])
    pixels, grids = pack_images([image for image, _ in images], PATCH)
    assert torch.equal(batch["pixel_values"], pixels)
    assert batch["image_grid_hw"].tolist() == [list(grid) for grid in grids]
    split = get_image_processor(
        64, 32, single_image_mode=False, vit_patch_size=PATCH, pixel_shuffle_factor=2
    )
    tiles = split(picture(64, 32))
    batch = BaseCollator(processor)([{"input_ids": [5], "images": [tiles]}])
    assert batch["image_grid_hw"].tolist() == [[4, 4]] * 3
    with pytest.raises(ValueError, match="patch_size: needed to pack images"):
        BaseCollator(tokenizer_of())([row])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1, 2]}, "labels has 2 entries, expected 3"),
        ({"attention_mask": [1]}, "attention_mask has 1 entries, expected 3"),
        ({"image_grid_hw": None}, "pixel_values and image_grid_hw go together"),
        ({"image_grid_hw": [[2, 4]]}, "pixel_values has 4 patches, expected 8"),
        ({"input_ids": [[1, 2], [3, 4]]}, r"input_ids must be \[L\]"),
    ],
)
def test_a_bad_sample_is_named(processor, change, message):
    good = sample([5, 6, 7], [5, 6, 7], [(2, 2)])
    with pytest.raises(ValueError, match=f"sample 1: {message}"):
        BaseCollator(processor)([good, good | change])
    with pytest.raises(ValueError, match="sample 0: it has no input_ids"):
        BaseCollator(processor)([{"text": "a"}])


def test_bad_options_are_refused(processor):
    for name, value in (("max_length", 0), ("patch_size", 0), ("pad_to_multiple_of", -3)):
        with pytest.raises(ValueError, match=f"{name}={value}: expected a whole number"):
            VQACollator(processor, **{name: value})
    tokenizer = tokenizer_of()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad_token"):
        VQACollator(tokenizer)


def test_a_batch_trains(processor):
    image = processor.image_token_id
    samples = [
        sample([5, image, 6], [-100, -100, 6], [(2, 2)], seed=1),
        sample([image, image, 9, 10], [-100, -100, 9, 10], [(2, 4)], seed=2),
        sample([8, 9], [-100, 9]),
    ]
    model = model_of().train()
    out = model(**VQACollator(processor)(samples))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_ids": "hello"}, "sample 1: input_ids: expected numbers, got 'hello'"),
        (
            {"input_ids": [1.5, 2.7]},
            r"sample 1: input_ids: expected whole numbers, got \[1.5, 2.7\]",
        ),
        ({"input_ids": [1], "labels": "x"}, "sample 1: labels: expected numbers, got 'x'"),
        ({"input_ids": [1], "images": [picture(8, 8)]}, "sample 1: image 0: expected a tensor"),
        (
            {"input_ids": [1], "images": picture(8, 8)},
            "sample 1: images: expected a list of tensors",
        ),
        (
            sample([1]) | {"pixel_values": torch.zeros(1, WIDTH), "image_grid_hw": "x"},
            "sample 1: image_grid_hw: expected num",
        ),
        (
            sample([1]) | {"pixel_values": torch.zeros(1, WIDTH), "image_grid_hw": [[1.5, 1]]},
            "sample 1: image_grid_hw: expected whole",
        ),
        (
            sample([1]) | {"pixel_values": torch.zeros(1, WIDTH), "image_grid_hw": [1]},
            r"sample 1: image_grid_hw must be \[images, 2\]",
        ),
        (
            sample([1]) | {"pixel_values": "x", "image_grid_hw": [(1, 1)]},
            "sample 1: pixel_values: expected numbers",
        ),
        (
            sample([1]) | {"pixel_values": torch.zeros(1, 12), "image_grid_hw": [(1, 1)]},
            f"sample 1: pixel_values has rows of 12 values, expected {WIDTH} for red",
        ),
        (
            sample([1]) | {"pixel_values": torch.zeros(4, WIDTH), "image_grid_hw": [(-2, -2)]},
            r"sample 1: image_grid_hw: expected positive numbers, got \[\[-2, -2\]\]",
        ),
        (
            sample([1]) | {"pixel_values": torch.zeros(1, WIDTH).byte(), "image_grid_hw": [(1, 1)]},
            "sample 1: pixel_values: torch.uint8, expected normalised",
        ),
        ({"input_ids": [1], "images": [()]}, "sample 1: image 0: expected a tensor, got tuple"),
        ({"input_ids": [1], "images": [torch.zeros(3, 7, 8)]}, "sample 1: image 0: 7x8 pixels"),
        ({"input_ids": [1], "attention_mask": [3]}, "sample 1: attention_mask: expected zeros"),
    ],
)
def test_parts_of_another_kind_are_named_with_their_sample(processor, wrong, message):
    good = sample([processor.image_token_id], grids=[(2, 2)])
    with pytest.raises((TypeError, ValueError), match=message):
        BaseCollator(processor)([good, wrong])


def test_what_is_no_list_of_samples_or_no_tokenizer_is_named(processor):
    with pytest.raises(TypeError, match="samples: expected a list of mappings, got NoneType"):
        BaseCollator(processor)(None)
    with pytest.raises(ValueError, match="tokenizer: it has no pad_token"):
        BaseCollator(None)
    rows = [
        sample([1]) | {"pixel_values": torch.zeros(1, 3 * p * p), "image_grid_hw": [(1, 1)]}
        for p in (8, 2)
    ]
    with pytest.raises(ValueError, match=r"sample 1: .* rows of 12 values, those of sample 0 have"):
        BaseCollator(tokenizer_of())(rows)
