"""Swap hrvlm's attention into the vision towers of models that are already built.

    model = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct")
    print(hrvlm.accelerate(model))

Modules change one by one and in place: they stay the same objects with the same parameters,
submodules and hooks, and take another class, which holds no tensors of its own; so ``state_dict``,
``save_pretrained``, optimizers, adapters and FSDP notice nothing. :func:`restore` gives them their
class back.

Which modules these are is decided by what their code does, never by their names:
:mod:`.packed_attention` says what an attention must take and call, :mod:`.grids` which towers
compute their layouts from grids, :mod:`.block_masks` which make a dense mask, :mod:`.padding` which
mask padding. DINOv3 has its own module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from hrvlm_kernels.backends import check_backend

from ..encoder.packed_encoder import PackedEncoder
from . import dinov3
from .block_masks import makes_block_mask, takes_mask
from .folding import OPTION, fold, unfold
from .grids import takes_sizes, tower_methods, uses_grids
from .packed_attention import NAMES, is_attention, obstacle, packed_methods
from .padding import encoder_methods, masks_padding, padded_methods
from .report import Acceleration, Found, parts
from .swapping import has_own_forward, refuse_own_forward, set_class, stock_class, swapped_class


def accelerate(
    model: nn.Module, *, backend: str = "auto", rope_augment: bool = True
) -> Acceleration:
    """Make the vision towers of transformers in `model` run on hrvlm's kernels.

    Works on a tower and on anything that contains one. Doing it again changes the options and
    nothing else. Undone by :func:`restore`.

    Args:
        model: Changed in place.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.
        rope_augment: In training mode, draw the random shift, jitter and scale of RoPE coordinates
            that a DINOv3's config names (``pos_embed_shift``, ``pos_embed_jitter``,
            ``pos_embed_rescale``), as the stock model does.

    Returns:
        What was swapped, and what was left alone and why.

    Raises:
        ValueError: there is nothing to swap (the reasons are listed), a DINOv3 has an attention
            class of its own, or `backend` is unknown.
    """
    _check_module(model)
    check_backend(backend)
    whole: list[Found] = [(n, m, "", "") for n, m in dinov3.swap(model, backend, rope_augment)]
    swapped: list[tuple[str, nn.Module]] = []
    encoders = [(n, m) for n, m in model.named_modules() if isinstance(m, PackedEncoder)]
    left: list[Found] = [(n, m, "it runs packed already", "") for n, m in encoders]
    masked = _in_masks(model)
    for name, module in _attention(model):
        reason = None if stock_class(module) else _obstacle(module, module in masked)
        if reason:
            left.append((name, module, reason, ""))
            continue
        if not stock_class(module):
            set_class(module, swapped_class(type(module), packed_methods))
        setattr(module, OPTION, backend)
        swapped.append((name, module))
    notes = fold(model, [module for _, module in swapped], NAMES)
    whole += [(name, module, "", notes.get(module, "")) for name, module in swapped]
    report = Acceleration(model, parts(whole), parts(left))
    if not whole:
        reasons = "".join(f"\n  {part}" for part in report.left_alone) or " it has no attention"
        raise ValueError(f"model: nothing to swap in {type(model).__name__}:{reasons}")
    for module in _towers(model):
        if masks_padding(module):
            encoder: Any = module.encoder
            set_class(encoder, swapped_class(type(encoder), encoder_methods))
            set_class(module, swapped_class(type(module), padded_methods))
        else:
            set_class(module, swapped_class(type(module), tower_methods))
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`; what was not accelerated is left alone.

    Args:
        model: Changed in place. A whole tower at least: one that masks padding gives its attention
            a layout for a mask, which stock attention does not take.

    Returns:
        `model` itself.

    Raises:
        ValueError: a forward was replaced on the instance of an accelerated module.
    """
    _check_module(model)
    swapped = [(name, m, stock) for name, m in model.named_modules() if (stock := stock_class(m))]
    for name, module, _ in swapped:
        refuse_own_forward(name, module)
    for _, module, stock in swapped:
        set_class(module, stock)
        for option in dinov3.OPTIONS if dinov3.is_part(module) else (OPTION,):
            vars(module).pop(option, None)
        unfold(module)
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")


def _attention(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Attention modules, DINOv3's left out: those that look up an attention function.

    Also those that only take ``cu_seqlens``, as no module inside them does.
    """
    for name, module in model.named_modules():
        if dinov3.is_part(module):
            continue
        inner = (type(child) for child in module.modules() if child is not module)
        if is_attention(type(module)) or (_takes(type(module)) and not any(map(_takes, inner))):
            yield name, module


def _takes(cls: type[nn.Module]) -> bool:
    return obstacle(cls) != "its forward takes no cu_seqlens"


def _in_masks(model: nn.Module) -> set[nn.Module]:
    """Attention whose mask comes from a tower around it, which makes a layout in its place.

    All of a tower's or none, since a mask has to be one for the others.
    """
    found: set[nn.Module] = set()
    for tower in model.modules():
        if makes_block_mask(type(tower)) or masks_padding(tower):
            masked = [m for m in tower.modules() if is_attention(type(m)) and takes_mask(type(m))]
            if not any(map(has_own_forward, masked)):
                found.update(masked)
    return found


def _obstacle(module: nn.Module, is_masked: bool) -> str | None:
    if has_own_forward(module):
        return "its forward was replaced on the instance"
    reason = None if is_masked else obstacle(type(module))
    config: Any = getattr(module, "config", None)
    if reason is None and is_flash_attention_requested(config):
        reason = f"it runs {config._attn_implementation} already"
    return reason


def _towers(model: nn.Module) -> list[nn.Module]:
    """What is around swapped attention, and all in it, that calls functions of grids.

    And the models that swapped attention is directly in, or that are given sizes of images,
    whether they do or not.
    """
    towers: dict[nn.Module, None] = {}
    for outer in model.modules():
        swapped = [name for name, module in outer.named_modules() if hasattr(module, OPTION)]
        inner = [name for name, m in outer.named_modules() if name and _is_model(m)]
        is_owner = _is_model(outer) and not all(_within(name, inner) for name in swapped)
        is_tower = is_owner or takes_sizes(type(outer)) or uses_grids(type(outer))
        if swapped and is_tower:
            towers |= {m: None for m in outer.modules() if uses_grids(type(m)) or m is outer}
    return [module for module in towers if not stock_class(module)]


def _is_model(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel)


def _within(name: str, outer: list[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in outer)
