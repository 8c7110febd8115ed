"""What ``hrvlm train`` reads: the model, the data and the training, from one YAML file.

model: {path: runs/first}                   a VisionLanguageModel; or
model: {vision: ..., language: ..., tokenizer: ..., max_img_size: 1024}    pretrained parts; or
model: {vit_hidden_dim: 384, ..., lm_tokenizer: ...}    nanoVLM's names, random weights

data:
    train: {kind: jsonl, path: train.jsonl}   one source, or a list of them
    eval: {kind: jsonl, path: eval.jsonl}
training: {output_dir: runs/second, max_steps: 1000, learning_rate_vision: 1.0e-5, ...}
lora: {targets: {language: all}, rank: 16}    adapters instead of all weights; may be left out
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from ..data.config import DataConfig, data_config
from ..files import as_mapping, check_names, parse_yaml, read_mapping
from ..images.geometry import true_or_false
from ..machine import MODEL_DTYPES, check_dtype
from .adapters import LoraOptions, lora_options

_PARTS = ("vision", "language", "tokenizer")


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from: `path`, or `vision` with `language` and `tokenizer`, or `names`.

    Attributes:
        path: Directory or hub id of a VisionLanguageModel with its processor.
        vision: Directory or hub id of a checkpoint of DINOv3, DINOv2, SigLIP or SigLIP2.
        language: Directory or hub id of a causal language model.
        tokenizer: Directory or hub id.
        options: Attributes of VLMConfig that go with pretrained parts.
        names: nanoVLM's names of VLMConfig; weights are random.
        dtype: Of the weights, "float32" or "bfloat16"; ``training.bf16`` computes in bfloat16 with
            weights in float32, which loses no small update.
        attn_implementation: Of the language model, as transformers calls them.
        allow_fp16: Let the encoder run in float16, which DINOv3's activations overflow.
    """

    path: str | None = None
    vision: str | None = None
    language: str | None = None
    tokenizer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    attn_implementation: str | None = None
    allow_fp16: bool = False


@dataclass(frozen=True)
class TrainingConfig:
    """All of a run.

    Attributes:
        model: What is trained.
        data: On what.
        training: Fields of :class:`~hrvlm.training.trainer.VLMTrainingArguments`.
        lora: Adapters that are trained in the place of the model's weights, if any.
        sections: What all this was read from.
    """

    model: ModelConfig
    data: DataConfig
    training: Mapping[str, Any]
    lora: LoraOptions | None = None
    sections: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_yaml(cls, path: str | PathLike[str], overrides: Sequence[str] = ()) -> TrainingConfig:
        """Read a file; see :meth:`from_dict`.

        Args:
            path: The file.
            overrides: Changes as ``training.max_steps=10``; the value is YAML.

        Raises:
            ValueError: as :meth:`from_dict`; the file or an override is no YAML.
        """
        return cls.from_dict(read_yaml(path, overrides))

    @classmethod
    def from_dict(cls, sections: Mapping[str, Any]) -> TrainingConfig:
        """Build from plain data.

        Raises:
            ValueError: a name is unknown (the nearest one is named) or missing; a value is wrong.
        """
        sections = as_mapping(sections, "configuration")
        known = ("model", "data", "training")
        check_names(sections, [*known, "lora"], "")
        if missing := [name for name in known if name not in sections]:
            raise ValueError(f"section {missing[0]!r} is missing; expected {[*known]}")
        training = as_mapping(sections["training"], "training")
        check_training_names(training)
        if training.get("output_dir") is None:
            raise ValueError("training.output_dir is missing: where checkpoints go")
        model, data = _model_config(sections["model"]), data_config(sections["data"])
        lora = None if sections.get("lora") is None else lora_options(sections["lora"])
        if lora is not None:
            _check_with_lora(model, training)
        return cls(model, data, training, lora, dict(sections))


