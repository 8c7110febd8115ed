"""The ViT of all encoders here: images of any size at native resolution, on packed tokens.

    pixels -> patches [N, 3*p*p] -> linear embedding -> [T, C] with prefix tokens -> blocks -> norm

One path serves a batch of equal images, a list of images of any shapes, and packed patches: a batch
is a pack whose grids are equal. Nothing in a block knows about images except
:class:`~hrvlm_kernels.PackedGrids`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hrvlm_kernels import PackedGrids
from hrvlm_kernels.backends import check_backend
from hrvlm_kernels.traced_grids import TracedGrids

from ..checkpoints.foreign import check_family, foreign_base, is_foreign, load_foreign
from ..checkpoints.keys import Family
from ..checkpoints.mapping import canonical_keys
from ..checkpoints.sizes import sizes_of
from ..checkpoints.strict import StrictModel
from ..images.geometry import true_or_false
from . import cpu_blocks, fused_blocks
from .batch_invariance import encode_by_image
from .inputs import Grids, flat_mask, pack_inputs
from .intermediate import as_maps, block_indices, by_image, layer_indices
from .kept_states import KeptStates
from .layers import EncoderEmbeddings, EncoderLayer, LayerScale, QKVBias
from .output import EncoderOutput, PackedEncoderOutput, batched
from .plain_modules import is_plain

if TYPE_CHECKING:
    from typing_extensions import Self

    from .cuda_graphs import GraphedEncoder
    from .graph_capacities import GraphedCapacities


class PackedEncoder(StrictModel):
    """A ViT for images of any size and aspect ratio, many at once; its families are subclasses.

    Attributes:
        backend: One of :data:`hrvlm_kernels.backends.BACKENDS`.
        batch_invariant: Whether an image's features have the same bits whatever it is packed with;
            see :mod:`hrvlm.encoder.batch_invariance`.
        sizes: What the blocks consist of.
        patch_size: Side of a patch in pixels.
        num_prefix_tokens: CLS and registers in front of each image's patches.
    """

    config: Any
    family: Family
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderLayer"]
    _supports_sdpa = True
    _overflows_float16 = False  # unless a subclass says so

    def __init__(
        self,
        config: Any,
        *,
        backend: str | None = None,
        allow_fp16: bool | None = None,
        batch_invariant: bool | None = None,
    ):
        super().__init__(config)
        self.backend = check_backend(backend or getattr(config, "backend", None) or "auto")
        if batch_invariant is None:
            batch_invariant = getattr(config, "batch_invariant", False)
        self.batch_invariant = true_or_false("batch_invariant", batch_invariant)
        self._allow_fp16 = allow_fp16 and true_or_false("allow_fp16", allow_fp16)
        self.sizes = sizes = sizes_of(config)
        self.patch_size = sizes.patch_size
        self.num_prefix_tokens = sizes.num_prefix_tokens
        self.embeddings = self._new_embeddings()
        self.layer = nn.ModuleList(EncoderLayer(sizes) for _ in range(sizes.num_hidden_layers))
        self.norm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)
        self.gradient_checkpointing = False
        self._frozen = False
        self._thaws: list[nn.Parameter] = []  # what freeze() found trainable
        self.register_load_state_dict_pre_hook(_accept_stored_keys)
        self.post_init()

    def _new_embeddings(self) -> EncoderEmbeddings:
        return EncoderEmbeddings(self.sizes)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *model_args: Any,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, for checkpoints of every layout; what does not fit raises.

        A file, or a directory without transformers' config, is read as
        :func:`hrvlm.checkpoints.convert.convert` reads it.

        Args:
            pretrained_model_name_or_path: Hub id, directory or weight file.
            *model_args: Of the model.
            **kwargs: Of transformers' ``from_pretrained``, and ``strict``; see
                :meth:`~hrvlm.checkpoints.strict.StrictModel.from_pretrained`. Of a file also
                fields of the config.

        Raises:
            ValueError: keys are missing, left over or of another shape (a grouped list), or a file
                is damaged.
            OSError: there is no such checkpoint.
        """
        source = pretrained_model_name_or_path
        load = super().from_pretrained
        if not isinstance(source, str | PathLike):
            return load(source, *model_args, **kwargs)
        if is_foreign(path := Path(source, kwargs.get("subfolder") or "")):
            return load_foreign(cls, load, path, *model_args, **kwargs)
        if base := foreign_base(path):
            raise ValueError(
                f"{path}: an adapter of {base}, which is no directory of transformers: load that, "
                "and the adapter on top by peft.PeftModel.from_pretrained"
            )
        if kwargs.get("config") is None:
            check_family(cls, path)
        return load(source, *model_args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, QKVBias):
            for bias in module.parameters():
                init.zeros_(bias)
        elif isinstance(module, EncoderEmbeddings):
            module.init_weights(std)
        elif isinstance(module, LayerScale):
            init.constant_(module.lambda1, self.sizes.layerscale_value)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.embeddings.patch_embeddings

    def freeze(self) -> Self:
        """Stop training: no gradients, no graph, and eval mode whatever ``train()`` says."""
        if not self._frozen:
            self._thaws = [p for p in self.parameters() if p.requires_grad]
        self._frozen = True
        self.requires_grad_(False)
        return self.eval()

    def unfreeze(self) -> Self:
        """Undo :meth:`freeze`; the mode stays eval until ``train()`` is called."""
        for parameter in self._thaws:
            parameter.requires_grad_(True)
        self._frozen, self._thaws = False, []
        return self

    def _is_frozen(self) -> bool:
        """Frozen, and no adapter has been added since that is there to be trained."""
        return self._frozen and not any(p.requires_grad for p in self.parameters())

    def graphed(
        self,
        sizes: Sequence[Sequence[Sequence[int]]] | None = None,
        *,
        capacities: Sequence[Sequence[int]] | None = None,
    ) -> GraphedEncoder | GraphedCapacities:
        """This encoder replayed from CUDA graphs, for inference.

        Args:
            sizes: For a fixed set of sizes, ``[[(224, 224)] * 32, [(768, 512), (512, 768)]]``:
                heights and widths in pixels of the images of each packing; see
                :class:`~hrvlm.encoder.cuda_graphs.GraphedEncoder`.
            capacities: For any mix of images, ``[(4096, 16), (16384, 64)]``: the most tokens and
                the most images of each graph; see
                :class:`~hrvlm.encoder.graph_capacities.GraphedCapacities`.

        Raises:
            ValueError: neither is given, or both.
        """
        from .cuda_graphs import GraphedEncoder
        from .graph_capacities import GraphedCapacities

        if (sizes is None) == (capacities is None):
            raise ValueError("graphed: give sizes, or capacities=[(tokens, images), ...]")
        if capacities is not None:
            return GraphedCapacities(self, capacities)
        return GraphedEncoder(self, sizes or [])

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; a frozen encoder stays in eval mode."""
        fused_blocks.forget(self.layer)
        return super().train(mode and not self._frozen)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Self:
        fused_blocks.forget(self.layer)
        return super()._apply(fn, *args, **kwargs)

    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        bool_masked_pos: Tensor | Sequence[Tensor] | None = None,
        *,
        grids: Grids | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        out_indices: Sequence[int] | None = None,
        apply_layernorm: bool = True,
        final_norm: bool = True,
        output_prefix_attentions: bool = False,
        rope_augment: bool = False,
        return_dict: bool | None = None,
    ) -> EncoderOutput | PackedEncoderOutput | tuple:
        """Encode images.

        Args:
            pixel_values: A batch ``[B, 3, H, W]``, a list of ``[3, Hi, Wi]``, or packed patches
                ``[N, 3*p*p]`` in the order of :func:`hrvlm.images.patches.patchify`, with `grids`.
            bool_masked_pos: True where the mask token replaces a patch: ``[B, hp*wp]`` for a batch,
                a list of ``[hp*wp]`` or ``[hp, wp]`` for a list, ``[N]`` for packed patches.
            grids: Patch grids (hp, wp) of packed patches: a PackedGrids (reads nothing from the
                device), pairs of ints, or an int tensor ``[B, 2]`` (read back once if it is on a
                GPU).
            output_attentions: Refused where it, or the config's, is True: attention here makes no
                matrix of weights. See `output_prefix_attentions`.
            output_hidden_states: Return the embeddings and each block's output, before the final
                norm. Default: the config's.
            out_indices: Layers to return as `selected_hidden_states`: 0 is the embeddings, i the
                output of block i, negative numbers count from the last block.
            apply_layernorm: Apply the final norm to the selected layers.
            final_norm: Apply the final norm to the last hidden state and the `pooler_output`, too;
                False for who does it together with what comes after.
            output_prefix_attentions: Return the attention of CLS and registers per layer and head.
            rope_augment: Draw a random shift, jitter and scale of each image's RoPE coordinates
                (config ``pos_embed_shift``, ``pos_embed_jitter``, ``pos_embed_rescale``), as
                DINOv3's training does; others have no RoPE.
            return_dict: False for a tuple. Default: the config's.

        Returns:
            :class:`EncoderOutput` for a batch, :class:`PackedEncoderOutput` otherwise.

        Raises:
            ValueError: an image's sides are not multiples of the patch size, shapes do not fit,
                something is asked for that the model has not, or the dtype is float16, which
                DINOv3's activations overflow, without ``allow_fp16``.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions=True (in the call or the config): no kernel makes a matrix of "
                "attention weights; output_prefix_attentions=True returns those of CLS and "
                "registers, and attention_maps() of the output has them by image"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._is_frozen()):
            patches, packed, shape = pack_inputs(pixel_values, grids, self)
            masked = flat_mask(bool_masked_pos, patches)
            if output_hidden_states is None:
                output_hidden_states = self.config.output_hidden_states
            encode = partial(
                self._encode,
                keep=layer_indices(out_indices, self.config.num_hidden_layers),
                keep_all=bool(output_hidden_states),
                apply_layernorm=apply_layernorm,
                final_norm=final_norm,
                prefix_attentions=output_prefix_attentions,
                rope_augment=rope_augment,
            )
            if self.batch_invariant:
                fields = encode_by_image(encode, patches, packed, masked)
            else:
                fields = encode(patches, packed, masked, shape)
        output: EncoderOutput | PackedEncoderOutput
        if shape is None:
            exported = isinstance(packed, TracedGrids)  # of no use outside its graph
            output = PackedEncoderOutput(packed=None if exported else packed, **fields)  # type: ignore[arg-type]
        else:
            output = batched(fields, shape)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def get_intermediate_layers(
        self,
        x: Tensor | Sequence[Tensor],
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
        grids: Grids | None = None,
    ) -> tuple[Any, ...]:
        """What chosen blocks return, as Meta's method of this name gives it.

        timm's is the same with ``norm=False``, and its prefix tokens are CLS and registers in one.

        Args:
            x: Images or patches, as :meth:`forward` takes them.
            n: The last n blocks, or a list of blocks counted from 0 (negative from the end); they
                come in ascending order.
            reshape: Patches as maps.
            return_class_token: CLS too.
            return_extra_tokens: The registers too.
            norm: Apply the final norm.
            grids: Patch grids of packed patches.

        Returns:
            For each block the patches: of a batch ``[B, hp*wp, C]`` or ``[B, C, hp, wp]``, of
            images of different shapes a tuple of ``[hp*wp, C]`` or ``[C, hp, wp]``. With CLS
            ``[B, C]`` or registers ``[B, R, C]``, a tuple of these for each block.

        Raises:
            ValueError: there is no such block, or as :meth:`forward`.
        """
        blocks = block_indices(n, len(self.layer))
        indices = [i + 1 for i in blocks]
        out = PackedEncoder.forward(
            self,
            x,
            grids=grids,
            out_indices=indices,
            apply_layernorm=norm,
            output_hidden_states=False,
            return_dict=True,
        )
        assert not isinstance(out, tuple)
        prefix = "" if isinstance(out, EncoderOutput) else "packed_"
        layers = out[f"{prefix}selected_hidden_states"]
        results: list[Any] = []
        for tokens in layers:
            patches, cls, registers = by_image(tokens, out, self.num_prefix_tokens)
            if reshape:
                patches = as_maps(patches, out, x, self.patch_size)
            extra = ((cls,) if return_class_token else ()) + (
                (registers,) if return_extra_tokens else ()
            )
            results.append((patches, *extra) if extra else patches)
        return tuple(results)

    @property
    def allow_fp16(self) -> bool:
        """Whether it runs in float16: as it was told, else as the config says now."""
        asked = self._allow_fp16
        return bool(getattr(self.config, "allow_fp16", False) if asked is None else asked)

    @allow_fp16.setter
    def allow_fp16(self, allow: bool) -> None:
        self._allow_fp16 = allow

    def _refuse_fp16(self, x: Tensor) -> None:
        if self._overflows_float16 and x.dtype == torch.float16 and not self.allow_fp16:
            raise ValueError(
                "float16: DINOv3's activations overflow it; use bfloat16 or float32, or "
                "allow_fp16=True, an argument of from_pretrained and a field of the config"
            )

    def _augmented(self, packed: PackedGrids) -> PackedGrids:
        raise ValueError(
            f"rope_augment=True: {type(self).__name__} has learned positions, and no RoPE"
        )

    def _encode(
        self,
        patches: Tensor,
        packed: PackedGrids,
        masked: Tensor | None,
        batch: tuple[int, int] | None = None,
        *,
        keep: tuple[int, ...],
        keep_all: bool,
        apply_layernorm: bool,
        final_norm: bool,
        prefix_attentions: bool,
        rope_augment: bool,
    ) -> dict[str, Any]:
        x = self.embeddings(patches, packed, masked)
        self._refuse_fp16(x)
        if rope_augment:
            packed = self._augmented(packed)
        if len(self.layer):
            # Who wraps a layer may hide what is in it; each attention then rotates by itself.
            attention: Any = getattr(self.layer[0], "attention", None)
            if hasattr(attention, "with_rope_table"):
                packed = attention.with_rope_table(packed, x, self.backend)
        drop_path = self.training and self.config.drop_path_rate > 0
        attentions = []
        kept = KeptStates(range(len(self.layer) + 1) if keep_all else keep, batch)
        x = kept.keep(0, x)
        run = None if drop_path or prefix_attentions else _joined_run(self, x)
        if run is not None:
            own = x.clone() if 0 in kept and run is not fused_blocks.train else x
            joined = final_norm and is_plain(self.norm, nn.LayerNorm)
            normed = run(self, own, packed, kept, joined)
            normed = self.norm(normed) if final_norm and not joined else normed
        else:
            for i, layer in enumerate(cast("Iterable[EncoderLayer]", self.layer), start=1):
                x = layer(x, packed, self.backend, drop_path, prefix_attentions)
                if prefix_attentions:
                    x, weights = x
                    attentions.append(weights)
                x = kept.keep(i, x)
            normed = self.norm(x) if final_norm else x
        states = kept.states
        selected = tuple(self.norm(states[i]) if apply_layernorm else states[i] for i in keep)
        return {
            "packed_last_hidden_state": normed,
            "pooler_output": normed[packed.cu_seqlens[:-1]],
            "packed_hidden_states": tuple(states[i] for i in range(len(self.layer) + 1))
            if keep_all
            else None,
            "packed_selected_hidden_states": selected or None,
            "packed_prefix_attentions": tuple(attentions) or None,
        }


def _joined_run(encoder: PackedEncoder, x: Tensor) -> Callable[..., Tensor] | None:
    """What runs all blocks as one, if it may; else they are called one by one."""
    if fused_blocks.can_run(encoder, x):
        return fused_blocks.train if torch.is_grad_enabled() else fused_blocks.infer
    return cpu_blocks.infer if cpu_blocks.can_run(encoder, x) else None


def _accept_stored_keys(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Accept transformers' keys, in memory and in files, beside the encoder's own."""
    fused_blocks.forget(cast("PackedEncoder", module).layer)
    for key in [key for key in state_dict if key.startswith(prefix)]:
        names = canonical_keys(key[len(prefix) :])
        if names != (key[len(prefix) :],):
            parts = state_dict.pop(key).chunk(len(names))
            for name, part in zip(names, parts, strict=True):  # in place: it is the caller's
                state_dict[prefix + name] = part
