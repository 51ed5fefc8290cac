"""The endless stream of training samples of one process.

Every epoch the shards are permuted from (seed, epoch) and only then dealt out to ranks and loading processes, so that
no two of them read the same shard in an epoch and each sees other shards in the next. Within a process samples go
through a shuffle buffer. All order and augmentation follows from (seed, epoch, rank, loading process).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from afa_core.config import DataConfig
from afa_core.data.sample import BadSample, Sample, decode_sample
from afa_core.data.shards import BadShard, DatasetIndex, iterate_shard, shard_paths
from afa_core.data.transforms import TrainItem
from afa_core.errors import InputError

# A share of bad samples means nothing before so many were seen.
BUDGET_FROM_SAMPLES = 100

Transform = Callable[[Sample, np.random.Generator], TrainItem]


def assign_shards(shards: Sequence[Path], seed: int, epoch: int, *, reader: int, readers: int) -> list[Path]:
    """The shards of one reader in one epoch: all are permuted, then every ``readers``-th is its own."""
    order = np.random.default_rng([seed, epoch]).permutation(len(shards))
    return [shards[index] for index in order[reader::readers]]


class SampleStream(IterableDataset[TrainItem]):
    """Augmented samples of a split, for one rank; iterates for ever."""

    def __init__(
        self,
        folder: str | Path,
        index: DatasetIndex,
        split: str,
        transform: Transform,
        config: DataConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """See the class.

        Raises:
            InputError: fewer shards than readers, so that some would have nothing to read.
        """
        self.shards = shard_paths(folder, index, split)
        readers = world_size * max(1, config.loader_workers)
        check_enough_shards(len(self.shards), readers)
        self.classes, self.transform, self.config = index.classes, transform, config
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def __iter__(self) -> Iterator[TrainItem]:
        """Samples without end.

        Raises:
            InputError: more than ``max_bad_share`` of the samples cannot be used.
        """
        worker = get_worker_info()
        loader, loaders = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.rank * loaders + loader, self.world_size * loaders
        budget = BadSampleBudget(self.config.max_bad_share)
        for epoch in count():
            rng = np.random.default_rng([self.seed, epoch, reader])
            shards = assign_shards(self.shards, self.seed, epoch, reader=reader, readers=readers)
            for raw in shuffled(_raw_samples(shards, budget), self.config.shuffle_buffer, rng):
                try:
                    sample = decode_sample(raw, self.classes, self.config.max_megapixels)
                    item = self.transform(sample, rng)
                except BadSample as bad:
                    budget.count_bad(bad.reason, str(raw["__key__"]))
                else:
                    budget.count_good()
                    yield item


class BadSampleBudget:
    """Counts samples and stops a stream in which too many are bad."""

    def __init__(self, max_bad_share: float) -> None:
        self.max_bad_share = max_bad_share
        self.good = 0
        self.reasons: Counter[str] = Counter()
        self.first: list[str] = []

    def count_good(self) -> None:
        """One more that could be used."""
        self.good += 1

    def count_bad(self, reason: str, key: str) -> None:
        """One more that could not.

        Raises:
            InputError: that was one too many.
        """
        self.reasons[reason] += 1
        self.first += [f"{key} ({reason})"] if len(self.first) < 3 else []
        bad = self.reasons.total()
        seen = bad + self.good
        if seen >= BUDGET_FROM_SAMPLES and bad > self.max_bad_share * seen:
            raise InputError(
                f"{bad} of {seen} training samples cannot be used (data.max_bad_share={self.max_bad_share}): "
                f"{dict(self.reasons)}, first {', '.join(self.first)}"
            )


def check_enough_shards(shards: int, readers: int) -> None:
    """Raise where some reader would have no shard of its own.

    Raises:
        InputError: saying what would be right.
    """
    if shards < readers:
        raise InputError(
            f"{shards} training shards for {readers} readers (train.workers x data.loader_workers): "
            "write smaller shards (--samples-per-shard) or use fewer readers"
        )


def shuffled(items: Iterator[dict[str, Any]], buffer: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Items in random order, each drawn from a window of ``buffer``."""
    held: list[dict[str, Any]] = []
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        drawn = int(rng.integers(buffer))
        yield held[drawn]
        held[drawn] = item
    for index in rng.permutation(len(held)):
        yield held[index]


def _raw_samples(shards: Sequence[Path], budget: BadSampleBudget) -> Iterator[dict[str, Any]]:
    for shard in shards:
        try:
            yield from iterate_shard(shard)
        except BadShard as error:
            budget.count_bad("bad_shard", str(error))
