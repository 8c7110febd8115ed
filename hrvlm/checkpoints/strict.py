"""``from_pretrained`` that raises where the weights are not those of the model.

transformers draws at random what a checkpoint lacks, leaves away what it has too much, and logs a
table. Here both raise, and so does another shape; a damaged file is named.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict

from ..files import save_whole
from ..images.geometry import true_or_false
from .damage import check_generation_config, naming_damaged_files
from .differences import KeyDifferences, group_keys, natural_order
from .files import SAFETENSORS_SUFFIX, read_weights, summary
from .mapping import ABSENT_PARTS, key_in_file, keys_in_files

_TRANSFORMERS = logging.getLogger("transformers.modeling_utils")
_STORED_SHAPES = "_stored_shapes"  # until a loaded model is judged


class StrictModel(PreTrainedModel):
    """A model of transformers whose checkpoints have to fit."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, but what does not fit raises.

        Args:
            pretrained_model_name_or_path: Hub id or directory.
            *model_args: Of the model.
            **kwargs: Of transformers' ``from_pretrained``, where ``ignore_mismatched_sizes=True``
                allows other shapes; and ``strict=False``, which allows keys that are missing or
                left over: transformers draws weights for the missing and logs both.

        Raises:
            TypeError: what is to be loaded is no name.
            ValueError: keys are missing, left over or of another shape (a grouped list), or a file
                is damaged.
            OSError: there is no such checkpoint.
        """
        source = pretrained_model_name_or_path
        if source is None and kwargs.get("state_dict") is None:
            raise ValueError(
                f"{cls.__name__}.from_pretrained(None): expected a hub id or a directory, or "
                "state_dict= and config="
            )
        if not isinstance(source, str | os.PathLike | None):
            raise TypeError(
                f"{cls.__name__}.from_pretrained: expected a hub id or a directory, "
                f"got {type(source).__name__}"
            )
        if source is not None and Path(source).is_file():
            raise ValueError(f"{source} is a file, expected a directory or a hub id")
        return load_strictly(super().from_pretrained, source, *model_args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers, but all files or none: what fails leaves what was there before.

        Of several processes, which may write parts of one checkpoint, each writes as transformers
        does.

        Args:
            save_directory: Made if need be; weights that were in it under other names (shards, an
                index) go.
            *args: Of transformers' ``save_pretrained``.
            **kwargs: Likewise.

        Raises:
            OSError: the files can't be written.
        """
        save = super().save_pretrained
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            save(save_directory, *args, **kwargs)
        else:
            save_whole(save, save_directory, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kw: Any
    ) -> Any:
        """Judge first what transformers takes without a word, by the headers of the files."""
        if load_config.hf_quantizer is None:
            parts = [state_dict] if state_dict is not None else []
            for file in () if parts else checkpoint_files or ():
                parts.append(_stored_in(Path(file)))
            source = load_config.pretrained_model_name_or_path or model.config.name_or_path
            _check_stored(source or "state_dict", model, parts)
            vars(model)[_STORED_SHAPES] = {
                stored: tensor.shape
                for part in parts
                for key, tensor in part.items()
                for stored in keys_in_files(key)
            }
        load: Any = PreTrainedModel._load_pretrained_model
        return load(model, state_dict, checkpoint_files, load_config, *args, **kw)

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """Note how the model's own weights fit: from_pretrained tells it of an adapter's alone.

        Other shapes raise before weights are drawn in their place, which may be many.
        """
        source = load_config.pretrained_model_name_or_path or model.config.name_or_path
        absent = vars(model).pop(ABSENT_PARTS, {})
        _note_parts_of_other_shapes(model, loading_info, vars(model).pop(_STORED_SHAPES, {}))
        if loading_info.mismatched_keys and not load_config.ignore_mismatched_sizes:
            tied = getattr(model, "all_tied_weights_keys", {})
            info = _as_stored(model, loading_info, absent)
            info["missing_keys"] = {key for key in info["missing_keys"] if key not in tied}
            raise ValueError(_report(source, model, _differences(info, False)))
        try:
            found = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        except RuntimeError as error:
            if not loading_info.conversion_errors:
                raise
            keys = ", ".join(group_keys(loading_info.conversion_errors))
            raise ValueError(f"{source}: these can't be made of its weights: {keys}") from error
        model._own_loading_info = _as_stored(model, found, absent)
        return found


def load_strictly(
    load: Callable[..., Any],
    source: str | os.PathLike[str] | None,
    *args: Any,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    not_needed: tuple[str, ...] = (),
    **kwargs: Any,
) -> Any:
    """What ``load(source, *args, **kwargs)`` loads, a ``from_pretrained`` of transformers.

    Args:
        load: The method.
        source: Hub id or directory, or None with a ``state_dict``.
        *args: Passed on.
        strict: Raise for keys that are missing or left over.
        ignore_mismatched_sizes: Allow other shapes, as in transformers.
        output_loading_info: Return transformers' report too.
        not_needed: Beginnings of keys that may be left over.
        **kwargs: Passed on.

    Raises:
        ValueError: the weights are not those of the model, or a file is damaged.
    """
    true_or_false("strict", strict)
    name = source or getattr(kwargs.get("config"), "name_or_path", "")
    model_class = getattr(load, "__self__", None)
    judged_here = strict and not (
        isinstance(model_class, type) and issubclass(model_class, StrictModel)
    )
    options = kwargs | {
        # For other shapes a class of transformers raises an error that names none.
        "ignore_mismatched_sizes": ignore_mismatched_sizes or judged_here,
        "output_loading_info": True,
    }
    with _tables_held(strict) as tables, naming_damaged_files(source, kwargs, model_class):
        model, info = load(source, *args, **options)
        if model.can_generate():
            check_generation_config(source, kwargs)
    own = vars(model).pop("_own_loading_info", info)
    if isinstance(model, StrictModel) and getattr(model, "hf_quantizer", None) is None:
        # Saving undoes the conversions that this checkpoint needed; it is to write the same keys
        # whatever was read.
        vars(model).pop("_weight_conversions", None)
    base = name if source is None else model.config.name_or_path  # below an adapter: its model
    for where, found in ((base, own), (name, info)) if strict else ():
        differences = _differences(found, ignore_mismatched_sizes, not_needed)
        if differences:
            raise ValueError(_report(where, model, differences))
    for table in tables:
        _TRANSFORMERS.handle(table)
    return (model, info) if output_loading_info else model


