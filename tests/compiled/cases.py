"""What runs on ptx_machine: every op, dtype and kind of configuration, forward and backward.

A case is the check of the op's own test file, by the same rules, on the tiles that the tables
choose for the chip. `core` cases run in ``make test``, all of them in ``make compiled``.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
import triton

import ptx_machine
from hrvlm_kernels import PackedGrids, backends, pixel_shuffle_linear, reference
from hrvlm_kernels.ops.rope_2d import rope_2d, rope_2d_
from hrvlm_kernels.triton_kernels import launch, linear_gelu, linear_rope_2d, linear_swiglu
from hrvlm_kernels.triton_kernels import pixel_shuffle_linear as shuffle_forward
from hrvlm_kernels.triton_kernels import pixel_shuffle_linear_backward as shuffle_backward
from hrvlm_kernels.triton_kernels import varlen_attention as forward
from hrvlm_kernels.triton_kernels import varlen_attention_backward as backward
from ptx_machine.global_memory import IN_PLACE
from tests import numerics
from tests.kernels import attention_cases as attention
from tests.kernels import test_bias_gelu as gelu
from tests.kernels import test_layer_norm_pixel_shuffle as norm
from tests.kernels import test_linear_gelu as product_gelu
from tests.kernels import test_linear_residual_layer_norm as connection
from tests.kernels import test_linear_rope_2d as product_rope
from tests.kernels import test_linear_swiglu as product_swiglu
from tests.kernels import test_normalize_patchify as patchify
from tests.kernels import test_pixel_shuffle_linear as shuffle
from tests.kernels import test_qkv_attention as qkv
from tests.kernels import test_residual_layer_norm as residual
from tests.kernels import test_rope_2d as rope
from tests.kernels import test_same_bits as same_bits
from tests.kernels import test_swiglu as gated
from tests.kernels.helpers import strided_copy

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
BOTH = (80, 90)  # chips
TILES = ("first", "fallback")
LENGTHS = (1, 5, 0, 63, 64, 65, 127, 128, 129, 300)  # 300: three blocks of 128 keys
# Ends of segments at every element of a tile of 64. A thread of a tensor core holds two columns of
# every eight, so beyond 64 two ends of every eight try all masks of wider tiles: 256 keys where k
# is rotated in the kernel for short images, else 128.
EVERY_END = (*range(1, 65), *(n + k for n in range(64, 128, 8) for k in (0, 1)))
WIDE_ENDS = tuple(n + k for n in range(128, 256, 8) for k in (0, 1))


@dataclass(frozen=True)
class Case:
    """One row of docs/compiled.md."""

    op: str
    dtype: str
    configuration: str
    run: Callable[[], object]
    core: tuple[int, ...] = ()  # chips for which it is run in `make test`

    @property
    def name(self) -> str:
        return f"{self.op}-{self.dtype}-{self.configuration}".replace(" ", "_")


def selected(chip: int, more: Iterable[Case]) -> list[Case]:
    """The cases of a chip, and some more: the core, or all with COMPILED=all."""
    everything = os.environ.get("COMPILED") == "all"
    return [case for case in (*all_cases(), *more) if everything or chip in case.core]


def all_cases() -> Iterator[Case]:
    for label, dtype in DTYPES.items():
        yield from _elementwise(label, dtype)
        yield from _products(label, dtype)
        yield from _projection(label, dtype)
        yield from _attention(label, dtype)
    yield from _layouts()


def _elementwise(label: str, dtype: torch.dtype) -> Iterator[Case]:
    def case(op, configuration, *runs, core=()):
        core = core if dtype == BF16 else ()
        return Case(op, label, configuration, lambda: [run() for run in runs], core)

    yield case(
        "swiglu", "F=1100, 2048",
        lambda: gated.check(5, 1100, dtype), lambda: gated.check(3, 2048, dtype), core=(80,),
    )  # fmt: skip
    yield case(
        "residual_layer_norm", "C=48, 600",
        lambda: residual.check(37, 48, dtype), lambda: residual.check(33, 600, dtype), core=(80,),
    )  # fmt: skip
    yield case(
        "residual_layer_norm", "C=1024, 4096",
        lambda: residual.check(9, 1024, dtype), lambda: residual.check(7, 4096, dtype),
    )  # fmt: skip
    yield case(
        "residual_layer_norm", "C=48, several blocks per program",
        few_multiprocessors(lambda: residual.check(70, 48, dtype)), core=(80,),
    )  # fmt: skip
    yield case(
        "linear_residual_layer_norm", "C=48 of 40, 600 of 300",
        lambda: connection.check(37, 40, 48, dtype), lambda: connection.check(9, 300, 600, dtype),
        lambda: connection.check_shifted(9, 600, dtype), core=(90,),
    )  # fmt: skip
    yield case(
        "linear_residual_layer_norm", "C=48, several blocks per program",
        few_multiprocessors(lambda: connection.check(70, 40, 48, dtype)), core=(80,),
    )  # fmt: skip
    yield case(
        "bias_gelu", "F=48, 300, 2049",
        *(lambda f=f: gelu.check(21, f, dtype) for f in (48, 300, 2049)), core=(80,),
    )  # fmt: skip
    yield case(
        "bias_gelu", "several blocks per program",
        few_multiprocessors(lambda: gelu.check(100, 300, dtype)), core=(90,),
    )  # fmt: skip
    yield case(
        "qkv_attention", "D=64, and 20 with rotations in passes of their own",
        lambda: qkv.check(2, 64, dtype), lambda: qkv.check(2, 20, dtype), core=BOTH,
    )  # fmt: skip
    yield case(
        "qkv_attention", "D=64, and 20, rotated in the product",
        *(lambda d=d: qkv.check(2, d, dtype, backend="triton") for d in (64, 20)), core=(90,),
    )  # fmt: skip
    yield case(
        "normalize_patchify", "patches of 16, 14, 1",
        *(lambda p=p: patchify.check(p, dtype) for p in (16, 14, 1)), core=(90,),
    )  # fmt: skip
    for head_dim in (32, 64, 72, 80, 96, 128):
        yield case(
            "rope_2d", f"D={head_dim}",
            lambda d=head_dim: rope.check_forward(d, dtype),
            lambda d=head_dim: rope.check_backward(d, dtype), core=BOTH if head_dim == 80 else (),
        )  # fmt: skip
    for factor, channels in ((2, 48), (4, 384), (2, 1024), (1, 4096)):
        yield case(
            "layer_norm_pixel_shuffle", f"C={channels}, factor {factor}",
            lambda f=factor, c=channels: norm.check_all(f, c, dtype),
            core=BOTH if channels == 48 else (),
        )  # fmt: skip
    yield case(
        "layer_norm_pixel_shuffle", "C=48, several blocks per program",
        few_multiprocessors(lambda: norm.check_all(2, 48, dtype)), core=(90,),
    )  # fmt: skip


def _products(label: str, dtype: torch.dtype) -> Iterator[Case]:
    for op, check in (("linear_gelu", product_gelu.check), ("linear_swiglu", product_swiglu.check)):
        for tiles in TILES:

            def run(check=check, tiles=tiles):
                with projection_tiles(tiles):
                    check(150, 128, 72, dtype)
                    check(33, 72, 130, dtype, bias=False)

            core = BOTH if (dtype, tiles) == (BF16, "first") else ()
            yield Case(op, label, f"128 to 72, 72 to 130, {tiles} tiles", run, core)
        strided = partial(check, 21, 48, 33, dtype, layout=strided_copy)
        yield Case(op, label, "any strides", strided)
    for tiles in TILES:

        def rotated(tiles=tiles):
            with projection_tiles(tiles):
                product_rope.check(150, 128, 1, 64, dtype, table=True)
                product_rope.check(33, 72, 1, 80, dtype, bias=False)

        core = BOTH if (dtype, tiles) == (BF16, "first") else ()
        name = f"D=64 of 128, 80 of 72, {tiles} tiles"
        yield Case("linear_rope_2d", label, name, rotated, core)
    yield Case("linear_rope_2d", label, "D=32, 128 and 4, any strides", lambda: [
        product_rope.check(21, 48, heads, d, dtype, layout=product_rope.any_strides)
        for heads, d in ((3, 32), (1, 128), (3, 4))
    ])  # fmt: skip
    exact = partial(product_gelu.check_gelu, dtype)
    yield Case("linear_gelu", label, "GELU alone", exact, (90,) if dtype == BF16 else ())


def _projection(label: str, dtype: torch.dtype) -> Iterator[Case]:
    for tiles in ("first", "fallback"):
        for factor, channels, features in ((2, 48, 33), (2, 64, 136), (4, 32, 130)):

            def run(sizes=(factor, channels, features), tiles=tiles):
                with projection_tiles(tiles):
                    shuffle.check_all(*sizes, dtype)

            sizes = f"{factor}x{factor}x{channels} to {features}, {tiles} tiles"
            core = BOTH if (dtype, tiles, channels) == (BF16, "first", 64) else ()
            yield Case("pixel_shuffle_linear", label, sizes, run, core)
    for parts in (2, 5):  # tiles of their own on sm_90
        name = f"sums cut into {parts} parts"
        core = (90,) if (dtype, parts) == (BF16, 2) else ()
        run = partial(check_parts, parts, dtype)
        yield Case("pixel_shuffle_linear", label, name, run, core)
    if dtype == FP32:
        yield Case("pixel_shuffle_linear", "tf32", "2x2x64 to 72", check_tf32)


@dataclass(frozen=True)
class Attention:
    """How attention runs; the tensors of all are slices of one packed qkv with two heads."""

    head_dim: int
    rope: bool = False
    tiles: str = "first"

    def __str__(self) -> str:
        return f"D={self.head_dim}{', RoPE' if self.rope else ''}, {self.tiles} tiles"

    def case(self, lengths, dtype, **options) -> attention.Case:
        options = {"heads": 2, "head_dim": self.head_dim, "rope": self.rope} | options
        return attention.make_case(lengths, dtype=dtype, **options)

    def check(self, case: attention.Case) -> None:
        with attention_tiles(self.tiles):
            attention.check_kernel(case)

    def results(self, case: attention.Case) -> list[torch.Tensor]:
        return attention.kernel_results(case)

    def check_ends(self, dtype, run=None, *, beyond=0, **options) -> None:
        """Every end, where a key past it would win, and a segment of one NaN token behind each.

        `beyond` tokens more, a multiple of 128, are in each segment.

        What one row or key too many does shows either way: in the scores, or as NaN.
        """
        ends = EVERY_END + WIDE_ENDS if self.rope and not beyond else EVERY_END
        ends = tuple(beyond + n for n in ends)
        case = attention.below_zero(self.case(ends, dtype, **options))
        lengths = [length for n in ends for length in (n, 1)]
        packed = PackedGrids.from_lengths(lengths)
        kept = torch.ones(packed.total_tokens, dtype=torch.bool)
        for segment in packed.split(kept)[1::2]:
            segment.fill_(False)

        def spread(a):
            out = torch.full((len(kept), *a.shape[1:]), float("nan"), dtype=a.dtype)
            out[kept] = a
            return out

        tensors = {name: spread(getattr(case, name)) for name in "qkvg"}
        if case.rope is not None:
            tensors["rope"] = torch.zeros(len(kept), 2), case.rope[1]
        with attention_tiles(self.tiles):
            found = (run or self.results)(replace(case, packed=packed, **tensors))
        attention.check(case, [a[kept] for a in found], attention.NAMES[: len(found)])


HEAD_DIMS = (32, 64, 72, 80, 96, 128)
# The code for float16 differs from that for bfloat16 in the types of its products only, and the
# tables have a single row for float32.
WAYS = {
    BF16: [
        *(Attention(d, r, t) for d in HEAD_DIMS for r in (False, True) for t in TILES),
        *(Attention(128, r, "second") for r in (False, True)),  # of three
    ],
    FP16: [
        *(Attention(d, r) for d in HEAD_DIMS for r in (False, True)),
        *(Attention(d, r, "fallback") for d in (32, 64, 128) for r in (False, True)),
    ],
    FP32: [Attention(d, r) for d in HEAD_DIMS for r in (False, True)],
}
# Those whose masks are tried at every end of a segment.
MASKED = {
    BF16: [way for way in WAYS[BF16] if way.head_dim in (32, 64, 80)],
    FP16: [Attention(32), Attention(32, True)],
    FP32: [Attention(32), Attention(32, True)],
}
CORE = {
    Attention(64): (90,),  # on sm_80 CORE_MASKED runs the same kernels
    Attention(64, True): (80,),  # on sm_90 the case with grouped heads does
    Attention(64, False, "fallback"): (90,),
    Attention(80): (80,),
    Attention(128, True): (90,),
}
CORE_MASKED = {Attention(64): BOTH}


def _attention(label: str, dtype: torch.dtype) -> Iterator[Case]:
    def case(name, run, core=()):
        return Case("varlen_attention", label, name, run, core if dtype == BF16 else ())

    for way in WAYS[dtype]:
        yield case(str(way), lambda way=way: way.check(way.case(LENGTHS, dtype)), CORE.get(way, ()))
    for way in MASKED[dtype]:
        yield case(
            f"{way}, ends everywhere, scores below 0, NaN behind each",
            lambda way=way: way.check_ends(dtype),
            CORE_MASKED.get(way, ()),
        )
    grouped = Attention(64, True)
    yield case(
        f"{grouped}, 4 heads of q on 2 of k",
        lambda: grouped.check(grouped.case((65, 3, 300), dtype, heads=4, kv_heads=2)),
        (90,),
    )
    longer = Attention(64, True)
    yield case(
        f"{longer}, every end beyond 256 tokens",
        lambda: longer.check_ends(dtype, beyond=256, heads=1),
        (90,),
    )
    negative = Attention(64)
    yield case(
        f"{negative}, negative scale",
        lambda: negative.check(negative.case((65, 129), dtype, scale=-0.3)),
    )


def _layouts() -> Iterator[Case]:
    """Tensors that are not aligned, NaN next door, and heads that no vector fits."""
    for label, head_dims in (("bf16", (64, 80, 128)), ("fp16", (64,))):
        dtype = DTYPES[label]
        for d in head_dims:
            for what, check, core in (
                ("unaligned tensors", check_unaligned, (80,)),
                ("any strides", check_strided, ()),
                ("NaN in the neighbours", check_neighbours, (90,)),
            ):
                yield Case(
                    "varlen_attention", label, f"D={d}, {what}",
                    lambda check=check, d=d, dtype=dtype: check(d, dtype),
                    core if (label, d) == ("bf16", 64) else (),
                )  # fmt: skip
    for label, dtype in DTYPES.items():
        for op in same_bits.OPS:
            core = BOTH if label == "bf16" and op == "varlen_attention with RoPE" else ()
            name, _, way = op.partition(" ")
            yield Case(
                name, label, f"{way} the same bits in any pack".strip(),
                lambda op=op, dtype=dtype: same_bits.check_same_bits(op, dtype), core,
            )  # fmt: skip
    for d in (4, 20, 36, 100):
        yield Case("rope_2d", "bf16", f"D={d}", lambda d=d: (
            rope.check_forward(d, BF16), rope.check_backward(d, BF16)
        ))  # fmt: skip
        odd = Attention(d, True)
        yield Case("varlen_attention", "bf16", f"{odd}, 3 heads", lambda odd=odd: odd.check(
            odd.case((5, 65, 129), BF16, heads=3)
        ))  # fmt: skip
    for d in (4, 64):
        yield Case("rope_2d", "bf16", f"D={d}, in place, warps in random order",
                   lambda d=d: check_in_place(d), (80,) if d == 4 else ())  # fmt: skip


def check_columns(machine: ptx_machine.PtxDriver, head_dim: int) -> None:
    """The tensor cores compute 1.12 times what the formulas ask for at most, of whole tiles."""
    tokens = 128
    case = Attention(head_dim).case((tokens,), BF16, heads=1)
    out, *grads = (torch.empty_like(a) for a in (case.g, *case.inputs))
    lse = torch.empty(1, tokens)
    machine.counts.clear()
    with mock.patch.object(machine.options, "count", True):
        forward.forward(case.problem, out, lse)
        backward.backward(case.problem, case.g, out, lse, *grads)
    assert len(machine.counts) == 3
    for counts, products in zip(machine.counts, (2, 3, 4), strict=True):
        useful = 2 * products * tokens**2 * head_dim
        assert useful <= sum(counts.flops().values()) <= 1.12 * useful


@contextmanager
def attention_tiles(which: str) -> Iterator[None]:
    """The first tiles of the tables, or those for chips that refuse the first: the last of a row.

    "second" are the ones between, where the forward has three.
    """
    if which == "first":
        yield
        return
    of_forward, of_backward = forward.select_tilings, backward.select_tilings
    kept = slice(-1, None) if which == "fallback" else slice(1, 2)

    def forward_tiles(*args):
        chosen = of_forward(*args)
        assert which == "fallback" or len(chosen) == 3, f"{len(chosen)} tiles in the row, not 3"
        return chosen[kept]

    def backward_tiles(*args):
        chosen = of_backward(*args)
        return backward.BackwardTilings(chosen.dq[-1:], chosen.dkdv[-1:])

    with ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(forward, "select_tilings", forward_tiles))
        stack.enter_context(patch(backward, "select_tilings", backward_tiles))
        yield


@contextmanager
def projection_tiles(which: str) -> Iterator[None]:
    """As :func:`attention_tiles`."""
    if which == "first":
        yield
        return
    select = shuffle_forward.select_configs
    with ExitStack() as stack:
        for module in (shuffle_forward, shuffle_backward):
            stack.enter_context(
                mock.patch.object(module, "select_configs", lambda *a: select(*a)[-1:])
            )
        for module in (linear_gelu, linear_rope_2d, linear_swiglu):
            stack.enter_context(
                mock.patch.object(module, "configs_of", lambda _, *a: select(*a)[-1:])
            )
        yield


def few_multiprocessors(run: Callable[[], object]) -> Callable[[], None]:
    """`run` on a chip with two: programs of the norms' backward go through several blocks."""

    def with_few():
        two = dict.fromkeys(ptx_machine.MULTIPROCESSORS, 2)
        try:
            with mock.patch.dict(ptx_machine.MULTIPROCESSORS, two):
                launch.multiprocessors.cache_clear()
                run()
        finally:
            launch.multiprocessors.cache_clear()

    return with_few


