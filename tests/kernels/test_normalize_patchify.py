"""normalize_patchify's kernel against float64, and against what hrvlm's processors do."""

import pytest
import torch

from benchmarks.compiled.compiler import TARGETS, assert_clean, submit_compile
from benchmarks.compiled.jobs import patchify_jobs
from hrvlm.images.patches import pack_images
from hrvlm.images.processor import IMAGENET, SAT493M, normalize
from hrvlm_kernels import normalize_patchify, reference
from tests.kernels.helpers import DTYPES, interpreter_only
from tests.kernels.mutations import caught, plant
from tests.numerics import assert_elements

SIZES = ((2, 3), (4, 1), (1, 1), (3, 9))  # patches


def make_images(patch_size=16, sizes=SIZES, *, device="cpu", seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(3, hp * patch_size, wp * patch_size) for hp, wp in sizes]
    return [
        torch.randint(256, shape, generator=rng, dtype=torch.uint8).to(device) for shape in shapes
    ]


def kernel(images, patch_size=16, numbers=IMAGENET, dtype=torch.float32):
    return normalize_patchify(images, patch_size, *numbers, dtype=dtype, backend="triton")


def check(patch_size=16, dtype=torch.float32, *, images=None, numbers=IMAGENET, device="cpu"):
    """Each element: half a rounding to `dtype`, and the float32 roundings of both terms."""
    images = make_images(patch_size, device=device) if images is None else images
    rows, grids = kernel(images, patch_size, numbers, dtype)
    batches = [image[None] for image in images]
    exact = reference.normalize_patchify(batches, patch_size, *numbers, upcast=torch.float64)
    assert rows.dtype == dtype and rows.shape == exact.shape
    assert grids == [(a.shape[1] // patch_size, a.shape[2] // patch_size) for a in images]
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    terms = exact.abs() + 2 * max(m / s for m, s in zip(*numbers, strict=True))
    assert_elements(rows, exact, 0.5 * eps * exact.abs() + 2 * eps32 * terms)
    return rows


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch_size", [16, 14, 1])
def test_a_list_of_images(patch_size, dtype):
    check(patch_size, dtype)


@interpreter_only
def test_other_statistics_and_patches_wider_than_a_program():
    check(numbers=SAT493M)
    check(48, images=make_images(48, [(2, 1)]))


@interpreter_only
def test_a_batch_is_its_images_and_one_launch(monkeypatch):
    from hrvlm_kernels.triton_kernels import normalize_patchify as module

    images = make_images(sizes=[(2, 3)] * 3)
    expected = check(images=images)
    calls, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *a: (calls.append(a), forward(*a)))
    rows, grids = kernel(torch.stack(images))
    assert torch.equal(rows, expected) and grids == [(2, 3)] * 3 and len(calls) == 1


@interpreter_only
def test_any_strides():
    """Channels last, as decoders give them; a crop, whose rows are unaligned; mirrored columns."""
    images = make_images(sizes=[(2, 3)] * 2)
    expected, _ = kernel(images)
    channels_last = [a.permute(1, 2, 0).contiguous().permute(2, 0, 1) for a in images]
    crops = [torch.nn.functional.pad(a, (3, 5, 1, 2))[:, 1:-2, 3:-5] for a in images]
    for others in (channels_last, crops, torch.stack(channels_last)):
        assert torch.equal(kernel(others)[0], expected)


@interpreter_only
def test_opcheck_and_one_graph(monkeypatch):
    monkeypatch.undo()  # opcheck compares what empty tensors hold
    images = make_images(4)
    arguments = [image[None] for image in images], 4, *map(list, IMAGENET), torch.float16
    torch.library.opcheck(torch.ops.hrvlm_kernels.normalize_patchify, arguments)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    rows, grids = compiled(images, 4)
    expected = kernel(images, 4)
    assert torch.equal(rows, expected[0]) and grids == expected[1]


def test_the_torch_path_is_what_the_processors_compute():
    images = make_images()
    rows, grids = normalize_patchify(images, 16, *IMAGENET)
    expected, expected_grids = pack_images([normalize(a, *IMAGENET) for a in images], 16)
    assert torch.equal(rows, expected) and grids == expected_grids
    half, _ = normalize_patchify(images, 16, *IMAGENET, dtype=torch.bfloat16)
    assert torch.equal(half, expected.bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    {
        "none": ({"images": []}, "at least one image"),
        "empty batch": ({"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8)}, "at least one"),
        "one image": ({"images": torch.zeros(3, 4, 4, dtype=torch.uint8)}, r"\[B, 3, H, W\]"),
        "floats": ({"images": [torch.zeros(3, 4, 4)]}, "image 0: expected uint8"),
        "grey": ({"images": [*make_images(4), torch.zeros(1, 4, 4, dtype=torch.uint8)]},
                 "image 4: expected uint8"),
        "sides": ({"images": [torch.zeros(3, 4, 6, dtype=torch.uint8)]}, "image 0: 4x6 pixels"),
        "patch size": ({"patch_size": 0}, "patch_size must be an int >= 1, got 0"),
        "patch size, a bool": ({"patch_size": True}, "patch_size must be an int >= 1, got True"),
        "mean": ({"mean": (0.5,)}, "mean must be 3 numbers"),
        "std": ({"std": (0.5, 0.0, 0.5)}, "std must be above 0"),
    }.values(),
)  # fmt: skip
def test_wrong_inputs_raise(changes, message):
    arguments = {"images": make_images(4), "patch_size": 4, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match=message):
        normalize_patchify(**(arguments | changes))


BUGS = {
    "x and y swapped": ("(y * stride_y)[None, :] + x * stride_x",
                        "(y * stride_x)[None, :] + x * stride_y"),
    "rows of patches": ("y = (i_row % hp) * P", "y = (i_row % hp)"),
    "another image's rows": ("(i_row // hp) * stride_b", "0 * stride_b"),
    "one mean for all": ("tl.where(i_c == 1, shift_1, shift_2)", "shift_1"),
    "blue as green": ("tl.where(i_c == 1, scale_1, scale_2)", "scale_1"),
    "channels overlap": ("+ i_c * (P * P)\n", "+ i_c * P\n"),
    "last patch missing": ("(i_n < wp)[:, None]", "(i_n < wp - 1)[:, None]"),
    "255 forgotten": ("1 / (255 * s)", "1 / (256 * s)"),
    "shift without std": ("-m / s for", "-m for"),
}  # fmt: skip


def check_batch():
    images = make_images(4, [(2, 3)] * 2)
    rows, _ = kernel(torch.stack(images), 4)
    assert torch.equal(rows, torch.cat([kernel([image], 4)[0] for image in images]))


@interpreter_only
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "normalize_patchify", *BUGS[bug])
    assert caught(check, check_batch)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_clean(target):
    jobs = list(patchify_jobs(target, dtypes=(torch.bfloat16,)))
    built = [submit_compile(j.kernel, j.signature, j.constants, target, **j.options) for j in jobs]
    for result in built:
        assert_clean(result.result())
    if target.startswith("sm_"):
        accesses = built[0].result().global_ops
        assert {"LDG.E.128", "STG.E.128"} <= accesses.keys() and "LDG.E.U8" not in accesses


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("patch_size", [16, 14])
def test_on_a_gpu(patch_size, dtype):
    images = make_images(patch_size, [(14, 14), (64, 64), (12, 96), (1, 1), (70, 2)], device="cuda")
    rows = check(patch_size, dtype, images=images)
    channels_last = [a.permute(1, 2, 0).contiguous().permute(2, 0, 1) for a in images]
    assert torch.equal(kernel(channels_last, patch_size, IMAGENET, dtype)[0], rows)
    assert torch.equal(
        kernel(images[1].expand(3, -1, -1, -1), patch_size, IMAGENET, dtype)[0],
        kernel([images[1]] * 3, patch_size, IMAGENET, dtype)[0],
    )