def _stored_in(path: Path) -> Mapping[str, Any]:
    """The tensors in a file; of safetensors their headers."""
    if path.suffix != SAFETENSORS_SUFFIX:
        return read_weights(path)
    try:
        return load_state_dict(str(path), map_location="meta")
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: can't be loaded ({summary(error)})") from error


def _check_stored(source: Any, model: Any, parts: Iterable[Mapping[str, Any]]) -> None:
    """Raise for a weight that is stored twice, of which one would win, and for integers.

    Integers are a quantiser's codes, whose scales a config without a quantiser doesn't apply.
    """
    numbers = {
        stored
        for key, tensor in model.state_dict().items()
        if tensor.is_floating_point()
        for stored in keys_in_files(key)
    }
    names: Counter[str] = Counter()
    for part in parts:
        for key, tensor in part.items():
            stored = keys_in_files(key)
            names.update(stored)
            if not tensor.is_floating_point() and numbers.issuperset(stored):
                raise ValueError(
                    f"{source}: {key} is stored as {tensor.dtype}, expected floating-point numbers"
                )
    if twice := [key for key, count in names.items() if count > 1]:
        raise ValueError(f"{source}: stored twice: {', '.join(group_keys(twice))}")


def _note_parts_of_other_shapes(
    model: Any, loading_info: Any, shapes: Mapping[str, torch.Size]
) -> None:
    """A fused matrix whose parts can't be joined is of another shape, not an error of its own."""
    for key in list(loading_info.conversion_errors):
        parts = [name for name in keys_in_files(key) if name in shapes]
        if len(parts) < 2:
            continue
        whole = model.get_parameter_or_buffer(key).shape
        expected = torch.Size((whole[0] // len(keys_in_files(key)), *whole[1:]))
        wrong = [name for name in parts if shapes[name] != expected]
        if wrong:
            del loading_info.conversion_errors[key]
            loading_info.missing_keys.discard(key)
            loading_info.mismatched_keys.add((key, shapes[wrong[0]], expected))


def _as_stored(model: Any, loading_info: Any, absent: Mapping[str, list[str]]) -> dict[str, Any]:
    """What transformers reports, with the missing keys as a file would have them."""
    info = loading_info.to_dict()
    info["missing_keys"] = {
        key_in_file(model, stored)
        for key in info["missing_keys"]
        for stored in absent.get(key, [key])
    }
    info["unexpected_keys"] = {key_in_file(model, key) for key in info["unexpected_keys"]}
    return info


def _report(source: Any, model: Any, differences: KeyDifferences) -> str:
    if differences.unexpected and len(differences.missing) >= len([*model.parameters()]):
        return (
            f"{source or 'state_dict'}: a checkpoint of another model: none of its "
            f"{len(differences.unexpected)} weights (as {differences.unexpected[0]}) is one of "
            f"this {type(model).__name__}"
        )
    return (
        f"{source or 'state_dict'}: not the weights of this {type(model).__name__}:\n"
        f"{differences}\n(strict=False lets missing and unexpected keys pass, "
        "ignore_mismatched_sizes=True other shapes)"
    )


def _differences(
    info: Mapping[str, Any], ignore_mismatched_sizes: bool, not_needed: tuple[str, ...] = ()
) -> KeyDifferences:
    def ordered(keys: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(keys, key=natural_order))

    mismatched = () if ignore_mismatched_sizes else info["mismatched_keys"]
    return KeyDifferences(
        missing=ordered(info["missing_keys"]),
        unexpected=ordered(k for k in info["unexpected_keys"] if not k.startswith(not_needed)),
        mismatched=tuple(
            (key, tuple(got), tuple(expected))
            for key, got, expected in sorted(mismatched, key=lambda item: natural_order(item[0]))
        ),
    )


@contextmanager
def _tables_held(strict: bool) -> Iterator[list[logging.LogRecord]]:
    """Keep transformers' table of differences back: an error says the same, in fewer lines."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        is_table = strict and "LOAD REPORT" in str(record.msg)
        if is_table:
            held.append(record)
        return not is_table

    _TRANSFORMERS.addFilter(hold)
    try:
        yield held
    except RuntimeError:  # transformers' own, which speaks of "the above report"
        _TRANSFORMERS.removeFilter(hold)
        for table in held:
            _TRANSFORMERS.handle(table)
        raise
    finally:
        _TRANSFORMERS.removeFilter(hold)
