"""Calls that are made again start the same kernels with the same arguments as by Triton's way."""

import contextlib
import gc
import threading
import weakref
from copy import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import LazyDict

from pretended_gpu import host_time, null_driver

DRIVER = null_driver.install()

from hrvlm_kernels import PackedGrids, replay, residual_layer_norm, rope_2d_, swiglu
from hrvlm_kernels import varlen_attention as attend
from hrvlm_kernels.ops.bias_gelu import bias_gelu
from hrvlm_kernels.ops.linear_residual_layer_norm import (
    linear_residual_layer_norm,
    shifted_layer_norm,
)
from hrvlm_kernels.ops.rope_2d import rope_table
from hrvlm_kernels.qkv_attention import qkv_attention
from hrvlm_kernels.triton_kernels import bound

LAYOUTS = {
    "short": [(14, 14), (3, 5)],
    "long": [(20, 20)],
    "mixed": [(14, 14), (30, 17), (2, 2)],
}


@pytest.fixture(autouse=True)
def nothing_seen():
    replay.forget()


def leaves(tree):
    if isinstance(tree, (tuple, list)):
        return [leaf for part in tree for leaf in leaves(part)]
    return [tree] if isinstance(tree, torch.Tensor) else []


def launches_of(call, inputs):
    """What `call` launches, addresses by what they lie in, what it returns, and its replays."""
    seen, again = [], []

    def noting(launch):
        if isinstance(launch, nvidia.CudaLauncher):  # since Triton 3.8; `note` sees its call
            return launch
        return lambda *passed: seen.append((launch, passed))

    def note(self, x, y, z, stream, *args):
        if stream is replay.STREAM:  # it is asked what it would do
            return LAUNCH(self, x, y, z, stream, *args)
        twin = copy(self)
        twin.launch = noting(self.launch)
        LAUNCH(twin, x, y, z, stream, *args)

    kept = []  # so that an address stands for one tensor

    def keeping(make):
        return lambda *args, **kwargs: kept.append(make(*args, **kwargs)) or kept[-1]

    def replaying(self, *args):
        again.append(self)
        twin = copy(self)
        twin.launches = [(noting(run), pick) for run, pick in self.launches]
        twin.results = [(keeping(allocate), layout) for allocate, layout in self.results]
        if self.own:
            allocate, layout = self.allocate_own
            twin.allocate_own = keeping(allocate), layout
        return REPLAY(twin, *args)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(nvidia.CudaLauncher, "__call__", note))
        stack.enter_context(mock.patch.object(replay._Replay, "__call__", replaying))
        for name in ("empty", "empty_like", "empty_strided"):
            stack.enter_context(mock.patch.object(torch, name, keeping(getattr(torch, name))))
        stack.enter_context(mock.patch.object(F, "linear", keeping(F.linear)))
        result = call(*inputs)
    buffers = [
        (f"{name} {i}", a.untyped_storage().data_ptr(), a.untyped_storage().nbytes())
        for name, part in (("argument", inputs), ("result", leaves(result)))
        for i, a in enumerate(leaves(part))
    ]
    own = {}

    def named(a):
        if isinstance(a, (LazyDict, knobs.HookChain)):  # for hooks, of which there are none
            a = None
        if isinstance(a, tuple):
            return tuple(map(named, a))
        if hasattr(a, "block_shape"):
            address = named(a.base)
            return address, [*a.shape], [*a.strides], [*a.block_shape], a.padding
        is_address = isinstance(a, int) and not isinstance(a, bool) and a > 2**32
        if not is_address and not isinstance(a, torch.Tensor) and not hasattr(a, "data_ptr"):
            return type(a), a
        address = a if is_address else a.data_ptr()
        if address == 0:
            return int, 0
        for name, start, size in buffers:
            if start <= address < start + size:
                return name, address - start
        return own.setdefault(address, f"its own {len(own)}")

    launches = [(launch, [named(a) for a in args]) for launch, args in seen]
    return launches, result, len(again)


def compare(call, make, *, replays=1, times=4):
    """Of `times` calls with new tensors each, in both ways; how many ops the last ones replay."""
    for i in range(times):
        inputs = make()
        with host_time.by_triton():
            expected, results, _ = launches_of(call, inputs)
        found, again_results, times_replayed = launches_of(call, inputs)
        assert found == expected
        assert [describe(a) for a in leaves(again_results)] == [
            describe(a) for a in leaves(results)
        ]
        if replays is not None:
            assert times_replayed == (replays if i >= 2 else 0), i


REPLAY, LAUNCH = replay._Replay.__call__, nvidia.CudaLauncher.__call__


