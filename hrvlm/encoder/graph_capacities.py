"""CUDA graphs of the encoder for any mix of images: ``encoder.graphed(capacities=[...])``.

A graph replays fixed sizes at fixed addresses. Here these are of a capacity, so many tokens of so
many images, and a batch fills them as far as it goes:

    rows      | image 0 | image 1 | ... | image B-1 | empty rows             |
    segments  |    0    |    1    | ... |    B-1    | B ... images: no rows  |

Segments without rows and tiles without queries do nothing, and empty rows belong to no segment, so
that no image sees them. No image's tokens are reduced, and images need not be of equal sizes. Empty
rows cost what full ones do, outside of attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hrvlm_kernels import PackedGrids
from hrvlm_kernels.packed_tables import TILE_SIZES

from .cuda_graphs import Replaying, as_output, capture, check_can_be_captured
from .fused_blocks import Held
from .inputs import Grids
from .layers import EncoderEmbeddings
from .output import EncoderOutput, PackedEncoderOutput

if TYPE_CHECKING:
    from .packed_encoder import PackedEncoder


@dataclass(frozen=True)
class Capacity:
    """How much a graph takes: `tokens`, prefix tokens included, of up to `images`."""

    tokens: int
    images: int


class _Slots:
    """The inputs of a graph: patches and layout, in memory that stays where it is."""

    def __init__(self, encoder: PackedEncoder, capacity: Capacity):
        prefix, device = encoder.num_prefix_tokens, encoder.device
        self.capacity, images = capacity, capacity.images
        size = encoder.config.num_channels * encoder.patch_size**2
        # The prefix tokens of images that are not there need rows, too.
        rows, segments = capacity.tokens + prefix, images + 1

        def ints(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.patches = torch.zeros(
            capacity.tokens - prefix, size, dtype=encoder.dtype, device=device
        )
        tables = {
            f"tiles{block}": ints(capacity.tokens // block + images, 2) for block in TILE_SIZES
        }
        # The last tile is of the last segment, which is always empty; so are all that are not used.
        self._no_tile = torch.tensor([[images, 0]], dtype=torch.int32).to(device)
        # One record less than there are segments: else all of them would count as short.
        tables["short_segments"] = ints(3 * segments)
        tables["shuffle1"] = ints(len(self.patches), 1)
        self.packed = PackedGrids(
            grids=None,
            lengths=(rows,),
            num_prefix_tokens=prefix,
            total_tokens=rows,
            max_seqlen=rows,
            cu_seqlens=ints(segments + 1),
            _coords=ints(rows, 2),
            _tables=tables,
        )

    def fill(self, patches: Tensor, packed: PackedGrids) -> None:
        """Take a batch: copies on the device, and nothing that waits for it."""
        ours, theirs = self.packed._tables, packed._tables
        end = packed.total_tokens
        assert self.packed._coords is not None
        _put(self.patches, patches, 0)
        _put(self.packed.cu_seqlens, packed.cu_seqlens, end)
        _put(self.packed._coords, packed._coords, 0)
        _put(ours["shuffle1"], theirs["shuffle1"], end)
        _put(ours["short_segments"], theirs["short_segments"], 0)
        for block in TILE_SIZES:
            _put(ours[f"tiles{block}"], theirs[f"tiles{block}"], self._no_tile)


def _put(slot: Tensor, values: Tensor | None, rest: int | Tensor) -> None:
    assert values is not None
    count = values.shape[0]
    slot[:count].copy_(values, non_blocking=True)
    if count < slot.shape[0]:
        if isinstance(rest, int):
            slot[count:].fill_(rest)
        else:
            slot[count:].copy_(rest.expand_as(slot[count:]))


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    slots: _Slots
    packed_last_hidden_state: Tensor
    pooler_output: Tensor
    folded: Held


class GraphedCapacities(Replaying):
    """A :class:`~hrvlm.DINOv3Encoder` that replays CUDA graphs for any batch that fits one.

    The smallest capacity that a batch fits is replayed. A batch that fits none runs eagerly, with a
    warning. What :class:`~hrvlm.encoder.cuda_graphs.GraphedEncoder` says of weights and results
    holds here as well: a replay allocates what it returns, and nothing else.

    Args:
        encoder: On a GPU, in eval mode, on the Triton kernels.
        capacities: Pairs (tokens, images): the most tokens, with each image's prefix tokens, and
            the most images.

    Attributes:
        empty_rows: The share of the rows computed so far that no image had.

    Raises:
        ValueError: a capacity is not two positive ints, has no room for an image, or the encoder is
            in training mode.
        RuntimeError: the encoder is not on a GPU or does not run on the kernels, or autocast is on.
    """

    def __init__(self, encoder: PackedEncoder, capacities: Sequence[Sequence[int]]):
        if not isinstance(capacities, Iterable):
            raise ValueError(f"capacities={capacities!r:.60}: expected [(tokens, images), ...]")
        checked = [_capacity(i, pair, encoder) for i, pair in enumerate(capacities)]
        if not checked:
            raise ValueError("capacities must hold at least one (tokens, images), got none")
        check_can_be_captured(encoder, kernels=True)
        if getattr(encoder, "batch_invariant", False):
            raise ValueError("graphed: batch_invariant=True runs images one by one, no capacity")
        if type(encoder.embeddings).placed is not EncoderEmbeddings.placed:
            raise ValueError(
                f"graphed: the learned positions of {type(encoder).__name__} are made for the "
                "grids of a batch; give sizes instead of capacities"
            )
        self._recordings, pool = [], None
        with torch.cuda.device(encoder.device):
            for capacity in sorted(set(checked), key=lambda c: (c.tokens, c.images)):
                with torch.inference_mode(False), torch.no_grad():
                    slots = _Slots(encoder, capacity)
                    grid = PackedGrids.from_grids(
                        [(1, 1)], num_prefix_tokens=encoder.num_prefix_tokens, device=encoder.device
                    )
                    slots.fill(slots.patches[:1].clone(), grid)
                    graph, out = capture(encoder, slots.patches, slots.packed, pool)
                pool = graph.pool()
                recording = _Recording(
                    graph, slots, out.packed_last_hidden_state, out.pooler_output,
                    Held(encoder.layer),
                )  # fmt: skip
                self._recordings.append(recording)
        self._rows, self._empty = 0, 0
        super().__init__(encoder)

    @property
    def empty_rows(self) -> float:
        """See the class."""
        return self._empty / self._rows if self._rows else 0.0

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
            ValueError: an input requires grad.
            RuntimeError: the encoder was moved or cast since.
        """
        device = self.encoder.device
        patches, packed, batch = self._inputs(pixel_values, grids, device)
        recording = self._fitting(packed)
        if recording is None:
            with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
                out = self.encoder(patches.to(device), grids=packed, return_dict=True)
            return as_output(out.packed_last_hidden_state, out.pooler_output, packed, batch)
        tokens, capacity = packed.total_tokens, recording.slots.capacity.tokens
        with self._turn(recording.folded):
            recording.slots.fill(patches, packed)
            recording.graph.replay()
            hidden = recording.packed_last_hidden_state[:tokens].clone()
            pooled = recording.pooler_output[: len(packed)].clone()
            self._rows += capacity
            self._empty += capacity - tokens
        return as_output(hidden, pooled, packed, batch)

    def _fitting(self, packed: PackedGrids) -> _Recording | None:
        tokens, images = packed.total_tokens, len(packed)
        for recording in self._recordings:
            capacity = recording.slots.capacity
            if tokens <= capacity.tokens and images <= capacity.images:
                return recording
        known = ", ".join(f"{r.slots.capacity.tokens} tokens of {r.slots.capacity.images} images"
                          for r in self._recordings)  # fmt: skip
        warnings.warn(
            f"graphed: {tokens} tokens of {images} images fit no capacity ({known}); this batch "
            "runs eagerly",
            stacklevel=3,
        )
        return None


def _capacity(i: int, pair: Sequence[int], encoder: PackedEncoder) -> Capacity:
    numbers = tuple(pair) if isinstance(pair, Sequence) else ()
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
    if len(numbers) != 2 or not whole:
        raise ValueError(f"capacities[{i}]: expected (tokens, images), positive ints, got {pair}")
    tokens, images = numbers
    least = encoder.num_prefix_tokens + 1
    if tokens < images * least:
        raise ValueError(
            f"capacities[{i}]: {images} images have {images * least} tokens at least, a patch and "
            f"{encoder.num_prefix_tokens} prefix tokens each, got {tokens}"
        )
    return Capacity(tokens, images)
