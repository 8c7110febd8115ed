"""The forward kernel of varlen_attention against the reference; gradients have their own file."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrvlm_kernels import PackedGrids, reference
from hrvlm_kernels.ops.rope_2d import rope_2d, rope_table
from hrvlm_kernels.ops.varlen_attention import varlen_attention
from hrvlm_kernels.triton_kernels import varlen_attention as kernels
from hrvlm_kernels.triton_kernels import varlen_attention_short as short_kernels
from hrvlm_kernels.triton_kernels.tile_tables import FORWARD, SHORT
from hrvlm_kernels.triton_kernels.tilings import Tiling
from tests.kernels.attention_cases import (
    ENDS,
    below_zero,
    check,
    kernel_results,
    make_case,
    with_layout,
)
from tests.kernels.helpers import (
    DTYPES,
    equal_if_interpreted,
    far_rows,
    interpreter_only,
    strided_copy,
)

pytestmark = interpreter_only

# Every shape of tile in the tables, in the order in which they walk.
TILINGS = (
    Tiling(128, 128, 8, 1, "ahead"),
    Tiling(128, 128, 8, 1),
    Tiling(128, 64, 8, 1),
    Tiling(128, 32, 8, 1),
    Tiling(64, 64, 4, 1),
    Tiling(64, 32, 4, 1),
    Tiling(32, 32, 4, 1),
)


def run_forward(case, tilings=None, short_tilings=None):
    """out and lse of the launcher, outside of the torch op."""
    tokens, heads, _ = case.q.shape
    out = torch.full(case.q.shape, float("nan"), dtype=case.q.dtype)
    lse = torch.full((heads, tokens), float("nan"))
    short_tilings = () if tilings is not None else short_tilings
    kernels.forward(case.problem, out, lse, tilings, short_tilings)
    return out, lse


def attend(case, **options):
    options = {"rope": case.rope, "backend": "triton"} | options
    return varlen_attention(*case.inputs, case.packed, case.scale, **options)


def check_forward(case, tilings=None):
    out, lse = run_forward(case, tilings)
    check(case, [out], ["out"])
    check_lse(case, lse)


def check_lse(case, lse):
    q, k = case.q.double(), case.k.double()
    eps = torch.finfo(torch.float32).eps
    if case.rope is not None:  # the kernels round q and k to their dtype after the rotation
        q, k = reference.rope_2d(q, k, *case.rope, upcast=torch.float64)
        eps = torch.finfo(case.q.dtype).eps
    args = q, k, case.v, case.packed, case.scale
    _, exact = reference.varlen_attention(*args, upcast=torch.float64)
    longest = [a.norm(dim=-1).flatten().tolist() for a in (q, k)]
    score = max(longest[0], default=0) * max(longest[1], default=0) * q.shape[-1] ** -0.5
    assert ((lse * math.log(2) - exact).abs() <= 4 * eps * (1 + score)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 72, 80, 96, 128])
def test_ragged_packs(head_dim, dtype):
    check_forward(make_case(head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_shape_of_tile(tiling):
    check_forward(make_case(), [tiling])
    check_forward(make_case((130, 64, 1), head_dim=80, rope=True), [tiling])
    check_forward(make_case((130, 64, 1), head_dim=112, rope=True), [tiling])


@pytest.mark.parametrize(
    ("tiling", "head_dim"),
    [*((t, 16) for t in TILINGS if t.rows == 128), (TILINGS[0], 72), (TILINGS[2], 72)],
    ids=str,
)
def test_no_key_past_any_end(tiling, head_dim):
    """The tiles that the interpreter does not use by itself; the others are in the backward's."""
    check_forward(below_zero(make_case(ENDS, head_dim=head_dim)), [tiling])


