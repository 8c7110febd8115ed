"""Whole towers of transformers, accelerated: as stock, reversible, layouts made once a forward."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    VJEPA2Config,
    VJEPA2Model,
)
from transformers.models.pixtral import modeling_pixtral

import hrvlm
from benchmarks.towers.tiny import TOWERS, gradients_of, inputs_of, output_of, tower_of
from hrvlm import DINOv3Encoder, VisionLanguageModel, VLMConfig
from hrvlm.towers import layouts
from tests.encoder.encoders import config_of
from tests.numerics import relative_error
from tests.towers.attention_classes import build
from tests.towers.attention_classes import inputs as attention_inputs

# Windows and whole images have one each, so do MiniCPM's images after its windows are joined;
# Pixtral's comes in a mask's place, and those of padded images do.
LAYOUTS_OF_LENGTHS = {"qwen2_5_vl": 2, "minicpmv4_6": 3, "pixtral": 0}
LAYOUTS_OF_LENGTHS |= {"siglip2": 0, "idefics3": 0, "smolvlm": 0}


def assert_equal_gradients(mine, theirs, tolerance=1e-6):
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        # That of k's bias is zero but for rounding, of sums as large as those of its weight.
        scale = theirs[name.replace("k_proj.bias", "k_proj.weight")].norm()
        assert (mine[name] - gradient).norm() <= tolerance * scale, name


def layouts_made(monkeypatch):
    """Lengths of each layout that is made from here on."""
    made = []
    stock = layouts.PackedGrids.from_cu_seqlens

    def from_cu_seqlens(*args, **options):
        made.append(stock(*args, **options).lengths)
        return stock(*args, **options)

    monkeypatch.setattr(layouts.PackedGrids, "from_cu_seqlens", from_cu_seqlens)
    return made


@pytest.mark.parametrize("name", TOWERS)
def test_equals_stock_shares_its_weights_and_is_undone(name, monkeypatch):
    tower, inputs = tower_of(name), inputs_of(name)
    expected, gradients = gradients_of(tower, inputs)
    parameters, keys = dict(tower.named_parameters()), list(tower.state_dict())
    structure, attributes = str(tower), [sorted(vars(module)) for module in tower.modules()]

    report = hrvlm.accelerate(tower)
    assert report.model is tower and not report.left_alone
    made = layouts_made(monkeypatch)
    out, mine = gradients_of(tower, inputs)
    assert relative_error(out, expected) <= 1e-6
    assert_equal_gradients(mine, gradients)
    assert len(made) == len(set(made)) == LAYOUTS_OF_LENGTHS.get(name, 1)
    assert all(p is parameters[n] for n, p in tower.named_parameters())
    assert list(tower.state_dict()) == keys and str(tower) == structure

    assert hrvlm.restore(tower) is tower
    assert [sorted(vars(module)) for module in tower.modules()] == attributes
    assert "hrvlm_stock" not in {name for m in tower.modules() for name in vars(type(m))}
    assert torch.equal(output_of(tower, inputs), expected)


def test_pixtral_makes_no_dense_mask_and_its_checkpointing_none(monkeypatch):
    tower, inputs = tower_of("pixtral"), inputs_of("pixtral")
    expected, gradients = gradients_of(tower, inputs)
    hrvlm.accelerate(tower)
    monkeypatch.delattr(modeling_pixtral, "generate_block_attention_mask")
    for use_reentrant in (False, True):
        tower.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        inputs["pixel_values"].requires_grad_()
        out, mine = gradients_of(tower.train(), inputs)
        assert relative_error(out, expected) <= 1e-6
        assert_equal_gradients(mine, gradients)
    hrvlm.restore(tower)
    with pytest.raises(NameError, match="generate_block_attention_mask"):
        tower(**inputs)


@pytest.mark.parametrize("name", ["Mistral3", "LightOnOcr"])
def test_mistral3_and_lighton_ocr_by_their_pixtral(name, monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "head_dim": 16}
    vision = {"model_type": "pixtral", **sizes, "patch_size": 4, "image_size": 40}
    kind = "mistral" if name == "Mistral3" else "qwen3"
    text = {"model_type": kind, **sizes, "vocab_size": 32, "num_key_value_heads": 2}
    token = {"image_token_index" if name == "Mistral3" else "image_token_id": 31}
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text, **token)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).train()
    inputs = inputs_of("pixtral", ((1, 4, 6), (1, 8, 2)))
    ids = torch.tensor([[1, *[31] * 10, 2]])

    def logits_and_gradients():
        model.zero_grad()
        out = model(input_ids=ids, labels=ids, **inputs)
        out.loss.backward()
        own = {n: p.grad for n, p in model.named_parameters() if "vision" in n}
        return out.logits.detach(), own

    expected, gradients = logits_and_gradients()
    report = hrvlm.accelerate(model)
    monkeypatch.delattr(modeling_pixtral, "generate_block_attention_mask")  # N x N
    assert [part.cls for part in report.swapped] == ["PixtralAttention"]
    assert [part.cls for part in report.left_alone] == [f"{kind.title()}Attention"]
    logits, mine = logits_and_gradients()
    assert relative_error(logits, expected) <= 1e-6
    assert_equal_gradients(mine, gradients, 1e-5)


def test_vjepa2_keeps_its_own():
    """What it does to q and k is no rotation, and its attention has no lengths: it stays stock."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    sizes |= {"pred_hidden_size": 48, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
    config = VJEPA2Config(**sizes, crop_size=16, frames_per_clip=4, mlp_ratio=1)
    clips = VJEPA2Model(config).eval()
    video = torch.randn(2, 4, 3, 16, 16)
    expected = clips(video, skip_predictor=True).last_hidden_state
    (attention, *_) = [m for m in clips.modules() if type(m).__name__ == "VJEPA2RopeAttention"]
    q = torch.randn(1, 2, 8, 24)
    turned = attention.apply_rotary_embeddings(q, attention.get_position_ids(q[:, 0]))
    assert (turned.norm(dim=-1) / q.norm(dim=-1) - 1).abs().max() > 0.01
    report = hrvlm.accelerate(nn.ModuleList([clips, tower_of("pixtral")]))
    assert [(part.cls, part.reason) for part in report.left_alone] == [
        ("VJEPA2RopeAttention", "its forward takes no cu_seqlens")
    ]
    assert torch.equal(clips(video, skip_predictor=True).last_hidden_state, expected)
    with pytest.raises(ValueError, match=r"VJEPA2RopeAttention x 2 .* takes no cu_seqlens"):
        hrvlm.accelerate(clips)


