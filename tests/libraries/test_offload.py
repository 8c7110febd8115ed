"""Weights offloaded to memory or a disk by Hugging Face's accelerate: the same outputs."""

import copy

import accelerate
import numpy as np
import pytest
import torch

import hrvlm
from hrvlm import VisionLanguageModel
from tests.encoder.encoders import FAMILY, pair_of
from tests.encoder.kinds import OTHERS
from tests.encoder.kinds import pair_of as pair_of_kind
from tests.tiny import config_of, model_of, picture, processor_of

CPU = torch.device("cpu")


def offloaded(model, kind, folder):
    model = copy.deepcopy(model)
    if kind == "cpu":
        return accelerate.cpu_offload(model, execution_device=CPU)
    return accelerate.disk_offload(model, folder, execution_device=CPU)


def assert_equal_offloaded(model, run, kind, folder):
    """Offloaded, with no weight left in its place, `model` gives what it gave."""
    with torch.no_grad():
        expected = run(model)
        away = offloaded(model, kind, folder)
        assert all(p.is_meta for p in away.parameters())
        torch.testing.assert_close(run(away), expected)
        assert all(p.is_meta for p in away.parameters())


@pytest.mark.parametrize("kind", OTHERS)
def test_encoders_of_both_families_in_eager_and_on_the_kernels(kind, tmp_path, rng):
    _, encoder = pair_of_kind(kind, num_hidden_layers=1, num_attention_heads=1)
    patches = torch.randn(2, 768, generator=rng)

    def run(model):
        return model(patches, grids=[(1, 2)]).packed_last_hidden_state

    for where in ("cpu", "disk") if encoder.num_prefix_tokens > 1 else ("cpu",):
        assert_equal_offloaded(encoder, run, where, tmp_path / where)


def maps_empty_files(folder):
    try:
        np.memmap(folder / "empty", np.float32, "w+", shape=(1, 0))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("name", FAMILY)
def test_the_encoder_as_transformers(name, kind, tmp_path, rng):
    theirs, ours = pair_of(name, num_hidden_layers=1)
    if kind == "disk" and not theirs.config.num_register_tokens and not maps_empty_files(tmp_path):
        pytest.skip("this numpy maps no empty file, so accelerate can't offload an empty parameter")
    images = torch.randn(2, 3, 32, 48, generator=rng)
    for i, model in enumerate((theirs, ours)):
        assert_equal_offloaded(
            model, lambda model: model(images).last_hidden_state, kind, tmp_path / str(i)
        )


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_the_vlm(kind, tmp_path):
    config = config_of(mp_append_cls=True)
    inputs = processor_of(config=config)(images=[picture(60, 40)], text="<|image|>say")
    assert_equal_offloaded(model_of(config), lambda model: model(**inputs).logits, kind, tmp_path)


def test_an_accelerated_model_of_transformers(tmp_path, rng):
    model, _ = pair_of(num_hidden_layers=1)
    images = torch.randn(2, 3, 32, 48, generator=rng)
    hrvlm.accelerate(model)
    for kind in ("cpu", "disk"):
        assert_equal_offloaded(
            model, lambda model: model(images).last_hidden_state, kind, tmp_path / kind
        )


def test_a_vlm_loaded_with_a_device_map(tmp_path):
    model, inputs = model_of(), processor_of()(images=[picture(60, 40)], text="<|image|>say")
    model.save_pretrained(tmp_path / "vlm")
    loaded = VisionLanguageModel.from_pretrained(
        tmp_path / "vlm",
        device_map={"vision_encoder": "disk", "MP": "disk", "decoder": "cpu"},
        offload_folder=tmp_path / "folder",
    )
    assert loaded.MP.proj.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("part", ["MP", "vision_encoder"])
def test_layers_that_are_stored_in_another_dtype_than_they_compute_in(part):
    """accelerate's layerwise casting: what a linear layer takes is not the dtype of its weight."""
    cast = getattr(accelerate.big_modeling, "attach_layerwise_casting_hooks", None)
    if cast is None:
        pytest.skip("accelerate has it since 1.3")
    config = config_of(mp_append_cls=True)
    model, inputs = (
        model_of(config),
        processor_of(config=config)(images=[picture(60, 40)], text="<|image|>"),
    )
    with torch.no_grad():
        exact = model(**inputs).logits
        cast(model.get_submodule(part), torch.bfloat16, torch.float32)
        near = model(**inputs).logits
    assert 0 < (near - exact).norm() / exact.norm() < 0.05
