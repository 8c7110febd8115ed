"""pixel_shuffle_linear in the orders of other models' patch mergers: equal to their own code.

On images that are not square, packed together: forward and gradients, eager and by the kernels.
Code that is for squares alone gets an image that is not one in squares of one token each.
"""

import pytest
import torch
from torch import nn
from transformers import (
    AyaVisionConfig,
    Cohere2VisionConfig,
    Idefics3Config,
    Lfm2VlConfig,
    LightOnOcrConfig,
    Mistral3Config,
    PaddleOCRVLConfig,
    SmolVLMConfig,
)
from transformers.models.aya_vision.modeling_aya_vision import AyaVisionMultiModalProjector
from transformers.models.cohere2_vision.modeling_cohere2_vision import (
    Cohere2VisionMultiModalProjector,
)
from transformers.models.glm4v import modeling_glm4v
from transformers.models.glm_ocr import modeling_glm_ocr
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlMultiModalProjector
from transformers.models.lighton_ocr.modeling_lighton_ocr import LightOnOcrPatchMerger
from transformers.models.llama4.modeling_llama4 import pixel_shuffle as llama4_pixel_shuffle
from transformers.models.mistral3.modeling_mistral3 import Mistral3PatchMerger
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRProjector
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from hrvlm_kernels import PackedGrids, pixel_shuffle_linear
from hrvlm_kernels.merge_orders import MERGE_ORDERS
from tests.numerics import relative_error

CHANNELS, FEATURES = 8, 12
GRIDS = [(2, 6), (4, 2), (4, 4), (6, 4)]
LENGTHS = [h * w for h, w in GRIDS]
TEXT = {"hidden_size": FEATURES, "num_attention_heads": 2, "num_key_value_heads": 2}
VISION = {"hidden_size": CHANNELS, "patch_size": 4}


class Merger(nn.Module):
    """A norm, a merger's linear layer and the layers behind it, by the ops; and stock code.

    Args:
        stock: From features ``[T, C]`` to tokens.
        linear: Whose weight the op takes.
        before: From features to what is merged.
        after: From what the linear layer gives to the stock result.
    """

    def __init__(self, stock, linear, before=None, after=None):
        super().__init__()
        self.stock, self.linear = stock, linear
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, x, order, backend="eager", prefix=0):
        packed = PackedGrids.from_grids(GRIDS, num_prefix_tokens=prefix)
        weight = self.linear.weight.flatten(1)
        x = self.before(x)
        merged = pixel_shuffle_linear(
            x, packed, 2, weight, self.linear.bias, order=order, backend=backend
        )
        return self.after(merged)


def of_shuffle(shuffle):
    """Merger whose own code is a function of one image ``[h, w, C]`` to rows, and a matrix."""
    linear = nn.Linear(4 * CHANNELS, FEATURES)

    def stock(x):
        images = zip(GRIDS, x.split(LENGTHS), strict=True)
        return linear(torch.cat([shuffle(image.view(h, w, -1)) for (h, w), image in images]))

    return Merger(stock, linear)


def of_squares(shuffle):
    """Likewise, by a function of a square ``[1, n*n, C]``."""

    def rows(image):
        squares = [image]
        if image.shape[0] != image.shape[1]:
            squares = [cut for row in image.split(2) for cut in row.split(2, dim=1)]
        return torch.cat([shuffle(cut.flatten(0, 1)[None]).flatten(0, -2) for cut in squares])

    return of_shuffle(rows)


def nanovlm():
    """As published: rows of (dy, dx, channel), token by token."""

    def rows(image):
        tokens = [cut.flatten() for row in image.split(2) for cut in row.split(2, dim=1)]
        return torch.stack(tokens)

    return of_shuffle(rows)


def idefics3():
    config = Idefics3Config(vision_config=VISION, text_config=TEXT, scale_factor=2)
    return of_squares(lambda x: Idefics3Connector(config).pixel_shuffle(x, 2))


