"""Products and the MLP by oneDNN on a CPU, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hrvlm_kernels import cpu_products
from tests.numerics import assert_close, relative_error

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)
TOLERANCE = 2e-6
SHAPES = [(1, 1, 1), (1, 5, 3), (7, 16, 1), (40, 24, 72), (1030, 24, 40)]  # the last: two chunks
NAMES = "x", "up", "up_bias", "down", "bias"


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def parameters(rng, rows, channels, inner, *, biases=True):
    shapes = (rows, channels), (inner, channels), (inner,), (channels, inner), (channels,)
    tensors = [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]
    return tensors if biases else [None if a.ndim == 1 else a for a in tensors]


def linear(x, weight, bias):
    return F.linear(x, weight, bias)


def mlp(x, up, up_bias, down, bias):
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down, bias)


OPS = {
    "linear": (cpu_products.linear, linear, 3),
    "mlp": (cpu_products.mlp, mlp, 5),
}


def exactly(op, inputs, cotangent):
    """The output and gradients of `op` in float64."""
    wide = [None if a is None else a.detach().double().requires_grad_() for a in inputs]
    out = op(*wide)
    leaves = [a for a in wide if a is not None]
    return [out, *torch.autograd.grad(out, leaves, cotangent.double())]


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_output_and_gradients_are_those_of_float64(name, shape, biases, rng):
    op, plain, count = OPS[name]
    inputs = parameters(rng, *shape, biases=biases)[:count]
    assert cpu_products.serves(*inputs)
    out = op(*inputs)
    cotangent = torch.randn(out.shape, generator=rng)
    leaves = [a for a in inputs if a is not None]
    got = [out, *torch.autograd.grad(out, leaves, cotangent)]
    for i, (mine, right) in enumerate(zip(got, exactly(plain, inputs, cotangent), strict=True)):
        assert mine.dtype == torch.float32 and mine.shape == right.shape
        assert_close(f"{name} {i}", mine, right, TOLERANCE)


def test_the_default_dtype_changes_nothing(rng):
    inputs = parameters(rng, 7, 6, 5)
    expected = cpu_products.mlp(*inputs)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        out = cpu_products.mlp(*inputs)
    finally:
        torch.set_default_dtype(before)
    assert out.dtype == torch.float32 and torch.equal(out, expected)


def test_bfloat16_errs_no_more_than_torch(rng):
    inputs = [a.detach().bfloat16().requires_grad_() for a in parameters(rng, 300, 64, 96)[:3]]
    out = cpu_products.linear(*inputs)
    cotangent = torch.randn(out.shape, generator=rng).bfloat16()
    got = [out, *torch.autograd.grad(out, inputs, cotangent)]
    plain = F.linear(*inputs)
    stock = [plain, *torch.autograd.grad(plain, inputs, cotangent)]
    for mine, theirs, right in zip(got, stock, exactly(linear, inputs, cotangent), strict=True):
        assert mine.dtype == torch.bfloat16
        assert relative_error(mine, right) <= 1.1 * relative_error(theirs, right)


@pytest.mark.parametrize("wanted", range(5), ids=NAMES)
def test_only_the_gradient_that_is_wanted_is_made(wanted, rng):
    inputs = [a.detach() for a in parameters(rng, 1030, 24, 40)]
    inputs[wanted].requires_grad_()
    cotangent = torch.randn(1030, 24, generator=rng)
    cpu_products.mlp(*inputs).backward(cotangent)
    assert [a.grad is not None for a in inputs] == [i == wanted for i in range(5)]
    expected = exactly(mlp, inputs, cotangent)[1 + wanted]
    assert_close(NAMES[wanted], inputs[wanted].grad, expected, TOLERANCE)


@pytest.mark.parametrize("name", OPS)
def test_gradients_have_gradients(name, rng):
    op, plain, count = OPS[name]
    inputs = parameters(rng, 9, 6, 7)[:count]

    def second(op, inputs):
        out = op(*inputs).square().sum()
        first = torch.autograd.grad(out, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    wide = [a.detach().double().requires_grad_() for a in inputs]
    for i, (mine, right) in enumerate(zip(second(op, inputs), second(plain, wide), strict=True)):
        assert_close(f"{name} {i}", mine, right, 1e-5)


def test_gradients_with_a_graph_pass_hooks_once_and_follow_no_other_path(rng):
    x, up, up_bias, down, _ = parameters(rng, 9, 6, 7)
    tied = torch.randn(6, generator=rng).requires_grad_()

    def run(op, leaves):
        x, up, up_bias, down, tied = leaves
        up.register_hook(lambda g: g * 0.5)
        rows = x * 2
        rows.retain_grad()
        shift = tied.square()  # of one input made another
        out = op(rows + shift, up, up_bias, down, shift)
        torch.autograd.backward(out.square().sum(), create_graph=True)
        return [rows.grad, *(a.grad for a in leaves)]

    leaves = x, up, up_bias, down, tied
    wide = [a.detach().double().requires_grad_() for a in leaves]
    with pytest.warns(UserWarning, match="create_graph"):
        both = zip(run(cpu_products.mlp, leaves), run(mlp, wide), strict=True)
    for i, (mine, right) in enumerate(both):
        assert_close(str(i), mine, right, 1e-5)


@pytest.mark.parametrize("name", OPS)
def test_many_gradients_are_made_at_once(name, rng):
    op, _, count = OPS[name]
    inputs = parameters(rng, 9, 6, 7)[:count]
    out = op(*inputs)
    cotangents = torch.randn(3, *out.shape, generator=rng)
    one_by_one = [torch.autograd.grad(out, inputs, v, retain_graph=True) for v in cotangents]
    expected = [torch.stack(grads) for grads in zip(*one_by_one, strict=True)]
    options = {"retain_graph": True}
    batched = torch.autograd.grad(out, inputs, cotangents, is_grads_batched=True, **options)
    mapped = torch.vmap(lambda v: torch.autograd.grad(out, inputs, v, **options))(cotangents)
    for got in (batched, mapped):
        for mine, right in zip(got, expected, strict=True):
            assert_close(name, mine, right, TOLERANCE)


LAYOUTS = {
    "cut out": lambda a: torch.cat((a, a, a), 1)[:, a.shape[1] : 2 * a.shape[1]],
    "transposed": lambda a: a.T.contiguous().T,
    "every other row": lambda a: a.repeat_interleave(2, 0)[::2],
    "backwards": lambda a: a.flip(1).contiguous(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_operands_lie_in_memory_as_they_like(name, layout, rng):
    op, plain, count = OPS[name]
    inputs = [a.detach() for a in parameters(rng, 1030, 24, 40)[:count]]
    lie = LAYOUTS[layout]
    inputs = [lie(a).requires_grad_() if a.ndim == 2 else a.requires_grad_() for a in inputs]
    out = op(*inputs)
    got = torch.autograd.grad(out.sum(), inputs, create_graph=True)  # an expanded gradient
    again = torch.autograd.grad(op(*inputs).sum(), inputs)
    expected = exactly(plain, inputs, torch.ones(out.shape))
    for mine, right in zip([out, *got], expected, strict=True):
        assert_close(name, mine, right, 1e-5)
    for mine, right in zip(again, expected[1:], strict=True):
        assert_close(name, mine, right, 1e-5)
    sum(g.square().sum() for g in got).backward()
    assert inputs[1].grad.isfinite().all() and inputs[1].grad.norm() > 0


@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
def test_of_a_product_only_what_its_gradient_needs_is_kept(wanted, rng):
    inputs = [a.detach() for a in parameters(rng, 8, 6, 7)[:3]]
    inputs[wanted].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a) or a, lambda a: a):
        out = cpu_products.linear(*inputs)
    assert [a.shape for a in kept] == [[(7, 6)], [(8, 6)], []][wanted]
    out.sum().backward()
    expected = exactly(linear, inputs, torch.ones(out.shape))[1 + wanted]
    assert_close(str(wanted), inputs[wanted].grad, expected, TOLERANCE)


def test_the_same_graph_may_be_walked_twice_and_checkpointed(rng):
    inputs = parameters(rng, 1030, 24, 40)
    out = cpu_products.mlp(*inputs)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(out.sum(), inputs)
    for reentrant in (False, True):
        out = checkpoint(cpu_products.mlp, *inputs, use_reentrant=reentrant)
        for a in inputs:
            a.grad = None
        out.sum().backward()
        for a, b, c in zip(inputs, first, again, strict=True):
            assert torch.equal(a.grad, b) and torch.equal(b, c)


def test_what_onednn_does_not_serve_is_not_given_to_it(rng):
    x, weight, bias = (a.detach() for a in parameters(rng, 4, 3, 5)[:3])
    assert cpu_products.helps(x, weight, bias) and cpu_products.helps(x, weight, None)
    assert not cpu_products.helps(x.double(), weight.double(), None)
    assert not cpu_products.helps(x, weight.half(), None)
    assert not cpu_products.helps(x[:0], weight, None)
    assert not cpu_products.helps(x.to("meta"), weight, None)
    assert not cpu_products.helps(x[None], weight, bias)
    assert not cpu_products.helps(x, weight.to_sparse_csr(), bias)
    half = x.bfloat16(), weight.bfloat16()
    assert not cpu_products.helps(*half, None)  # torch's own is oneDNN's
    assert (
        cpu_products.helps(*half, bias.bfloat16()) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not cpu_products.helps(x, weight, bias)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not cpu_products.helps(x, weight, bias)
    seen = []
    torch.func.vmap(lambda a: seen.append(cpu_products.helps(a[None], weight, None)) or a)(x)
    assert seen == [False]
    with torch.autograd.forward_ad.dual_level():
        assert not cpu_products.helps(x, weight, bias)


def test_gelu_in_the_epilogue_is_the_exact_one(rng):
    x, weight, bias = (a.detach() for a in parameters(rng, 33, 16, 48)[:3])
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    assert_close("gelu", cpu_products.product(x, weight, bias, gelu=True), expected, TOLERANCE)
