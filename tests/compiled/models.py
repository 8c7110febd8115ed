"""The encoder, and the language model's way through the projector, end to end on compiled kernels.

Everything between the kernels is torch on the CPU: products of the linear layers, GELU, the
language model. Judged as the encoder is everywhere: against float64, by the error of plain torch.
"""

import copy
from collections.abc import Iterator

import torch
from transformers import DINOv3ViTConfig

from hrvlm import DINOv3Encoder
from hrvlm.vlm.vision_language_model import VisionLanguageModel
from hrvlm_kernels import PackedGrids
from tests import tiny
from tests.compiled.cases import BOTH, Case
from tests.numerics import assert_contraction

# A page, a strip, a square, one patch: 365, 53, 69 and 6 tokens, short images and long ones.
GRIDS = [(18, 20), (2, 24), (8, 8), (1, 1)]
KINDS = {
    "ViT": {"num_attention_heads": 2},
    "gated MLP, head_dim 32": {
        "num_attention_heads": 4, "use_gated_mlp": True, "hidden_act": "silu",
    },
}  # fmt: skip


def model_cases() -> Iterator[Case]:
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for kind in KINDS:
            core = BOTH if (label, kind) == ("bf16", "ViT") else ()
            core = (80,) if (label, kind) == ("bf16", "gated MLP, head_dim 32") else core
            name = f"encoder of 2 layers, {kind}, forward and backward"
            yield Case(
                "DINOv3Encoder", label, name, lambda k=kind, d=dtype: check_encoder(k, d), core
            )
        name = "images to the loss and back, two samples, three images"
        core = (90,) if label == "bf16" else ()
        yield Case("VisionLanguageModel", label, name, lambda d=dtype: check_vlm(d), core)


def encoder_of(kind: str, dtype: torch.dtype) -> DINOv3Encoder:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    config = DINOv3ViTConfig(num_register_tokens=4, **sizes, **KINDS[kind])
    encoder = tiny.randomize(DINOv3Encoder(config), seed=1).eval().to(dtype)
    return encoder


def check_encoder(kind: str, dtype: torch.dtype) -> None:
    """Output, and the gradients of the pixels and of every weight."""
    packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=5)
    encoder = encoder_of(kind, dtype)
    rng = torch.Generator().manual_seed(0)
    patches = torch.randn(sum(hp * wp for hp, wp in GRIDS), 768, generator=rng).to(dtype)
    cotangent = torch.randn(packed.total_tokens, 128, generator=rng)

    def run(model, backend):
        model.backend = backend
        leaf = patches.to(next(model.parameters()).dtype).requires_grad_()
        out = model(leaf, grids=packed).packed_last_hidden_state
        used = {name: p for name, p in model.named_parameters() if "mask_token" not in name}
        grads = torch.autograd.grad(out, [leaf, *used.values()], cotangent.to(out.dtype))
        return [out.detach(), *grads]

    compare(run, encoder, packed)


def check_vlm(dtype: torch.dtype) -> None:
    """Features, logits, and the gradients of the pixels, the projector and the encoder."""
    vision = tiny.vision_config_of(hidden_size=128, intermediate_size=192)
    model = tiny.model_of(tiny.config_of(vision)).to(dtype)
    grids = torch.tensor([(18, 20), (4, 4), (2, 6)])
    image = model.config.image_token_id
    texts = [[7, *[image] * 90, 8, *[image] * 4, 9], [50, *[image] * 3, 51, 52]]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    rng = torch.Generator().manual_seed(0)
    patches = tiny.images_of(grids.tolist(), rng).to(dtype)
    cotangent = torch.randn(*ids.shape, model.config.text_config.vocab_size, generator=rng)

    def run(model: VisionLanguageModel, backend: str):
        model.vision_encoder.backend = model.MP.backend = backend
        leaf = patches.to(next(model.parameters()).dtype).requires_grad_()
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        out = model(**inputs, pixel_values=leaf, image_grid_hw=grids)
        weights = [model.MP.proj.weight, model.vision_encoder.layer[0].attention.qkv.weight]
        grads = torch.autograd.grad(out.logits, [leaf, *weights], cotangent.to(out.logits.dtype))
        logits = out.logits.detach()[ids != 0]
        return [out.image_hidden_states.detach(), logits, *grads]

    compare(run, model)


def compare(run, model, packed=None) -> None:
    """Kernels against float64, by the error of plain torch in the model's dtype."""
    got, baseline = run(model, "triton"), run(model, "eager")
    exact = run(copy.deepcopy(model).double(), "eager")
    for a, b, c in zip(got, exact, baseline, strict=True):
        assert_contraction(a, b, c, packed)