@pytest.mark.parametrize("head_dim", [65, 72, 80, 96, 100])
def test_no_column_past_the_head(head_dim):
    """What lies behind a head, the next one or the next token, is neither read nor written."""
    case = make_case((70, 5), head_dim=head_dim)
    clean, _ = run_forward(case)
    room = torch.full((4, 75, 1, 128), float("nan"), dtype=case.q.dtype)
    q, k, v, out = room[..., :head_dim]
    for wide, a in zip((q, k, v), case.inputs, strict=True):
        wide.copy_(a)
    kernels.forward(replace(case, q=q, k=k, v=v).problem, out, torch.empty(1, 75))
    check(case, [out], ["out"])
    assert equal_if_interpreted(out, clean)  # rows of 128 are aligned, those of 100 are not
    assert room[..., head_dim:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotated_q_by_way_of_the_result(dtype):
    """Where a program has few registers; the bits are those of the usual way."""
    case = make_case((33, 1, 130), heads=2, head_dim=128, dtype=dtype, rope=True)
    few, many = Tiling(128, 32, 4, 1), Tiling(128, 32, 8, 1)
    assert kernels.rotates_via_out(128, few) and not kernels.rotates_via_out(128, many)
    assert not kernels.rotates_via_out(64, few)
    check_forward(case, [few])
    for ours, expected in zip(run_forward(case, [few]), run_forward(case, [many]), strict=True):
        assert equal_if_interpreted(ours, expected)


def test_every_shape_of_tile_is_listed():
    def shape(tiling):
        return tiling.rows, tiling.step, tiling.order

    shipped = {shape(t) for row in (*FORWARD.values(), kernels._INTERPRETER) for t in row}
    assert shipped == set(map(shape, TILINGS))


def test_a_long_segment():
    check_forward(make_case((577,)))


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
def test_shared_heads_of_k_and_v(heads):
    case = make_case((70, 3, 129), heads=heads[0], kv_heads=heads[1], head_dim=32)
    check_forward(case)
    check_forward(case, [Tiling(128, 128, 8, 1, "ahead")])


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0, -0.3, 3.0])
def test_scale(scale):
    case = make_case((33, 70), head_dim=32, dtype=torch.float32, scale=scale)
    check(case, [attend(case)], ["out"])


def test_scores_of_any_size(rng):
    """Rows with scores in the thousands, equal scores, and scores far below zero."""
    case = make_case((100, 65), head_dim=32, dtype=torch.float32)
    case.q[::3] *= 300
    case.k[5::4] = case.k[5]
    case.q[1] = -1000 * case.k[:100].mean(0)
    check(case, [attend(case)], ["out"])


# RoPE


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(32, torch.float32), (80, torch.float32), *((d, torch.float16) for d in (32, 64, 80, 128))],
)
def test_rope_folded_in(head_dim, dtype):
    lengths = (64, 257) if dtype == torch.float16 else (64, 70)
    case = make_case(lengths, head_dim=head_dim, dtype=dtype, rope=True)
    check_forward(case)
    rotated = rope_2d(case.q, case.k, *case.rope, backend="triton")
    apart = varlen_attention(*rotated, case.v, case.packed, backend="triton")
    # The first image is short: see below. Compiled, the products of the rotation are fused.
    assert equal_if_interpreted(attend(case)[64:], apart[64:])


def test_a_table_may_be_given():
    """It changes no bit, forward or backward; without one, each call writes its own."""
    case = make_case((201, 257), heads=2, head_dim=32, rope=True)
    table = rope_table(*case.rope)
    results = [kernel_results(case, rope=rope) for rope in (case.rope, (*case.rope, table))]
    for own, shared in zip(*results, strict=True):
        assert torch.equal(own, shared)
    other = kernel_results(case, rope=(*case.rope, table.flip(0)))
    assert not torch.equal(other[0], results[0][0])
    for wrong in (table[1:], table[:, :16], table.half()):
        with pytest.raises(ValueError, match=r"rope: its table must be float32 \[458, 32\]"):
            kernel_results(case, rope=(*case.rope, wrong))


# Short images: k is rotated in the kernel


@pytest.fixture
def started(monkeypatch):
    """Names of the kernels launched."""
    names = []
    for module in (kernels, short_kernels):
        launch = module.launch
        monkeypatch.setattr(
            module,
            "launch",
            lambda name, *args, launch=launch: (names.append(name), launch(name, *args)),
        )
    return names


def check_short_images(tiling=None):
    case = make_case((1, 0, 64, 65, 201, 256), heads=2, kv_heads=1, head_dim=32, rope=True)
    tilings = None if tiling is None else [tiling]
    out, lse = run_forward(case, short_tilings=tilings)
    check(case, [out], ["out"])
    check_lse(case, lse)


@pytest.mark.parametrize("tiling", [None, Tiling(128, 256, 8, 1)], ids=str)
def test_short_images(tiling, started):
    check_short_images(tiling)
    assert started == ["varlen_attention of short images"]


def test_short_and_long_images_in_one_pack(started):
    """Whatever an image is packed with, the same kernel takes it and its bits are the same."""
    lengths = (70, 257, 0, 256, 5)
    case = make_case(lengths, head_dim=32, rope=True)
    out, lse = run_forward(case)
    assert started == ["varlen_attention of short images", "varlen_attention"]
    check(case, [out], ["out"])
    check_lse(case, lse)
    coords, inv_freq = case.rope
    parts = (case.packed.split(a) for a in (*case.inputs, coords, out))
    for n, q, k, v, positions, together in zip(lengths, *parts, strict=True):
        packed = PackedGrids.from_lengths([n])
        rope = positions, inv_freq
        alone = varlen_attention(q, k, v, packed, rope=rope, backend="triton")
        assert torch.equal(alone, together)


