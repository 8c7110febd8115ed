"""An encoder for the commands: a checkpoint, or random weights that say so."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoints.damage import naming_damaged_files
from ..checkpoints.sizes import DINOV2_TYPES
from ..images.processor import Normalization, normalization_for
from ..machine import MODEL_DTYPES, default_dtype, first_line, pick_device, torch_dtype

if TYPE_CHECKING:
    from ..encoder.packed_encoder import PackedEncoder

ENCODER_TYPES = ("dinov3_vit", *DINOV2_TYPES)
RANDOM_MODEL, RANDOM_SEED = "vits16", 0
_DIGESTED = 1024  # values of a weight that its digest looks at


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder with what has to be known about it.

    Attributes:
        encoder: Frozen, on its device.
        name: Hub id, directory, or "vits16, RANDOM WEIGHTS (seed 0)".
        random_weights: Nothing was loaded: the features mean nothing.
        normalization: Mean and std of the pixels it takes.
    """

    encoder: PackedEncoder
    name: str
    random_weights: bool
    normalization: Normalization

    @property
    def factor(self) -> int:
        """Sides of images are whole patches of this number."""
        return 1


def load_encoder(
    model: str | None = None,
    *,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    batch_invariant: bool = False,
) -> LoadedEncoder:
    """Load a checkpoint, or make a ViT-S/16 with random weights from a fixed seed.

    Args:
        model: Hub id, directory or weight file; None for random weights.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`; checked here rather than in the
            first layer.
        device: Default: the GPU if there is one, else the CPU.
        dtype: One of :data:`hrvlm.machine.MODEL_DTYPES`; default: bfloat16 on a GPU, float32 on
            the CPU.
        batch_invariant: Give an image's features the same bits whatever it is packed with.

    Raises:
        ValueError: no encoder there, weights missing from it, a name is unknown, or backend
            or device can't be used here; the message says why.
    """
    where = pick_device(device)
    weights = torch_dtype(dtype or default_dtype(where), MODEL_DTYPES)
    check_backend_runs(backend, where, weights)
    if model is None:
        encoder = _random_encoder()
        label, normalization = f"{RANDOM_MODEL}, RANDOM WEIGHTS (seed {RANDOM_SEED})", None
    else:
        (encoder, normalization), label = _pretrained_encoder(model), model
    encoder.backend, encoder.batch_invariant = backend, batch_invariant
    encoder.to(device=where, dtype=weights)  # type: ignore[call-arg]
    encoder.freeze()
    return LoadedEncoder(encoder, label, model is None, normalization or normalization_for(label))


def weights_digest(encoder: torch.nn.Module) -> str:
    """Of the names and shapes of all weights, and a sample of the values of each."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(encoder.named_parameters()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // _DIGESTED)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def check_backend_runs(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError, saying why, when `backend` can't run an encoder on `device`."""
    from hrvlm_kernels.backends import resolve

    from ..encoder.layers import OPS

    for op in OPS:
        try:
            resolve(op, backend, torch.empty(0, device=device, dtype=dtype))
        except RuntimeError as error:
            raise ValueError(str(error)) from error


def _random_encoder() -> PackedEncoder:
    from ..checkpoints.family import get_config
    from ..encoder.vision_transformer import DINOv3Encoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        return DINOv3Encoder(get_config(RANDOM_MODEL))


def _pretrained_encoder(model: str) -> tuple[PackedEncoder, Normalization | None]:
    """The encoder, and mean and std of its own image processor if it has one."""
    from ..checkpoints.foreign import is_foreign
    from ..checkpoints.preprocessor import normalization_in, stored_normalization
    from ..encoder.vision_transformer import DINOv2Encoder, DINOv3Encoder, load_file

    if is_foreign(model):
        with quiet_loading(model):
            encoder, preprocessor = load_file(model)
        return encoder, normalization_in(preprocessor, model)
    kind = check_model_type(model, *ENCODER_TYPES)
    with quiet_loading(model):
        family = DINOv2Encoder if kind in DINOV2_TYPES else DINOv3Encoder
        return family.from_pretrained(model), stored_normalization(model)


def check_model_type(model: str, *expected: str) -> str:
    """The type of the model in a directory or of a hub id.

    Raises:
        ValueError: there is none, or it is none of those expected.
    """
    from transformers import PretrainedConfig

    path = Path(model)
    if path.is_file():
        raise ValueError(f"model {model!r} is a file, expected a directory or a hub id")
    if not path.is_dir() and (model.startswith((".", "~", "/")) or model.count("/") > 1):
        raise ValueError(f"model {model!r}: no such directory (and no hub id, OWNER/NAME)")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").exists():
        raise ValueError(
            f"model {model!r} holds adapters alone: `hrvlm merge` makes a model of them"
        )
    try:
        with naming_damaged_files(model):
            stored, _ = PretrainedConfig.get_config_dict(model)
    except OSError as error:
        raise ValueError(f"model {model!r} can't be loaded: {first_line(error)}") from error
    if (kind := stored.get("model_type")) not in expected:
        wanted = " or ".join(map(repr, expected))
        raise ValueError(f"model {model!r} is of type {kind!r}, expected {wanted}")
    return kind


@contextmanager
def quiet_loading(source: str | None = None) -> Iterator[None]:
    """Load from files of transformers: errors in one line, no bars where stderr is no terminal.

    Args:
        source: The model, to be named in errors.

    Raises:
        ValueError: a file is missing, can't be read or is damaged.
    """
    from transformers.utils import logging

    quiet = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if quiet:
        logging.disable_progress_bar()
    try:
        with naming_damaged_files(source, all_errors=True):
            yield
    except OSError as error:
        raise ValueError(first_line(error)) from error
    finally:
        if quiet:
            logging.enable_progress_bar()
