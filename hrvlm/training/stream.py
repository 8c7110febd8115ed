"""The order that training data comes in, and how it is divided among processes and workers.

Two ways to go through it. `RowDataset` is a map: rows by index, shuffled and divided by Trainer.
`SampleStream` is endless, for what has no index or no length (streamed and drawn data), for
mixtures by weight and for packed sequences; it divides itself.

Both give the same samples in the same order in every run of the same seed, processes and workers,
which is what a resumed run rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..data.rows import Row
from ..data.sources import Source
from .sequence_packing import pack_sequences

MakeSample = Callable[[Row, str], "dict[str, Tensor] | None"]


class RowDataset(Dataset):
    """Samples by index, from sources that have one after the other; None where it can't be used."""

    def __init__(self, sources: Sequence[Any], make: MakeSample):
        self.sources, self.make = sources, make
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        """Rows of all sources."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor] | None:
        """The sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        s = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[s - 1]) if s else 0
        where, row = self.sources[s][index - first]
        return self.make(row, where)


class SampleStream(IterableDataset):
    """An endless mixture of sources, as samples or as packed rows.

    A resumed run goes through what was used before once more, without training on it; it needs the
    number of processes and workers of the first.

    Args:
        sources: Each is gone through again and again.
        make: Row to sample, or to None where it can't be used.
        weights: How often a source is drawn, relative to the others; default: all alike.
        seed: Of the mixture and of the orders.
        packing: Length of rows that samples are packed into; None to leave them apart.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        make: MakeSample,
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        packing: int | None = None,
    ):
        self.sources, self.make = sources, make
        self.weights = [1.0] * len(sources) if weights is None else list(weights)
        self.seed, self.packing = seed, packing
        self.process, self.processes = 0, 1

    def divide(self, process: int, processes: int) -> None:
        """Give out only what falls to one process of several."""
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The samples for this process and this worker of a DataLoader."""
        worker = get_worker_info()
        workers, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        shard, shards = self.process * workers + own, self.processes * workers
        samples = self._samples(shard, shards)
        return samples if self.packing is None else pack_sequences(samples, self.packing)

    def _samples(self, shard: int, shards: int) -> Iterator[dict[str, Tensor]]:
        rng = Random(f"{self.seed}/{shard}")
        supplies = [self._endless(source, shard, shards) for source in self.sources]
        while True:
            supply = rng.choices(supplies, self.weights)[0] if len(supplies) > 1 else supplies[0]
            where, row = next(supply)
            sample = self.make(row, where)
            if sample is not None:
                yield sample

    def _endless(self, source: Source, shard: int, shards: int) -> Iterator[tuple[str, Row]]:
        epoch = 0
        while True:
            found = False
            for named in source.rows(self.seed, epoch, shard, shards):
                found = True
                yield named
            if not found:
                raise ValueError(
                    f"{source.name}: it has no rows for {shards} workers (processes * "
                    "dataloader_num_workers); use fewer"
                )
            epoch += 1
