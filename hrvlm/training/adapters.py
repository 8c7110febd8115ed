"""Low-rank adapters by PEFT: what the section ``lora`` of a training file asks for, and merging.

The base stays as it is, in 4 bits if asked (QLoRA); a run saves the adapters alone. ``merge`` makes
a model of base and adapters again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import all_or_nothing, as_mapping, check_names
from ..images.geometry import positive_int, positive_number, true_or_false
from .parts import MODULES, PARTS

ALL, WHOLE = "all", "whole"
_EVERYTHING = {part: ALL for part in PARTS}


@dataclass(frozen=True)
class LoraOptions:
    """Adapters of a run.

    Attributes:
        targets: What gets adapters, by part of the model: "all" its linear layers, or a list of
            their names (``[q_proj, v_proj]``, the ends of paths). The projector may also be
            "whole": trained itself, and saved with the adapters. A part that is not named stays as
            it is.
        rank: Of the update of each weight, for all parts or by part.
        alpha: The update is scaled by alpha / rank; default: twice the rank.
        dropout: Of what goes into an adapter.
        dora: Learn magnitudes of the weights apart from their directions (DoRA).
        four_bit: Load the base in 4 bits (NF4, doubly quantised), as QLoRA does.
    """

    targets: Mapping[str, Any] = field(default_factory=lambda: _EVERYTHING)
    rank: int | Mapping[str, int] = 16
    alpha: float | Mapping[str, float] | None = None
    dropout: float = 0.0
    dora: bool = False
    four_bit: bool = False


def lora_options(section: Any) -> LoraOptions:
    """From plain data.

    Raises:
        ValueError: a name is unknown (the nearest one is named), a value is wrong, or a library is
            missing.
    """
    section = as_mapping(section, "lora")
    check_names(section, [f.name for f in dataclasses.fields(LoraOptions)], "lora.")
    options = LoraOptions(**section)
    targets = as_mapping(options.targets, "lora.targets")
    check_names(targets, PARTS, "lora.targets.")
    if not targets:
        raise ValueError(f"lora.targets: expected some of {[*PARTS]}")
    for part, names in targets.items():
        listed = isinstance(names, list) and names and all(isinstance(n, str) for n in names)
        if not listed and names != ALL and (part, names) != ("projector", WHOLE):
            raise ValueError(
                f"lora.targets.{part}={names!r}: expected {ALL!r} or a list of names of layers"
                + (f", or {WHOLE!r}" if part == "projector" else "")
            )
    for part in targets:
        positive_int(f"lora.rank of {part}", rank_of(options, part))
        positive_number(f"lora.alpha of {part}", alpha_of(options, part))
    if not isinstance(options.dropout, int | float) or not 0 <= options.dropout < 1:
        raise ValueError(f"lora.dropout={options.dropout!r}: expected a number from 0, below 1")
    for name in ("dora", "four_bit"):
        true_or_false(f"lora.{name}", getattr(options, name))
    for library in ["peft"] + ["bitsandbytes"] * options.four_bit:
        if find_spec(library) is None:
            raise ValueError(f"lora: the library {library} is missing: pip install 'hrvlm[lora]'")
    return options


def rank_of(options: LoraOptions, part: str) -> Any:
    """The rank of a part's updates."""
    return options.rank.get(part, 16) if isinstance(options.rank, Mapping) else options.rank


def alpha_of(options: LoraOptions, part: str) -> Any:
    """The alpha of a part's updates."""
    given = options.alpha.get(part) if isinstance(options.alpha, Mapping) else options.alpha
    rank = rank_of(options, part)
    return 2 * rank if given is None else given


