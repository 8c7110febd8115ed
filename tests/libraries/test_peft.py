"""Adapters by PEFT on every module of all three parts: encoder, projector and language model."""

import copy

import pytest
import torch
from torch import nn

from hrvlm import VisionLanguageModel
from tests.encoder.kinds import KINDS, OTHERS, pair_of
from tests.tiny import config_of, model_of, picture, processor_of, text_config_of

peft = pytest.importorskip("peft")

TARGETS = ["qkv", "o_proj", "up_proj", "down_proj", "proj", "q_proj", "k_proj", "v_proj"]


def inputs_of(config):
    images = [picture(60, 40), picture(16, 64, seed=1)]
    return processor_of(config=config)(images=images, text="<|image|>and<|image|>say")


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("append_cls", [False, True])
def test_adapters_of_all_parts_learn_reload_and_merge(append_cls, tmp_path):
    config = config_of(mp_append_cls=append_cls)
    model, inputs = model_of(config), inputs_of(config)
    model.save_pretrained(tmp_path / "base")
    before = logits_of(model, inputs)
    targets = TARGETS + ["cls_proj"] * append_cls
    # Not the usual start from zero, so that every adapter matters at once.
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, lora)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    for part in ("vision_encoder.layer.0.attention.qkv", "MP.proj", "decoder.model.layers.0"):
        assert any(part in name for name in trained), part
    for name, parameter in trained.items():
        assert "lora_" in name and parameter.grad.abs().max() > 0, name

    after = logits_of(adapted, inputs)
    assert (after - before).abs().max() > 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = VisionLanguageModel.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(logits_of(again, inputs), after)

    merged = again.merge_and_unload()
    assert type(merged) is VisionLanguageModel
    torch.testing.assert_close(logits_of(merged, inputs), after, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(loaded, inputs), logits_of(merged, inputs))


def test_an_adapter_of_the_projector_alone_changes_the_image_features_only():
    config = config_of()
    model, inputs = model_of(config), inputs_of(config)
    text = processor_of(config=config)(text="say")
    before, said = logits_of(model, inputs), logits_of(model, text)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["MP.proj"], init_lora_weights=False)
    )
    assert (logits_of(adapted, inputs) - before).abs().max() > 0.01
    assert torch.equal(logits_of(adapted, text), said)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits_of(adapted, inputs), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapters_on_every_module_of_an_encoder_learn_and_merge(kind, use_dora, rng):
    _, encoder = pair_of(kind, num_hidden_layers=1, num_attention_heads=1)
    patches = torch.randn(2, 768, generator=rng)

    def run():
        return encoder.eval()(patches, grids=[(1, 2)]).packed_last_hidden_state

    lora = peft.LoraConfig(
        r=2,
        target_modules=names_of(encoder, *ADAPTABLE),
        init_lora_weights=False,
        use_dora=use_dora,
    )
    with torch.no_grad():
        before = run()
        torch.manual_seed(0)
        adapted = peft.get_peft_model(encoder, lora)
        after = run()
    assert (after - before).abs().max() > 0.1
    run().square().sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.any() for p in trained)
    with torch.no_grad():
        assert adapted.merge_and_unload() is encoder
        torch.testing.assert_close(run(), after, rtol=0, atol=1e-4)


def names_of(model, *kinds):
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


ADAPTABLE = (nn.Linear, nn.Conv2d, nn.Embedding)
WITH_ALL = {"text": text_config_of(tie_word_embeddings=False), "mp_append_cls": True}
TUNERS = {
    "lora": lambda model: peft.LoraConfig(
        r=4, target_modules=names_of(model, *ADAPTABLE), init_lora_weights=False
    ),
    "dora": lambda model: peft.LoraConfig(
        r=4, target_modules=names_of(model, *ADAPTABLE), init_lora_weights=False, use_dora=True
    ),
    "lora on parameters": lambda model: peft.LoraConfig(
        r=4,
        target_modules=[],
        target_parameters=["qkv.weight", "MP.proj.weight"],
        init_lora_weights=False,
    ),
    "lokr": lambda model: peft.LoKrConfig(
        target_modules=names_of(model, nn.Linear, nn.Conv2d), init_weights=False
    ),
    "oft": lambda model: peft.OFTConfig(
        r=0, oft_block_size=4, target_modules=names_of(model, nn.Linear), init_weights=False
    ),
    "norms": lambda model: peft.LNTuningConfig(target_modules=names_of(model, nn.LayerNorm)),
}