def check_parts(parts: int, dtype: torch.dtype) -> None:
    """The output and dweight, both as sums of parts: 141 rows make three steps of 64."""
    shuffle.check_parts(parts, dtype, grids=[(9, 15), (2, 3)])
    launches = [name for name, _ in triton.runtime.driver.active.launches]
    assert launches.count("pixel_shuffle_linear_add_parts") == 2, launches


def check_tf32() -> None:
    """Right to the 10 bits of tf32, and not better: tf32 it was."""
    packed = shuffle.pack(2)
    rng = torch.Generator().manual_seed(0)
    x, weight, bias, _ = shuffle.make_inputs(packed, 2, 64, 72, FP32, rng)
    with mock.patch.object(shuffle_forward, "dot_precision", lambda dtype: "tf32"):
        out = pixel_shuffle_linear(x, packed, 2, weight, bias, backend="triton")
    exact = reference.pixel_shuffle_linear(x, packed, 2, weight, bias, upcast=torch.float64)
    numerics.assert_close("out", out, exact, 2e-3)
    assert numerics.relative_error(out, exact) > 1e-5


def check_unaligned(head_dim: int, dtype: torch.dtype) -> None:
    """Tensors that start an element behind a multiple of 16 bytes: neither vectors nor TMA."""
    case = attention.make_case((5, 65, 300), heads=2, head_dim=head_dim, dtype=dtype)

    def moved(a):
        room = torch.full((a.numel() + 1,), float("nan"), dtype=a.dtype)[1:]
        return room.view(a.shape).copy_(a)

    attention.check_kernel(attention.with_layout(case, moved))


