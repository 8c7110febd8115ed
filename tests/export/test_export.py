"""One graph for any size: torch.export, torch.jit.trace, and files for other runtimes.

``make exports`` runs every format; `make test` writes one of torch by the command here, and the
ONNX file of docs/use_the_encoder.md.
"""

import json
import os
import random

import numpy as np
import pytest
import torch
from torch.export import Dim
from transformers import DINOv3ViTModel

import hrvlm
from hrvlm import DINOv3Encoder
from hrvlm.export import files
from hrvlm.export.files import FORMATS, NOT_WRITTEN, export
from hrvlm.export.graphs import GRAPHS, export_program, graph_of
from hrvlm_kernels import PackedGrids
from hrvlm_kernels.traced_grids import TracedGrids
from tests.commands.helpers import run
from tests.encoder import dinov2_models
from tests.encoder.encoders import config_of, pair_of
from tests.tiny import model_of
from tests.vlm.test_vision_language_model import alone, batch_of

heavy = pytest.mark.skipif("HRVLM_EXPORTS" not in os.environ, reason="run by `make exports`")


def encoder_of(name="vit", **changes):
    return pair_of(name, **({"num_hidden_layers": 1} | changes))[1]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# torch.export


@torch.no_grad()
def test_a_program_of_the_encoder_itself_serves_any_batch(rng):
    encoder = encoder_of()
    sides = {2: 16 * Dim("rows"), 3: 16 * Dim("columns")}
    example = torch.randn(2, 3, 64, 96, generator=rng)
    shapes = ({0: Dim("batch", min=1, max=64), **sides},)
    program = torch.export.export(encoder, (example,), dynamic_shapes=shapes).module()
    for shape in ((2, 3, 64, 96), (1, 3, 32, 48), (5, 3, 96, 32)):
        images = torch.randn(shape, generator=rng)
        out, want = program(images), encoder(images)
        close(out.last_hidden_state, want.last_hidden_state)
        close(out.pooler_output, want.pooler_output)


@torch.no_grad()
def test_a_program_of_a_pack_serves_any_mixture():
    encoder = encoder_of()
    program = export_program(encoder, "pack").module()
    for grids in ([(4, 6), (2, 2), (3, 1)], [(1, 1), (5, 3)], [(2, 3)] * 4):
        patches, tensor = graph_of(encoder, "pack").random_inputs(grids)
        hidden, pooled = program(patches, tensor)
        want = encoder(patches, grids=grids)
        close(hidden, want.packed_last_hidden_state)
        close(pooled, want.pooler_output)


@heavy
@torch.no_grad()
def test_a_program_of_dinov2_interpolates_positions_for_any_batch(rng):
    encoder = dinov2_models.pair_of("registers", num_hidden_layers=1)[1]
    program = export_program(encoder, "batch").module()
    for shape in ((2, 3, 56, 56), (1, 3, 28, 112), (3, 3, 140, 42)):  # of its weights, and others
        images = torch.randn(shape, generator=rng)
        close(program(images)[0], encoder(images).last_hidden_state)


@heavy
@torch.no_grad()
def test_a_program_of_dinov2_interpolates_positions_for_any_mixed_pack():
    encoder = dinov2_models.pair_of("registers", num_hidden_layers=1)[1]
    program = export_program(encoder, "pack").module()
    for grids in ([(4, 6), (2, 2), (3, 1)], [(4, 4), (13, 3)], [(2, 3)] * 4):
        patches, tensor = graph_of(encoder, "pack").random_inputs(grids)
        close(program(patches, tensor)[0], encoder(patches, grids=grids).packed_last_hidden_state)


@torch.no_grad()
def test_an_accelerated_model_of_transformers_is_exported_too(rng):
    theirs, _ = pair_of(num_hidden_layers=1)
    images = torch.randn(3, 3, 48, 32, generator=rng)
    want = theirs(images).last_hidden_state
    shapes = {"pixel_values": {0: Dim("batch"), 2: 16 * Dim("rows"), 3: 16 * Dim("columns")}}
    example = {"pixel_values": torch.randn(2, 3, 64, 96, generator=rng)}
    hrvlm.accelerate(theirs)
    program = torch.export.export(theirs, (), kwargs=example, dynamic_shapes=shapes)
    close(program.module()(pixel_values=images).last_hidden_state, want)


