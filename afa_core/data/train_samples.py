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

import torch
from torch import Tensor

from afa_core.config import DataConfig
from afa_core.data.draws import Draws
from afa_core.data.order import SampleOrder, micro_batches
from afa_core.data.sample import BadSample, NeededSize, Sample, decode_sample
from afa_core.data.shard_reader import ShardReader
from afa_core.data.transforms import Decode, TrainItem, make_crops

OPEN_SHARDS = 256

Transform = Callable[[Decode, Draws], TrainItem]
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
        windows: what the crops are made of on the device, uint8 [h, w, 3] each.
        mirrored: which crops are mirrored.
        cls_label: [B, F] multi-hot.
        box: [B, 4] int64, y0 y1 x0 x1, where the window goes in each crop: its valid region.
        keys: of the samples.
        skipped: those that could not be used; B may be 0.
    """

    windows: tuple[Tensor, ...]
    mirrored: tuple[bool, ...]
    cls_label: Tensor
    box: Tensor
    keys: tuple[str, ...]
    skipped: tuple[SkippedSample, ...]

    def crops(self, crop_px: int, device: torch.device) -> Tensor:
        """Crops uint8 [B, S, S, 3], made on the device."""
        return make_crops(self.windows, self.mirrored, self.box, crop_px, device)

    def pin_memory(self) -> TrainBatch:
        """In memory that a GPU copies from while the processor goes on."""
        windows = tuple(window.contiguous().pin_memory() for window in self.windows)
        return replace(self, windows=windows, cls_label=self.cls_label.pin_memory())


class TrainSamples:
    """Augmented samples by number; any thread may ask."""

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
        shard, at = self.order.place(number)
        key = f"shard {shard}, sample {at}"
        try:
            raw = self._reader(shard).read(at)
            key = str(raw["__key__"])
            return self.transform(partial(self._decode, raw), Draws(self.seed, number))
        except BadSample as bad:
            return SkippedSample(bad.reason, key)

    def batch(self, numbers: Sequence[int]) -> TrainBatch:
        """The samples of some numbers."""
        return collate([self[number] for number in numbers])

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


def collate(items: Sequence[TrainItem | SkippedSample]) -> TrainBatch:
    """Samples to a batch."""
    good = [item for item in items if isinstance(item, TrainItem)]
    return TrainBatch(
        tuple(item.window for item in good),
        tuple(item.mirrored for item in good),
        torch.stack([item.cls_label for item in good]) if good else torch.zeros(0),
        torch.tensor([item.box for item in good], dtype=torch.int64),
        tuple(item.key for item in good),
        tuple(item for item in items if isinstance(item, SkippedSample)),
    )
