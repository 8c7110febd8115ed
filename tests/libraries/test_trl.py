"""TRL's SFTTrainer on chats with images, in the forms of data that it knows."""

import pytest
import torch
from peft import LoraConfig

from tests.tiny import config_of, model_of, picture, processor_of

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
if int(trl.__version__.partition(".")[0]) < 1:
    pytest.skip("TRL asks processors for what tokenizers have, before 1.0", allow_module_level=True)

QUESTION, ANSWER = "What is it?", "a square"
FORMS = {
    "messages": {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "prompt and completion": {
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": ANSWER}],
    },
    "text": {"text": f"<|image|>{QUESTION} {ANSWER}<eos>"},
}


@pytest.mark.parametrize("form", FORMS)
def test_sft_trains_every_part_on_images(form, tmp_path):
    model, before = trained(form, tmp_path)
    for part in ("vision_encoder.layer.0.attention.qkv", "MP.proj", "decoder.model.layers.0.mlp"):
        moved = [
            not torch.equal(p, before[name])
            for name, p in model.named_parameters()
            if name.startswith(part)
        ]
        assert moved and all(moved), part


def test_sft_trains_adapters_on_images(tmp_path):
    lora = LoraConfig(r=2, target_modules=["qkv", "MP.proj", "q_proj"])
    model, before = trained("messages", tmp_path, peft_config=lora)
    names = {name for name, p in model.named_parameters() if "lora_B" in name and p.any()}
    for part in ("attention.qkv", "MP.proj", "q_proj"):
        assert any(part in name for name in names), part
    for name, value in before.items():
        kept = name.replace("_proj.weight", "_proj.base_layer.weight") if "q_proj" in name else name
        kept = kept.replace("qkv.weight", "qkv.base_layer.weight")
        kept = kept.replace("MP.proj.weight", "MP.proj.base_layer.weight")
        assert torch.equal(model.get_parameter(kept), value), name


def trained(form, tmp_path, **options):
    """The model after two steps, and its parameters before."""
    config = config_of()
    model = model_of(config)
    rows = [{"images": [picture(24 + 16 * i, 40, i)]} | FORMS[form] for i in range(4)]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_length=None,
        remove_unused_columns=form != "text",  # which TRL takes for unused beside images
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor_of(config=config),
        **options,
    )
    assert trainer.train().training_loss > 0
    return model, before
