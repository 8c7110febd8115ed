"""CUDA graphs of the encoder for a fixed set of packings: ``encoder.graphed(sizes)``.

A forward of a small model on small images is hundreds of launches, and the host can't issue them as
fast as the GPU runs them. A CUDA graph records them once and starts them all with one call. It also
records every size and every address, so there is one graph per packing, with buffers of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from hrvlm_kernels import PackedGrids
from hrvlm_kernels.backends import resolve

from ..images.geometry import positive_pair
from .fused_blocks import Held
from .inputs import Grids, PackedInputs, pack_inputs
from .output import EncoderOutput, PackedEncoderOutput

if TYPE_CHECKING:
    from .packed_encoder import PackedEncoder

_Grid = tuple[int, int]
_Value = TypeVar("_Value")
_WARM_UPS = 3  # compile the kernels, choose the libraries' algorithms, fill the caches of tables


@dataclass(frozen=True)
class _Recording:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    patches: Tensor
    packed_last_hidden_state: Tensor
    pooler_output: Tensor
    packed: PackedGrids  # its tables are read by the graph
    folded: Held  # so are these


class Replaying:
    """What the graphs of an encoder have in common, of whatever sizes they are.

    They share buffers, so that replays take turns, on whatever thread and stream.

    Args:
        encoder: Its graphs are captured: later replays wait for what this stream has done so far.
    """

    def __init__(self, encoder: PackedEncoder):
        self.encoder = encoder
        self._turns, self._place = Lock(), self._place_of_weights()
        with torch.cuda.device(encoder.device):
            self._last = torch.cuda.Event()  # recorded after each replay
            self._last.record()

    def _place_of_weights(self) -> int:
        return next(self.encoder.parameters()).data_ptr()  # moving a module moves all

    def _inputs(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        grids: Grids | None,
        device: torch.device | None = None,
    ) -> PackedInputs:
        """The patches of what a call was given, and their layout, there or on `device`."""
        inputs = pack_inputs(pixel_values, grids, self.encoder, device=device)
        if inputs.patches.requires_grad and torch.is_grad_enabled():
            raise ValueError("pixel_values requires grad, but a graphed encoder has no backward")
        return inputs

    @contextmanager
    def _turn(self, folded: Held) -> Iterator[None]:
        """A replay's turn: what the graph reads is as the encoder's weights are now."""
        if self._place_of_weights() != self._place:
            raise RuntimeError("graphed: the encoder was moved or cast since; make new graphs")
        with (
            self._turns,
            torch.inference_mode(False),
            torch.no_grad(),
            torch.cuda.device(self.encoder.device),
        ):
            self._last.wait()  # of another stream
            folded.renew()
            yield
            self._last.record()


def as_output(
    hidden: Tensor, pooled: Tensor, packed: PackedGrids, batch: tuple[int, int] | None
) -> EncoderOutput | PackedEncoderOutput:
    """Packed tokens as the encoder gives them: of a batch, or of a pack where `batch` is None."""
    if batch is None:
        return PackedEncoderOutput(hidden, pooled, packed=packed)
    fields: dict[str, Any] = {
        "last_hidden_state": hidden.unflatten(0, batch),
        "pooler_output": pooled,
    }
    return EncoderOutput(**fields)


class GraphedEncoder(Replaying):
    """An encoder that replays CUDA graphs, for inference.

    The graphs read the encoder's weights where they are, and those that inference folds (see
    :mod:`~hrvlm.encoder.fused_blocks`) are written again when one has changed: changing them in
    place is seen, through ``.data`` only after an optimizer's step. Moving or casting the encoder
    needs a new GraphedEncoder. Results are copies, so that the next call does not overwrite them.
    Threads, on streams of their own too, take turns: the graphs share buffers.

    Args:
        encoder: On a GPU, in eval mode.
        sizes: The packings: for each, height and width in pixels of its images, in order.

    Raises:
        ValueError: `sizes` is empty, a side is not a positive multiple of the patch size, or the
            encoder is in training mode.
        RuntimeError: the encoder is not on a GPU, or autocast is on (its copies of the weights do
            not outlive it: cast the encoder instead); in a call, it was moved or cast since.
    """

    def __init__(self, encoder: PackedEncoder, sizes: Sequence[Sequence[Sequence[int]]]):
        if not isinstance(sizes, Iterable):
            raise ValueError(f"sizes={sizes!r:.60}: expected [[(height, width), ...], ...]")
        packings = [_grids_of(i, images, encoder.patch_size) for i, images in enumerate(sizes)]
        if not packings:
            raise ValueError("sizes must hold at least one packing, got none")
        check_can_be_captured(encoder)
        device = encoder.device
        self._recordings: dict[tuple[_Grid, ...], _Recording] = {}
        pool = None
        with torch.cuda.device(device):
            for grids in dict.fromkeys(packings):
                recording = _record(encoder, grids, device, pool)
                self._recordings[grids] = recording
                pool = recording.graph.pool()
        super().__init__(encoder)

    def __call__(
        self, pixel_values: Tensor | Sequence[Tensor], *, grids: Grids | None = None
    ) -> EncoderOutput | PackedEncoderOutput:
        """Encode images, given as to the encoder itself.

        Args:
            pixel_values: A batch ``[B, 3, H, W]``, a list of ``[3, Hi, Wi]``, or packed patches
                ``[N, 3*p*p]`` with `grids`; on any device.
            grids: Patch grids of packed patches.

        Returns:
            The last hidden state and `pooler_output`, without gradients, as the encoder gives them.

        Raises:
            ValueError: there is no graph for these sizes in this order, or an input requires grad.
        """
        patches, packed, batch = self._inputs(pixel_values, grids)
        recording = _select(self._recordings, packed.grids or (), self.encoder.patch_size)
        with self._turn(recording.folded):
            recording.patches.copy_(patches.detach(), non_blocking=True)
            recording.graph.replay()
            hidden = recording.packed_last_hidden_state.clone()
            pooled = recording.pooler_output.clone()
        return as_output(hidden, pooled, recording.packed, batch)


def _record(
    encoder: PackedEncoder, grids: tuple[_Grid, ...], device: torch.device, pool: Any
) -> _Recording:
    packed = PackedGrids.from_grids(
        grids, num_prefix_tokens=encoder.num_prefix_tokens, device=device
    )
    shape = sum(hp * wp for hp, wp in grids), encoder.config.num_channels * encoder.patch_size**2
    with torch.inference_mode(False), torch.no_grad():
        patches = torch.zeros(shape, dtype=encoder.dtype, device=device)
        graph, out = capture(encoder, patches, packed, pool)
    return _Recording(
        graph, patches, out.packed_last_hidden_state, out.pooler_output, packed, Held(encoder.layer)
    )


def check_can_be_captured(encoder: PackedEncoder, *, kernels: bool = False) -> None:
    """Raise ValueError or RuntimeError where no graph of `encoder` can be made.

    With `kernels` it has to run on the Triton kernels, which take segments without rows.
    """
    if encoder.training:
        raise ValueError("graphed: the encoder is in training mode; call eval() first")
    device = encoder.device
    if device.type != "cuda":
        raise RuntimeError(
            f"graphed: CUDA graphs need the encoder on a GPU, it is on {device.type!r}"
        )
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError(
            "graphed: autocast is on; cast the encoder (encoder.to(torch.bfloat16)) instead"
        )
    x = torch.empty(0, dtype=encoder.dtype, device=device)
    if kernels and (chosen := resolve("varlen_attention", encoder.backend, x)) != "triton":
        raise RuntimeError(f"graphed: capacities need backend 'triton', here it is {chosen!r}")


def capture(
    encoder: PackedEncoder, patches: Tensor, packed: PackedGrids, pool: Any
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `encoder` on these patches and this layout, and the outputs that it writes."""
    device = patches.device
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            encoder(patches, grids=packed, return_dict=True)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on allocating: only what this one does is recorded.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = encoder(patches, grids=packed, return_dict=True)
    return graph, out


