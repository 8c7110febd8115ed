"""The vision-language model on a GPU: logits, gradients and generated tokens."""

import pytest
import torch

from tests.tiny import model_of
from tests.vlm.test_vision_language_model import batch_of

pytestmark = pytest.mark.gpu


def moved(batch, dtype=torch.float32):
    batch = {name: a.to("cuda") for name, a in batch.items()}
    return batch | {"pixel_values": batch["pixel_values"].to(dtype)}


def test_forward_and_generate():
    model, batch = model_of().eval(), batch_of()
    greedy = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        expected = model(**batch).logits
    tokens = model.generate(**batch, **greedy)
    model.to("cuda")
    with torch.no_grad():
        logits = model(**moved(batch)).logits
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(logits.cpu()[kept], expected[kept], rtol=1e-3, atol=1e-3)
    assert torch.equal(model.generate(**moved(batch), **greedy).cpu(), tokens)


def test_a_training_step_in_bfloat16():
    model, batch = model_of().to("cuda", torch.bfloat16).train(), moved(batch_of(), torch.bfloat16)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert "MP.proj.weight" in trained
    assert any("layer.0.attention" in name for name in trained)
    assert all(p.grad.isfinite().all() for p in trained.values())
