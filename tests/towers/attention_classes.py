"""All vision attention classes of the installed transformers, found by AST, and a run of each."""

import ast
import copy
import inspect
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
import transformers
from torch import nn

import hrvlm
from benchmarks.towers.forms import SIZES
from tests.numerics import assert_close

_MODELS = Path(transformers.__file__).parent / "models"
_CLASS = re.compile(r"^class \w.*?(?=^[A-Za-z@_]|\Z)", re.M | re.S)
_VISION = re.compile(r"^class \w*(Vision|ViT|Dinov2|DINOv3|CLIP|Siglip|Pixtral)\w*Attention", re.M)
_SIZED_MODEL = re.compile(rf"class \w+\(\w+PreTrainedModel\):.*\b({'|'.join(SIZES)}): ", re.S)


def number_of_towers() -> int:
    """Vision classes whose attention is packed: counted by hand in the releases named."""
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    return 33 if release >= (5, 24) else 24


# Classes of each source form, with the head_dim that their towers have.
IN_KERNELS = {
    ("cohere_compass", "CohereCompassVisionAttention"): 64,
    ("exaone4_5", "Exaone4_5_VisionAttention"): 80,
    ("glm4v", "Glm4vVisionAttention"): 128,
    ("glm_ocr", "GlmOcrVisionAttention"): 64,
    ("hunyuan_vl", "HunYuanVLVisionAttention"): 72,
    ("kimi_k25", "Kimi_K25VisionAttention"): 72,
    ("paddleocr_vl", "PaddleOCRVisionAttention"): 72,
    ("qwen2_5_vl", "Qwen2_5_VLVisionAttention"): 80,
    ("qwen3_vl", "Qwen3VLVisionAttention"): 72,
    ("video_llama_3", "VideoLlama3VisionAttention"): 64,
}


class Config:
    """What the attention classes read from their configs, under all their names for it."""

    def __init__(self, heads, head_dim, implementation="sdpa"):
        size = heads * head_dim
        self.hidden_size = self.embed_dim = self.d_model = size
        self.num_heads = self.num_attention_heads = self.attention_heads = heads
        self.encoder_attention_heads = heads
        self.num_key_value_heads = heads // 2
        self.attention_bias = self.qkv_bias = True
        self.attention_dropout = self.attention_probs_dropout_prob = 0.0
        self.rope_parameters = {"rope_type": "axial", "rope_theta": 10000.0}
        self.rms_norm_eps = self.layer_norm_eps = self.norm_eps = 1e-6
        self._attn_implementation = implementation


class Tower(nn.Module):
    """An attention, and what makes its tables of cos and sin."""

    def __init__(self, attention, rotary):
        super().__init__()
        self.attention, self.rotary, self.config = attention, rotary, attention.config

    def forward(self, hidden_states, position_ids, **kwargs):
        position_embeddings = self.rotary(hidden_states, position_ids)
        return self.attention(hidden_states, position_embeddings=position_embeddings, **kwargs)


@cache
def _forwards():
    """{model: {class: its node and that of its forward}} of what may be vision attention."""
    found = {}
    for path in sorted(_MODELS.glob("*/modeling_*.py")):
        text = path.read_text()
        if "cu_seqlens" in text or _VISION.search(text):
            for chunk in _CLASS.findall(text):  # only these are parsed: a tenth of the file
                if "cu_seqlens" in chunk or _VISION.match(chunk) or _SIZED_MODEL.match(chunk):
                    (node,) = ast.parse(chunk).body
                    methods = (m for m in node.body if isinstance(m, ast.FunctionDef))
                    forward = next((m for m in methods if m.name == "forward"), None)
                    if forward:
                        found.setdefault(path.parent.name, {})[node.name] = node, forward
    return found


@cache
def attention_classes():
    """(model, class) for the leaves of each file's classes that take ``cu_seqlens``.

    A class is a leaf unless it makes a module of another that takes them.
    """
    found = []
    for model, classes in _forwards().items():
        takes = {name: node for name, (node, forward) in classes.items() if _takes(forward)}
        for name, node in takes.items():
            if not _names(node) & takes.keys() - {name}:
                found.append((model, name))
    return found


def classes_with_tables():
    """Those of :func:`attention_classes` that are given tables of cos and sin."""
    forms = _forwards()
    return [
        (model, name)
        for model, name in attention_classes()
        if _takes(forms[model][name][1], "position_embeddings")
    ]


def models_of_images(model):
    """Its models that are given sizes of images, and no text."""
    return [
        name
        for name, (node, forward) in _forwards()[model].items()
        if any(_takes(forward, sizes) for sizes in SIZES)
        and not _takes(forward, "input_ids")
        and _is_model(node)
    ]


def other_vision_classes():
    """(class, a class with its forward alone) of vision attention without ``cu_seqlens``."""
    for classes in _forwards().values():
        for name, (_, forward) in classes.items():
            vision = _VISION.match(f"class {name}") and "ALL_ATTENTION_FUNCTIONS" in _names(forward)
            if vision and not _takes(forward):
                yield name, type(name, (nn.Module,), {"forward": _compiled(forward)})


