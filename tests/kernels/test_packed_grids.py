import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from hrvlm_kernels import PackedGrids, packed_grids, packed_tables

GRIDS = [(2, 4), (1, 1), (6, 2), (2, 4)]


@pytest.fixture
def packed():
    return PackedGrids.from_grids(GRIDS, num_prefix_tokens=5)


def test_host_numbers_and_cu_seqlens(packed):
    assert packed.grids == tuple(GRIDS)
    assert packed.lengths == (13, 6, 17, 13)
    assert packed.total_tokens == 49 and packed.max_seqlen == 17 and len(packed) == 4
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == [0, 13, 19, 36, 49]


def test_coords_are_the_centres_of_the_true_grid_and_zero_for_prefix_tokens(packed):
    expected = []
    for hp, wp in GRIDS:
        expected += [(0.0, 0.0)] * 5
        expected += [
            ((2 * i + 1) / hp - 1, (2 * j + 1) / wp - 1) for i in range(hp) for j in range(wp)
        ]
    assert packed.coords.dtype == torch.float32
    torch.testing.assert_close(packed.coords, torch.tensor(expected), rtol=0, atol=2e-7)
    assert (packed.coords[:5] == 0).all()


def test_coords_equal_transformers_bit_for_bit():
    from transformers.models.dinov3_vit.modeling_dinov3_vit import get_patches_center_coordinates

    for hp, wp in [(14, 14), (3, 251), (257, 1), (48, 64)]:
        ours = PackedGrids.from_grids([(hp, wp)]).coords
        assert torch.equal(
            ours, get_patches_center_coordinates(hp, wp, torch.float32, torch.device("cpu"))
        )