def quantization(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a base in 4 bits that computes in `dtype`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def with_adapters(model: Any, options: LoraOptions, base: str, *, checkpointing: bool) -> Any:
    """The model with adapters to train, as a PEFT model; nothing else of it learns.

    Args:
        model: A VisionLanguageModel.
        options: Which adapters.
        base: Where the model comes from, for `merge`.
        checkpointing: Whether its layers are run again for their gradients.

    Raises:
        ValueError: a name in `targets` fits no linear layer of its part.
    """
    import peft

    named = {
        part: _layers(model, part, names)
        for part, names in options.targets.items()
        if names != WHOLE
    }
    whole = [MODULES[part] for part, names in options.targets.items() if names == WHOLE]
    if options.four_bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:  # reentrant checkpoints need an input that asks for gradients
        model.enable_input_require_grads()
    patterns = {part: rf"{MODULES[part]}\..*" for part in named}
    config = peft.LoraConfig(
        target_modules=[name for names in named.values() for name in names],
        modules_to_save=whole or None,
        r=rank_of(options, next(iter(named))) if named else 1,
        rank_pattern={pattern: rank_of(options, part) for part, pattern in patterns.items()},
        alpha_pattern={pattern: alpha_of(options, part) for part, pattern in patterns.items()},
        lora_dropout=options.dropout,
        use_dora=options.dora,
    )
    adapted = peft.get_peft_model(model, config)
    # PEFT knows the name that the config of a model was loaded by, which is none for our own.
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def _layers(model: nn.Module, part: str, names: str | Sequence[str]) -> list[str]:
    """Paths of a part's linear layers; the language model's last one is none of "all"."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = {
        f"{MODULES[part]}.{path}": module
        for path, module in model.get_submodule(MODULES[part]).named_modules()
        if isinstance(module, nn.Linear)
    }
    if isinstance(names, str):
        return [path for path, module in layers.items() if module is not head]
    found = {name: [p for p in layers if f".{p}".endswith(f".{name}")] for name in names}
    if missing := [name for name, paths in found.items() if not paths]:
        known = sorted({path.rpartition(".")[2] for path in layers})
        raise ValueError(f"lora.targets.{part}: no linear layer {missing[0]!r}; there are {known}")
    return [*dict.fromkeys(path for paths in found.values() for path in paths)]


@dataclass(frozen=True)
class Merged:
    """What `merge` did.

    Attributes:
        directory: Where the model is.
        base: What the adapters were added to.
        layers: How many weights they have changed.
    """

    directory: str
    base: str
    layers: int


def merge(adapter: Path, directory: Path, base: str | None = None) -> Merged:
    """Add the adapters of a run to the weights of its base, and save the model and its processor.

    The sums are taken in float32; the weights are saved in the base's own dtype. A base that was
    in 4 bits for training is read as its files have it.

    Args:
        adapter: Directory of a run with adapters, or one of its checkpoints.
        directory: To write the model into.
        base: Directory or hub id of the base; default: the one the run started from.

    Raises:
        ValueError: there are no adapters in `adapter`, the base is not there, or `directory` holds
            a model.
    """
    from ..encoder.plain_modules import cast_parameters
    from ..inference.loading import check_model_type, quiet_loading
    from ..vlm.processors import VLMProcessor
    from ..vlm.vision_language_model import VisionLanguageModel

    if find_spec("peft") is None:
        raise ValueError("adapters need the library peft: pip install 'hrvlm[lora]'")
    import peft

    if not adapter.exists():
        raise ValueError(f"{adapter}: no such directory")
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter}: no adapters in it (no adapter_config.json)")
    if (directory / "config.json").exists():
        raise ValueError(f"{directory} holds a model; choose another directory")
    with quiet_loading(str(adapter)):
        named = peft.PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    base = base or named
    if not base:
        raise ValueError(f"{adapter}: it does not say which base it is for; name it with --base")
    try:
        check_model_type(base, "hrvlm")
    except ValueError as error:
        raise ValueError(f"{error}; --base says where the base is") from error
    with quiet_loading(base):
        processor = VLMProcessor.from_pretrained(
            adapter if os.path.exists(adapter / "processor_config.json") else base
        )
        model = VisionLanguageModel.from_pretrained(base, dtype="auto")
        dtype = model.dtype
        cast_parameters(model, torch.float32)
    with quiet_loading(str(adapter)):
        adapted = peft.PeftModel.from_pretrained(model, str(adapter))
    layers = sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in adapted.modules())
    merged: Any = adapted.merge_and_unload()
    cast_parameters(merged, dtype)
    with all_or_nothing(directory) as folder:
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
    return Merged(str(directory), base, layers)