@torch.no_grad()
def test_only_a_graph_has_a_traced_layout(rng, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a traced layout outside a graph")

    monkeypatch.setattr(TracedGrids, "__init__", refuse)
    encoder, images = encoder_of(), torch.randn(2, 3, 32, 32, generator=rng)
    encoder(images)
    encoder(list(images))
    # Dynamic, as torch.compile makes it once it has met another size, in this or an earlier test.
    compiled = torch.compile(encoder, backend="eager", fullgraph=True, dynamic=True)
    close(compiled(images).last_hidden_state, encoder(images).last_hidden_state)
    with pytest.raises(AssertionError, match="a traced layout"):
        torch.export.export(encoder, (images,))


@torch.no_grad()
def test_the_whole_model_is_exported_for_grids_that_are_given_as_ints():
    model, batch = model_of(), alone(batch_of(), 0)
    batch["image_grid_hw"] = torch.tensor(batch["image_grid_hw"])
    with pytest.raises(ValueError, match=r"torch\.export does not know: give a list of pairs"):
        torch.export.export(model, (), kwargs=batch | {"use_cache": False})
    batch["image_grid_hw"] = batch["image_grid_hw"].tolist()
    program = torch.export.export(model, (), kwargs=batch | {"use_cache": False})
    close(program.module()(**batch, use_cache=False).logits, model(**batch).logits)


def test_a_graph_says_that_it_has_no_parts_by_image():
    layout = TracedGrids.from_tensor(torch.tensor([[2, 3]]), 6, num_prefix_tokens=5)
    with pytest.raises(ValueError, match="no parts by image"):
        layout.split(torch.zeros(11, 4))


@pytest.mark.parametrize("grids", [[(2, 3)], [(1, 1), (4, 2), (2, 2)], [(3, 2)] * 3])
def test_a_traced_layout_is_the_packed_one(grids):
    packed = PackedGrids.from_grids(grids, num_prefix_tokens=5)
    patches = sum(hp * wp for hp, wp in grids)
    layouts = [TracedGrids.from_tensor(torch.tensor(grids), patches, num_prefix_tokens=5)]
    if len(set(grids)) == 1:
        options = {"num_prefix_tokens": 5, "device": torch.device("cpu")}
        layouts.append(TracedGrids.from_batch(len(grids), grids[0], **options))
    for traced in layouts:
        torch.testing.assert_close(traced.coords, packed.coords, rtol=0, atol=1e-6)
        assert traced.cu_seqlens.tolist() == packed.cu_seqlens.tolist()
        assert traced.patch_rows().tolist() == packed.patch_rows().tolist()
        assert traced.total_tokens == packed.total_tokens


# torch.jit.trace


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_of_a_batch_serves_any_batch(rng):
    encoder = encoder_of()
    traced = torch.jit.trace(encoder, (torch.randn(2, 3, 64, 96, generator=rng),), strict=False)
    for shape in ((2, 3, 64, 96), (3, 3, 96, 64), (1, 3, 16, 80)):
        images = torch.randn(shape, generator=rng)
        close(traced(images)["last_hidden_state"], encoder(images).last_hidden_state)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_a_list_is_refused_by_name(rng):
    images = [torch.randn(3, 32, 48, generator=rng), torch.randn(3, 16, 16, generator=rng)]
    encoder = encoder_of()
    with pytest.raises(ValueError, match=r"torch\.jit\.trace: give the encoder a batch"):
        torch.jit.trace(lambda a, b: encoder([a, b]).pooler_output, tuple(images))


# Files


def test_the_command_writes_a_file_that_was_checked(tmp_path, monkeypatch):
    encoder_of(num_register_tokens=1).save_pretrained(tmp_path / "model")
    path = tmp_path / "out" / "encoder.pt2"
    path.parent.mkdir()
    monkeypatch.chdir(path.parent)
    result = run("export", "../model", "--format", "torch", "--form", "pack", "--json")
    path = path.relative_to(path.parent)  # what it is called if nothing is said
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["files"] == [str(path)] and document["bytes"] == path.stat().st_size
    assert document["error"] < 1e-4 and document["checked"] == 3
    assert [*path.parent.iterdir()] == [path]


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    encoder = encoder_of()
    wrong = files.Format(
        ".pt2",
        (),
        lambda graph, form, path: path.write_text("new"),
        lambda path: lambda inputs: [out.detach().numpy() * 1.001 for out in graph(*inputs)],
    )
    graph = graph_of(encoder, "batch")
    monkeypatch.setitem(FORMATS, "torch", wrong)
    path = tmp_path / "encoder.pt2"
    path.write_text("old")
    with pytest.raises(RuntimeError, match=r"last_hidden_state of images of \[\(2, 3\)\]"):
        export(encoder, path, format="torch")
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_what_cannot_be_written_is_named(tmp_path):
    encoder = encoder_of()
    for options, message in (
        ({"format": "caffe"}, "format='caffe': expected one of onnx, torch, openvino"),
        ({"form": "list"}, "form='list': expected one of batch, pack"),
        ({"format": "torch"}, "is called \\*.pt2"),
    ):
        with pytest.raises(ValueError, match=message):
            export(encoder, tmp_path / "a.onnx", **options)
    with pytest.raises(ValueError, match=r"is torch\.bfloat16 on cpu; graphs"):
        export(encoder_of().bfloat16(), tmp_path / "a.onnx")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("format", NOT_WRITTEN)
def test_formats_that_do_not_work_say_why(format, tmp_path):
    with pytest.raises(ValueError, match=f"{format}.* is not written: .{{40}}"):
        export(encoder_of(), tmp_path / "a", format=format)


def compare(encoder, form, run_file, count):
    """The file against the encoder on random shapes; the smallest image is one of them."""
    draw, graph = random.Random(0), graph_of(encoder, form)
    for k in range(count):
        images = 1 if k == 0 else draw.randint(1, 5)
        largest = 1 if k == 0 else 10
        sizes = [(draw.randint(1, largest), draw.randint(1, largest)) for _ in range(images)]
        sizes = [sizes[0]] * images if form == "batch" else sizes
        inputs = graph.random_inputs(sizes)
        with torch.no_grad():
            expected = graph(*inputs)
        for got, want in zip(run_file(inputs), expected, strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-4, err_msg=str(sizes))


@heavy
@pytest.mark.parametrize("form", GRAPHS)
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_one_file_serves_fifty_shapes(format, form, tmp_path):
    for package in FORMATS[format].packages:
        pytest.importorskip(package)
    encoder = pair_of()[1]
    path = tmp_path / f"encoder{FORMATS[format].suffix}"
    assert export(encoder, path, format=format, form=form).error < 1e-4
    compare(encoder, form, FORMATS[format].load(path), 50)


@heavy
@pytest.mark.parametrize("form", GRAPHS)
def test_a_program_of_torch_is_loaded_again(form, tmp_path):
    export(pair_of()[1], tmp_path / "encoder.pt2", format="torch", form=form)


def test_a_loaded_encoder_without_registers_is_saved_as_a_program_of_torch(tmp_path):
    encoder_of("no_registers_no_biases").save_pretrained(tmp_path)
    encoder = DINOv3Encoder.from_pretrained(tmp_path).eval()
    export(encoder, tmp_path / "encoder.pt2", format="torch")


@heavy
@pytest.mark.parametrize("name", ["vit_gated", "vit_7b", "no_registers_no_biases", "patch_8"])
def test_every_branch_of_the_family_is_exported(name, tmp_path):
    encoder = encoder_of(name)
    export(encoder, tmp_path / "encoder.onnx")
    compare(encoder, "batch", FORMATS["onnx"].load(tmp_path / "encoder.onnx"), 10)


@heavy
@pytest.mark.parametrize("form", GRAPHS)
@pytest.mark.parametrize("name", dinov2_models.FAMILY)
def test_every_branch_of_dinov2_is_exported(name, form, tmp_path):
    encoder = dinov2_models.pair_of(name, num_hidden_layers=1)[1]
    export(encoder, tmp_path / "encoder.onnx", form=form)
    compare(encoder, form, FORMATS["onnx"].load(tmp_path / "encoder.onnx"), 10)


@heavy
def test_weights_beyond_what_onnx_holds_go_into_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_ONE_FILE", 1000)
    encoder = encoder_of()
    out = export(encoder, tmp_path / "encoder.onnx")
    assert len(out.files) == 2
    compare(encoder, "batch", FORMATS["onnx"].load(tmp_path / "encoder.onnx"), 3)


@heavy
def test_transformers_own_model_is_the_judge_too(tmp_path):
    theirs, encoder = pair_of()
    assert isinstance(theirs, DINOv3ViTModel) and config_of().num_hidden_layers == 3
    export(encoder, tmp_path / "encoder.onnx")
    images = torch.randn(2, 3, 80, 48)
    hidden, _ = FORMATS["onnx"].load(tmp_path / "encoder.onnx")((images,))
    np.testing.assert_allclose(hidden, theirs(images)[0].detach().numpy(), rtol=1e-4, atol=1e-4)
