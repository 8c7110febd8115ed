"""Vision towers of other models, accelerated, as encoders of images of any sizes.

What a tower takes is told by the parameters of its forward, what it gives is put in order:

    grid_thw              patches by blocks of those merged later   Qwen2-VL to Qwen3.5, Ernie 4.5
    spatial_shapes        patches, padded to one length             SigLIP2, LFM2-VL
    image_sizes           images on one canvas, packed inside       Pixtral, Mistral 3, LightOnOCR
    patch_attention_mask  images on one canvas, padding masked      Idefics 2 and 3, SmolVLM

The sizes of images are this project's, as for its own encoders, and not those that the model's own
image processor would choose; sides are whole patches, or whole blocks of merged ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.vision_utils import get_vision_window_index

from hrvlm_kernels import PackedGrids

from ..checkpoints.foreign import is_foreign
from ..checkpoints.preprocessor import stored_normalization
from ..images.patches import pack_images
from ..images.processor import Normalization
from ..machine import MODEL_DTYPES, default_dtype, pick_device, torch_dtype
from ..towers.acceleration import accelerate
from ..towers.rebinding import global_names, innermost
from ..vlm.vision_towers import encode
from .loading import ENCODER_TYPES, check_backend_runs, quiet_loading

_FORMS = ("grid_thw", "spatial_shapes", "image_sizes", "patch_attention_mask")
_MERGED, _WINDOWS = "spatial_merge_size", "get_vision_window_index"


class Tower:
    """A tower on hrvlm's attention that takes a list of images.

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
        form = form_of(type(module))
        if form is None:
            raise ValueError(f"{type(module).__name__} takes images in no form that is known")
        accelerate(module, backend=backend)
        self.module, self._form, self._batch_invariant = module.eval(), form, batch_invariant
        self.patch_size = int(module.config.patch_size)
        # Of the sides of a block of patches that are neighbours in what the tower is given.
        in_blocks = form == "grid_thw" and _MERGED in global_names(type(module).forward)
        self.factor = int(getattr(module, _MERGED)) if in_blocks else 1
        hidden, states = self._alone([torch.zeros(3, self._side, 2 * self._side)], layers=True)
        self.hidden_size, self.num_layers = hidden.shape[1], len(states) - 1

    @property
    def _side(self) -> int:
        return self.patch_size * self.factor

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.module.dtype

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[Tensor], layer: int | None = None
    ) -> tuple[Tensor, PackedGrids]:
        """Tokens of all images ``[T, C]``, each image's row by row of its grid, and their layout.

        Args:
            images: ``[3, H, W]``, normalised; sides are multiples of ``patch_size * factor``.
            layer: Whose output, as the tower gives it; None for its last hidden state.
        """
        grids = [(i.shape[1] // self.patch_size, i.shape[2] // self.patch_size) for i in images]
        packed = PackedGrids.from_grids(grids, num_prefix_tokens=0, device=self.device)
        groups = [[image] for image in images] if self._batch_invariant else [list(images)]
        found = []
        for group in groups:
            hidden, states = self._alone(group, layers=layer is not None)
            found.append(hidden if layer is None else states[layer])
        return torch.cat(found), packed

    @torch.inference_mode()
    def _alone(self, images: list[Tensor], *, layers: bool) -> tuple[Tensor, Sequence[Tensor]]:
        """The last hidden state, and the others on request: ``[T, C]`` each."""
        images = [image.to(self.device, self.dtype) for image in images]
        patches, grids = pack_images(images, self.patch_size)
        flags: dict[str, bool | None] = {"output_hidden_states": layers, "output_attentions": None}
        if self._form == "spatial_shapes":
            encoded = encode(self.module, patches, grids, self.patch_size, flags)
            return encoded.last_hidden_state, encoded.hidden_states or ()
        given, rows = (
            self._by_grids(patches, grids)
            if self._form == "grid_thw"
            else self._on_canvas(images, grids)
        )
        out = self.module(**given, output_hidden_states=layers)

        def in_order(states: Tensor) -> Tensor:
            flat = states.flatten(0, -2)
            flat = flat if rows is None or len(flat) < len(rows) else flat[rows.to(flat.device)]
            if len(flat) != len(patches):
                name, shape = type(self.module).__name__, tuple(states.shape)
                raise ValueError(f"{name} gives {shape} for {len(patches)} patches: not one each")
            return flat

        states = [in_order(state) for state in (out.hidden_states if layers else ())]
        return in_order(out.last_hidden_state), states

    def _by_grids(
        self, patches: Tensor, grids: list[tuple[int, int]]
    ) -> tuple[dict[str, Any], Tensor]:
        config: Any = self.module.config
        m, area, rows, start = self.factor, self.patch_size**2, [], 0
        for hp, wp in grids:
            raster = torch.arange(start, start + hp * wp).view(hp // m, m, wp // m, m)
            rows.append(raster.transpose(1, 2).flatten())
            start += hp * wp
        order = torch.cat(rows)  # of patches as they are given
        frames = int(getattr(config, "temporal_patch_size", 1))
        ordered = patches[order.to(patches.device)].unflatten(1, (3, 1, area))
        given = ordered.expand(-1, -1, frames, -1).flatten(1)
        thw = torch.tensor([(1, *grid) for grid in grids])  # on the host, where it is read
        if _WINDOWS in global_names(type(self.module).forward):  # and leaves its tokens in them
            windows, _ = get_vision_window_index(thw, m, config.window_size, self.patch_size)
            order = order.view(-1, m * m)[windows].flatten()
        return {"hidden_states": given, "grid_thw": thw}, order.argsort()

    def _on_canvas(
        self, images: list[Tensor], grids: list[tuple[int, int]]
    ) -> tuple[dict[str, Any], Tensor | None]:
        down, across = (max(sides) for sides in zip(*grids, strict=True))
        p, count = self.patch_size, len(images)
        canvas = images[0].new_zeros(count, 3, down * p, across * p)
        mask = torch.zeros(count, down, across, dtype=torch.bool)
        for i, (image, (hp, wp)) in enumerate(zip(images, grids, strict=True)):
            canvas[i, :, : hp * p, : wp * p] = image
            mask[i, :hp, :wp] = True
        if self._form == "image_sizes":
            sizes = torch.tensor([(hp * p, wp * p) for hp, wp in grids])
            return {"pixel_values": canvas, "image_sizes": sizes}, None
        given = {"pixel_values": canvas, "patch_attention_mask": mask.to(self.device)}
        return given, mask.flatten().nonzero()[:, 0]


def form_of(cls: type[nn.Module]) -> str | None:
    """How a tower takes images of several sizes: the parameter that tells their sizes."""
    names = inspect.signature(innermost(cls.forward)).parameters
    if "input_ids" in names or "merge_sizes" in names:
        return None
    found = next((form for form in _FORMS if form in names), None)
    wanted = "hidden_states" if found == "grid_thw" else "pixel_values"
    return found if wanted in names else None


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


def has_tower(model: str) -> bool:
    """Whether it is a model of transformers other than this project's encoders."""
    if is_foreign(model):
        return False
    try:
        stored, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError):
        return False
    kind = stored.get("model_type")
    return kind in CONFIG_MAPPING and kind not in ENCODER_TYPES


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
        raise ValueError(f"model {model!r}: no image_mean and image_std in its image processor")
    with quiet_loading(model):
        whole, told = AutoModel.from_pretrained(model, dtype=weights, output_loading_info=True)
    towers = {
        name: module
        for name, module in whole.named_modules()
        if isinstance(module, PreTrainedModel) and form_of(type(module))
    }
    name, module = next(iter(towers.items()), (None, None))
    if name is None or module is None:
        raise ValueError(
            f"model {model!r}: {type(whole).__name__} has no vision tower that takes images of any "
            f"sizes: none with {', '.join(_FORMS)}"
        )
    missing = sorted(key for key in told["missing_keys"] if f"{key}.".startswith(name))
    if missing:
        raise ValueError(
            f"model {model!r}: weights of its vision tower are missing: {', '.join(missing[:3])}"
        )
    module.requires_grad_(False).to(where)  # type: ignore[arg-type]
    return LoadedTower(Tower(module, backend, batch_invariant), model, normalization)
