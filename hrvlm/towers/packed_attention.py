"""An attention of transformers' towers, on packed tokens: its own code, other scores.

What makes a class one that can be swapped is what its forward takes and calls:

    forward(hidden_states, cu_seqlens, ...)            tokens of all images, and where each ends
    ALL_ATTENTION_FUNCTIONS.get_interface(...)         looked up at each call
    attention(..., cu_seq_lens_q=cu_seqlens, ...)      its branch for flash-attention

The accelerated class runs that branch with :func:`attend` for the function looked up. Fused or
separate projections, norms of q and k, grouped heads and what is returned stay the class's own; so
does its rotation, unless the kernels know it (:mod:`.folding`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from hrvlm_kernels import PackedGrids, varlen_attention

from .folding import OPTION, ROTATION
from .layouts import layout_of
from .rebinding import LOOKED_UP, global_names, innermost, rebind, strings
from .rotation import TABLES, TO_KERNELS, is_folded, rope_of, rotation_names, unless_folded

_FLASH = "is_flash_attention_requested"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedGrids | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    is_causal: bool | None = None,
    hrvlm_tables: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function by :func:`hrvlm_kernels.varlen_attention`.

    Args:
        module: The accelerated attention.
        query: ``[B, H, N, D]``; B is 1 where lengths are given.
        key: ``[B, Hk, N, D]``.
        value: As `key`.
        attention_mask: None, or a layout that stands in the place of a mask.
        scaling: Factor of the scores.
        dropout: 0.
        cu_seq_lens_q: Cumulative lengths of the segments; without any, each of the B rows is one.
        is_causal: False; None for what `module` says, which is True if it says nothing.
        hrvlm_tables: What to rotate q and k by, where that was left to the kernels.
        kwargs: What else the module hands on; a maximum length, say, which the layout knows.

    Returns:
        ``[B, N, H, D]``, and no attention weights.

    Raises:
        ValueError: asked for a mask, for attention weights, for dropout, or for causal attention.
    """
    _refuse(module, attention_mask, dropout, is_causal, kwargs)
    batch, _, tokens, _ = query.shape
    if isinstance(attention_mask, PackedGrids):
        packed = attention_mask
    elif cu_seq_lens_q is not None:
        packed = layout_of(cu_seq_lens_q, query.device)
    else:
        packed = PackedGrids.from_lengths([tokens] * batch, device=query.device)
    q, k, v = (a.transpose(1, 2).flatten(0, 1) for a in (query, key, value))
    rope, backend = None, getattr(module, OPTION)
    if hrvlm_tables is not None:
        rope = rope_of(hrvlm_tables, q, backend)
        q, k = (getattr(module, ROTATION).ordered(a) for a in (q, k))
    out = varlen_attention(q, k, v, packed, scaling, rope=rope, backend=backend)
    return out.unflatten(0, (batch, tokens)), None


def _refuse(
    module: nn.Module, mask: object, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]
) -> None:
    if mask is not None and not isinstance(mask, PackedGrids):
        raise ValueError(
            "attention_mask: an accelerated attention takes none; restore(model) for that"
        )
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ValueError(
            "output_attentions: the kernels of an accelerated model make no attention matrix; call "
            "restore(model) and set_attn_implementation('eager')"
        )
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout}, and no kernel has dropout: build the model with 0, "
            "or call eval()"
        )
    if is_causal is None:  # a mask that a layout stands for was not causal
        is_causal = mask is None and getattr(module, "is_causal", True)
    if is_causal:
        raise ValueError("is_causal: the kernels' attention is bidirectional")


class _Functions:
    """Stands for transformers' table of attention functions; whichever is asked for is ours."""

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """:func:`attend`, whatever `name` is."""
        return attend


def _yes(config: object) -> bool:
    return True


def _unknown(*args: Any, **kwargs: Any) -> None:
    """The longest segment, which the layout knows, without asking the device."""


NAMES = {LOOKED_UP: _Functions(), _FLASH: _yes, "get_max_seqlen": _unknown}


def obstacle(cls: type[nn.Module]) -> str | None:
    """Why the attention class `cls` can't be swapped; None if it can."""
    forward = cls.forward
    if "cu_seqlens" not in inspect.signature(innermost(forward)).parameters:
        return "its forward takes no cu_seqlens"
    if not {LOOKED_UP, "get_interface", _FLASH} <= global_names(forward):
        return "its forward does not look up an attention function of transformers"
    if "cu_seq_lens_q" not in strings(forward):
        return "its forward hands no cu_seq_lens_q to the attention function"
    return None


def is_attention(cls: type[nn.Module]) -> bool:
    """Whether the forward of `cls` looks up an attention function of transformers."""
    return LOOKED_UP in global_names(cls.forward)


def packed_methods(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """What a swapped attention has of its own: the forward of `cls`, bound to :func:`attend`."""
    stock = innermost(cls.forward)
    rotations = {n: unless_folded(stock.__globals__[n]) for n in rotation_names(cls)}
    forward: Callable[..., Any] = rebind(cls.forward, {**NAMES, **rotations})
    parameters = list(inspect.signature(stock).parameters)
    if TABLES not in parameters:
        return {"forward": forward}
    at = parameters.index(TABLES) - 1

    @wraps(forward)
    def with_tables(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tables = args[at] if len(args) > at else kwargs.get(TABLES)
        if is_folded(tables):
            kwargs[TO_KERNELS] = tables
        return forward(self, *args, **kwargs)

    return {"forward": with_tables}
