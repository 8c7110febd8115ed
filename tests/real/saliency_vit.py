"""The network of recipes/saliency_vit.py in onnxruntime; what imports this skips without it."""

import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
recipe = pytest.importorskip("recipes.saliency_vit")
try:
    MODEL = recipe.model_file()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

weights = recipe.weights
HIDDEN = "/backbone/layernorm/Add_1_output_0"


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
