"""How many bytes a piece of code moves, and how many kernels it starts: counted, op by op.

    PYTHONPATH=kernels:. python -m pretended_gpu.moved_bytes

prints the table of a DINOv3 layer. An op reads its inputs and writes its outputs once; a view moves
nothing. An op of hrvlm_kernels counts as what it reads and returns. It is what the memory has to
bring at the least, op by op: a cache may save some of it, and a kernel may read something twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pretended_gpu

from .record import RECORD

# Nothing runs on the device for these.
_FREE = {
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}
_PRODUCTS = {"aten::addmm", "aten::bmm", "aten::linear", "aten::mm"}


@dataclass(frozen=True)
class Moved:
    """What some code did; `-` gives what one piece did more than another."""

    calls: Counter[str]  # aten ops that start something
    bytes: Counter[str]  # of them, and of the ops of hrvlm_kernels
    launches: Counter[str]  # of Triton kernels

    def __sub__(self, other: Moved) -> Moved:
        def less(a: Counter[str], b: Counter[str]) -> Counter[str]:
            a = Counter(a)
            a.subtract(b)
            return Counter({name: n for name, n in a.items() if n})

        return Moved(
            less(self.calls, other.calls),
            less(self.bytes, other.bytes),
            less(self.launches, other.launches),
        )

    def elementwise_bytes(self) -> int:
        """Bytes of everything that is neither a matrix product nor an op of hrvlm_kernels."""
        return sum(n for name, n in self.bytes.items() if name in self.calls.keys() - _PRODUCTS)

    def kernel_bytes(self, op: str) -> int:
        """Bytes that an op of hrvlm_kernels reads and returns."""
        return self.bytes[f"hrvlm_kernels::{op}"]


def moved_by(run: Callable[[], object]) -> Moved:
    """Count what `run` does; :func:`pretended_gpu.install` comes before."""
    RECORD.clear()
    with RECORD.counting():
        run()
    calls: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for op in RECORD.ops:
        is_ours = op.name.startswith("hrvlm_kernels::")
        if is_ours or not (op.is_view or op.name in _FREE):
            calls[op.name] += not is_ours
            moved[op.name] += op.read + op.written
    launches = Counter(launch.kernel for launch in RECORD.launches)
    return Moved(+calls, moved, launches)


def of_a_layer(*, grid: tuple[int, int], train: bool) -> tuple[Moved, int]:
    """What one more layer of ViT-L does for an image of `grid` patches, and S = T*C*2 bytes."""
    import torch
    from transformers import DINOv3ViTConfig

    from hrvlm import DINOv3Encoder

    width = 1024

    def run(layers: int) -> Moved:
        config = DINOv3ViTConfig(
            num_register_tokens=4, num_hidden_layers=layers, hidden_size=width,
            intermediate_size=4 * width, num_attention_heads=16,
        )  # fmt: skip
        with torch.no_grad():
            encoder = DINOv3Encoder(config).bfloat16().to("cuda").eval()  # type: ignore[arg-type]
        x = torch.randn(1, 3, 16 * grid[0], 16 * grid[1]).to(torch.bfloat16).to("cuda")

        def step() -> None:
            with torch.set_grad_enabled(train):
                out = encoder(x).last_hidden_state
            if train:
                out.backward(torch.ones_like(out))

        return moved_by(step)

    tokens = 5 + grid[0] * grid[1]
    return run(2) - run(1), 2 * tokens * width


def main() -> None:
    """Print the table."""
    pretended_gpu.install(numbers=False)
    for train in (False, True):
        for grid in ((14, 14), (16, 18)):
            layer, size = of_a_layer(grid=grid, train=train)
            direction = "forward and backward" if train else "forward"
            print(f"\na layer of ViT-L, {grid[0]}x{grid[1]} patches, {direction}: S = {size} bytes")
            for name, n in layer.bytes.most_common():
                print(f"  {name:42} {layer.calls[name] or '':>4} {n / size:6.1f} S")
            print(f"  Triton launches: {dict(layer.launches)}")
            print(
                f"  {layer.calls.total()} aten launches, {layer.launches.total()} of Triton; "
                f"{layer.elementwise_bytes() / size:.1f} S beside products and our ops"
            )


if __name__ == "__main__":
    main()
