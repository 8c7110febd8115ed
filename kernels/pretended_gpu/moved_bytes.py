"""How many bytes a piece of code moves, and how many kernels it starts: counted, launch by launch.

    PYTHONPATH=kernels:. python -m pretended_gpu.moved_bytes

prints the table of a DINOv3 layer. What counts are passes: an aten op, or a Triton kernel, reads a
tensor with a row for each token and writes another, each once. Of matrix products the summand C
counts and the factors and the result don't (torch copies C into a result that is not C itself);
attention's kernels are counted apart. It is what the memory has to bring at the least: a cache may
save some of it, and a kernel may read something twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import pretended_gpu

from .record import RECORD, Launch, Op, Operand
from .torch_tensors import inner

# Nothing runs on the device for these.
_FREE = {
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}
_PRODUCTS = {
    "aten::bmm", "aten::linear", "aten::mm",
    "linear_gelu_forward", "linear_rope_2d_forward", "linear_swiglu_forward",
}  # fmt: skip
_WITH_SUMMAND = {"aten::addmm", "aten::addmm_"}
_ATTENTION = "varlen_attention"
_COPY = "aten::addmm, copying C"


@dataclass(frozen=True)
class Moved:
    """What some code did; `-` gives what one piece did more than another.

    Attributes:
        passes: Bytes of tensors with a row per token, by aten op or Triton kernel; neither products
            nor attention.
        attention: Those of attention's kernels.
        launches: How often each aten op or Triton kernel starts something.
        kept: Bytes of what tensors with a row per token keep for the backward, each memory once.
    """

    passes: Counter[str] = field(default_factory=Counter)
    attention: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)

    def __sub__(self, other: Moved) -> Moved:
        def less(a: Counter[str], b: Counter[str]) -> Counter[str]:
            a = Counter(a)
            a.subtract(b)
            return Counter({name: n for name, n in a.items() if n})

        mine, others = vars(self).values(), vars(other).values()
        return Moved(*(less(a, b) for a, b in zip(mine, others, strict=True)))


def moved_by(run: Callable[[], object], *, tokens: int) -> Moved:
    """Count what `run` does; :func:`pretended_gpu.install` comes before.

    Args:
        run: Called once.
        tokens: A tensor with a dimension of this size has rows of tokens. No other size may be it.
    """
    memories: dict[int, int] = {}

    def note(a: Tensor) -> Tensor:
        if tokens in a.shape:
            memory = inner(a).untyped_storage()
            memories[memory.data_ptr()] = memory.nbytes()
        return a

    RECORD.clear()
    with RECORD.counting(), saved_tensors_hooks(note, lambda a: a):
        run()
    moved = Moved(kept=Counter(bytes=sum(memories.values())))
    moved.launches.update(launched(RECORD.ops, RECORD.launches))
    for op in RECORD.ops:
        if not _starts_something(op):
            continue
        if op.name in _WITH_SUMMAND:
            _count_summand(op, tokens, moved)
        elif op.name not in _PRODUCTS:
            moved.passes[op.name] += _of_tokens((*op.reads, *op.writes), tokens)
    for launch in RECORD.launches:
        if launch.kernel not in _PRODUCTS:
            into = moved.attention if launch.kernel.startswith(_ATTENTION) else moved.passes
            into[launch.kernel] += _of_tokens((*launch.reads, *launch.writes), tokens)
    return Moved(*(+counted for counted in vars(moved).values()))


def launched(ops: Iterable[Op], launches: Iterable[Launch]) -> list[str]:
    """Names of what the device starts: aten ops, with what torch adds, and Triton kernels."""
    names = []
    for op in filter(_starts_something, ops):
        names += [_COPY, op.name] if _copies_summand(op) else [op.name]
    return names + [launch.kernel for launch in launches]


def _starts_something(op: Op) -> bool:
    return op.name.startswith("aten::") and not op.is_view and op.name not in _FREE


def _copies_summand(op: Op) -> bool:
    return op.name == "aten::addmm" and len(op.reads[0].shape) == 2


def _count_summand(op: Op, tokens: int, moved: Moved) -> None:
    """Read by the product; and copied first, where the result is a tensor of its own."""
    summand = op.reads[:1]
    moved.passes[op.name] += _of_tokens(summand, tokens)
    if _copies_summand(op):
        moved.passes[_COPY] += 2 * _of_tokens(summand, tokens)


def _of_tokens(operands: Iterable[Operand], tokens: int) -> int:
    """Bytes of those with a row per token, and more in it than a number per head."""
    return sum(
        a.bytes for a in operands if tokens in a.shape and a.bytes >= 2 * tokens * _LEAST_WIDTH
    )


_LEAST_WIDTH = 64  # of a row; log-sum-exps and coordinates are no passes


def of_a_layer(
    *, grid: tuple[int, int], train: bool, gated: bool = False, **options: object
) -> tuple[Moved, int]:
    """What one more layer of ViT-L does for an image of `grid` patches, and S = T*C*2 bytes.

    Counted when it has run once: what is made of the weights alone is there. `options` go to the
    encoder.
    """
    import torch
    from transformers import DINOv3ViTConfig

    from hrvlm import DINOv3Encoder

    width = 1024
    tokens = 5 + grid[0] * grid[1]

    def run(layers: int) -> Moved:
        config = DINOv3ViTConfig(
            num_register_tokens=4, num_hidden_layers=layers, hidden_size=width,
            intermediate_size=4 * width, num_attention_heads=16,
            use_gated_mlp=gated, hidden_act="silu" if gated else "gelu",
        )  # fmt: skip
        with torch.no_grad():
            encoder = DINOv3Encoder(config, **options).bfloat16().to("cuda").eval()  # type: ignore[arg-type]
        x = torch.randn(1, 3, 16 * grid[0], 16 * grid[1]).to(torch.bfloat16).to("cuda")

        def step() -> None:
            with torch.set_grad_enabled(train):
                out = encoder(x).last_hidden_state
            if train:
                out.backward(torch.ones_like(out))

        step()
        encoder.zero_grad()
        return moved_by(step, tokens=tokens)

    return run(2) - run(1), 2 * tokens * width


def main() -> None:
    """Print the table."""
    pretended_gpu.install(numbers=False)
    ways = [(train, grid, "auto") for train in (False, True) for grid in ((14, 14), (16, 18))]
    asked_for = [(train, grid, "triton") for train, grid, _ in ways]
    for train, grid, backend in (*ways, *asked_for):
        layer, size = of_a_layer(grid=grid, train=train, backend=backend)
        direction = "forward and backward" if train else "forward"
        print(
            f"\na layer of ViT-L, {grid[0]}x{grid[1]} patches, backend={backend!r}, {direction}: "
            f"S = {size} bytes"
        )
        for name, n in layer.launches.most_common():
            moved = (layer.passes + layer.attention)[name]
            print(f"  {name:42} {n:4} {moved / size:6.1f} S" if moved else f"  {name:42} {n:4}")
        print(
            f"  {layer.launches.total()} launches; passes {layer.passes.total() / size:.1f} S, "
            f"attention {layer.attention.total() / size:.1f} S, "
            f"kept {layer.kept.total() / size:.1f} S"
        )


if __name__ == "__main__":
    main()