def _takes(forward, name="cu_seqlens"):
    return name in {a.arg for a in (*forward.args.args, *forward.args.kwonlyargs)}


def _is_model(node):
    return any(ast.unparse(base).endswith("PreTrainedModel") for base in node.bases)


def _names(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _compiled(forward):
    """A function of the node, without its module: what it is made of can be read, not run."""
    forward = copy.deepcopy(forward)
    forward.decorator_list, forward.returns = [], None
    for argument in ast.walk(forward.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    forward.args.defaults = [ast.Constant(None) for _ in forward.args.defaults]
    forward.args.kw_defaults = [
        default and ast.Constant(None) for default in forward.args.kw_defaults
    ]
    module = ast.fix_missing_locations(ast.Module([forward], []))
    exec(compile(module, "forward", "exec"), namespace := {})
    return namespace["forward"]


def class_of(model, name):
    """The class of that name."""
    return getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name)


def build(model, name, *, heads=2, head_dim=32, implementation="sdpa"):
    """An attention module with random weights."""
    cls = class_of(model, name)
    torch.manual_seed(0)
    layer = {"layer_idx": 0} if "layer_idx" in inspect.signature(cls).parameters else {}
    module = cls(Config(heads, head_dim, implementation), **layer)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


def build_tower(model, name, **options):
    """:func:`build`, in a tower that makes its tables if it takes any."""
    attention = build(model, name, **options)
    if "position_embeddings" not in inspect.signature(attention.forward).parameters:
        return attention
    home = import_module(type(attention).__module__)
    (rotary,) = (c for c in vars(home) if re.fullmatch(r"(?!.*Text)\w+Vision\w*RotaryEmbedding", c))
    return Tower(attention, getattr(home, rotary)(attention.config))


def inputs(module, lengths, *, seed=1):
    """Keyword arguments of `module`: hidden states, lengths, and tables of cos and sin."""
    if isinstance(module, Tower):
        given = inputs(module.attention, lengths, seed=seed)
        del given["position_embeddings"]
        rng = torch.Generator().manual_seed(seed)
        axes = 3 if "MiniMaxM3" in type(module.attention).__name__ else 2
        return given | {"position_ids": torch.randint(24, (sum(lengths), axes), generator=rng)}
    rng = torch.Generator().manual_seed(seed)
    size, total = module.config.hidden_size, sum(lengths)
    names = inspect.signature(module.forward).parameters
    hidden = torch.randn(total, size, generator=rng)
    if _batched(module):
        hidden = hidden[None]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    given = {"hidden_states": hidden, "cu_seqlens": ends}
    if "position_embeddings" in names:
        angles = torch.randn(total, module.head_dim // 2, generator=rng).repeat(1, 2)
        given["position_embeddings"] = (angles.cos(), angles.sin())
    if "max_seqlen" in names:
        given["max_seqlen"] = None
    if "attention_mask" not in inspect.getsource(type(module).forward):
        given["attention_mask"] = None  # as the layers of such a class do
    return given


def run(module, lengths, dtype=torch.float32):
    """Output and the gradients of the input and of the weights, for a random cotangent."""
    module = module.to(dtype)
    module.zero_grad()
    given = {name: _cast(value, dtype) for name, value in inputs(module, lengths).items()}
    given["hidden_states"].requires_grad_()
    out = module(**given)
    out = out[0] if isinstance(out, tuple) else out
    rng = torch.Generator().manual_seed(2)
    out.backward(torch.randn(out.shape, generator=rng).to(dtype))
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "hidden_states": given["hidden_states"].grad, **gradients}


def _cast(value, dtype):
    if isinstance(value, tuple):
        return tuple(_cast(each, dtype) for each in value)
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def check_kernels(model, name, head_dim, lengths):
    """By the Triton kernels, RoPE too: output and all gradients within 1e-6 of stock in float64.

    On some machines stock's own in float32 are further away.
    """
    module = build_tower(model, name, head_dim=head_dim)
    swapped = copy.deepcopy(module)
    report = hrvlm.accelerate(swapped, backend="triton")
    assert report.swapped[0].rope == ("RoPE in the kernels" if isinstance(module, Tower) else "")
    mine, stock = run(swapped, lengths), run(module, lengths, torch.float64)
    assert mine.keys() == stock.keys()
    for part, result in mine.items():
        # Softmax does not see k's bias, unless RoPE turns it: rounding of sums of this size.
        is_rounding = part == "k_proj.bias" and not isinstance(module, Tower)
        like = stock["k_proj.weight"] if is_rounding else None
        assert_close(part, result, stock[part], 1e-6, like)


def _batched(module):
    """Whether the hidden states of `module` have an axis for the batch, of size 1."""
    source = inspect.getsource(type(module))
    if "transpose(0, 1).unsqueeze(0)" in source:
        return False
    return "hidden_states.shape[:-1]" in source or "batch_size, seq_len" in source