def _check_with_lora(model: ModelConfig, training: Mapping[str, Any]) -> None:
    if model.path is None:
        raise ValueError(
            "lora needs model.path: adapters are saved alone, and their base has to stay somewhere"
        )
    if training.get("freeze"):
        raise ValueError("training.freeze: with lora, what lora.targets leaves out is frozen")
    if training.get("optimizer", "adamw") != "adamw":
        raise ValueError(f"training.optimizer={training['optimizer']!r}: lora needs adamw")


def read_yaml(path: str | PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A mapping from a file, with changes.

    Args:
        path: The file.
        overrides: As of :meth:`TrainingConfig.from_yaml`; a number steps into a list.

    Raises:
        ValueError: the file is no mapping in YAML, or an override has no "=", is no YAML or leads
            nowhere.
    """
    sections = read_mapping(path)
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r}: expected name=value, as training.max_steps=10")
        _set(sections, name, parse_yaml(value, repr(override)))
    return sections


def check_training_names(training: Mapping[str, Any]) -> None:
    """Raise ValueError where a name is no field of VLMTrainingArguments, or a number is text."""
    from .trainer import VLMTrainingArguments

    defaults = {f.name: f.default for f in dataclasses.fields(VLMTrainingArguments) if f.init}
    check_names(training, [*defaults], "training.")
    for name, value in training.items():
        if isinstance(value, str) and type(defaults[name]) in (int, float):
            raise ValueError(f"training.{name}={value!r}: expected a number")


def _set(sections: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    place: Any = sections
    for word in path:
        if isinstance(place, list):
            place = place[_index(place, word, name)]
        else:
            if place.get(word) is None:
                place[word] = {}
            place = place[word]
        if not isinstance(place, dict | list):
            raise ValueError(f"{name!r}: {word!r} holds {place!r}, nothing can be set in it")
    if isinstance(place, list):
        place[_index(place, last, name)] = value
    else:
        place[last] = value


def _index(place: list[Any], word: str, name: str) -> int:
    if not word.isdigit() or int(word) >= len(place):
        raise ValueError(f"{name!r}: {word!r} is no place in a list of {len(place)}")
    return int(word)


def _model_config(section: Any) -> ModelConfig:
    section = as_mapping(section, "model")
    always = ("dtype", "attn_implementation", "allow_fp16")
    common = {name: section[name] for name in always if name in section}
    rest = {name: value for name, value in section.items() if name not in common}
    check_dtype(common.get("dtype", "float32"), MODEL_DTYPES, "model.dtype")
    true_or_false("model.allow_fp16", common.get("allow_fp16", False))
    if "path" in rest:
        if len(rest) > 1:
            others = sorted(map(str, set(rest) - {"path"}))
            raise ValueError(f"model.path: the model is all there; leave out {others}")
        return ModelConfig(path=str(rest["path"]), **common)
    if given := [name for name in _PARTS if name in rest]:
        if missing := [name for name in _PARTS if name not in rest]:
            raise ValueError(f"model: {given} need {missing} too")
        options = {name: value for name, value in rest.items() if name not in _PARTS}
        check_names(options, _vlm_options(), "model.")
        vision, language, tokenizer = (str(rest[name]) for name in _PARTS)
        return ModelConfig(None, vision, language, tokenizer, options, **common)
    _check_random(rest)
    return ModelConfig(names=rest, **common)


def _check_random(names: Mapping[str, Any]) -> None:
    """NanoVLM's names, from which the parts are new."""
    from ..vlm.config import VLMConfig

    for name in ("vit_model_type", "lm_model_type"):
        if name in names:
            raise ValueError(
                f"model.{name}: with nanoVLM's names the weights are random; to start from "
                "checkpoints, give vision, language and tokenizer"
            )
    if "lm_tokenizer" not in names:
        raise ValueError("model: expected path; or vision, language, tokenizer; or lm_tokenizer")
    VLMConfig.from_names(names)


def _vlm_options() -> list[str]:
    from ..vlm.config import VLMConfig

    skip = ("vision_config", "text_config", "image_token_id")
    return [name for name in inspect.get_annotations(VLMConfig) if name not in skip]