def test_another_scale_would_be_noticed():
    tower, inputs = tower_of("qwen3_vl"), inputs_of("qwen3_vl")
    expected = output_of(tower, inputs)
    hrvlm.accelerate(tower)
    tower.blocks[1].attn.scaling *= 1.5
    assert relative_error(output_of(tower, inputs), expected) > 1e-3


def test_images_of_the_next_forward_have_their_own_layout():
    tower = tower_of("qwen2_5_vl")
    inputs = [inputs_of("qwen2_5_vl", grids) for grids in (((1, 4, 6),), ((1, 8, 2), (1, 2, 4)))]
    expected = [output_of(tower, each) for each in inputs]
    hrvlm.accelerate(tower)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            for each, out in zip(inputs, expected, strict=True):
                assert relative_error(output_of(tower, each), out) <= 1e-6


def test_lengths_that_change_in_place_are_read_anew():
    attention = tower_of("qwen3_vl").blocks[0].attn
    hrvlm.accelerate(attention)
    x, angles = torch.randn(8, 144), torch.zeros(8, 72)
    lengths = torch.tensor([0, 8, 8], dtype=torch.int32)
    rope = (angles.cos(), angles.sin())
    joined = attention(x, lengths, position_embeddings=rope)
    lengths[1] = 3
    parted = attention(x, lengths, position_embeddings=rope)
    assert relative_error(parted, joined) > 1e-3
    assert torch.equal(parted, attention(x, lengths.clone(), position_embeddings=rope))
    with torch.inference_mode():
        untracked = torch.tensor([0, 8, 8], dtype=torch.int32)
        assert torch.equal(attention(x, untracked, position_embeddings=rope), joined)
        untracked[1] = 3
        assert torch.equal(attention(x, untracked, position_embeddings=rope), parted)


def test_copies_and_pickles_are_accelerated_and_restored_for_themselves():
    tower, inputs = tower_of("qwen2_vl"), inputs_of("qwen2_vl")
    hrvlm.accelerate(tower)
    expected = output_of(tower, inputs)
    for twin in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert type(twin.blocks[0].attn) is type(tower.blocks[0].attn)
        assert torch.equal(output_of(hrvlm.restore(twin), inputs), expected)
    assert torch.equal(output_of(tower, inputs), expected)


