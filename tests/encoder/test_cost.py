import weakref

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from hrvlm import DINOv3Encoder
from hrvlm.checkpoints.family import CONFIGS, get_config
from hrvlm.encoder.cost import Architecture, forward_cost, make_plan, named_architecture, size_of
from tests.encoder.encoders import config_of


@pytest.mark.parametrize("name", ["vit", "vit_gated", "no_registers_no_biases"])
def test_flops_are_those_that_torch_counts(name):
    config = config_of(name)
    # torch has no formula for the CPU's fused attention: eager's two products are counted.
    encoder = DINOv3Encoder(config, backend="eager").eval()
    grids = [(2, 3), (4, 4), (4, 4), (5, 1)]
    images = [torch.randn(3, 16 * hp, 16 * wp) for hp, wp in grids]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(images)
    costs = [forward_cost(Architecture.from_config(config), hp * wp) for hp, wp in grids]
    assert counter.get_total_flops() == sum(cost.total for cost in costs)
    by_op = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in by_op.items() if op.__name__ not in ("addmm", "mm"))
    assert attention == sum(cost.attention for cost in costs)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_of_the_family_has_the_planned_parameters(name):
    architecture = named_architecture(name)
    assert architecture == Architecture.from_config(get_config(name), name)
    with torch.device("meta"):
        encoder = DINOv3Encoder(get_config(name))
    assert architecture.num_parameters == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("name", ["vit", "key_bias", "patch_8", "no_registers_no_biases"])
def test_parameters_of_unusual_configs(name):
    encoder = DINOv3Encoder(config_of(name))
    planned = Architecture.from_config(encoder.config).num_parameters
    assert planned == sum(p.numel() for p in encoder.parameters())


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages made inside, at their highest."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary(ref_type=weakref.ref)
        for tensor in known:
            self.seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    self.seen[storage] = True
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size):
        self.now -= size


@pytest.mark.parametrize("gated", [False, True])
def test_activation_memory_of_a_forward(gated):
    act = "silu" if gated else "gelu"
    config = config_of(hidden_size=128, intermediate_size=512, use_gated_mlp=gated, hidden_act=act)
    encoder = DINOv3Encoder(config, backend="sdpa").freeze()
    images = [torch.randn(3, 256, 512), torch.randn(3, 320, 320)]
    encoder(images)  # makes the layout, which stays in a cache
    with PeakMemory([*encoder.parameters(), *images]) as memory, torch.no_grad():
        encoder(images)
    plan = make_plan(
        ["256x512", "320x320"],
        Architecture.from_config(config),
        max_img_size=512,
        factor=1,
        dtype="float32",
    )
    assert 0.8 * plan.activation_bytes <= memory.peak <= 1.02 * plan.activation_bytes


def test_issue_example():
    plan = make_plan(["640x960"], named_architecture("vitb16"), max_img_size=960)
    image = plan.images[0]
    assert image.geometry.patch_grid == (40, 60)
    assert image.geometry.token_grid == (10, 15)
    assert plan.visual_tokens == 150 and plan.packed_tokens == 2405
    assert plan.weight_bytes == 2 * 85660416


def test_attention_grows_with_the_square_and_packing_adds_none_across_images():
    architecture = named_architecture("vits16")
    one = make_plan(["512x512"], architecture, max_img_size=512).cost
    two = make_plan(["512x512", "512x512"], architecture, max_img_size=512).cost
    assert two == (2 * one.gemm, 2 * one.attention)
    n = 32 * 32 + 5
    assert one.attention == 12 * 4 * 384 * n * n


def test_image_files_count_upright(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(path, exif=exif)
    assert size_of(str(path)) == (64, 32)


@pytest.mark.parametrize("text", ["640X960", "640 x 960", "640×960"])  # noqa: RUF001
def test_ways_to_write_a_size(text):
    assert size_of(text) == (640, 960)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0x20", "'0x20': both sides must be at least 1 pixel"),
        ("12", "'12' is neither HEIGHTxWIDTH"),
        ("12x", "'12x' is neither HEIGHTxWIDTH"),
        ("missing.png", "'missing.png' is neither HEIGHTxWIDTH"),
    ],
)
def test_sizes_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        size_of(text)


def test_the_encoder_alone_is_planned_as_encode_runs_it():
    architecture = named_architecture("vits16")
    (alone,) = make_plan(["150x40"], architecture, max_img_size=1024, factor=1).images
    (joined,) = make_plan(["150x40"], architecture, max_img_size=1024).images
    assert (alone.geometry.height, alone.geometry.width) == (160, 48)
    assert (joined.geometry.height, joined.geometry.width) == (192, 64)
    assert alone.stretch == pytest.approx((150 / 40) / (160 / 48))
    assert joined.stretch == pytest.approx((150 / 40) / (192 / 64)) and alone.stretch < 1.13


def test_options_out_of_range_are_named():
    architecture = named_architecture("vits16")
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        make_plan(["8x8"], architecture, max_img_size=64, dtype="int8")
    with pytest.raises(ValueError, match="max_img_size=32"):
        make_plan(["8x8"], architecture, max_img_size=32)
    with pytest.raises(ValueError, match=r"model must be one of vitt16, .*got 'vits'"):
        named_architecture("vits")
    with pytest.raises(ValueError, match="patch_size=0"):
        named_architecture("vits16", 0)
