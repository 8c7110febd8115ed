"""linear_gelu's kernel against float64."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.compiled.compiler import TARGETS, assert_clean, submit_compile
from benchmarks.compiled.jobs import linear_jobs
from hrvlm_kernels.ops.linear_gelu import linear_gelu
from hrvlm_kernels.triton_kernels import tile_tables
from tests.kernels.helpers import DTYPES, assert_like_reference, interpreter_only, strided_copy
from tests.kernels.mutations import caught, plant
from tests.numerics import assert_elements


def make_inputs(tokens=21, channels=72, width=40, dtype=torch.float32, *, bias=True, seed=0):
    """x, a weight that makes sums of all sizes of it, and a bias or none."""
    rng = torch.Generator().manual_seed(seed)
    x, weight, b = (
        torch.randn(*size, generator=rng)
        for size in ((tokens, channels), (width, channels), (width,))
    )
    weight *= torch.linspace(0.1, 3, width)[:, None] / channels**0.5
    return [x.to(dtype), weight.to(dtype), b.to(dtype) if bias else None]


def check(*args, layout=lambda a: a, **options):
    inputs = make_inputs(*args, **options)
    given = [None if a is None else layout(a) for a in inputs]
    with torch.no_grad():
        got = linear_gelu(*given, backend="triton")
    exact = linear_gelu(*(None if a is None else a.double() for a in inputs), backend="eager")
    assert got.is_contiguous() and got.dtype == inputs[0].dtype
    assert_like_reference([got], [exact], [linear_gelu(*inputs, backend="eager")])
    return got


def check_gelu(dtype):
    """Of every size, as sums of one product with 1; halves are rounded, and all else is exact."""
    z = torch.cat([torch.linspace(-13.5, 13.5, 501), torch.tensor([-1e4, -60.0, 60.0, 1e4])])
    x = torch.zeros(len(z), 16, dtype=dtype)
    x[:, 3] = z
    weight = torch.zeros(1, 16, dtype=dtype)
    weight[0, 3] = 1
    out = linear_gelu(x, weight, backend="triton")
    exact = F.gelu(x[:, 3:4].double())
    exact = torch.where(x[:, 3:4] < 0, x[:, 3:4].double() * tail(x[:, 3:4]), exact)
    rounding = torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).smallest_normal * rounding
    # 2 ** p(u) is 0 where it would be no normal float32.
    relative, absolute = (2**-22, 2**-21) if dtype == torch.float32 else (6e-5, 13.5 * 2**-126)
    bound = (rounding + relative) * exact.abs() + absolute + smallest
    assert_elements(out, exact, bound)


def tail(z):
    """Phi(z) for z below 0, where the formula of gelu would cancel."""
    return torch.special.log_ndtr(z.double()).exp()


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "channels", "width", "bias"),
    [(1, 1, 1, True), (70, 64, 96, True), (21, 72, 40, False), (33, 40, 65, True)],
)
def test_forward(tokens, channels, width, bias, dtype):
    check(tokens, channels, width, dtype, bias=bias)


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_activation_is_exact_to_its_dtype(dtype):
    check_gelu(dtype)


@interpreter_only
@pytest.mark.parametrize("layout", [strided_copy, lambda a: a.t().contiguous().t()])
def test_any_strides(layout):
    check(5, 40, 33, layout=layout)


@interpreter_only
def test_nan_stays_and_infinities_are_the_limits():
    x = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=torch.float16)[:, None]
    out = linear_gelu(x, torch.ones(1, 1, dtype=torch.float16), backend="triton").flatten()
    assert out[0].isnan() and out[1] == float("inf") and out[2] == 0


@interpreter_only
def test_nothing_to_do():
    with torch.no_grad():
        assert linear_gelu(*make_inputs(0), backend="triton").shape == (0, 40)


@interpreter_only
def test_it_has_no_gradient_and_says_so():
    x, weight, bias = make_inputs()
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="linear_gelu: backend 'triton' can't run: it has"):
        linear_gelu(x, weight, bias, backend="triton")
    assert linear_gelu(x, weight, bias).requires_grad


@interpreter_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[0], w, b), r"x must be \[T, C\], got \(72,\)"),
        (lambda x, w, b: (x, w[:, 1:], b), r"weight must be \[F, C\] with C = 72"),
        (
            lambda x, w, b: (x, w.half(), b),
            "weight must be torch.float32 on cpu, got",
        ),
        (lambda x, w, b: (x, w, b[1:]), r"bias must be \[40\], got \(39,\)"),
        (lambda x, w, b: (x, w, b.half()), "bias must be torch.float32"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_gelu(*change(*make_inputs()), backend="triton")


@interpreter_only
def test_opcheck(monkeypatch):
    monkeypatch.undo()  # opcheck compares what empty tensors hold
    torch.library.opcheck(torch.ops.hrvlm_kernels.linear_gelu, make_inputs(3, 8, 5))


BUGS = {
    "another slope": ("tl.erf(z * SQRT_HALF)", "tl.erf(z * 0.7)"),
    "bias forgotten": ("z += tl.load(bias", "z += 0 * tl.load(bias"),
    "last row missing": ("m_t, m_f = i_t < T", "m_t, m_f = i_t < T - 1"),
    "last column missing": ("i_f < F\n    # Rows", "i_f < F - 1\n    # Rows"),
    "last channels missing": ("range(0, C, BK)", "range(0, C - BK, BK)"),
}  # fmt: skip


@interpreter_only
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "linear_gelu", *BUGS[bug])
    assert caught(lambda: [check(33, 72, 40), check(70, 64, 33)])


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_clean(target):
    """Also linear_swiglu's and linear_rope_2d's."""
    jobs = list(linear_jobs(target))
    assert len(jobs) >= 3 and not tile_tables.LINEAR_GELU
    built = [submit_compile(j.kernel, j.signature, j.constants, target, **j.options) for j in jobs]
    for job, result in zip(jobs, built, strict=True):
        assert_clean(result.result(), tensor_core=job.tensor_core)
