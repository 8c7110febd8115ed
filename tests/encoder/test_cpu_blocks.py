"""The blocks as one run on a CPU: the same features, seen by nobody, with nothing remembered."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hrvlm.encoder import cpu_blocks
from tests.encoder import dinov2_models, encoders
from tests.numerics import relative_error

# Runs of equal lengths and others, in chunks of more rows than pack a bfloat16 weight; and lengths
# that change so often that images are sorted.
GRIDS = ((20, 20), (9, 7), (9, 7), (1, 1), (30, 25))
TINY = ((1, 1), (2, 1), (1, 2), (1, 3)) * 8
KINDS = {
    "vit": (encoders, "vit"),
    "gated": (encoders, "vit_gated"),
    "no biases": (encoders, "no_registers_no_biases"),
    "dinov2": (dinov2_models, "registers"),
}


def encoder_of(kind="vit"):
    module, name = KINDS[kind]
    return module.pair_of(name, num_hidden_layers=2)[1]


def images_for(encoder, rng, grids=GRIDS):
    p = encoder.patch_size
    return [torch.randn(3, hp * p, wp * p, generator=rng) for hp, wp in grids]


@pytest.fixture
def runs(monkeypatch):
    """The number of tokens of each run so far."""
    counted, infer = [], cpu_blocks.infer
    monkeypatch.setattr(cpu_blocks, "infer", lambda *a: (counted.append(len(a[1])), infer(*a))[1])
    return counted


def called(encoder, images, monkeypatch, **options):
    """What the blocks give, called one by one."""
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(cpu_blocks, "can_run", lambda *_: False)
        return encoder(images, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grids", [GRIDS, TINY], ids=["mixed", "tiny"])
def test_features_and_states_err_no_more_than_those_of_blocks_called_one_by_one(
    grids, kind, dtype, runs, monkeypatch, rng
):
    encoder = encoder_of(kind).to(dtype)
    images = images_for(encoder, rng, grids)
    oracle = copy.deepcopy(encoder).double()
    plain = called(encoder, [i.to(dtype) for i in images], monkeypatch, output_hidden_states=True)
    with torch.no_grad():
        expected = oracle([i.to(dtype).double() for i in images], output_hidden_states=True)
        assert not runs
        got = encoder([i.to(dtype) for i in images], output_hidden_states=True)
    assert runs == [len(got.packed_last_hidden_state)]
    is_sorted = cpu_blocks._rows_by_length(got.packed.lengths) is not None
    assert is_sorted == (grids == TINY)
    assert is_sorted or runs[0] > max(cpu_blocks.CHUNK, cpu_blocks.MANY)
    of_each = [
        (*out.packed_hidden_states, out.packed_last_hidden_state) for out in (got, plain, expected)
    ]
    for ours, theirs, right in zip(*of_each, strict=True):
        assert ours.dtype == dtype and ours.isfinite().all()
        for rows, other, true in zip(*map(got.packed.split, (ours, theirs, right)), strict=True):
            assert relative_error(rows, true) <= 2 * relative_error(other, true) + 1e-7


def test_a_weight_that_was_written_past_all_counters_counts(runs, monkeypatch, rng):
    encoder = encoder_of().bfloat16()
    images = [image.bfloat16() for image in images_for(encoder, rng)]
    with torch.no_grad():
        before = encoder(images).packed_last_hidden_state
        for parameter in encoder.layer.parameters():
            parameter.data.mul_(1.5)
        after = encoder(images).packed_last_hidden_state
    expected = called(encoder, images, monkeypatch).packed_last_hidden_state
    assert len(runs) == 2
    assert relative_error(after, expected) < 0.02 < 0.1 < relative_error(before, expected)


def test_blocks_are_called_where_somebody_watches_or_something_else_was_asked_for(runs, rng):
    encoder = encoder_of()
    images = images_for(encoder, rng, [(2, 3), (1, 1)])
    with torch.inference_mode():
        expected = encoder(images).packed_last_hidden_state
    assert runs == [17]

    def check(**options):
        with torch.no_grad():
            got = encoder(images, **options).packed_last_hidden_state
        torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)

    encoder(images)  # recording gradients
    with FlopCounterMode(display=False) as counter:
        check()
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check()
    check(output_prefix_attentions=True)
    seen = []
    handle = encoder.layer[1].mlp.up_proj.register_forward_hook(lambda *a: seen.append(a[2].shape))
    check()
    assert seen == [(17, 96)]
    handle.remove()
    encoder.backend = "eager"
    check()
    encoder.backend = "auto"
    assert runs == [17]
    check()
    assert runs == [17, 17]
