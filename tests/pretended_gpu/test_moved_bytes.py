"""What a layer of the encoder moves and starts: a change that adds a pass or a launch fails here.

S is a tensor ``[T, C]``. The counts are of ViT-L with one image: 14x14 patches take the attention
of short images, 16x18 that of all others.
"""

import pytest
import torch

import pretended_gpu

pretended_gpu.install(numbers=False)

from hrvlm_kernels import PackedGrids, swiglu, varlen_attention
from pretended_gpu import RECORD
from pretended_gpu.kernel_accesses import read_ttir
from pretended_gpu.moved_bytes import moved_by, of_a_layer

SHORT, LONG = (14, 14), (16, 18)


@pytest.mark.parametrize(
    ("grid", "train", "passes", "launches"),
    [(SHORT, False, 14, 8), (LONG, False, 16, 9), (SHORT, True, 44, 28), (LONG, True, 44, 28)],
)
def test_what_a_layer_moves(grid, train, passes, launches):
    layer, size = of_a_layer(grid=grid, train=train)
    assert {name: n / size for name, n in layer.passes.items() if n % size} == {}
    assert layer.passes.total() / size == passes, layer.passes
    assert layer.launches.total() == launches, layer.launches
    table = size / 8  # cos and sin of one head in float32, read by the forward, or by dq and dk
    forward = 4 * size
    assert layer.attention.total() == (16 * size + 2 * table if train else forward + table)
    assert layer.kept.total() / size == pytest.approx(16 if train else 0, abs=0.1)


@pytest.mark.parametrize(("grid", "train"), [(SHORT, False), (LONG, False), (LONG, True)])
def test_what_a_layer_moves_with_activation_and_rotation_in_the_products(grid, train):
    """By backend="triton"; "auto" takes these products only where a GPU has measured them."""
    layer, size = of_a_layer(grid=grid, train=train, backend="triton")
    assert layer.passes.total() / size == (40 if train else 6), layer.passes
    assert layer.launches.total() == (27 if train else 7), layer.launches
    assert layer.launches["linear_rope_2d_forward"] == 1
    assert layer.launches["linear_gelu_forward"] == (0 if train else 1)
    table = size / 8  # read by dq and by dk alone
    assert layer.attention.total() == (16 * size + 2 * table if train else 4 * size)


def test_what_inference_moves_with_a_gate_in_the_product():
    gated, size = of_a_layer(grid=SHORT, train=False, backend="triton", gated=True)
    assert gated.passes.total() / size == 6, gated.passes
    assert gated.launches.total() == 7 and gated.launches["linear_swiglu_forward"] == 1


def test_counting_itself():
    a, b = torch.randn(64, 32, device="cuda"), torch.randn(32, 128, device="cuda")
    size = 4 * 64 * 128
    moved = moved_by(lambda: (a @ b).t().contiguous().add_(1), tokens=64)
    assert moved.passes == {"aten::clone": 2 * size, "aten::add_": 2 * size}
    assert moved.launches == {"aten::mm": 1, "aten::clone": 1, "aten::add_": 1}


def test_the_summand_of_a_product_is_a_pass_and_is_copied_unless_it_is_the_result():
    a, b = torch.randn(64, 32, device="cuda"), torch.randn(32, 128, device="cuda")
    bias, c = torch.randn(128, device="cuda"), torch.randn(64, 128, device="cuda")
    size = 4 * 64 * 128
    assert not moved_by(lambda: torch.addmm(bias, a, b), tokens=64).passes
    assert moved_by(lambda: c.addmm_(a, b), tokens=64).passes == {"aten::addmm_": size}
    copied = moved_by(lambda: torch.addmm(c, a, b), tokens=64)
    assert copied.passes == {"aten::addmm": size, "aten::addmm, copying C": 2 * size}
    assert copied.launches.total() == 2


def test_what_kernels_read_and_write():
    """An expanded tensor is read once; one that two arguments hold, once too."""
    packed = PackedGrids.from_grids([(20, 15)], num_prefix_tokens=5, device="cuda")
    t = packed.total_tokens
    q, k, v = torch.randn(t, 3, 2, 64).to("cuda", torch.bfloat16).unbind(1)
    rope = packed.coords, torch.rand(16, device="cuda")
    gate = torch.randn(1, 128, device="cuda").expand(t, 128)

    def run():
        varlen_attention(q, k, v, packed, rope=rope)
        swiglu(gate, torch.ones(t, 128, device="cuda"))

    moved_by(run, tokens=t)
    size = 2 * t * 128
    ends, tiles = packed.segments.cu_seqlens, packed.segments.tiles_128
    positions = sorted([4 * 2 * t, 4 * 16])
    table, rotation, attention, gated = RECORD.launches
    turns = 4 * t * 64
    assert sorted(a.bytes for a in table.reads) == positions
    assert [a.bytes for a in table.writes] == [turns]
    assert sorted(a.bytes for a in rotation.reads) == sorted([size, *positions])
    assert [a.bytes for a in rotation.writes] == [size]
    layout = [4 * ends.numel(), 4 * tiles.numel()]
    assert sorted(a.bytes for a in attention.reads) == sorted([*3 * [size], *layout, turns])
    assert sorted(a.bytes for a in attention.writes) == sorted([4 * 2 * t, size])
    assert sorted(a.bytes for a in gated.reads) == [4 * 128, 2 * size]
    assert [a.bytes for a in gated.writes] == [2 * size]


def test_accesses_that_cannot_be_told_raise():
    """Also through a loop that moves the pointer, and atomics are both."""
    header = "tt.func public @f(%x: !tt.ptr<f32> loc(#l), %y: !tt.ptr<f32> loc(#l), %n: i32) {\n"
    loop = """
  %a = tt.splat %x : !tt.ptr<f32> -> tensor<8x!tt.ptr<f32>>
  %r:2 = scf.for %i = %n to %n step %n iter_args(%s = %n, %p = %a) -> (i32, !tt.ptr<f32>) {
    %b = tt.load %p : tensor<8x!tt.ptr<f32>> loc(#l)
    scf.yield %n, %p : i32, !tt.ptr<f32>
  }
  %c = tt.atomic_rmw fadd, relaxed, gpu, %y, %b, %m : (tensor<8x!tt.ptr<f32>>) -> tensor<8xf32>
  tt.store %r#1, %b : tensor<8x!tt.ptr<f32>>
"""
    assert read_ttir(header + loop) == ({"x", "y"}, {"x", "y"})
    with pytest.raises(ValueError, match="no argument of the kernel is known"):
        read_ttir(header + "  %b = tt.load %unknown : !tt.ptr<f32> loc(#l)\n")