def test_rotating_k_in_the_kernel_or_before_gives_the_same_result():
    case = make_case((201, 65), head_dim=64, rope=True)
    results = [run_forward(case), run_forward(case, short_tilings=())]
    assert not torch.equal(results[0][0], results[1][0])  # two kernels have run
    for out, lse in results:
        check(case, [out], ["out"])
        check_lse(case, lse)


def test_every_short_tile_is_listed():
    shipped = {
        (t.rows, t.step) for row in (*SHORT.values(), short_kernels._INTERPRETER) for t in row
    }
    assert shipped == {(64, 256), (128, 256)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_leaks_from_a_short_neighbour(bad):
    case = make_case((70, 65, 130), head_dim=32, rope=True)
    clean, _ = run_forward(case)
    poisoned = with_layout(case, torch.clone)
    for a in poisoned.inputs:
        a[:70], a[135:] = bad, bad
    out, _ = run_forward(poisoned)
    assert torch.equal(out[70:135], clean[70:135])


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_rope_on_the_torch_backends(backend):
    case = make_case((5, 17), heads=2, head_dim=32, dtype=torch.float32, rope=True)
    rotated = rope_2d(case.q, case.k, *case.rope, backend=backend)
    apart = varlen_attention(*rotated, case.v, case.packed, backend=backend)
    assert torch.equal(attend(case, backend=backend), apart)


def test_rope_arguments_are_checked():
    case = make_case((5,), head_dim=32, rope=True)
    coords, inv_freq = case.rope
    with pytest.raises(ValueError, match=r"coords must be float32 \[5, 2\]"):
        attend(case, rope=(coords[:4], inv_freq))
    with pytest.raises(ValueError, match="inv_freq requires grad"):
        attend(case, rope=(coords, inv_freq.clone().requires_grad_()))


# Segments


def test_windows_are_segments():
    """Qwen2.5-VL: the same tokens, once in windows and once as whole images."""
    windows = torch.tensor([0, 16, 32, 40, 104, 168], dtype=torch.int32)
    whole = make_case((40, 128), head_dim=32, dtype=torch.float32)
    packed = PackedGrids.from_cu_seqlens(windows)
    out = varlen_attention(*whole.inputs, packed, backend="triton")
    for start, end in zip(windows[:-1].tolist(), windows[1:].tolist(), strict=True):
        alone = PackedGrids.from_lengths([end - start])
        part = (a[start:end] for a in whole.inputs)
        assert torch.equal(out[start:end], varlen_attention(*part, alone, backend="triton"))
    assert not torch.equal(out, attend(whole))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 1), (1, 1, 1)])
def test_no_tokens_and_single_tokens(lengths):
    case = make_case(lengths, heads=2, head_dim=32, dtype=torch.float32)
    out = attend(case)
    assert out.shape == case.q.shape
    # The softmax of one score is 1; compiled products take float32 in three parts.
    assert equal_if_interpreted(out, case.v)
    torch.testing.assert_close(out, case.v, rtol=2**-20, atol=2**-20)


def test_no_heads():
    packed = PackedGrids.from_lengths([3])
    out = varlen_attention(*[torch.zeros(3, 0, 32)] * 1, torch.zeros(3, 1, 32),
                           torch.zeros(3, 1, 32), packed, backend="triton")  # fmt: skip
    assert out.shape == (3, 0, 32)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("tiling", "bad", "head_dim"),
    [
        *((tiling, NAN, 32) for tiling in (None, *TILINGS[:4], TILINGS[-1])),
        *((None, INF, 32), (None, 6e4, 32), (TILINGS[0], INF, 32), (TILINGS[-1], 6e4, 32)),
        *((None, NAN, 72), (TILINGS[3], INF, 72)),
    ],
    ids=str,
)
def test_nothing_leaks_from_a_neighbour(tiling, bad, head_dim):
    """A segment is the same alone, packed, and between segments full of NaN."""
    tilings = None if tiling is None else [tiling]
    case = make_case((70, 65, 130), head_dim=head_dim)
    clean, clean_lse = run_forward(case, tilings)
    for i, segment in enumerate((slice(0, 70), slice(70, 135), slice(135, 265))):
        poisoned = with_layout(case, torch.clone)
        for a in (poisoned.q, poisoned.k, poisoned.v):
            kept = a[segment].clone()
            a.fill_(bad)
            a[segment] = kept
        out, lse = run_forward(poisoned, tilings)
        assert torch.equal(out[segment], clean[segment])
        assert torch.equal(lse[:, segment], clean_lse[:, segment])
        alone = make_case((case.packed.lengths[i],), head_dim=head_dim)
        for name in "qkv":
            getattr(alone, name).copy_(getattr(case, name)[segment])
        assert torch.equal(run_forward(alone, tilings)[0], clean[segment])


