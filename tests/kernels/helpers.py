"""What the tests of several kernels share."""

import pytest
import torch
from torch._dynamo import trace_rules
from torch._dynamo.backends.debugging import aot_eager

from hrvlm_kernels.backends import cpu_driver, interpreted
from tests.numerics import assert_contraction

COMPILED = cpu_driver() is not None  # kernels are compiled and run on ptx_machine: see conftest.py
interpreter_only = pytest.mark.skipif(
    not (interpreted() or COMPILED), reason="kernels on CPU tensors: runs where there is no GPU"
)
# By other tiles than the interpreter's some of them do nothing; what stands for them in compiled
# code are the faults of tests/compiled.
seeded_in_sources = pytest.mark.skipif(COMPILED, reason="bugs seeded for the interpreter's tiles")
DTYPES = (torch.float32, torch.float16)
if COMPILED:  # the interpreter gets it wrong
    DTYPES += (torch.bfloat16,)
_INTS = (torch.int8, torch.int16, torch.int32, torch.int64)


def poison_empty(monkeypatch):
    """Fill the result of torch.empty and its siblings with NaN (ints: their minimum)."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.device.type == "meta" or torch.compiler.is_compiling():
                return out
            if out.dtype.is_floating_point:
                out.detach().fill_(float("nan"))
            elif out.dtype in _INTS:
                out.fill_(torch.iinfo(out.dtype).min)
            return out

        return wrapper

    # torch.compile's table of torch's functions. A process group clears it; were it made anew while
    # these are replaced, no later test could compile the real ones.
    trace_rules.get_torch_obj_rule_map()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def equal_if_interpreted(a, b):
    """Whether two results have equal bits, where the interpreter computed both; else True.

    It computes each element by the same formula whatever the strides, the tiles or the kernel. In
    compiled code these decide the vector width, hence the layout, hence the order of a sum, and
    which products are fused into sums: results then agree by the rules of the numerics only.
    """
    return COMPILED or torch.equal(a, b)


def assert_like_reference(outs, oracles, baselines, packed=None, *, factor=2.0):
    """:func:`assert_contraction` for lists of tensors of any rank; None must meet None."""
    for out, oracle, baseline in zip(outs, oracles, baselines, strict=True):
        if out is None or baseline is None:
            assert out is baseline is None
            continue
        flat = (a.reshape(a.shape[0], -1) for a in (out, oracle, baseline))
        assert_contraction(*flat, packed, factor=factor)


def gradients(run, inputs, cotangent):
    """``run(*leaves)`` and its gradients for the given cotangent, on fresh leaves of `inputs`.

    The leaves keep the strides of `inputs`; None stays None.
    """
    leaves = [None if a is None else a.detach().requires_grad_() for a in inputs]
    out = run(*leaves)
    wanted = [a for a in leaves if a is not None]
    grads = iter(torch.autograd.grad(out, wanted, cotangent.to(out.dtype)))
    return [out.detach(), *(None if a is None else next(grads) for a in leaves)]


def strided_copy(a, *, offset=1):
    """`a` in a larger buffer: other strides, and an address that is not a multiple of 16 bytes."""
    buffer = torch.full((a.numel() * 2 + 64 + offset,), float("nan"), dtype=a.dtype)
    shape = (a.shape[0], -1)
    width = a.reshape(shape).shape[1] if a.numel() else 0
    row = width + 3
    strides, step = [], 1
    for size in reversed(a.shape[1:]):
        strides.insert(0, step)
        step *= size
    assert a.shape[0] * row + offset <= buffer.numel() + row
    view = torch.as_strided(buffer, a.shape, (row, *strides), offset)
    return view.copy_(a)


def far_rows(values, tmp_path, *, stride=2**30):
    """`values` ``[T, ...]`` with rows `stride` elements apart, in a sparse file.

    From row 2 on, offsets are beyond int32; only the pages written take memory or disk.
    """
    size = (values.shape[0] - 1) * stride + values[0].numel()
    flat = torch.from_file(
        str(tmp_path / "far_rows.bin"), shared=True, size=size, dtype=values.dtype
    )
    inner = values[0].contiguous().stride()
    return torch.as_strided(flat, values.shape, (stride, *inner)).copy_(values)


class CountingBackend:
    """The aot_eager backend of torch.compile, counting the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, example_inputs):
        self.graphs += 1
        return aot_eager(module, example_inputs)
