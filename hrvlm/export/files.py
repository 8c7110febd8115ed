"""Exported files, each checked against the encoder before it takes its place."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..encoder.packed_encoder import PackedEncoder
from ..files import folder_for_results
from .graphs import BatchGraph, export_program, graph_of

Runner = Callable[[tuple[Tensor, ...]], "list[np.ndarray[Any, Any]]"]

TOLERANCE = 1e-4  # of the largest value of an output
_ONE_FILE = 1_800_000_000  # bytes of weights; ONNX holds up to 2 GB in the file itself


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        suffix: Of its name.
        packages: What writes and runs it.
        write: Writes the graph to a path.
        load: What runs the file at a path.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[BatchGraph, str, Path], None]
    load: Callable[[Path], Runner]


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: Where.
        form: "batch" or "pack".
        format: Its kind.
        files: All its files.
        bytes: Of all of them.
        checked: Inputs on which it was compared with the encoder.
        error: The largest difference, by the largest value of the output.
    """

    path: str
    form: str
    format: str
    files: tuple[str, ...]
    bytes: int
    checked: int
    error: float

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def _write_onnx(graph: BatchGraph, form: str, path: Path) -> None:
    weights = sum(p.numel() * p.element_size() for p in graph.parameters())
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            graph,
            graph.random_inputs(graph.example),
            path,
            dynamo=True,
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes=graph.dynamic_shapes(),
            external_data=weights > _ONE_FILE,
            verbose=False,
        )


def _load_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda inputs: session.run(
        None, dict(zip(names, (x.numpy() for x in inputs), strict=True))
    )


def _write_torch(graph: BatchGraph, form: str, path: Path) -> None:
    # In memory first: where a disk is full, torch's writer of files ends the process.
    content = BytesIO()
    with _quiet():
        program = export_program(graph.encoder, form)
        for name, weight in program.state_dict.items():
            if not weight.numel():  # as loaded, it has an address that torch can't save
                program.state_dict[name] = nn.Parameter(torch.empty_like(weight))
        torch.export.save(program, content)
    # Not its getbuffer(): after an error here, collecting that ends a Python before 3.12.2.
    path.write_bytes(content.getvalue())


def _load_torch(path: Path) -> Runner:
    program = torch.export.load(path).module()

    def run(inputs: tuple[Tensor, ...]) -> list[np.ndarray[Any, Any]]:
        with torch.no_grad():
            return [out.numpy() for out in program(*inputs)]

    return run


def _write_openvino(graph: BatchGraph, form: str, path: Path) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder, "graph.onnx")
        _write_onnx(graph, form, stored)
        openvino.save_model(openvino.convert_model(stored), path, compress_to_fp16=False)


def _load_openvino(path: Path) -> Runner:
    import openvino

    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(path, "CPU", precise)

    def run(inputs: tuple[Tensor, ...]) -> list[np.ndarray[Any, Any]]:
        results = compiled([x.numpy() for x in inputs])
        return [results[i] for i in range(len(compiled.outputs))]

    return run


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
    "torch": Format(".pt2", (), _write_torch, _load_torch),
    "openvino": Format(".xml", ("openvino", "onnx", "onnxscript"), _write_openvino, _load_openvino),
}

# Formats that don't work, tried from the same graphs, and why.
NOT_WRITTEN = {
    "executorch": "its memory is planned ahead, from a largest size of every dimension, and its "
    "runtime (tried: 1.2.0) does not resize tensors that the graph makes anew, as for images of "
    "other sizes"
}


def export(
    encoder: PackedEncoder, path: str | Path, *, format: str = "onnx", form: str = "batch"
) -> Exported:
    """Write an encoder as one file for any size, and check it.

    The file is run on inputs of several sizes and compared with the encoder; only then does it take
    the place of what was there.

    Args:
        encoder: In float32 on the CPU.
        path: With the suffix of the format.
        format: One of :data:`FORMATS`.
        form: "batch", or "pack" for images of mixed sizes; see :mod:`hrvlm.export.graphs`.

    Raises:
        ImportError: a package is not installed.
        ValueError: the format, the form or the suffix is unknown or not written, or the encoder is
            not in float32 on the CPU.
        RuntimeError: what the file computes is not what the encoder computes.
    """
    if format in NOT_WRITTEN:
        raise ValueError(f"format={format!r} is not written: {NOT_WRITTEN[format]}")
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    kind, path = FORMATS[format], Path(path)
    if path.suffix != kind.suffix:
        raise ValueError(f"{path}: a file of the format {format!r} is called *{kind.suffix}")
    missing = [name for name in kind.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"format {format!r} needs {', '.join(missing)}, not installed here: "
            "pip install 'hrvlm[export]' (openvino: pip install openvino)"
        )
    graph = graph_of(encoder, form)
    with (
        folder_for_results(path.parent),
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
    ):
        draft = Path(folder, path.name)
        kind.write(graph, form, draft)
        error = check(graph, kind.load(draft))
        written = sorted(Path(folder).iterdir(), key=lambda file: file == draft)  # it comes last
        for file in written:
            file.replace(path.with_name(file.name))
    files = tuple(str(path.with_name(file.name)) for file in written)
    size = sum(Path(file).stat().st_size for file in files)
    return Exported(str(path), form, format, files, size, len(graph.checks), error)


def check(graph: BatchGraph, run: Runner) -> float:
    """The largest difference between a file and its encoder, on all of the graph's checks.

    Raises:
        RuntimeError: it is larger than `TOLERANCE`; the images are named.
    """
    worst = 0.0
    for sizes in graph.checks:
        inputs = graph.random_inputs(sizes)
        with torch.no_grad():
            expected = graph(*inputs)
        for name, got, want in zip(graph.outputs, run(inputs), expected, strict=True):
            right = want.numpy()
            error = float(np.abs(got - right).max() / np.abs(right).max())
            if got.shape != right.shape or not error <= TOLERANCE:
                raise RuntimeError(
                    f"the exported file is wrong: {name} of images of {list(sizes)} patches is off "
                    f"by {error:.1e} of the largest value"
                )
            worst = max(worst, error)
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes about their own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