def test_the_order_of_segments_does_not_matter():
    case = make_case((70, 5, 130), head_dim=32)
    out = case.packed.split(attend(case))
    order = [2, 0, 1]
    packed = PackedGrids.from_lengths([case.packed.lengths[i] for i in order])
    moved = (torch.cat([case.packed.split(a)[i] for i in order]) for a in case.inputs)
    for i, part in zip(order, packed.split(varlen_attention(*moved, packed, backend="triton")),
                       strict=True):  # fmt: skip
        assert torch.equal(part, out[i])


# Memory


def heads_first(a):
    return a.transpose(0, 1).contiguous().transpose(0, 1)


def spread(a):
    """Last stride 2: copied."""
    return torch.stack([a, torch.full_like(a, float("nan"))], -1).flatten(-2)[..., ::2]


LAYOUTS = [torch.clone, heads_first, spread, strided_copy]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    case = make_case((70, 129), heads=2, head_dim=32)
    before = [a.clone() for a in case.inputs]
    expected = attend(case)
    changed = with_layout(case, layout)
    out = attend(changed)
    check(case, [out], ["out"])
    assert equal_if_interpreted(out, expected)  # what TMA can't load takes another order
    for a, b in zip(changed.inputs, before, strict=True):
        assert torch.equal(a, b), "the input was written to"


def test_tensors_that_tma_can_not_load_take_the_plain_order(monkeypatch):
    monkeypatch.setattr(kernels, "architecture", lambda device: "sm_90")
    started = []
    monkeypatch.setattr(kernels, "launch", lambda name, tilings, start: started.append(tilings))
    for layout, ahead in zip(LAYOUTS, (True, False, True, False), strict=True):
        run_forward(with_layout(make_case((70, 129), heads=2, head_dim=32), layout))
        assert (started[-1][0].order == "ahead") == ahead
    sliced = make_case((70,), heads=2)
    run_forward(sliced)
    assert started[-1][0].order == "ahead"  # slices of a packed qkv are fine
    assert started[-1][1].order == "plain"


def test_offsets_beyond_int32(tmp_path):
    case = make_case((3, 1), heads=2, head_dim=32)
    expected, _ = run_forward(case)
    for i, name in enumerate("qkv"):
        folder = tmp_path / name
        folder.mkdir()
        inputs = list(case.inputs)
        inputs[i] = far_rows(inputs[i], folder)
        out = varlen_attention(*inputs, case.packed, backend="triton")
        assert torch.equal(out, expected)


def test_offsets_beyond_int32_in_every_block(tmp_path):
    """Blocks of the loop and of the last block, where a row is 2^25 elements from the next."""
    case = make_case((130,), head_dim=16)
    for tiling in (Tiling(64, 64, 4, 1), Tiling(128, 64, 8, 1, "ahead")):
        expected, _ = run_forward(case, [tiling])
        k = far_rows(case.k, tmp_path, stride=2**25)
        out = torch.full_like(expected, float("nan"))
        kernels.forward(replace(case, k=k).problem, out, torch.empty(1, 130), [tiling])
        assert torch.equal(out, expected)


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=3),
    group=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([16, 24, 32]),
    dtype=st.sampled_from(DTYPES),
    rope=st.booleans(),
    tiling=st.sampled_from([None, *TILINGS]),
    seed=st.integers(0, 99),
)
def test_random_packs(lengths, group, head_dim, dtype, rope, tiling, seed):
    options = {"head_dim": head_dim, "dtype": dtype, "rope": rope, "seed": seed}
    case = make_case(lengths, heads=group, kv_heads=1, **options)
    check_forward(case, None if tiling is None else [tiling])


# Choosing


def test_head_dims_beyond_the_kernels():
    case = make_case((5,), head_dim=136)
    with pytest.raises(RuntimeError, match="head_dim is 136, the kernels take up to 128"):
        attend(case)
    check(case, [attend(case, backend="auto")], ["out"])


def test_wrong_inputs_raise():
    case = make_case((3, 4), heads=4, kv_heads=2, head_dim=32)
    q, k, v = case.inputs
    for message, args in {
        "q has 6 rows": (q[:6], k[:6], v[:6]),
        "its 2 heads must divide the 3 heads": (q[:, :3], k, v),
        r"got \(7, 4, 32\), \(7, 2, 32\), \(7, 1, 32\)": (q, k, v[:, :1]),
        "one dtype": (q, k.float(), v),
    }.items():
        with pytest.raises(ValueError, match=message):
            varlen_attention(*args, case.packed, backend="triton")
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        varlen_attention(*(a.double() for a in case.inputs), case.packed, backend="triton")


def test_equal_inputs_give_equal_bits():
    case = make_case((70, 129), heads=2, head_dim=32)
    assert all(
        torch.equal(a, b) for a, b in zip(kernel_results(case), kernel_results(case), strict=True)
    )