def smolvlm():
    config = SmolVLMConfig(vision_config=VISION, text_config=TEXT, scale_factor=2)
    return of_squares(lambda x: SmolVLMConnector(config).pixel_shuffle(x, 2))


def aya():
    config = AyaVisionConfig(vision_config=VISION, text_config=TEXT, downsample_factor=2)
    return of_squares(AyaVisionMultiModalProjector(config).pixel_shuffle)


def cohere2():
    config = Cohere2VisionConfig(vision_config=VISION, text_config=TEXT, downsample_factor=2)
    return of_squares(Cohere2VisionMultiModalProjector(config).pixel_shuffle)


def llama4():
    return of_squares(lambda x: llama4_pixel_shuffle(x, 0.5))


def internvl_v2():
    return of_shuffle(lambda image: InternVLModel.pixel_shuffle(None, image[None]).flatten(0, 2))


def internvl_v1():
    """As published: where "v2" swaps height and width back at the end, "v1" does not."""

    def rows(image):
        h, w, channels = image.shape
        x = image.reshape(h, w // 2, channels * 2).permute(1, 0, 2)
        return x.reshape(w // 2 * (h // 2), channels * 4)

    return of_shuffle(rows)


def lfm2_vl():
    config = Lfm2VlConfig(
        vision_config=VISION,
        text_config={**TEXT, "model_type": "llama"},
        downsample_factor=2,
        projector_hidden_size=16,
        projector_use_layernorm=False,
    )
    whole = Lfm2VlMultiModalProjector(config)

    def stock(x):
        images = zip(GRIDS, x.split(LENGTHS), strict=True)
        return torch.cat([whole(image.view(1, h, w, -1)).flatten(0, 2) for (h, w), image in images])

    return Merger(stock, whole.linear_1, after=nn.Sequential(whole.act, whole.linear_2))


def paddleocr_vl():
    vision = {"hidden_size": CHANNELS, "spatial_merge_size": 2}
    whole = PaddleOCRProjector(PaddleOCRVLConfig(vision_config=vision, text_config=TEXT))
    grids = torch.tensor([(1, h, w) for h, w in GRIDS])
    after = nn.Sequential(whole.act, whole.linear_2)
    return Merger(lambda x: whole(x, grids), whole.linear_1, whole.pre_norm, after)


def qwen2_vl(merger_class=PatchMerger):
    whole = merger_class(FEATURES, CHANNELS)
    return Merger(whole, whole.mlp[0], whole.ln_q, whole.mlp[1:])


def qwen3_vl():
    whole = Qwen3VLVisionPatchMerger(
        Qwen3VLVisionConfig(hidden_size=CHANNELS, out_hidden_size=FEATURES)
    )
    after = nn.Sequential(whole.act_fn, whole.linear_fc2)
    return Merger(whole, whole.linear_fc1, whole.norm, after)


def mistral3():
    vision = {**VISION, "model_type": "pixtral"}
    whole = Mistral3PatchMerger(Mistral3Config(vision_config=vision, spatial_merge_size=2))
    return Merger(lambda x: whole(x, 4 * torch.tensor(GRIDS)), whole.merging_layer)


def lighton_ocr():
    vision = {**VISION, "model_type": "pixtral"}
    whole = LightOnOcrPatchMerger(LightOnOcrConfig(vision_config=vision, spatial_merge_size=2))
    return Merger(lambda x: whole(x, 4 * torch.tensor(GRIDS)), whole.merging_layer)


class ByGlm(nn.Module):
    """Stock code of GLM's tower from its last norm to its convolution."""

    def __init__(self, tower):
        super().__init__()
        self.tower, self.norm = tower, tower.post_layernorm
        tower.blocks = nn.ModuleList()
        self.given = self.found = None
        self.norm.register_forward_hook(lambda *_: self.given)
        tower.downsample.register_forward_hook(self.keep)

    def keep(self, module, args, out):
        self.found = out.flatten(1)

    def forward(self, x):
        self.given = x
        grids = torch.tensor([(1, h, w) for h, w in GRIDS])
        config = self.tower.config
        size = 3 * config.temporal_patch_size * config.patch_size**2
        self.tower(torch.zeros(len(x), size), grid_thw=grids)
        return self.found


def glm(home=modeling_glm4v, name="Glm4v"):
    config_class = getattr(home, f"{name}VisionConfig")
    sizes = {"depth": 1, "hidden_size": CHANNELS, "num_heads": 1, "out_hidden_size": FEATURES}
    tower = getattr(home, f"{name}VisionModel")(config_class(**sizes, intermediate_size=16))
    return Merger(ByGlm(tower), tower.downsample)


MERGERS = {
    "nanoVLM": ("nanovlm", nanovlm),
    "Idefics3": ("nanovlm", idefics3),
    "SmolVLM": ("nanovlm", smolvlm),
    "Aya Vision": ("raster", aya),
    "Command A Vision": ("raster", cohere2),
    "Llama 4": ("raster", llama4),
    "LFM2-VL": ("raster", lfm2_vl),
    "PaddleOCR-VL": ("raster", paddleocr_vl),
    "InternVL v1": ("internvl_v1", internvl_v1),
    "InternVL v2": ("internvl_v2", internvl_v2),
    "Qwen2-VL": ("qwen", qwen2_vl),
    "Qwen2.5-VL": ("qwen", lambda: qwen2_vl(Qwen2_5_VLPatchMerger)),
    "Qwen3-VL": ("qwen", qwen3_vl),
    "Mistral 3": ("mistral", mistral3),
    "LightOnOCR": ("mistral", lighton_ocr),
    "GLM-4.1V": ("glm", glm),
    "GLM-OCR": ("glm", lambda: glm(modeling_glm_ocr, "GlmOcr")),
}


def gradients(function, x, merger, cotangent):
    x = x.clone().requires_grad_()
    merger.zero_grad()
    out = function(x)
    out.backward(cotangent)
    return [out.detach(), x.grad, *(a.grad.clone() for a in merger.linear.parameters())]


@pytest.mark.parametrize("model", MERGERS)
def test_equals_the_models_own_merger(model, rng):
    torch.manual_seed(0)
    order, make = MERGERS[model]
    merger = make()
    for parameter in merger.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    x = torch.randn(sum(LENGTHS), CHANNELS, generator=rng)
    tokens = merger.stock(x)
    cotangent = torch.randn(tokens.shape, generator=rng)
    expected = gradients(merger.stock, x, merger, cotangent)
    for backend in ("eager", "triton"):

        def ours(x, backend=backend):
            return merger(x, order, backend)

        for found, stock in zip(gradients(ours, x, merger, cotangent), expected, strict=True):
            assert relative_error(found, stock) <= 2e-6, backend
    for name, other in MERGE_ORDERS.items():
        if other != MERGE_ORDERS[order]:
            assert relative_error(merger(x, name), tokens) > 0.1, name
    with_cls = [torch.cat((torch.zeros(1, CHANNELS), image)) for image in x.split(LENGTHS)]
    again = merger(torch.cat(with_cls), order, "triton", prefix=1)
    assert relative_error(again, tokens) <= 2e-6


def test_every_order_has_a_model_and_others_are_refused(rng):
    assert {order for order, _ in MERGERS.values()} == set(MERGE_ORDERS)
    packed, x = PackedGrids.from_grids(GRIDS), torch.randn(sum(LENGTHS), CHANNELS, generator=rng)
    with pytest.raises(ValueError, match="order='qwen2': expected one of nanovlm, raster"):
        pixel_shuffle_linear(x, packed, 2, torch.ones(1, 4 * CHANNELS), order="qwen2")
    with pytest.raises(ValueError, match="image 0: patch grid 2x6 is not divisible by"):
        packed.shuffle_index(4, "internvl_v1")