def test_a_model_says_what_is_left_alone_and_saves_the_same_files(tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    text |= {"bos_token_id": None, "eos_token_id": None}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    options = tower_of("qwen2_5_vl").config.to_dict() | {"tokens_per_second": 2}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=options, image_token_id=60, vision_start_token_id=61
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    inputs = inputs_of("qwen2_5_vl")
    tokens = torch.tensor([[1, *(61, *[60] * 6, 2), *(61, *[60] * 4, 2), *(61, *[60] * 5, 2)]])
    call = {"input_ids": tokens, "pixel_values": inputs["hidden_states"]}
    call |= {"image_grid_thw": inputs["grid_thw"], "mm_token_type_ids": (tokens == 60).int()}
    with torch.no_grad():
        expected = model(**call).logits
    model.save_pretrained(tmp_path / "stock")
    report = hrvlm.accelerate(model)
    assert str(report).splitlines() == [
        "Acceleration of Qwen2_5_VLForConditionalGeneration",
        "  swapped     Qwen2_5_VLVisionAttention x 4 (model.visual.blocks.*.attn), "
        "RoPE in the kernels",
        "  left alone  Qwen2_5_VLAttention x 1 (model.language_model.layers.*.self_attn): "
        "its forward takes no cu_seqlens",
    ]
    with torch.no_grad():
        assert relative_error(model(**call).logits, expected) <= 1e-6
    model.save_pretrained(tmp_path / "accelerated")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "stock" / file).read_bytes() == (
            tmp_path / "accelerated" / file
        ).read_bytes()


def test_a_tower_that_runs_flash_attention_is_left_alone_and_said():
    tower = tower_of("qwen3_vl")
    tower.config._attn_implementation = "flash_attention_2"
    pair = nn.ModuleList([tower, tower_of("glm_ocr")])
    report = hrvlm.accelerate(pair)
    assert [part.cls for part in report.swapped] == ["GlmOcrVisionAttention"]
    assert "runs flash_attention_2 already" in str(report.left_alone[0])
    with pytest.raises(ValueError, match=r"Qwen3VLVisionAttention x 3 .*flash_attention_2 already"):
        hrvlm.accelerate(tower)


def test_a_model_without_any_raises_with_its_reasons():
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "image_size": 16}
    model = SiglipVisionModel(SiglipVisionConfig(**tiny, num_hidden_layers=2, patch_size=8))
    with pytest.raises(ValueError, match=r"SiglipAttention x 2 .*takes no cu_seqlens"):
        hrvlm.accelerate(model)


def test_an_encoder_of_this_package_needs_none():
    encoder = DINOv3Encoder(config_of())
    with pytest.raises(
        ValueError, match="in DINOv3Encoder:\n  DINOv3Encoder x 1: it runs packed al"
    ):
        hrvlm.accelerate(encoder)
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = VLMConfig(vision_config=encoder.config.to_dict(), text_config=text)
    with pytest.raises(ValueError, match=r"\(vision_encoder\): it runs packed already\n  LlamaAtt"):
        hrvlm.accelerate(VisionLanguageModel(config))
    report = hrvlm.accelerate(nn.ModuleList([encoder, tower_of("glm_ocr")]))
    assert [part.cls for part in report.left_alone] == ["DINOv3Encoder"]


def test_masks_attention_matrices_and_dropout_are_refused():
    tower, inputs = tower_of("glm4v", attention_dropout=0.5), inputs_of("glm4v")
    hrvlm.accelerate(tower)
    output_of(tower, inputs)
    with pytest.raises(ValueError, match=r"attention dropout is 0\.5"):
        output_of(tower.train(), inputs)
    with pytest.raises(ValueError, match="output_attentions"):
        tower.eval()(**inputs, output_attentions=True)
    attention = build("hunyuan_vl", "HunYuanVLVisionAttention")
    given = attention_inputs(attention, (3, 5)) | {"attention_mask": torch.zeros(1, 1, 8, 8)}
    hrvlm.accelerate(attention)
    with pytest.raises(ValueError, match="attention_mask"):
        attention(**given)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, monkeypatch):
    tower, inputs = tower_of("qwen2_5_vl"), inputs_of("qwen2_5_vl")
    hrvlm.accelerate(tower)
    inputs["hidden_states"].requires_grad_()
    out, gradients = gradients_of(tower, inputs)
    tower.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    made = layouts_made(monkeypatch)
    again, recomputed = gradients_of(tower.train(), inputs)
    assert torch.equal(again, out)
    assert_equal_gradients(recomputed, gradients, tolerance=0)
    assert len(made) == 2, "a recomputed layer made a layout"


def test_adapters_after_accelerating():
    peft = pytest.importorskip("peft")
    tower, inputs = tower_of("qwen3_vl"), inputs_of("qwen3_vl")
    options = peft.LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False)
    torch.manual_seed(3)
    expected, gradients = gradients_of(peft.get_peft_model(copy.deepcopy(tower), options), inputs)
    torch.manual_seed(3)
    hrvlm.accelerate(tower)
    out, mine = gradients_of(peft.get_peft_model(tower, options), inputs)
    assert relative_error(out, expected) <= 1e-6
    assert any("lora_A" in name for name in mine)
    assert_equal_gradients(mine, gradients)