# PEFT's tuning of norms asks a LayerNorm for the number of its inputs, which it has none of.
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("tuner", TUNERS)
def test_adapters_on_every_module_learn_and_merge_to_the_same_output(tuner):
    config = config_of(**WITH_ALL)
    model, inputs = model_of(config), inputs_of(config)
    before = logits_of(model, inputs)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, TUNERS[tuner](model))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():  # where they start is the base layer's own for these
        for name, parameter in trained.items():
            if "magnitude" in name or tuner == "norms":
                parameter.mul_(1.3)
    after = logits_of(adapted, inputs)
    assert (after - before).abs().max() > 0.1
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    merged = logits_of(adapted.merge_and_unload(), inputs)
    torch.testing.assert_close(merged, after, rtol=0, atol=1e-4)


def test_an_adapter_of_any_one_module_changes_the_output():
    config = config_of(**WITH_ALL)
    model, inputs = model_of(config), inputs_of(config)
    before = logits_of(model, inputs)
    for name in names_of(model, *ADAPTABLE):
        lora = peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False)
        adapted = peft.get_peft_model(model, lora)
        assert (logits_of(adapted, inputs) - before).abs().max() > 1e-3, name
        model = adapted.unload()
    assert torch.equal(logits_of(model, inputs), before)


def gradients_of(model, run, targets, *, reentrant=None, **options):
    """Those of all adapters after one step; `reentrant` None is without checkpointing."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora).train()
    if reentrant is not None:
        adapted.base_model.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        adapted.base_model.model.enable_input_require_grads()
    run(adapted).backward()
    return {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("part", ["transformers", *KINDS, "vlm"])
def test_checkpointing_gives_every_adapter_its_gradient(part, use_dora, rng):
    own = part if part in KINDS else "dinov3"
    theirs, ours = pair_of(own, num_hidden_layers=2)
    images = torch.randn(2, 3, 32, 32 if "kernels" in part else 48, generator=rng)
    model = theirs if part == "transformers" else ours
    tokens = ours.num_prefix_tokens + images.shape[-1] // 8
    cotangent = torch.randn(2, tokens, 64, generator=rng)
    targets = {
        kind: ["patch_embeddings", "qkv", "o_proj", "up_proj", "down_proj"] for kind in KINDS
    }
    targets["transformers"] = ["q_proj", "v_proj"]

    def run(model):
        return (model(images).last_hidden_state * cotangent).sum()

    if part == "vlm":
        config = config_of()
        model, inputs = model_of(config), inputs_of(config)

        def run(model):
            return model(**inputs, labels=inputs["input_ids"]).loss

    wanted = targets.get(part, ["patch_embeddings", "qkv", "down_proj", "proj", "q_proj"])
    plain = gradients_of(model, run, wanted, use_dora=use_dora)
    assert plain and all(g is not None and g.any() for g in plain.values())
    for reentrant in (True, False):
        kept = gradients_of(model, run, wanted, reentrant=reentrant, use_dora=use_dora)
        for name, gradient in plain.items():
            assert kept[name] is not None, (name, reentrant)
            torch.testing.assert_close(kept[name], gradient, msg=f"{name} {reentrant}")


def test_an_adapter_of_a_frozen_encoder_learns(rng):
    _, encoder = pair_of("dinov3", num_hidden_layers=2)
    images = torch.randn(2, 3, 32, 48, generator=rng)
    assert encoder.freeze()(images).last_hidden_state.grad_fn is None
    lora = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)
    adapted = peft.get_peft_model(encoder, lora)
    adapted(images).last_hidden_state.square().sum().backward()
    assert all(p.grad.any() for p in adapted.parameters() if p.requires_grad)


PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


# Positions are counted from the mask, with the prompt in front: PEFT drops those that are given.
@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning")
@pytest.mark.parametrize("method", PROMPTS)
def test_learned_prompts_stand_before_images_and_text(method):
    config = config_of()
    model, inputs = model_of(config), inputs_of(config)
    text = processor_of(config=config)(text="say")
    before = {id(i): logits_of(model, i) for i in (inputs, text)}
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, PROMPTS[method]())
    assert adapted.word_embeddings is model.get_input_embeddings()
    for own in (inputs, text):
        logits = logits_of(adapted, own)[:, -before[id(own)].shape[1] :]
        assert (logits - before[id(own)]).abs().max() > 1e-3
        adapted.train()(**own, labels=own["input_ids"]).loss.backward()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        assert trained and all(p.grad.any() for p in trained)
        new = adapted.eval().generate(**own, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert new.shape[1] == own["input_ids"].shape[1] + 3