def check_strided(head_dim: int, dtype: torch.dtype) -> None:
    """Rows with three elements between them; heads before tokens in memory."""
    case = attention.make_case((5, 129), heads=2, head_dim=head_dim, dtype=dtype)
    for layout in (strided_copy, lambda a: a.transpose(0, 1).contiguous().transpose(0, 1)):
        attention.check_kernel(attention.with_layout(case, layout))


def check_neighbours(head_dim: int, dtype: torch.dtype) -> None:
    """NaN in all other segments changes no bit of a segment, forward and backward."""
    case = attention.make_case((70, 130, 65), heads=2, head_dim=head_dim, dtype=dtype)
    clean = attention.kernel_results(case)
    for start, end in ((0, 70), (70, 200), (200, 265)):
        bad = {name: torch.full_like(getattr(case, name), float("nan")) for name in "qkvg"}
        for name, tensor in bad.items():
            tensor[start:end] = getattr(case, name)[start:end]
        for a, b in zip(attention.kernel_results(replace(case, **bad)), clean, strict=True):
            assert torch.equal(a[start:end], b[start:end]), (start, end)


def check_in_place(head_dim: int) -> None:
    """Several warps may hold copies of an element; only what one of them computes may count.

    The others read what that one may have overwritten, and drop it: a race by the letter, which
    must not change a bit in any order.
    """
    packed = PackedGrids.from_grids(rope.GRIDS, num_prefix_tokens=2)
    rng = torch.Generator().manual_seed(0)
    qkv, inv_freq = rope.make_qkv(packed, head_dim, BF16, rng), rope.frequencies(head_dim)
    expected = rope_2d(qkv[:, 0], qkv[:, 1], packed.coords, inv_freq, backend="triton")
    machine = triton.runtime.driver.active
    assert not machine.report, machine.report
    for seed in range(3):
        copy = qkv.clone()
        order = {"shuffle_warps": True, "shuffle_ctas": True, "seed": seed}
        with mock.patch.multiple(machine.options, **order):
            rope_2d_(copy[:, 0], copy[:, 1], packed.coords, inv_freq, backend="triton")
        assert torch.equal(copy[:, 0], expected[0]) and torch.equal(copy[:, 1], expected[1])
        assert torch.equal(copy[:, 2], qkv[:, 2])
    assert set(machine.report.kinds()) <= {"global race", IN_PLACE}
    machine.report.clear()


def check_launchers(chip: int) -> None:
    """Tables, multiprocessors and backend follow from Triton's driver; "auto" does not take it."""
    cpu = torch.device("cpu")
    assert launch.architecture(cpu) == f"sm_{chip}"
    assert launch.multiprocessors(cpu) == ptx_machine.MULTIPROCESSORS[chip]
    for dtype in DTYPES.values():
        assert backends.resolve("rope_2d", "triton", torch.zeros(1, dtype=dtype)) == "triton"
        assert backends.resolve("rope_2d", "auto", torch.zeros(1, dtype=dtype)) == "eager"
    assert backends.triton_obstacle(cpu, torch.float64)
