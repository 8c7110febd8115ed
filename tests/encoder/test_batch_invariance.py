"""``batch_invariant=True``: an image's features have the same bits whatever it is packed with."""

import random

import pytest
import torch
from PIL import Image

from hrvlm import DINOv3Encoder
from hrvlm.images.patches import patchify
from hrvlm.inference.loading import load_encoder
from tests.commands.helpers import run
from tests.encoder.encoders import config_of, pair_of

OPTIONS = {
    "output_hidden_states": True,
    "out_indices": [1, -1],
    "output_prefix_attentions": True,
}


def random_packs(count, seed, largest=9):
    """Grids of images, and the order in which some of them are packed."""
    draw = random.Random(seed)
    grids = [(draw.randint(1, largest), draw.randint(1, largest)) for _ in range(12)]
    packs = [draw.sample(range(len(grids)), draw.randint(1, 6)) for _ in range(count)]
    return grids, packs


def fields_of(out):
    return {
        name: value if isinstance(value, tuple) else (value,)
        for name, value in out.items()
        if name != "packed" and value is not None
    }


def of_image(out, i):
    """All that a forward gives for image `i`, as one list."""
    found = []
    for name, values in fields_of(out).items():
        for value in values:
            if name.endswith("attentions"):
                found.append(value.split(out.packed.lengths, -1)[i])
            else:
                found.append(value[i] if name == "pooler_output" else out.packed.split(value)[i])
    return found


@pytest.mark.parametrize(
    ("backend", "dtype", "threads", "packs"),
    [
        ("auto", torch.float32, 1, 50),
        ("auto", torch.float32, 3, 15),
        ("auto", torch.bfloat16, 3, 15),
        ("eager", torch.float32, 2, 2),
        ("triton", torch.float32, 1, 1),
    ],
)
def test_an_image_has_the_same_bits_alone_packed_and_in_any_order(
    backend, dtype, threads, packs, rng
):
    _, encoder = pair_of("vit", num_hidden_layers=2)
    encoder.to(dtype)
    encoder.backend, encoder.batch_invariant = backend, True
    grids, order = random_packs(packs, seed=7)
    images = [torch.randn(3, 16 * hp, 16 * wp, generator=rng).to(dtype) for hp, wp in grids]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            used = sorted({i for pack in order for i in pack})
            alone = {i: of_image(encoder([images[i]], **OPTIONS), 0) for i in used}
            for pack in order:
                out = encoder([images[i] for i in pack], **OPTIONS)
                for place, i in enumerate(pack):
                    for got, expected in zip(of_image(out, place), alone[i], strict=True):
                        assert torch.equal(got, expected), (pack, i)
    finally:
        torch.set_num_threads(before)


def test_it_is_what_the_encoder_computes_in_every_form_of_input(rng):
    _, encoder = pair_of("vit", num_hidden_layers=2)
    batch = torch.randn(3, 3, 32, 48, generator=rng)
    mask = torch.rand(3, 6, generator=rng) < 0.5
    plain = encoder(batch, mask, output_hidden_states=True)
    encoder.batch_invariant = True
    same = encoder(batch, mask, output_hidden_states=True)
    assert same.keys() == plain.keys()
    torch.testing.assert_close(same.last_hidden_state, plain.last_hidden_state)
    torch.testing.assert_close(same.hidden_states, plain.hidden_states)
    patches = patchify(batch, 16).flatten(0, 1)
    packed = encoder(patches, mask.flatten(), grids=[(2, 3)] * 3)
    assert torch.equal(packed.packed_last_hidden_state, same.last_hidden_state.flatten(0, 1))
    assert encoder(patches[:0], grids=[]).packed_last_hidden_state.shape == (0, 64)


def test_the_gradient_of_an_image_has_the_same_bits(rng):
    _, encoder = pair_of("vit", num_hidden_layers=2)
    encoder.batch_invariant = True
    images = [torch.randn(3, 16 * h, 16 * w, generator=rng) for h, w in ((3, 5), (7, 2), (1, 1))]
    cotangents = [torch.randn(5 + h * w, 64, generator=rng) for h, w in ((3, 5), (7, 2), (1, 1))]

    def gradients(chosen):
        leaves = [images[i].clone().requires_grad_() for i in chosen]
        out = encoder(leaves).packed_last_hidden_state
        return torch.autograd.grad(out, leaves, torch.cat([cotangents[i] for i in chosen]))

    alone = [gradients([i])[0] for i in range(3)]
    for pack in ([0, 1, 2], [2, 0], [1, 2, 0]):
        for i, gradient in zip(pack, gradients(pack), strict=True):
            assert torch.equal(gradient, alone[i])


def test_it_is_an_argument_a_field_of_the_config_and_an_option(tmp_path):
    assert DINOv3Encoder(config_of(batch_invariant=True)).batch_invariant is True
    with pytest.raises(ValueError, match="batch_invariant=1: expected True or False"):
        DINOv3Encoder(config_of(), batch_invariant=1)
    _, encoder = pair_of("vit", num_hidden_layers=1)
    encoder.save_pretrained(tmp_path)
    assert DINOv3Encoder.from_pretrained(tmp_path, batch_invariant=True).batch_invariant is True
    assert load_encoder(str(tmp_path), batch_invariant=True).encoder.batch_invariant is True
    image = Image.new("RGB", (32, 48))
    image.save(tmp_path / "a.png")
    result = run("encode", tmp_path / "a.png", "--model", tmp_path, "--batch-invariant")
    assert result.exit_code == 0, result.output


def test_a_graph_for_any_number_of_images_says_that_it_can_not():
    _, encoder = pair_of("vit", num_hidden_layers=1)
    encoder.batch_invariant = True
    with pytest.raises(ValueError, match="batch_invariant = False to export"):
        torch.jit.trace(encoder.forward, (torch.zeros(1, 3, 32, 32),))