@pytest.mark.parametrize("factor", [1, 2])
def test_shuffle_index_by_explicit_loops(factor):
    grids = [(2, 4), (6, 2), (4, 4)]
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=3)
    expected, start = [], 0
    for hp, wp in grids:
        for i in range(hp // factor):
            for j in range(wp // factor):
                expected.append(
                    [
                        start + 3 + (i * factor + dy) * wp + j * factor + dx
                        for dy in range(factor)
                        for dx in range(factor)
                    ]
                )
        start += 3 + hp * wp
    index = packed.shuffle_index(factor)
    assert index.dtype == torch.int32 and index.tolist() == expected
    assert packed.token_grids(factor) == tuple((h // factor, w // factor) for h, w in grids)


@pytest.mark.parametrize("block", [1, 16, 64, 100])
def test_tiles_cover_every_row_once_longest_segment_first(block):
    lengths = [65, 0, 1, 200, 64, 200]
    tiles = PackedGrids.from_lengths(lengths).tiles(block).tolist()
    assert sorted(tiles) == [[s, b] for s, n in enumerate(lengths) for b in range(-(-n // block))]
    assert [lengths[s] for s, _ in tiles] == sorted((lengths[s] for s, _ in tiles), reverse=True)
    assert [t for t in tiles if t[0] == 3] == [[3, b] for b in range(-(-200 // block))]


def test_short_segments_are_listed_with_their_rows():
    short = PackedGrids.from_lengths((300, 256, 0, 257, 1)).short_segments
    assert short.dtype == torch.int32
    assert short.view(-1, 3).tolist() == [[300, 256, 1], [556, 0, 2], [813, 1, 4], [0, 0, 0]]
    for lengths in ((), (257,)):
        assert PackedGrids.from_lengths(lengths).short_segments.tolist() == [0, 0, 0]


def test_split_returns_views_of_each_segment(packed):
    x = torch.randn(49, 3)
    parts = packed.split(x)
    assert [len(p) for p in parts] == list(packed.lengths)
    assert torch.equal(torch.cat(parts), x) and parts[1].data_ptr() == x[13].data_ptr()


def test_patch_rows_leave_the_prefix_out(packed):
    expected = [
        r for a, n in zip([0, 13, 19, 36], packed.lengths, strict=True) for r in range(a + 5, a + n)
    ]
    assert packed.patch_rows().tolist() == expected


def test_from_cu_seqlens_and_lengths_agree():
    a = PackedGrids.from_cu_seqlens(torch.tensor([0, 4, 4, 9], dtype=torch.int32))
    assert a.lengths == (4, 0, 5) and a is PackedGrids.from_lengths([4, 0, 5])
    with pytest.raises(ValueError, match="no patch grids"):
        _ = a.coords
    with pytest.raises(ValueError, match="no patch grids"):
        a.shuffle_index(1)


def test_empty_packs():
    for packed in (
        PackedGrids.from_grids([]),
        PackedGrids.from_lengths([]),
        PackedGrids.from_lengths([0, 0]),
    ):
        assert packed.total_tokens == 0 and packed.max_seqlen == 0
        assert packed.tiles(64).shape == (0, 2)
    assert PackedGrids.from_grids([]).shuffle_index(2).shape == (0, 4)


def test_equal_requests_share_one_object_and_the_cache_is_bounded(packed):
    assert PackedGrids.from_grids([list(g) for g in GRIDS], num_prefix_tokens=5) is packed
    assert PackedGrids.from_grids(GRIDS, num_prefix_tokens=4) is not packed
    for n in range(1, 200):
        PackedGrids.from_lengths([n])
    assert PackedGrids.from_grids(GRIDS, num_prefix_tokens=5) is not packed


def test_pickle_deepcopy_to_and_pytree(packed):
    for other in (pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed), packed.to("cpu")):
        assert other.grids == packed.grids and torch.equal(other.coords, packed.coords)
    leaves, spec = pytree.tree_flatten(packed)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    back = pytree.tree_unflatten([leaf.clone() for leaf in leaves], spec)
    assert back.lengths == packed.lengths and back.total_tokens == packed.total_tokens
    assert torch.equal(back.coords, packed.coords) and torch.equal(back.tiles(64), packed.tiles(64))
    on_meta = packed.to("meta")
    assert on_meta.device.type == "meta" and on_meta.tiles(64).shape == packed.tiles(64).shape


def test_copies_keep_coordinates_of_their_own(packed):
    own = packed.with_coords(packed.coords * 2)
    for other in (pickle.loads(pickle.dumps(own)), copy.copy(own), copy.deepcopy(own)):
        assert torch.equal(other.coords, own.coords) and other.grids == own.grids
        assert torch.equal(other.cu_seqlens, own.cu_seqlens)
    assert pickle.loads(pickle.dumps(packed)) is packed


def test_a_dumped_tree_spec_loads_equal(packed):
    leaves, spec = pytree.tree_flatten(packed)
    loaded = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert loaded == spec
    again = pytree.tree_unflatten(leaves, loaded)
    assert again.to("cpu") is again.to(None) is again
    for name in ("grids", "lengths", "num_prefix_tokens", "total_tokens", "max_seqlen"):
        assert getattr(again, name) == getattr(packed, name)


def test_layouts_that_stay_keep_coordinates_of_their_own():
    packed = PackedGrids.from_grids([(2, 3), (1, 4)], num_prefix_tokens=1)
    own = packed.with_coords(packed.coords * 2)
    assert own.to("cpu") is own.to("cpu", non_blocking=True) is own
    assert torch.equal(own.to("cpu").coords, 2 * packed.coords)


def test_usable_by_training_after_it_was_made_under_inference_mode():
    with torch.inference_mode():
        packed = PackedGrids.from_grids([(3, 5)], num_prefix_tokens=1)
        index = packed.shuffle_index(1)
    x = torch.randn(15, 2, requires_grad=True)
    (x * packed.coords[1:]).square().mean().backward()
    assert not packed.coords.is_inference() and not index.is_inference() and x.grad is not None


def test_a_layout_made_in_a_compiled_graph():
    def tables(x, grids):
        packed = PackedGrids.from_grids(grids, num_prefix_tokens=1)
        parts = (
            packed.cu_seqlens, packed.tiles(64), packed.tiles(128), packed.short_segments,
            packed.coords, packed.patch_rows(), packed.shuffle_index(2),
        )  # fmt: skip
        return [part + x for part in parts]

    compiled = torch.compile(tables, backend="eager", fullgraph=True, dynamic=True)
    for grids in ([(4, 4), (2, 6)], [(40, 60), (20, 80)], [(2, 2)] * 3):
        found, expected = compiled(torch.zeros(()), grids), tables(torch.zeros(()), grids)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_fake_tensors_do_not_enter_the_cache():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        PackedGrids.from_grids([(7, 9)], num_prefix_tokens=2)
    real = PackedGrids.from_grids([(7, 9)], num_prefix_tokens=2)
    assert real.cu_seqlens.tolist() == [0, 65]


def test_a_transforms_wrappers_do_not_enter_the_cache():
    def lay_out(x):
        PackedGrids.from_grids([(3, 4), (5, 6)], num_prefix_tokens=5, shuffle_factors=(1,))
        return x

    torch.func.functionalize(lay_out)(torch.zeros(2))
    for grids in ([(3, 4), (5, 6)], [(7, 8)] * 5):
        packed = PackedGrids.from_grids(grids, num_prefix_tokens=5)
        assert type(packed.cu_seqlens + 0) is torch.Tensor
        assert packed.patch_rows()[-1] == packed.total_tokens - 1


def test_numbers_of_numpy_and_iterators_are_taken():
    expected = PackedGrids.from_grids([(3, 4), (2, 2)], num_prefix_tokens=5, shuffle_factors=(1,))
    grids = [map(np.int64, (3, 4)), iter(np.array([2, 2]))]
    options = {"num_prefix_tokens": np.int8(5), "shuffle_factors": (np.int32(1),)}
    packed = PackedGrids.from_grids(grids, **options)
    assert packed is expected
    with pytest.raises(ValueError, match=r"image 1: .* got \(3, 4, 5\)"):
        PackedGrids.from_grids([map(int, "34"), map(int, "345")])


def test_the_longest_segment_that_int32_can_count():
    packed = PackedGrids.from_lengths([2**31 - 1])
    last = (2**31 - 1) // 128
    assert packed.tiles(128).shape == (last + 1, 2) and packed.tiles(128)[-1].tolist() == [0, last]


def test_default_device_context_is_ignored():
    with torch.device("meta"):
        packed = PackedGrids.from_grids([(5, 7)], num_prefix_tokens=2)
    assert packed.device.type == "cpu" and packed.cu_seqlens.tolist() == [0, 37]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedGrids.from_grids([(2, 2), (0, 3)]), r"image 1: .*\(0, 3\)"),
        (lambda: PackedGrids.from_grids([(2, 2, 2)]), r"image 0: .*\(2, 2, 2\)"),
        (lambda: PackedGrids.from_grids([(2.0, 2)]), "image 0"),
        (lambda: PackedGrids.from_grids([(2, True)]), "image 0"),
        (lambda: PackedGrids.from_grids([(2, 2)], num_prefix_tokens=-1), "num_prefix_tokens"),
        (lambda: PackedGrids.from_grids([(2, 2)], num_prefix_tokens=True), "int >= 0, got True"),
        (lambda: PackedGrids.from_lengths([3, -1]), r"lengths\[1\]"),
        (lambda: PackedGrids.from_cu_seqlens([1, 2]), "start at 0"),
        (lambda: PackedGrids.from_cu_seqlens([0, 5, 3]), r"lengths\[1\]"),
        (lambda: PackedGrids.from_lengths([2**30, 2**30 + 1, 7]), "image 1 with 1073741825"),
        (
            lambda: PackedGrids.from_grids([(4, 4), (6, 9)]).shuffle_index(2),
            "image 1: patch grid 6x9 .* factor 2",
        ),
        (lambda: PackedGrids.from_grids([(4, 4)]).shuffle_index(0), "factor"),
        (lambda: PackedGrids.from_grids([(4, 4)]).token_grids(True), "factor must be .* got True"),
        (
            lambda: PackedGrids.from_grids([(4, 4)]).split(torch.zeros(15)),
            r"x has 15 rows.*\(4, 4\).*16",
        ),
    ],
)
def test_bad_layouts_raise_and_name_the_image(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("device", ["gpu", "", 3.5, [], -1, 10**30])
def test_a_device_that_torch_does_not_know_is_named(device):
    packed = PackedGrids.from_grids([(2, 3)])
    for make in (
        lambda: PackedGrids.from_grids([(2, 3)], device=device),
        lambda: PackedGrids.from_lengths([4], device=device),
        lambda: packed.to(device),
    ):
        with pytest.raises(ValueError, match="device="):
            make()


@pytest.mark.parametrize("factor", [2, 4])
def test_the_shuffle_index_comes_with_the_first_upload(factor, monkeypatch):
    grids = [(4, 8), (12, 4), (4, 8)]
    expected = PackedGrids.from_grids(grids, num_prefix_tokens=3).shuffle_index(factor)
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=3, shuffle_factors=(1, factor))
    monkeypatch.setattr(packed_grids, "upload", None)
    assert torch.equal(packed.shuffle_index(factor), expected)
    with pytest.raises(ValueError, match="image 1: patch grid 3x4 is not divisible by"):
        PackedGrids.from_grids([(4, 4), (3, 4)], shuffle_factors=(2,))


def test_pieces_that_are_kept_are_not_written_to():
    grids = [(4, 8), (2, 4), (4, 8)]
    first = PackedGrids.from_grids(grids, num_prefix_tokens=2)
    kept = first.coords.clone(), first.shuffle_index(2).clone()
    first.coords.add_(1)
    first.shuffle_index(2).add_(1)
    again = PackedGrids.from_grids([*grids, (1, 1)], num_prefix_tokens=2)
    rows = sum(first.lengths)
    assert torch.equal(again.coords[:rows], kept[0])
    again = PackedGrids.from_grids([*grids, (2, 2)], num_prefix_tokens=2)
    assert torch.equal(again.shuffle_index(2)[: len(kept[1])], kept[1])
    packed_grids._build_cached.cache_clear()  # of the layout that was written to


class Stream:
    """What a layout asks of torch.cuda's."""

    def __init__(self, number, log):
        self.cuda_stream, self.log = number, log

    def record_event(self):
        return f"event of stream {self.cuda_stream}"

    def wait_event(self, event):
        self.log.append((self.cuda_stream, event))


class Table:
    def __init__(self, log):
        self.log = log

    def record_stream(self, stream):
        self.log.append((stream.cuda_stream, "memory"))


def test_another_stream_waits_once_for_the_upload(monkeypatch):
    log, current, capturing = [], [], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    first, other = Stream(1, log), Stream(2, log)
    current.append(first)
    uploads = packed_tables.Uploads(torch.device("cuda", 0))
    uploads.wait([Table(log)])
    current.append(other)
    capturing.append(True)
    uploads.wait([Table(log)])
    assert log == []
    capturing.clear()
    for _ in range(2):
        uploads.wait([Table(log)])
    assert log == [(2, "event of stream 1"), (2, "memory")]
    uploads.note()  # one more table, from this stream
    current.append(first)
    uploads.wait([])
    assert log[2:] == [(1, "event of stream 2")]
