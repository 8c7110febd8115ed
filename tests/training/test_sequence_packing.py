import pytest
import torch

from hrvlm.training.collators import VQACollator
from hrvlm.training.sequence_packing import PackedSequenceCollator, pack_sequences
from tests.tiny import BYTES, SPECIAL, images_of, model_of, tokenizer_of

IMAGE = len(SPECIAL) + BYTES


def sample(length, grid=None, seed=0):
    """Random text, the placeholders of one image in front if it has one; the last third learned."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, IMAGE, (length,), generator=rng)
    made = {"input_ids": ids}
    if grid is not None:
        ids[1 : 1 + grid[0] * grid[1] // 4] = IMAGE
        made |= {
            "pixel_values": images_of([grid], rng),
            "image_grid_hw": torch.tensor([grid]),
        }
    made["labels"] = torch.where(torch.arange(length) >= length * 2 // 3, ids, -100)
    return made


SAMPLES = [
    sample(12, (4, 4), 1),
    sample(20, (2, 8), 2),
    sample(7, None, 3),
    sample(25, (6, 2), 4),
    sample(9, (4, 2), 5),
]


def test_rows_hold_every_sample_once_and_are_well_filled():
    lengths = torch.randint(1, 65, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = list(pack_sequences((sample(n, seed=i) for i, n in enumerate(lengths)), 128))
    starts = [int((row["position_ids"] == 0).sum()) for row in rows]
    assert sum(starts) == len(lengths)
    assert sorted(
        int(n)
        for row in rows
        for n in (row["position_ids"] == 0)
        .nonzero()
        .flatten()
        .diff(append=torch.tensor([len(row["position_ids"])]))
    ) == sorted(lengths)
    assert all(len(row["input_ids"]) <= 128 for row in rows)
    assert sum(lengths) / (128 * len(rows)) > 0.95


def test_a_sample_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match=r"a sample of 20 tokens does not fit into a row of 16"):
        list(pack_sequences([sample(20)], 16))


def test_what_are_no_samples_is_named():
    good = sample(3)
    for samples, length, message in (
        ([good], "x", "length='x': expected a whole number"),
        ([good, 3], 16, "sample 1: expected input_ids and labels, tensors"),
        ([good, {"input_ids": good["input_ids"]}], 16, "sample 1: expected input_ids and labels"),
        ([good | {"labels": good["labels"][:2]}], 16, "sample 0: 3 input_ids and 2 labels"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            list(pack_sequences(samples, length))


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_samples_have_the_loss_and_gradients_of_samples_apart(attention, side):
    model, tokenizer = model_of().train(), tokenizer_of()
    model.decoder.set_attn_implementation(attention)
    tokenizer.padding_side = side
    learned = sum(int((s["labels"][1:] != -100).sum()) for s in SAMPLES)

    apart = VQACollator(tokenizer, patch_size=8)(SAMPLES)
    loss = model(**apart, use_cache=False, num_items_in_batch=learned).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()

    rows = list(pack_sequences(SAMPLES, 40, open_rows=2))
    packed = PackedSequenceCollator(tokenizer, 40, patch_size=8)(rows)
    assert packed["input_ids"].shape == (len(rows), 40) and len(rows) < len(SAMPLES)
    again = model(**packed, use_cache=False, num_items_in_batch=learned).loss
    again.backward()
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name, grad in gradients(model).items():
        assert (grad - expected[name]).norm() <= 2e-5 * expected[name].norm(), name


def test_what_a_sample_says_does_not_reach_its_neighbours():
    model, tokenizer = model_of().train(), tokenizer_of()
    collate = PackedSequenceCollator(tokenizer, 64, patch_size=8)

    def logits(first):
        batch = collate(list(pack_sequences([first, SAMPLES[0]], 64)))
        own = len(first["input_ids"])
        pad = 64 - own - len(SAMPLES[0]["input_ids"])
        return model(**batch, use_cache=False).logits[0, pad + own :]

    with torch.no_grad():
        assert torch.equal(logits(sample(20, seed=6)), logits(sample(20, seed=7)))


def test_an_empty_batch_and_a_row_without_positions():
    collate = PackedSequenceCollator(tokenizer_of(), 16, patch_size=8)
    batch = collate([None])
    assert batch["input_ids"].shape == batch["position_ids"].shape == (0, 0)
    with pytest.raises(ValueError, match=r"sample 0: it has no position_ids"):
        collate([sample(4)])
