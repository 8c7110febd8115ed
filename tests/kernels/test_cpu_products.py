"""Products and the MLP by oneDNN on a CPU, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hrvlm_kernels import cpu_products
from tests.numerics import assert_close

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
    assert cpu_products.helps(*inputs)
    out = op(*inputs)
    cotangent = torch.randn(out.shape, generator=rng)
    leaves = [a for a in inputs if a is not None]
    got = [out, *torch.autograd.grad(out, leaves, cotangent)]
    for i, (mine, right) in enumerate(zip(got, exactly(plain, inputs, cotangent), strict=True)):
        assert mine.dtype == torch.float32 and mine.shape == right.shape
        assert_close(f"{name} {i}", mine, right, TOLERANCE)


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


@pytest.mark.parametrize("name", OPS)
def test_operands_lie_in_memory_as_they_like(name, rng):
    op, plain, count = OPS[name]
    inputs = [a.detach() for a in parameters(rng, 20, 8, 8)[:count]]
    inputs[0] = torch.randn(20, 24, generator=rng)[:, 8:16]  # cut out
    inputs[1] = inputs[1].T  # transposed
    if name == "mlp":
        inputs[3] = torch.randn(16, 8, generator=rng)[::2]
    for a in inputs:
        a.requires_grad_()
    out = op(*inputs)
    got = torch.autograd.grad(out.sum(), inputs)  # the gradient of a sum is expanded
    expected = exactly(plain, inputs, torch.ones(out.shape))
    for mine, right in zip([out, *got], expected, strict=True):
        assert_close(name, mine, right, TOLERANCE)


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
    assert not cpu_products.helps(x.double(), weight.double())
    assert not cpu_products.helps(x, weight.half())
    assert not cpu_products.helps(x[:0], weight)
    assert not cpu_products.helps(x.to("meta"), weight)
    assert not cpu_products.helps(x.bfloat16(), weight.bfloat16())  # torch's own is oneDNN's
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not cpu_products.helps(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not cpu_products.helps(x, weight)
    seen = []
    torch.func.vmap(lambda a: seen.append(cpu_products.helps(a[None], weight)) or a)(x)
    assert seen == [False]
    with torch.autograd.forward_ad.dual_level():
        assert not cpu_products.helps(x, weight)


def test_gelu_in_the_epilogue_is_the_exact_one(rng):
    x, weight, bias = (a.detach() for a in parameters(rng, 33, 16, 48)[:3])
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    assert_close("gelu", cpu_products.product(x, weight, bias, gelu=True), expected, TOLERANCE)
