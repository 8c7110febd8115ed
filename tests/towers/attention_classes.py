"""All attention classes of the installed transformers that take ``cu_seqlens``, found by AST."""

import ast
import inspect
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
import transformers
from torch import nn

_MODELS = Path(transformers.__file__).parent / "models"


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
        self.rms_norm_eps = self.layer_norm_eps = 1e-6
        self._attn_implementation = implementation


@cache
def attention_classes():
    """(model, class) for the leaves of each file's classes that take ``cu_seqlens``.

    A class is a leaf unless it makes a module of another that takes them.
    """
    found = []
    for path in sorted(_MODELS.glob("*/modeling_*.py")):
        text = path.read_text()
        if "cu_seqlens" not in text:
            continue
        takes = {}
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and method.name == "forward":
                        names = {a.arg for a in (*method.args.args, *method.args.kwonlyargs)}
                        if "cu_seqlens" in names:
                            takes[node.name] = node
        for name, node in takes.items():
            called = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            if not called & takes.keys() - {name}:
                found.append((path.parent.name, name))
    return found


def build(model, name, *, heads=2, head_dim=32, implementation="sdpa"):
    """An attention module with random weights."""
    cls = getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name)
    torch.manual_seed(0)
    module = cls(Config(heads, head_dim, implementation))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


def inputs(module, lengths, *, seed=1):
    """Keyword arguments of `module`: hidden states, lengths, and tables of cos and sin."""
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


def _batched(module):
    """Whether the hidden states of `module` have an axis for the batch, of size 1."""
    source = inspect.getsource(type(module))
    return "hidden_states.shape[:-1]" in source or "batch_size, seq_len" in source
