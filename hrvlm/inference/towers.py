"""Vision towers of other models, accelerated, as encoders of images of any sizes.

Images go in as :mod:`hrvlm.vlm.vision_towers` says. What comes out is a token for each patch, row
by row of its grid: of towers that merge blocks of patches (Qwen2-VL to Qwen3.5, Ernie 4.5), what
they have in front of their merger, out of blocks and windows.

The sizes of images are this project's, as for its own encoders, and not those that the model's own
image processor would choose; sides are whole patches, or whole blocks of merged ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.vision_utils import get_vision_window_index

from hrvlm_kernels import PackedGrids

from ..checkpoints.foreign import is_foreign
from ..checkpoints.preprocessor import stored_normalization
from ..encoder.output import PackedEncoderOutput
from ..encoder.packed_encoder import PackedEncoder
from ..images.patches import pack_images
from ..images.processor import Normalization, check_normalization
from ..machine import MODEL_DTYPES, default_dtype, pick_device, torch_dtype
from ..towers.acceleration import accelerate
from ..towers.rebinding import global_names, innermost
from ..vlm.config import VLMConfig
from ..vlm.tower_classes import Form, tower_class, tower_form
from ..vlm.vision_towers import encode
from .loading import (
    ENCODER_TYPES,
    LoadedEncoder,
    check_backend_runs,
    load_encoder,
    quiet_loading,
)

if TYPE_CHECKING:
    from ..vlm.vision_language_model import VisionLanguageModel

_MERGED, _WINDOWS = "spatial_merge_size", "get_vision_window_index"


class Tower(nn.Module):
    """A tower on hrvlm's attention, called as an encoder of this project is.

    Args:
        module: The tower; changed in place by :func:`hrvlm.accelerate`.
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.
        batch_invariant: Give an image's features the same bits whatever it is packed with: each
            goes through alone.

    Raises:
        ValueError: it takes its images in no form that is known here, has no attention that can be
            swapped, or gives no token for each patch.
    """

    num_prefix_tokens = 0

    def __init__(
        self, module: PreTrainedModel, backend: str = "auto", batch_invariant: bool = False
    ):
        super().__init__()
        form = form_of(module)
        if form is None:
            raise ValueError(f"{type(module).__name__} takes images in no form that is known")
        accelerate(module, backend=backend)
        self.module, self._form = module.eval(), form
        self.backend, self.batch_invariant = backend, batch_invariant
        self.patch_size = int(module.config.patch_size)
        # Of the sides of a block of patches that are neighbours in what the tower is given.
        in_blocks = form is Form.MERGED and _MERGED in global_names(type(module).forward)
        self.factor = int(getattr(module, _MERGED)) if in_blocks else 1
        side = self.patch_size * self.factor
        hidden, states = self._encode([torch.zeros(3, side, 2 * side)], layers=True)
        self.hidden_size, self.num_layers = hidden.shape[1], len(states) - 1

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.module.dtype

    def forward(
        self,
        images: Sequence[Tensor],
        out_indices: Sequence[int] | None = None,
        apply_layernorm: bool = True,
    ) -> PackedEncoderOutput:
        """Tokens of all images, each image's row by row of its grid; there are no prefix tokens.

        Args:
            images: ``[3, H, W]``, normalised; sides are multiples of ``patch_size * factor``.
            out_indices: Layers whose output is kept, too; 0 for the embeddings.
            apply_layernorm: No matter: the output of a layer is as the tower gives it.
        """
        p = self.patch_size
        grids = [(image.shape[1] // p, image.shape[2] // p) for image in images]
        packed = PackedGrids.from_grids(grids, num_prefix_tokens=0, device=self.device)
        groups = [[image] for image in images] if self.batch_invariant else [list(images)]
        found = [self._encode(group, layers=bool(out_indices)) for group in groups]
        return PackedEncoderOutput(
            packed_last_hidden_state=torch.cat([hidden for hidden, _ in found]),
            packed_selected_hidden_states=tuple(
                torch.cat([states[i] for _, states in found]) for i in out_indices or ()
            ),
            packed=packed,
        )

    @torch.inference_mode()
    def _encode(self, images: list[Tensor], *, layers: bool) -> tuple[Tensor, Sequence[Tensor]]:
        """The last hidden state, and the others on request: ``[T, C]`` each."""
        images = [image.to(self.device, self.dtype) for image in images]
        patches, grids = pack_images(images, self.patch_size)
        flags: dict[str, bool | None] = {"output_hidden_states": layers, "output_attentions": None}
        if self._form is not Form.MERGED:
            encoded = encode(self.module, patches, grids, self.patch_size, flags)
            return encoded.last_hidden_state, encoded.hidden_states or ()
        given, rows = self._by_grids(patches, grids)
        out = self.module(**given, output_hidden_states=layers)

        def in_order(states: Tensor) -> Tensor:
            if len(states) != len(patches):
                name, shape = type(self.module).__name__, tuple(states.shape)
                raise ValueError(f"{name} gives {shape} for {len(patches)} patches: not one each")
            return states[rows.to(states.device)]

        states = [in_order(state) for state in (out.hidden_states if layers else ())]
        return in_order(out.last_hidden_state), states

    def _by_grids(
        self, patches: Tensor, grids: list[tuple[int, int]]
    ) -> tuple[dict[str, Any], Tensor]:
        config: Any = self.module.config
        m, area = self.factor, self.patch_size**2
        # Of patches as they are given: block after block.
        order = PackedGrids.from_grids(grids).shuffle_index(m).flatten().long()
        frames = int(getattr(config, "temporal_patch_size", 1))
        ordered = patches[order.to(patches.device)].unflatten(1, (3, 1, area))
        given = ordered.expand(-1, -1, frames, -1).flatten(1)
        thw = torch.tensor([(1, *grid) for grid in grids])  # on the host, where it is read
        if _WINDOWS in global_names(type(self.module).forward):  # and leaves its tokens in them
            windows, _ = get_vision_window_index(thw, m, config.window_size, self.patch_size)
            order = order.view(-1, m * m)[windows].flatten()
        return {"hidden_states": given, "grid_thw": thw}, order.argsort()


def form_of(module: nn.Module) -> Form | None:
    """How a tower takes images of several sizes; None if it is none or takes one size."""
    takes = tuple(inspect.signature(innermost(type(module).forward)).parameters)[1:3]
    if takes == Form.MERGED.value:
        return Form.MERGED
    config: Any = getattr(module, "config", None)
    form = tower_form(config) if config is not None and _is_outermost(module) else None
    return None if form in (Form.MERGED, Form.SQUARES) else form


def _is_outermost(module: nn.Module) -> bool:
    """Whether it is the tower of its config, and no part of it."""
    cls: Any = tower_class(module.config)  # type: ignore[arg-type]
    return cls is not None and isinstance(module, cls)


@dataclass(frozen=True)
class LoadedTower:
    """A tower with what has to be known about it.

    Attributes:
        encoder: Frozen, on its device.
        name: Hub id or directory.
        normalization: Mean and std of the pixels it takes.
    """

    encoder: Tower
    name: str
    normalization: Normalization
    random_weights: bool = False

    @property
    def factor(self) -> int:
        """See :class:`LoadedEncoder`."""
        return self.encoder.factor


def _stored_type(model: str) -> str | None:
    """The `model_type` in its config; None where there is none."""
    if is_foreign(model) or Path(model).is_file():
        return None
    try:
        stored, _ = PretrainedConfig.get_config_dict(model)
        return str(stored["model_type"])
    except Exception:  # whatever is wrong with it, load_encoder says better
        return None


def load_encoder_or_tower(model: str | None, **options: Any) -> LoadedEncoder | LoadedTower:
    """By what the model is; the arguments are those of `load_encoder`."""
    return load_with_vlm(model, **options)[1]


def load_with_vlm(
    model: str | None, **options: Any
) -> tuple[VisionLanguageModel | None, LoadedEncoder | LoadedTower]:
    """Likewise, and the VisionLanguageModel that an encoder of this project is in, if it is."""
    if model is not None and (kind := _stored_type(model)) not in ENCODER_TYPES:
        if kind == VLMConfig.model_type:
            return _load_vlm(model, **options)
        if kind in CONFIG_MAPPING:
            return None, load_tower(model, **options)
    return None, load_encoder(model, **options)


def _load_vlm(
    model: str,
    *,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    batch_invariant: bool = False,
) -> tuple[VisionLanguageModel | None, LoadedEncoder | LoadedTower]:
    """The model with its encoder; of one whose encoder is a tower of transformers, that alone."""
    from .chat import load_vlm

    where = pick_device(device)
    name = dtype or default_dtype(where)
    check_backend_runs(backend, where, torch_dtype(name, MODEL_DTYPES))
    processor, vlm = load_vlm(model, device=device, dtype=name)
    encoder, images = vlm.vision_encoder, processor.image_processor
    normalization = check_normalization(images.image_mean, images.image_std)
    if not isinstance(encoder, PackedEncoder):
        encoder.requires_grad_(False)
        return None, LoadedTower(Tower(encoder, backend, batch_invariant), model, normalization)
    encoder.backend, encoder.batch_invariant = backend, batch_invariant
    encoder.freeze()
    return vlm, LoadedEncoder(encoder, model, False, normalization)


def load_tower(
    model: str,
    *,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    batch_invariant: bool = False,
) -> LoadedTower:
    """Load a model of transformers and keep its vision tower; the rest is read and dropped.

    The arguments are those of :func:`hrvlm.inference.loading.load_encoder`.

    Raises:
        ValueError: it has no tower of a known form, weights of the tower are missing, there are no
            mean and std beside it, or backend or device can't be used here.
    """
    where = pick_device(device)
    weights = torch_dtype(dtype or default_dtype(where), MODEL_DTYPES)
    check_backend_runs(backend, where, weights)
    normalization = stored_normalization(model)
    if normalization is None:
        raise ValueError(
            f"model {model!r}: no image_mean and image_std in its image processor, if it has one; "
            "expected a DINOv3, a DINOv2 or a model with a vision tower"
        )
    with quiet_loading(model):
        whole, told = AutoModel.from_pretrained(model, dtype=weights, output_loading_info=True)
    towers = {
        name: module
        for name, module in whole.named_modules()
        if isinstance(module, PreTrainedModel) and form_of(module)
    }
    name, module = next(iter(towers.items()), (None, None))
    if name is None or module is None:
        raise ValueError(
            f"model {model!r}: {type(whole).__name__} has no vision tower that takes images of any "
            "sizes in a form that is known"
        )
    missing = sorted(key for key in told["missing_keys"] if f"{key}.".startswith(name))
    if missing:
        raise ValueError(
            f"model {model!r}: weights of its vision tower are missing: {', '.join(missing[:3])}"
        )
    module.requires_grad_(False).to(where)  # type: ignore[arg-type]
    return LoadedTower(Tower(module, backend, batch_invariant), model, normalization)