def describe(a):
    return a.dtype, a.shape, a.stride(), a.device, a.requires_grad


def rows(tokens, width, dtype=torch.bfloat16):
    return torch.randn(tokens, width).to(dtype)


def attention_inputs(layout, heads=2, kv_heads=2, head_dim=64, dtype=torch.bfloat16, rope="table"):
    packed = PackedGrids.from_grids(LAYOUTS[layout], num_prefix_tokens=5)
    n = packed.total_tokens
    if heads == kv_heads:
        q, k, v = torch.randn(n, 3, heads, head_dim).to(dtype).unbind(1)
    else:
        q = torch.randn(n, heads, head_dim).to(dtype)
        k, v = torch.randn(n, 2, kv_heads, head_dim).to(dtype).unbind(1)
    if rope is None:
        return q, k, v, packed, None
    frequencies = torch.rand(head_dim // 4)
    positions = packed.coords, frequencies
    if rope == "table":
        positions = *positions, rope_table(*positions)
    return q, k, v, packed, positions


def attention(q, k, v, packed, rope):
    return attend(q, k, v, packed, rope=rope, backend="triton")


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope": "frequencies"},
        {"rope": None},
        {"kv_heads": 1},
        {"dtype": torch.float32},
        {"head_dim": 72},
    ],
    ids=str,
)
def test_attention(layout, options):
    compare(attention, lambda: attention_inputs(layout, **options))


@torch.no_grad()
def test_rows():
    compare(gated, lambda: (rows(9, 128), rows(9, 256)[:, 128:]))
    vectors = [torch.rand(64) for _ in range(3)]
    compare(
        lambda *a: residual_layer_norm(*a, backend="triton"),
        lambda: (rows(9, 64), rows(9, 64), *vectors),
    )
    for shift in (None, torch.rand(64)):
        compare(
            lambda x, *w, shift=shift: shifted_layer_norm(x, shift, *w, 1e-5),
            lambda: (rows(9, 64), *vectors[:2]),
        )


def with_gradients(function):
    """As a call: its outputs, and the gradients of all inputs that want one."""

    def call(*inputs):
        outputs = leaves(function(*inputs))
        wanted = [a for a in leaves(inputs) if a.requires_grad]
        cotangents = [torch.ones_like(a) for a in outputs]
        return outputs, torch.autograd.grad(outputs, wanted, cotangents)

    return call


def wanting_gradients(*tensors):
    return tuple(a.detach().clone().requires_grad_() for a in tensors)


def test_gradients():
    vectors = [torch.rand(64).bfloat16() for _ in range(4)]
    compare(
        with_gradients(lambda *a: linear_residual_layer_norm(*a, 1e-5)),
        lambda: wanting_gradients(rows(9, 64), rows(9, 128), rows(64, 128), *vectors),
        replays=3,
    )
    compare(
        with_gradients(bias_gelu),
        lambda: wanting_gradients(rows(9, 64), torch.rand(64).bfloat16()),
        replays=2,
    )
    compare(
        with_gradients(gated),
        lambda: wanting_gradients(rows(9, 64), rows(9, 64)),
        replays=2,
    )


@pytest.mark.parametrize("layout", ["short", "mixed"])
def test_gradients_of_attention(layout):
    packed = PackedGrids.from_grids(LAYOUTS[layout], num_prefix_tokens=5)
    rope = packed.coords, torch.rand(16)

    def joined(x, weight, bias):
        return qkv_attention(x, weight, (None, None, None), bias, packed, rope, 2)

    def make():
        tensors = wanting_gradients(rows(packed.total_tokens, 128), rows(384, 128))
        return *tensors, torch.rand(384).bfloat16()

    compare(
        with_gradients(lambda q, k, v: attention(q, k, v, packed, rope)),
        lambda: wanting_gradients(*attention_inputs(layout, rope=None)[:3]),
        replays=2,
    )
    compare(with_gradients(joined), make, replays=3)


def gated(gate, up):
    return swiglu(gate, up, backend="triton")


def test_what_inductor_calls():
    """The op by torch's dispatcher, which its code goes through."""
    op = torch.ops.hrvlm_kernels.swiglu.default
    compare(op, lambda: (rows(9, 64), rows(9, 64)))
    with torch.no_grad():
        compare(op, lambda: (rows(9, 128), rows(9, 256)[:, 128:]))
    compare(with_gradients(op), lambda: wanting_gradients(rows(9, 64), rows(9, 64)), replays=2)


