"""The model under torch.compile with its defaults, and generation with a cache of fixed length."""

import json
import os
import shutil

import pytest
import torch
from transformers.generation import CompileConfig

from hrvlm.training.run import train
from hrvlm.vlm.vision_language_model import VisionLanguageModel
from tests.tiny import model_of
from tests.training import runs
from tests.vlm.test_vision_language_model import IMAGE, alone, batch_of

SIZES = [[(4, 6)], [(8, 2)], [(2, 2), (4, 4)], [(6, 2), (2, 4)], [(4, 8)], [(2, 6), (2, 6), (6, 4)]]
OF_INDUCTOR = {False: SIZES[:2], True: SIZES[:3]}  # a graph takes its C++ compiler a minute


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch_with(grids):
    text = [7, *(i for hp, wp in grids for i in [*[IMAGE] * (hp * wp // 4), 9])]
    return batch_of([text], grids)


dear = pytest.mark.skipif(
    "HRVLM_EXPORTS" not in os.environ, reason="run by `make exports`: minutes"
)


@dear
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_model_takes_image_after_image_of_other_sizes(training, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    model = model_of().train(training)
    compiled = torch.compile(model, backend=backend)
    for grids in SIZES if backend == "eager" else OF_INDUCTOR[training]:
        batch = batch_with(grids)
        with torch.set_grad_enabled(training):
            want, got = (run(**batch, labels=batch["input_ids"]) for run in (model, compiled))
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
        if training:
            gradients = []
            for loss in (want.loss, got.loss):
                model.zero_grad()
                loss.backward()
                gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
            torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@dear
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_a_trainer_compiles_the_model(tmp_path):
    """Trainer's torch_compile=True, over rows of none, one and two images of two sizes."""
    model = runs.save_model(tmp_path / "model")
    rows = {"kind": "jsonl", "path": str(runs.save_rows(tmp_path / "rows"))}
    histories = []
    for name, options in (("plain", {}), ("compiled", {"torch_compile": True})):
        train(runs.config_of(tmp_path / name, model, rows, **options))
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        histories.append([log["loss"] for log in state["log_history"] if "loss" in log])
    assert len(histories[0]) == 4
    torch.testing.assert_close(*map(torch.tensor, histories), rtol=1e-4, atol=1e-4)


def test_steps_with_a_static_cache_are_one_graph():
    model, inputs = model_of(), alone(batch_of(), 0)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options["cache_implementation"] = "static"
    want = model.generate(**inputs, **options, disable_compile=True)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    counters = torch._dynamo.utils.counters
    counters.clear()
    got = model.generate(**inputs, **options, compile_config=config)
    assert torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_a_graph_of_the_language_model_serves_any_images(monkeypatch):
    """The encoder, which on a CPU has a graph for each number of images, runs as it is."""
    graphs = []

    def counting(graph, example):
        graphs.append([getattr(node.target, "__name__", "") for node in graph.graph.nodes])
        return graph.forward

    model = model_of()
    monkeypatch.setattr(
        VisionLanguageModel, "encode_images", torch.compiler.disable(model.encode_images.__func__)
    )
    compiled = torch.compile(model, backend=counting)
    for grids in (*SIZES[:3], SIZES[5]):
        batch = batch_with(grids)
        with torch.no_grad():
            got, want = (run(**batch) for run in (compiled, model))
        assert torch.equal(got.logits, want.logits)
        shapes = [tokens.shape for tokens in got.image_outputs.pooler_output]
        assert shapes == [(hp * wp // 4, 48) for hp, wp in grids]
    decoders = [graph for graph in graphs if "cross_entropy" in graph or "silu" in graph]
    assert 1 <= len(decoders) <= 3, len(decoders)
    batch = batch_with([(4, 6)])
    with pytest.raises(ValueError, match="got 6 image placeholders, expected 4"):
        compiled(**batch | {"image_grid_hw": [(4, 4)], "pixel_values": batch["pixel_values"][:16]})
