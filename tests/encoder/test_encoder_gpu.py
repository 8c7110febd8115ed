"""The encoder on a GPU in the ways that it is used: compiled, swapped in, in graphs, on streams."""

import copy

import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

import hrvlm
from hrvlm_kernels import PackedGrids
from tests.encoder.test_vision_transformer_gpu import DEVICE, PACKS, encoder_of, patches_of, run
from tests.numerics import assert_contraction

pytestmark = pytest.mark.gpu

VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}


def layout_of(grids):
    return PackedGrids.from_grids(grids, num_prefix_tokens=5, device=DEVICE)


def assert_no_worse_than_eager(results, encoder, patches, packed, cotangent):
    others = {}
    for dtype in (torch.float64, patches.dtype):
        model = copy.deepcopy(encoder).to(dtype)
        model.backend = "eager"
        others[dtype] = run(model, patches.to(dtype), packed, cotangent)
    for got, exact, plain in zip(results, *others.values(), strict=True):
        assert_contraction(got, exact, plain, packed)


def test_inductor_forward_and_backward():
    encoder = encoder_of(layers=2).bfloat16()
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True)
    for grids in (PACKS["mixed"], [(20, 9), (3, 5)]):
        packed, patches = layout_of(grids), patches_of(grids, torch.bfloat16)
        cotangent = torch.randn(packed.total_tokens, 384, device=DEVICE)
        results = run(compiled, patches, packed, cotangent)
        assert_no_worse_than_eager(results, encoder, patches, packed, cotangent)


def test_inductor_without_gradients():
    encoder = encoder_of(layers=2).bfloat16().eval()
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True)
    patches, packed = patches_of(PACKS["mixed"], torch.bfloat16), layout_of(PACKS["mixed"])
    with torch.inference_mode():
        got = compiled(patches, grids=packed).packed_last_hidden_state
        expected = encoder(patches, grids=packed).packed_last_hidden_state
    assert (got.float() - expected.float()).norm() <= 2e-2 * expected.float().norm()


def test_the_widths_of_a_vit_l():
    encoder = encoder_of(layers=1, **VIT_L).bfloat16()
    grids = [(14, 14), (3, 5)]
    packed, patches = layout_of(grids), patches_of(grids, torch.bfloat16)
    cotangent = torch.randn(packed.total_tokens, 1024, device=DEVICE)
    results = run(encoder, patches, packed, cotangent)
    assert_no_worse_than_eager(results, encoder, patches, packed, cotangent)


def test_accelerate():
    torch.manual_seed(0)
    config = DINOv3ViTConfig(num_hidden_layers=2, num_register_tokens=4)
    model = DINOv3ViTModel._from_config(config, attn_implementation="eager").eval().to(DEVICE)
    images = torch.randn(2, 3, 224, 320, device=DEVICE)
    wide = copy.deepcopy(model).double()
    model = model.bfloat16()
    with torch.no_grad():
        exact = wide(images.bfloat16().double()).last_hidden_state
        plain = model(images.bfloat16()).last_hidden_state
        report = hrvlm.accelerate(model)
        got = model(images.bfloat16()).last_hidden_state
    assert report.swapped
    assert_contraction(got.flatten(0, 1), exact.flatten(0, 1), plain.flatten(0, 1))


def test_training_goes_on_after_inference_mode():
    """With the layout, the table of RoPE and the folded weights that were made under it."""
    encoder = encoder_of(layers=2).bfloat16()
    grids = [(5, 7), (11, 29)]
    patches = patches_of(grids, torch.bfloat16)
    with torch.inference_mode():
        packed = layout_of(grids)
        inferred = encoder(patches, grids=packed).packed_last_hidden_state
    with torch.no_grad():
        again = encoder(patches, grids=packed).packed_last_hidden_state
    assert torch.equal(inferred, again) and inferred.is_inference()
    cotangent = torch.randn(packed.total_tokens, 384, device=DEVICE)
    results = run(encoder, patches, packed, cotangent)
    assert_no_worse_than_eager(results, encoder, patches, packed, cotangent)


def test_graphs_of_images_above_256_tokens():
    encoder = encoder_of(layers=2).bfloat16().eval()
    sizes = [(512, 320), (224, 224), (256, 768)]
    graphed = encoder.graphed([sizes])
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        images = [torch.randn(3, *size, generator=generator) for size in sizes]
        images = [image.to(DEVICE, torch.bfloat16) for image in images]
        with torch.no_grad():
            expected = encoder(images).packed_last_hidden_state
        got = graphed(images).packed_last_hidden_state
        assert (got.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()


def test_layouts_on_side_streams_and_after_eviction():
    encoder = encoder_of(layers=2).bfloat16().eval()
    grids = [(9, 33), (14, 14), (2, 5)]
    patches = patches_of(grids, torch.bfloat16)
    with torch.no_grad():
        expected = encoder(patches, grids=PackedGrids.from_grids(grids, num_prefix_tokens=5))
        expected = expected.packed_last_hidden_state
        results = []
        for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                packed = layout_of(grids)  # of the cache, from the second stream on
                results.append(encoder(patches, grids=packed).packed_last_hidden_state)
                for width in range(1, 200):  # push it out while it is in use
                    layout_of([(3, width)])
                del packed
                torch.full((1 << 20,), 7, dtype=torch.int32, device=DEVICE)  # takes what is free
        torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def launches_of(call):
    """Kernels, but those that a matrix product of torch adds to sum its parts."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    kernels = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
    return len([name for name in kernels if "splitk" not in name.lower()])


SHORT, LONG = [(14, 14), (3, 5)], [(48, 48), (30, 40)]  # a kernel of its own rotates k of LONG


@pytest.mark.parametrize(
    ("training", "grids", "most"), [(False, SHORT, 8), (False, LONG, 9), (True, LONG, 28)]
)
def test_launches_per_layer(training, grids, most):
    packed, patches = layout_of(grids), patches_of(grids, torch.bfloat16)
    cotangent = torch.randn(packed.total_tokens, 384, device=DEVICE).bfloat16()
    counts = []
    for layers in (2, 4):
        encoder = encoder_of(layers=layers).bfloat16()

        def step(encoder=encoder):
            with torch.set_grad_enabled(training):
                out = encoder(patches, grids=packed).packed_last_hidden_state
            if training:
                for parameter in encoder.parameters():
                    parameter.grad = None  # or adding to it is a launch
                out.backward(cotangent)

        counts.append(launches_of(step))
    assert 0 < counts[1] - counts[0] <= 2 * most, counts
