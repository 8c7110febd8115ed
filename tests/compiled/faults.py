"""Faults seeded in the PTX of the kernels: each is noticed, or has a reason why it does nothing.

A fault changes one instruction: what a compiler's bug, or a wrong order of operations in a kernel,
would come to. Of every kind a few places of each kernel are tried, spread over the kernel.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

import ptx_machine
from hrvlm_kernels import PackedGrids, triton_kernels
from hrvlm_kernels.ops.rope_2d import rope_table
from hrvlm_kernels.triton_kernels import linear_residual_layer_norm as connection
from hrvlm_kernels.triton_kernels import pixel_shuffle_linear as shuffle_forward
from hrvlm_kernels.triton_kernels import pixel_shuffle_linear_backward as shuffle_backward
from tests.compiled.cases import BF16, BOTH, Attention, attention_tiles, few_multiprocessors
from tests.compiled.judge import Outcome, judge
from tests.kernels import attention_cases as attention
from tests.kernels import test_bias_gelu as gelu
from tests.kernels import test_layer_norm_pixel_shuffle as norm
from tests.kernels import test_linear_gelu as product_gelu
from tests.kernels import test_linear_rope_2d as product_rope
from tests.kernels import test_linear_swiglu as product_swiglu
from tests.kernels import test_normalize_patchify as patchify
from tests.kernels import test_pixel_shuffle_linear as shuffle
from tests.kernels import test_residual_layer_norm as residual
from tests.kernels import test_rope_2d as rope
from tests.kernels import test_swiglu as gated
from tests.kernels import test_varlen_attention as forward
from tests.numerics import assert_elements, assert_rope

PLACES = 3  # of a kind in a kernel, at most
# Ends in a block of 1024 elements and 128 threads: at each of a thread's eight, side by side or 128
# apart; none a multiple of 16, which is another specialisation.
ENDS_OF_BLOCKS = range(1024 + 72, 2048, 129)
MAX_STEPS = 500_000  # blocks of a launch: some faults make loops endless


@dataclass(frozen=True)
class Fault:
    """One changed instruction.

    Attributes:
        kind: key of :data:`KINDS`, or one of :data:`ORDER` "at every place".
        number: which of the places of this kind in the kernel, from 0.
        place: the line of the kernel's source that the instruction comes from.
        ptx: of the kernel, with the fault.
    """

    kind: str
    number: int
    place: str
    ptx: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.kind} {self.number} ({self.place})"


Change = Callable[[str], str | None]  # a line with the fault; None where there is no such fault


def _dropped(pattern: str) -> Change:
    return lambda line: "" if re.search(pattern, line) else None


def _replaced(pattern: str, new: str | Callable[[re.Match[str]], str]) -> Change:
    def change(line: str) -> str | None:
        made, count = re.subn(pattern, new, line, count=1)
        return made if count else None

    return change


def _first_of(*changes: Change) -> Change:
    return lambda line: next((made for c in changes if (made := c(line)) is not None), None)


def _exchanged(line: str) -> str | None:
    """A and B of a product, or two registers of A, or the two halves of B, whatever it has."""
    if re.search(r"\bmma\.sync", line):
        parts = re.findall(r"\{[^}]*\}", line)
        registers = parts[1].strip("{} ").split(", ")
        if len(registers) < 2:
            return None
        registers[:2] = registers[1::-1]
        return line.replace(parts[1], "{ " + ", ".join(registers) + " }", 1)
    if "wgmma.mma_async" in line:
        head, operands = line.split("}", 1)
        made, count = re.subn(r"^, (%rd\d+), (%rd\d+)", r", \2, \1", operands)
        if not count:  # A in registers
            made, count = re.subn(r"\{(%r\d+),(%r\d+)", r"{\2,\1", operands, count=1)
        return f"{head}}}{made}" if count else None
    return None


def _moved(line: str) -> str | None:
    """A vector of global memory, loaded or stored by its own size too far."""
    vector = re.search(r"\b(?:ld|st)\.global\S*\.v([248])\.b(\d+)", line)
    size = int(vector[1]) * int(vector[2]) // 8 if vector else 16
    if vector:
        return re.sub(r"\+ (\d+) \]", lambda m: f"+ {int(m[1]) + size} ]", line, count=1)
    if re.search(r"\bcp\.async\.c[ag]\.shared", line):
        return re.sub(r"(\], \[ %rd\d+ \+ )(\d+)", lambda m: f"{m[1]}{int(m[2]) + size}", line)
    return None


KINDS: dict[str, Change] = {
    "barrier dropped": _dropped(r"\bbar\.sync"),
    "wait dropped": _first_of(
        _dropped(r"\b(cp\.async|wgmma)\.wait_group"),
        _replaced(r"mbarrier\.try_wait\S*\s+(\w+),.*", r"setp.eq.u32 \1, 0, 0;"),
    ),
    "wait a group short": _replaced(
        r"\b((?:cp\.async|wgmma)\.wait_group\S*\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}"
    ),
    "fence dropped": _dropped(r"\bfence\.proxy\.async"),
    "half the bytes expected": _replaced(
        r"(arrive\.expect_tx.*, )(\d+);", lambda m: f"{m[1]}{int(m[2]) // 2};"
    ),
    # But for the guards of loops, whether a size is below 1 or above 0: no launch has such sizes.
    "mask off by one": _first_of(
        _replaced(r"\bsetp\.lt\.(s\d\d)(?!.*, 1;)", r"setp.le.\1"),
        _replaced(r"\bsetp\.gt\.(s\d\d)(?!.*, 0;)", r"setp.ge.\1"),
    ),
    "operands exchanged": _exchanged,
    "vector shifted": _moved,
    "store dropped": _dropped(r"^\s*(@!?%p\d+ )?(st\.(global|shared)|stmatrix)"),
}


ORDER = ("barrier dropped", "wait dropped", "wait a group short", "fence dropped")


def faults_of(ptx: str, places: int = PLACES) -> Iterator[Fault]:
    """Of every kind, at most so many places, spread evenly; what orders, also all at once.

    Where dropping one of several does nothing, dropping all of them has to be noticed.
    """
    lines = ptx.splitlines()
    for kind, change in KINDS.items():
        made = [(i, new) for i, line in enumerate(lines) if (new := change(line)) is not None]
        step = max(1, (len(made) - 1) / max(1, places - 1)) if len(made) > places else 1
        wanted = sorted({round(k * step) for k in range(min(places, len(made)))})
        for number in wanted:
            i, new = made[number]
            text = "\n".join([*lines[:i], new, *lines[i + 1 :]]) + "\n"
            yield Fault(kind, number, _source(lines, i), text)
        if kind in ORDER and len(made) > 1:
            changed = dict(made)
            text = "\n".join(changed.get(i, line) for i, line in enumerate(lines)) + "\n"
            yield Fault(f"{kind}, at every place", 0, "everywhere", text)


def _source(lines: list[str], at: int) -> str:
    """The line of a kernel that instruction `at` comes from, outside of what it calls in Triton."""
    loc = next((ln for ln in reversed(lines[:at]) if re.match(r"\s*\.loc\s", ln)), "")
    for file, number in re.findall(r"(\w+\.py):(\d+)", loc.partition("//")[2]):
        text = _file(file)
        if text and int(number):
            return f"{file}: {text[int(number) - 1].strip()}"
    return "in Triton's own library"


@cache
def _file(name: str) -> list[str]:
    path = Path(triton_kernels.__file__).parent / name
    return path.read_text().splitlines() if path.exists() else []


@dataclass(frozen=True)
class Subject:
    """A kernel, and what runs it.

    Attributes:
        name: of the kernel, in the words of the page.
        kernel: the function's name.
        run: with inputs in which every instruction matters but the masks.
        ends: with sizes that end at every element of a tile, for the masks.
        chips: for which it is shipped.
    """

    name: str
    kernel: str
    run: Callable[[], object]
    ends: Callable[[], object]
    chips: tuple[int, ...] = BOTH

    def runs(self, fault: Fault) -> list[Callable[[], object]]:
        """What has to notice a fault, if it has an effect; order is checked whatever the sizes."""
        order = fault.kind.partition(",")[0] in ORDER
        return [self.run] if order else [self.run, self.ends]


def subjects() -> list[Subject]:
    # Rows of 1000: where one warp has a row, even its last store of 256 columns holds some of them.
    elementwise = {
        "bias_gelu": (
            lambda: gelu.check(5, 1100, BF16),
            few_multiprocessors(  # two or three blocks per program, and every remainder of rows
                lambda: [gelu.check(13 + n, w, BF16) for n, w in enumerate(ENDS_OF_BLOCKS)]
            ),
        ),
        "swiglu": (lambda: gated.check(5, 1100, BF16), _widths),
        "residual_layer_norm": (
            lambda: residual.check(37, 1000, BF16),
            few_multiprocessors(lambda: [residual.check(n, 1000, BF16) for n in range(1, 19)]),
        ),
    }
    return [
        _attention("attention forward", "varlen_attention_forward", chips=(80,), backward=False),
        _attention(  # whose rotated q waits where the result will be
            "attention forward, D=128, RoPE", "varlen_attention_forward", chips=(80,), rope=True,
            head_dim=128, backward=False,
        ),
        _attention(
            "attention forward, ahead", "varlen_attention_forward", chips=(90,), backward=False
        ),
        _attention(
            "attention forward, ahead, RoPE", "varlen_attention_forward", chips=(90,), rope=True,
            head_dim=64, backward=False,
        ),
        _attention(
            "attention forward, plain", "varlen_attention_forward", chips=(90,), backward=False,
            tiles="fallback",
        ),
        _attention(
            "attention of short images", "varlen_attention_short", rope=True, backward=False
        ),
        _attention("attention dq", "varlen_attention_dq"),
        _attention("attention dk, dv", "varlen_attention_dkdv"),
        _projection("forward", channels=64),
        _projection("dx", channels=144),
        _projection("dweight", channels=144),
        _product("linear_gelu", product_gelu.check),
        _product("linear_swiglu", product_swiglu.check),
        Subject(  # two heads a tile; v's ends within the second one
            "linear_rope_2d", "linear_rope_2d_forward",
            lambda: product_rope.check(130, 192, 1, 64, BF16, table=True),
            lambda: [
                product_rope.check(2 * n + 1, 64, 1, 64, BF16, table=True) for n in range(64)
            ],
        ),
        Subject(
            "pixel_shuffle_linear, prefix rows", "pixel_shuffle_linear_zero_prefix",
            _prefix, _prefix,
        ),
        Subject(
            "pixel_shuffle_linear, adding parts", "pixel_shuffle_linear_add_parts",
            _parts, _parts,
        ),
        Subject(
            "rope_2d", "rope_2d", lambda: rope.check_forward(80, BF16),
            lambda: [rope.check_forward(80, BF16, grids=[(1, n)], prefix=0) for n in range(1, 34)],
        ),
        Subject(
            "rope_2d, table", "rope_2d_table", lambda: _table(33),
            lambda: [_table(tokens) for tokens in range(1, 34)],
        ),
        Subject(
            "linear_residual_layer_norm gradients", "linear_residual_layer_norm_gradients",
            lambda: _gradients(130, 20),
            lambda: [_gradients(60 + width, width) for width in range(2, 16)],
        ),
        Subject(
            "bias_gelu, adding parts", "bias_gelu_add_parts",
            lambda: gelu.check(21, 72, BF16),
            lambda: [gelu.check(5, width, BF16) for width in range(65, 80)],
        ),
        *(
            Subject(f"{op} {way}", f"{op}_{way}", run, ends)
            for op, (run, ends) in elementwise.items()
            for way in ("forward", "backward")
        ),
        *map(_norm_pixel_shuffle, ("forward", "backward")),
        Subject(
            "normalize_patchify", "normalize_patchify", lambda: patchify.check(16, BF16),
            lambda: patchify.check(
                16, BF16, images=patchify.make_images(16, [(2, n) for n in range(1, 18)])
            ),
        ),
    ]  # fmt: skip


def _attention(
    name: str, kernel: str, *, chips=BOTH, backward=True, rope=False, head_dim=32, tiles="first"
) -> Subject:
    """With scores around 0, long enough for every stage of the loop; and with every kind of end."""
    longest = 256 if kernel == "varlen_attention_short" else 520
    lengths, beyond = (1, 0, 63, 128, longest), 0
    if chips == (90,) and rope:  # segments that are short are left to the other kernel
        lengths, beyond = (1, 0, 256, 257, 639), 256
    way = Attention(head_dim, rope, tiles)

    def check(change=lambda case: case):
        case = change(way.case(lengths, BF16, heads=1))
        if backward:
            return way.check(case)
        with attention_tiles(tiles):
            out, lse = forward.run_forward(case)
        attention.check(case, [out], ["out"])
        return forward.check_lse(case, lse)

    def results(case):
        return way.results(case) if backward else forward.run_forward(case)[:1]

    def ends():
        check(attention.below_zero)  # where the log-sum-exp of each row is another
        way.check_ends(BF16, results, heads=1, beyond=beyond)

    return Subject(name, kernel, check, ends, chips)


def _norm_pixel_shuffle(way: str) -> Subject:
    ends = few_multiprocessors(
        lambda: [norm.check_all(3, 1000, BF16, grids=[(1, n)]) for n in range(1, 19)]
    )
    name = "layer_norm_pixel_shuffle"
    return Subject(f"{name} {way}", f"{name}_{way}", lambda: norm.check_all(3, 1000, BF16), ends)


def _projection(part: str, channels: int) -> Subject:
    """More than a tile of rows, of features and, but for the forward, of channels.

    189 features: the last of three blocks of 64 reaches into each vector of a thread.
    """

    def check():
        shuffle.check_all(2, channels, 189, BF16, grids=[(1, 1), (9, 15)])

    def ends():
        """Every second row of a tile of 128 as the end, and features of every remainder by 8.

        Neither features nor outputs are a multiple of 16: that is another specialisation.
        """
        widths = [n for n in (*range(2, 10), *range(17, 130, 9)) if n % 16]
        for n in range(64):
            width = widths[n % len(widths)]
            shuffle.check_all(2, channels, width, BF16, grids=[(1, 2 * n + 1)])

    name = f"pixel_shuffle_linear {part}"
    return Subject(name, name.replace(" ", "_"), check, ends)


def _product(op: str, check: Callable[..., object]) -> Subject:
    """As :func:`_projection`: more than a tile of tokens and of features, three turns of the loop.

    The features, no multiple of 16, end among those of a thread.
    """

    def ends():
        widths = [n for n in (*range(2, 10), *range(17, 130, 9)) if n % 16]
        for n in range(64):
            check(2 * n + 1, 64, widths[n % len(widths)], BF16)

    return Subject(op, f"{op}_forward", lambda: check(130, 192, 189, BF16), ends)


def _widths() -> None:
    """Ends among each of the eight elements that a thread has."""
    for width in ENDS_OF_BLOCKS:
        gated.check(2, width, BF16)


def _prefix() -> None:
    """Nothing but the prefix rows is touched, nor what lies between two rows."""
    ends = torch.tensor([0, 7, 9], dtype=torch.int32)
    for channels in range(33, 48):
        room = torch.full((9, 50), 3.0, dtype=BF16)
        dx = room[:, :channels]
        shuffle_backward.pixel_shuffle_linear_zero_prefix[(2,)](
            dx, ends, channels, *dx.stride(), PREFIX=2, BLOCK=32
        )
        expected = torch.full_like(room, 3.0)
        expected[[0, 1, 7, 8], :channels] = 0
        assert torch.equal(room, expected)


def _parts() -> None:
    """Likewise, with a bias."""
    rng = torch.Generator().manual_seed(0)
    for width in ENDS_OF_BLOCKS:
        parts = torch.randn(3, 1, width, generator=rng)
        bias = torch.randn(width, generator=rng).to(BF16)
        out = torch.full((1, width), float("nan"), dtype=BF16)
        shuffle_forward.add_parts(parts, bias, out)
        exact = parts.double().sum(0) + bias.double()
        terms = parts.double().abs().sum(0) + bias.double().abs()
        assert_elements(out, exact, 2.0**-8 * exact.abs() + 2.0**-21 * terms)


def _table(tokens: int, head_dim: int = 80) -> None:
    """Rotated by the table, (1, 0) is (cos, sin)."""
    coords = PackedGrids.from_grids([(1, tokens)]).coords
    inv_freq = rope.frequencies(head_dim)
    one = torch.zeros(tokens, 1, head_dim)
    one[..., : head_dim // 2] = 1
    assert_rope(rope_table(coords, inv_freq)[:, None], one, coords, inv_freq)


def _gradients(count: int, width: int, inner: int = 520) -> None:
    """Each of the five gradients by its formula: the sums of two turns of both loops, or three."""
    rng = torch.Generator().manual_seed(0)
    # Tensors of their own: what is read past the end of one is outside of all.
    product, weight, scale, bias = (
        torch.randn(*size, generator=rng).to(BF16)
        for size in ((width, inner), (width, inner), (width,), (width,))
    )
    parts = torch.randn(3, count, width, generator=rng)
    dweight, vectors, of_norm = (
        torch.full(size, float("nan"), dtype=BF16)
        for size in ((width, inner), (2, width), (2, width))
    )
    connection.launch(product, weight, scale, bias, parts, scale, dweight, vectors, of_norm)

    def sums(p, w, s, b, parts):
        of_x, dw, db = parts.sum(1)
        return s[:, None] * p, torch.stack([(p * w).sum(1) + b * of_x, s * of_x, dw, db])

    exact = [a.double() for a in (product, weight, scale, bias, parts)]
    for out, value, terms in zip(
        (dweight, torch.cat([vectors, of_norm])),
        sums(*exact), sums(*(a.abs() for a in exact)), strict=True,
    ):  # fmt: skip
        assert_elements(out, value, 2.0**-8 * value.abs() + 2.0**-20 * terms)


@contextmanager
def collected(machine: ptx_machine.PtxDriver, kernel: str) -> Iterator[list[str]]:
    """The PTX of all specialisations of a kernel that run meanwhile."""
    seen: list[str] = []

    def keep(name: str, ptx: str) -> str:
        if name == kernel and ptx not in seen:
            seen.append(ptx)
        return ptx

    with ptx_machine.edited(machine, keep):
        yield seen


def ptx_of(machine: ptx_machine.PtxDriver, subject: Subject) -> str:
    """What the subject's kernel is compiled to; without a fault nothing is noticed."""
    with collected(machine, subject.kernel) as seen:
        for run in (subject.run, subject.ends):
            outcome = judge(machine, run)
            assert not outcome.noticed, outcome
    assert len(seen) == 1, f"{len(seen)} specialisations of {subject.kernel} ran, not one"
    return seen[0]


def outcomes(
    machine: ptx_machine.PtxDriver, subject: Subject, original: str, fault: Fault
) -> Iterator[Outcome]:
    """One for each way to run the subject, with the fault in the kernel."""

    def plant(name: str, ptx: str) -> str:
        return fault.ptx if name == subject.kernel and ptx == original else ptx

    before, machine.options.max_steps = machine.options.max_steps, MAX_STEPS
    try:
        with ptx_machine.edited(machine, plant):
            for run in subject.runs(fault):
                yield judge(machine, run)
    finally:
        machine.options.max_steps = before


def noticed_by(machine, subject: Subject, original: str, fault: Fault) -> str:
    """What noticed the fault first; nothing if it went unnoticed."""
    for outcome in outcomes(machine, subject, original, fault):
        if outcome.noticed:
            return ", ".join(outcome.noticed)
    return ""
