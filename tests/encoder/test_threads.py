"""One encoder used by several threads, processes and devices at once: right, or a clear error."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader

from hrvlm_kernels import PackedGrids
from hrvlm_kernels.packed_grids import _CACHE_SIZE, _build_cached
from tests.encoder.encoders import pair_of
from tests.encoder.loader_rows import Layouts, as_they_are, images_of

THREADS = 8


def encoder_of():
    _, encoder = pair_of("vit", num_hidden_layers=2)
    encoder.batch_invariant = True  # equal bits, whatever runs beside it
    return encoder


def forward_and_backward(encoder, seed):
    leaves = [image.requires_grad_() for image in images_of(seed)]
    out = encoder(leaves).packed_last_hidden_state
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1000))
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def test_eight_threads_forward_and_backward_through_one_encoder():
    encoder, rounds = encoder_of(), range(24)
    expected = [forward_and_backward(encoder, seed) for seed in rounds]
    _build_cached.cache_clear()  # all make their layouts at once
    together = threading.Barrier(THREADS)

    def work(first):
        together.wait()
        return [(s, forward_and_backward(encoder, s)) for s in rounds[first::THREADS]]

    with ThreadPoolExecutor(THREADS) as pool:
        for results in pool.map(work, range(THREADS)):
            for seed, tensors in results:
                for got, right in zip(tensors, expected[seed], strict=True):
                    assert torch.equal(got, right), seed


def test_threads_add_up_gradients_of_weights():
    encoder = encoder_of()
    for seed in range(THREADS):
        encoder(images_of(seed)).packed_last_hidden_state.square().sum().backward()
    expected = {
        name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None
    }
    encoder.zero_grad()
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(
            lambda seed: (
                encoder(images_of(seed)).packed_last_hidden_state.square().sum().backward()
            ),
            range(THREADS),
        ):
            pass
    for name, parameter in encoder.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_layouts_and_images_come_from_the_workers_of_a_loader(start):
    encoder = encoder_of()
    with torch.inference_mode():
        encoder(images_of(0))  # threads and caches are there when it forks
        loader = DataLoader(
            Layouts(), num_workers=1, collate_fn=as_they_are, multiprocessing_context=start
        )
        for index, (images, packed) in enumerate(loader):
            expected = encoder(images_of(index))
            assert packed.lengths == expected.packed.lengths
            assert torch.equal(packed.coords, expected.packed.coords)
            again = encoder(images).packed_last_hidden_state
            assert torch.equal(again, expected.packed_last_hidden_state)


def test_freezing_while_others_encode_changes_no_bits():
    encoder = encoder_of()
    expected = encoder(images_of(1)).packed_last_hidden_state.detach()
    stop = threading.Event()

    def toggle():
        while not stop.is_set():
            encoder.freeze()
            encoder.unfreeze()

    other = threading.Thread(target=toggle)
    other.start()
    try:
        for _ in range(20):
            assert torch.equal(encoder(images_of(1)).packed_last_hidden_state.detach(), expected)
    finally:
        stop.set()
        other.join()
    assert all(p.requires_grad for p in encoder.parameters())


def test_casting_while_others_encode_is_right_before_and_after_or_an_error():
    """Weights of two dtypes in one forward: torch says so; never a silent mixture."""
    encoder = encoder_of()
    images = images_of(2)
    right = {}
    for dtype in (torch.float32, torch.float64, torch.float32):
        encoder.to(dtype)
        right[dtype] = encoder([i.to(dtype) for i in images]).packed_last_hidden_state.detach()
    stop = threading.Event()

    def move():
        while not stop.is_set():
            encoder.to(torch.float64)
            encoder.to(torch.float32)

    other = threading.Thread(target=move)
    other.start()
    try:
        for _ in range(30):
            try:
                with torch.no_grad():
                    out = encoder(images).packed_last_hidden_state
            except RuntimeError as error:
                assert any(word in str(error) for word in ("type", "Double", "primitive"))
            else:
                assert (out.double() - right[torch.float64]).abs().max() < 1e-4
    finally:
        stop.set()
        other.join()


def test_two_encoders_on_two_devices_have_layouts_of_their_own():
    """The meta device stands in for a second one."""
    here, there = encoder_of(), encoder_of().to("meta")
    images = images_of(3)
    expected = here(images).packed_last_hidden_state

    def on_meta(_):
        out = there([image.to("meta") for image in images])
        return out.packed.device.type, out.packed_last_hidden_state.device.type

    with ThreadPoolExecutor(4) as pool:
        elsewhere = pool.map(on_meta, range(8))
        for out in pool.map(lambda _: here(images), range(8)):
            assert out.packed.device.type == "cpu"
            assert torch.equal(out.packed_last_hidden_state, expected)
        assert set(elsewhere) == {("meta", "meta")}


def test_layouts_of_many_shapes_are_not_kept():
    gc.collect()
    for n in range(1, 700):
        PackedGrids.from_grids([(n % 37 + 1, n)], num_prefix_tokens=5)
    assert _build_cached.cache_info().currsize == _CACHE_SIZE
    gc.collect()
    alive = sum(type(item) is PackedGrids for item in gc.get_objects())
    assert alive <= 2 * _CACHE_SIZE