@torch.no_grad()
def test_what_decides_is_told_apart():
    """Strides, dtypes, shapes and alignment, one after the other, and each again."""
    a, b = rows(9, 130), rows(9, 130)
    cases = [
        (a[:8, :64], b[:8, :64]),  # rows of 130 elements
        (a[:8, :64], a[:8, :64]),  # one tensor twice
        (a[1:9, :64], b[:8, :64]),  # unaligned
        (rows(8, 64), rows(8, 64)),
        (rows(64, 8).T, rows(8, 64)),
        (rows(8, 64, torch.float32), rows(8, 64, torch.float32)),
        (rows(8, 128), rows(8, 128)),
        (rows(16, 64), rows(16, 64)),
    ]
    for _ in range(4):
        for case in cases:
            compare(gated, lambda case=case: case, replays=None, times=1)


@torch.no_grad()
def test_one_tensor_twice_when_watched_and_two_afterwards():
    one = rows(8, 64)
    for _ in range(3):
        gated(one, one)
    compare(gated, lambda: (rows(8, 64), rows(8, 64)), replays=None)


@torch.no_grad()
def test_copies_are_made_again():
    """Heads whose elements do not lie side by side are copied: such a call is never replayed."""
    packed = PackedGrids.from_grids(LAYOUTS["short"], num_prefix_tokens=5)

    def make():
        heads = [torch.randn(packed.total_tokens, 64, 2).bfloat16().mT for _ in range(3)]
        return *heads, packed, None

    compare(attention, make, replays=0)


@torch.no_grad()
def test_what_was_refused_before_is_refused_after_many_good_calls():
    packed = PackedGrids.from_grids(LAYOUTS["short"], num_prefix_tokens=5)
    other = PackedGrids.from_grids(LAYOUTS["long"], num_prefix_tokens=5)
    q, k, v, _, rope = attention_inputs("short")
    gate = rows(8, 64)
    for _ in range(4):
        attention(q, k, v, packed, rope)
        gated(gate, rows(8, 64))
    with pytest.raises(ValueError, match="one dtype"):
        attention(q, k, v.float(), packed, rope)
    with pytest.raises(ValueError, match="q has 221 rows"):
        attention(q, k, v, other, rope)
    with pytest.raises(ValueError, match="table must be float32"):
        attention(q, k, v, packed, (*rope[:2], rope[2][:, :32]))
    with pytest.raises(ValueError, match="inv_freq requires grad"):
        attention(q, k, v, packed, (rope[0], rope[1].clone().requires_grad_()))
    with pytest.raises(ValueError, match="device"):
        gated(gate, gate.to("meta"))
    with pytest.raises(ValueError, match="backend must be"):
        swiglu(gate, gate, backend="tritom")


def replays_of(call):
    with mock.patch.object(replay._Replay, "__call__", autospec=True, side_effect=REPLAY) as again:
        result = call()
    return again.call_count, result


def test_torch_and_profilers_see_what_they_want_to_see():
    q, k, v, packed, rope = attention_inputs("short", dtype=torch.float32)
    gate, up = rows(8, 64), rows(8, 64)
    with torch.no_grad():
        for _ in range(3):
            gated(gate, up)
            attention(q, k, v, packed, rope[:2])
        assert replays_of(lambda: gated(gate, up))[0] == 1
        with torch.autocast("cpu", torch.bfloat16):  # the kernels of another dtype
            times, out = replays_of(lambda: attention(q, k, v, packed, rope[:2]))
        assert (times, out.dtype) == (0, torch.bfloat16)
        launches = []
        knobs.runtime.launch_enter_hook.add(launches.append)
        try:
            assert replays_of(lambda: gated(gate, up))[0] == 0
        finally:
            knobs.runtime.launch_enter_hook.remove(launches.append)
        assert len(launches) == 1
        with torch.profiler.profile(acc_events=True) as profile:
            gated(gate, up)
        assert any(event.key == "hrvlm_kernels::swiglu" for event in profile.key_averages())
    leaf = gate.clone().requires_grad_()
    assert gated(leaf, up).grad_fn is not None
    with torch.inference_mode():
        assert gated(gate, up).is_inference()
    assert not gated(gate, up).is_inference()


@torch.no_grad()
def test_modes_and_transforms_see_the_op():
    gate, up = rows(8, 64, torch.float32), rows(8, 64, torch.float32)
    for _ in range(3):
        gated(gate, up)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        assert replays_of(lambda: gated(gate, up))[0] == 0
    assert torch.ops.hrvlm_kernels.swiglu.default in seen
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda a: gated(a, up).sum())(gate)
    times, traced = replays_of(lambda: torch.jit.trace(gated, (gate, up), check_trace=False))
    assert times == 0 and "hrvlm_kernels::swiglu" in str(traced.graph)
    assert replays_of(lambda: gated(gate, up))[0] == 1