def _grids_of(i: int, images: Sequence[Sequence[int]], patch_size: int) -> tuple[_Grid, ...]:
    grids = []
    for j, size in enumerate(images):
        pair = positive_pair(size)
        if pair is None or pair[0] % patch_size or pair[1] % patch_size:
            raise ValueError(
                f"sizes[{i}], image {j}: expected (height, width), positive multiples of the patch "
                f"size {patch_size}, got {size}"
            )
        grids.append((pair[0] // patch_size, pair[1] // patch_size))
    if not grids:
        raise ValueError(f"sizes[{i}] has no images")
    return tuple(grids)


def _select(
    recordings: Mapping[tuple[_Grid, ...], _Value], grids: tuple[_Grid, ...], patch_size: int
) -> _Value:
    if grids not in recordings:
        known = "; ".join(_pixels(key, patch_size) for key in recordings)
        raise ValueError(
            f"no graph was captured for images of {_pixels(grids, patch_size)} px (height x width, "
            f"in this order), only for: {known}"
        )
    return recordings[grids]


def _pixels(grids: tuple[_Grid, ...], patch_size: int) -> str:
    sizes = [f"{hp * patch_size}x{wp * patch_size}" for hp, wp in grids]
    return ", ".join(sizes[:8]) + (f", ... {len(sizes)} in all" if len(sizes) > 8 else "")
