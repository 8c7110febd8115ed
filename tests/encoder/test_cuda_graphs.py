"""CUDA graphs of the encoder: what is refused, and on a GPU equal outputs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hrvlm.encoder.cuda_graphs import _select
from hrvlm_kernels import PackedGrids
from tests.encoder.encoders import pair_of

SIZES = [[(32, 48), (16, 16)], [(64, 64)] * 3, [(16, 16), (32, 48)]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "at least one packing"),
        ([[(32, 32)], []], r"sizes\[1\] has no images"),
        ([[(32, 32), (32, 40)]], r"sizes\[0\], image 1: .* multiples of the patch size 16.*40"),
        ([[(32, 0)]], r"got \(32, 0\)"),
        ([(32, 32)], r"sizes\[0\], image 0: expected \(height, width\).* got 32"),
    ],
)
def test_wrong_sizes_raise(sizes, message):
    _, encoder = pair_of()
    with pytest.raises(ValueError, match=message):
        encoder.graphed(sizes)


def test_an_encoder_that_can_not_be_captured_raises():
    _, encoder = pair_of()
    with pytest.raises(RuntimeError, match="need the encoder on a GPU, it is on 'cpu'"):
        encoder.graphed(SIZES)
    with pytest.raises(ValueError, match=r"training mode; call eval\(\) first"):
        encoder.train().graphed(SIZES)


def test_unknown_sizes_raise_and_say_what_is_known():
    recordings = {((2, 3), (1, 1)): "first", ((4, 4),) * 9: "second"}
    assert _select(recordings, ((2, 3), (1, 1)), 16) == "first"
    with pytest.raises(ValueError, match=r"16x16, 32x48 px .* only for: 32x48, 16x16; 64x64") as e:
        _select(recordings, ((1, 1), (2, 3)), 16)
    assert "... 9 in all" in str(e.value)


@pytest.fixture
def encoder():
    _, encoder = pair_of()
    return encoder.to("cuda", torch.bfloat16)


def images_of(sizes, seed):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=rng).to("cuda", torch.bfloat16) for size in sizes]


@pytest.mark.gpu
def test_replays_equal_the_encoder(encoder):
    graphed = encoder.graphed(SIZES)
    kept = []
    for seed in range(2):
        for sizes in (*SIZES, *SIZES[::-1]):
            images = images_of(sizes, seed)
            out = graphed(images)
            with torch.no_grad():
                expected = encoder(images)
            assert out.grids == expected.grids
            kept.append((out, expected))
    batch = torch.stack(images_of(SIZES[1], 7))
    with torch.no_grad():
        expected = encoder(batch)
    kept.append((graphed(batch.cpu()), expected))  # from the CPU, and with a batch axis
    for out, expected in kept:  # later replays have not written over them
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out.pooler_output, expected.pooler_output)


@pytest.mark.gpu
def test_weights_changed_in_place_are_seen(encoder):
    graphed = encoder.graphed(SIZES[:1])
    images = images_of(SIZES[0], 0)
    before = graphed(images).packed_last_hidden_state
    with torch.no_grad():
        encoder.layer[0].attention.qkv.weight.mul_(0.5)
        assert torch.equal(
            graphed(images).packed_last_hidden_state, encoder(images).packed_last_hidden_state
        )
    assert not torch.equal(graphed(images).packed_last_hidden_state, before)


@pytest.mark.gpu
def test_refusals_on_a_gpu(encoder):
    graphed = encoder.graphed(SIZES[:1])
    with pytest.raises(ValueError, match="no graph was captured for images of 64x64 px"):
        graphed(images_of([(64, 64)], 0))
    images = images_of(SIZES[0], 0)
    with pytest.raises(ValueError, match="requires grad"):
        graphed([images[0].requires_grad_(), images[1]])
    with (
        torch.autocast("cuda", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="autocast is on"),
    ):
        encoder.graphed(SIZES)


@pytest.mark.gpu
def test_a_replay_never_waits_for_the_device(encoder):
    graphed = encoder.graphed(SIZES[:1])
    grids = [(h // 16, w // 16) for h, w in SIZES[0]]
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=5, device="cuda")
    rows = sum(h * w for h, w in grids)
    patches = torch.randn(rows, 768, dtype=torch.bfloat16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed(patches, grids=packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_threads_take_turns(encoder):
    graphed = encoder.graphed(SIZES)
    images = [images_of(SIZES[i % 3], seed=i) for i in range(24)]
    expected = [graphed(one).packed_last_hidden_state for one in images]

    def replay(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            return [graphed(images[i]).packed_last_hidden_state for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        for right, found in zip(expected, pool.map(replay, range(24)), strict=True):
            torch.cuda.synchronize()
            assert all(torch.equal(one, right) for one in found)


@pytest.mark.gpu
def test_an_encoder_that_was_cast_raises(encoder):
    graphed = encoder.graphed(SIZES[:1])
    kept = [p.data for p in encoder.parameters()]  # so that no new weight takes an old one's place
    encoder.to(torch.float32)
    with pytest.raises(RuntimeError, match="was moved or cast since"):
        graphed(images_of(SIZES[0], 0))
    assert kept
