"""How far an accelerated tower is from stock, by the Triton kernels in the interpreter, float32.

Run in a process of its own with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import json
import sys

import hrvlm
from benchmarks.towers.tiny import TOWERS, gradients_of, inputs_of, tower_of


def errors(name: str) -> dict[str, float]:
    """Largest difference from stock of the output and of a weight's gradient, by the kernels."""
    tower, inputs = tower_of(name), inputs_of(name)
    expected, gradients = gradients_of(tower, inputs)
    hrvlm.accelerate(tower, backend="triton")
    out, mine = gradients_of(tower, inputs)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    wrong = max((mine[key] - gradient).abs().max() for key, gradient in gradients.items())
    return {
        "output": ((out - expected).abs().max() / expected.abs().max()).item(),
        "gradients": (wrong / largest).item(),
    }


if __name__ == "__main__":
    json.dump({name: errors(name) for name in sys.argv[1:] or TOWERS}, sys.stdout)