@pytest.mark.parametrize("calls", [0, 1, 4])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_traced_graphs_have_the_op(calls, recorded, tracing):
    """However often it was called before: torch's own modes are no tensor's business."""
    gate, up = rows(8, 64), rows(8, 64)
    gate.requires_grad_(recorded)
    for _ in range(calls):
        gated(gate, up)
    traced = make_fx(
        lambda x: x + gated(gate, up), tracing_mode=tracing, _allow_non_fake_inputs=True
    )
    times, graph = replays_of(lambda: traced(rows(8, 64)))
    assert times == 0
    assert [node.target for node in graph.graph.nodes if "swiglu" in str(node.target)]


@torch.no_grad()
def test_fake_tensors_launch_nothing():
    gate, up = rows(8, 64), rows(8, 64)
    for _ in range(4):
        gated(gate, up)
    launches = DRIVER.launches()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(gated(gate, up), FakeTensor)
    assert DRIVER.launches() == launches


@torch.no_grad()
def test_one_tensor_twice_puts_nothing_out():
    gate, up = rows(8, 64), rows(8, 64)
    for _ in range(3):
        gated(gate, up)
    for _ in range(20):
        gated(gate, gate)
    assert replays_of(lambda: gated(gate, up))[0] == 1


@torch.no_grad()
def test_rotation_in_place_counts_a_version():
    q, k, _, _, rope = attention_inputs("short")
    for i in range(4):
        before, launches = q._version, DRIVER.launches()
        times, _ = replays_of(lambda: rope_2d_(q, k, *rope[:2], backend="triton"))
        assert (times, DRIVER.launches() - launches) == (int(i > 1), 1)
        assert q._version > before


@torch.no_grad()
def test_nothing_is_kept_in_memory():
    def run():
        q, k, v, packed, rope = attention_inputs("long", rope="frequencies")
        return weakref.ref(v), weakref.ref(attention(q, k, v, packed, rope))

    def run_with_gradient():
        x = rows(9, 64).requires_grad_()
        with torch.enable_grad():
            out = bias_gelu(x, torch.ones(64).bfloat16())
        out.backward(torch.ones_like(out))
        return weakref.ref(x), weakref.ref(out)

    kept = [run() for _ in range(4)] + [run_with_gradient() for _ in range(4)]
    gc.collect()
    assert not any(a() is not None for pair in kept for a in pair)


def test_what_a_launcher_calls():
    class Launcher:
        def __init__(self, *more):
            self.launch, self.more = list.append, more

        def __call__(self, *args):
            self.launch(*args, None, False, *self.more)

    args = (1, replay.STREAM, object())
    simple, with_memory = Launcher(), Launcher(object())
    assert bound._inside(simple, args) == (list.append, (*args, None, False))
    assert bound._inside(with_memory, args) == (with_memory, args)
    assert bound._inside(pytest.fail, args) == (pytest.fail, args)


@torch.no_grad()
def test_what_one_thread_watches_is_its_own():
    gate, up = rows(8, 64), rows(8, 64)
    gated(gate, up)
    started, go = threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        started.set()
        assert go.wait(60)
        return EMPTY(*args, **kwargs)

    with mock.patch.object(torch, "empty", slow):
        thread = threading.Thread(target=gated, args=(gate, up))
        thread.start()
        assert started.wait(60)
    shifted_layer_norm(gate, None, torch.ones(64), None, 1e-5)
    go.set()
    thread.join()
    compare(gated, lambda: (rows(8, 64), rows(8, 64)), replays=None)
    assert replays_of(lambda: gated(gate, up))[0] == 1


EMPTY = torch.empty


@torch.no_grad()
def test_a_view_is_no_result_to_replay():
    flattened = replay.replayed(lambda *a: attention(*a).flatten(1))
    compare(flattened, lambda: attention_inputs("short"), replays=None)
    assert flattened(*attention_inputs("short")).ndim == 2


def test_torch_compile_sees_one_op_for_all_sizes():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(gated, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (8, 12, 40):
        gate, up = rows(tokens, 64), rows(tokens, 64)
        assert replays_of(lambda gate=gate, up=up: compiled(gate, up))[0] == 0
    assert len(graphs) == 1
    assert [str(n.target) for n in graphs[0].graph.nodes if "swiglu" in n.name] == [
        "hrvlm_kernels.swiglu"
    ]
