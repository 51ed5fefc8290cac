"""Training samples by their number in the job's order, read from shards where they lie and augmented.

What is random about a sample follows from (seed, number). A sample that cannot be used stays in its place as a
``SkippedSample``, so that all workers stay in step whatever the data are like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from afa_core.config import DataConfig
from afa_core.data.order import SampleOrder, micro_batches
from afa_core.data.sample import BadSample, NeededSize, Sample, decode_sample
from afa_core.data.shard_reader import ShardReader
from afa_core.data.transforms import Decode, TrainItem

OPEN_SHARDS = 256

Transform = Callable[[Decode, np.random.Generator, Tensor | None], TrainItem]
# Number of a shard -> its file; a ``BadSample`` says why there is none.
FindShard = Callable[[int], Path]


@dataclass(frozen=True)
class SkippedSample:
    """A sample that cannot be used: why, and which."""

    reason: str
    key: str


@dataclass(frozen=True)
class TrainBatch:
    """Samples of one worker in one part of a step.

    Attributes:
        image: uint8 [B, S, S, 3] crops, to be normalised on the device.
        cls_label: [B, F] multi-hot.
        box: [B, 4] int64, valid region y0 y1 x0 x1 of each crop.
        keys: of the samples.
        skipped: those that could not be used; B may be 0.
    """

    image: Tensor
    cls_label: Tensor
    box: Tensor
    keys: tuple[str, ...]
    skipped: tuple[SkippedSample, ...]

    def pin_memory(self) -> TrainBatch:
        """In memory that a GPU copies from while the processor goes on; a DataLoader asks for it."""
        return replace(
            self, image=self.image.pin_memory(), cls_label=self.cls_label.pin_memory(), box=self.box.pin_memory()
        )


class TrainSamples(Dataset[TrainItem | SkippedSample]):
    """Augmented samples by number."""

    def __init__(
        self,
        order: SampleOrder,
        find_shard: FindShard,
        transform: Transform,
        classes: tuple[str, ...],
        config: DataConfig,
        seed: int,
    ) -> None:
        self.order, self.find_shard, self.transform = order, find_shard, transform
        self.classes, self.config, self.seed = classes, config, seed
        self._reader = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def __getitem__(self, number: int) -> TrainItem | SkippedSample:
        """The sample of a number."""
        return self._sample(number)

    def batch(self, numbers: Sequence[int], memory: Tensor | None = None) -> TrainBatch:
        """The samples of some numbers; their crops are made in the memory uint8 [>= B, S, S, 3], if one is given."""
        side = self.config.crop_px
        crops = torch.empty(len(numbers), side, side, 3, dtype=torch.uint8) if memory is None else memory
        items: list[TrainItem | SkippedSample] = []
        good = 0
        for number in numbers:
            items.append(self._sample(number, crops[good]))
            good += isinstance(items[-1], TrainItem)
        return collate(items, crops)

    def _sample(self, number: int, memory: Tensor | None = None) -> TrainItem | SkippedSample:
        shard, at = self.order.place(number)
        key = f"shard {shard}, sample {at}"
        try:
            raw = self._reader(shard).read(at)
            key = str(raw["__key__"])
            return self.transform(partial(self._decode, raw), np.random.default_rng([self.seed, number]), memory)
        except BadSample as bad:
            return SkippedSample(bad.reason, key)

    def _decode(self, raw: dict[str, Any], needed_size: NeededSize) -> Sample:
        return decode_sample(raw, self.classes, self.config.max_megapixels, needed_size=needed_size)

    def _open(self, shard: int) -> ShardReader:
        path = self.find_shard(shard)
        try:
            return ShardReader(path)
        except OSError as error:
            raise BadSample("bad_shard", f"{path.name}: {error.strerror}") from error


@dataclass(frozen=True)
class WorkerBatches:
    """The numbers that one worker trains on from a step on, without end: what a DataLoader takes as batch sampler."""

    first_step: int
    global_batch: int
    batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[int]]:
        """Parts of steps, in order; a step has ``parts`` of them."""
        for step in count(self.first_step):
            yield from map(list, self.numbers(step))

    def numbers(self, step: int) -> list[range]:
        """Those of one step."""
        return micro_batches(step, self.global_batch, self.batch_size, self.rank, self.world_size)

    @property
    def parts(self) -> int:
        """Parts of a step."""
        return len(self.numbers(0))


def collate(items: Sequence[TrainItem | SkippedSample], crops: Tensor | None = None) -> TrainBatch:
    """Samples to a batch; ``crops`` uint8 [>= B, S, S, 3] if those of the usable ones lie there already."""
    good = [item for item in items if isinstance(item, TrainItem)]
    skipped = tuple(item for item in items if isinstance(item, SkippedSample))
    if not good:
        return TrainBatch(
            torch.zeros(0, dtype=torch.uint8), torch.zeros(0), torch.zeros(0, dtype=torch.int64), (), skipped
        )
    return TrainBatch(
        torch.stack([item.image for item in good]) if crops is None else crops[: len(good)],
        torch.stack([item.cls_label for item in good]),
        torch.stack([item.box for item in good]),
        tuple(item.key for item in good),
        skipped,
    )
