"""Batches out of loading processes, through memory that is used over and over.

A DataLoader sends every batch in new shared memory, and to map that costs both sides together more than to decode the
pictures in it. Here each loading process has a few places for a batch in memory shared from the start. It sends the
number of the place; the receiver copies the crops out before it asks for the next batch. A process is never asked for
more than ``PREFETCH`` batches beyond those that were received, so one place more is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from afa_core.data.train_samples import SkippedSample, TrainBatch, TrainSamples

PREFETCH = 2


@dataclass(frozen=True)
class SentBatch:
    """A batch whose crops lie in a place of the shared memory; the rest is small and travels as it is."""

    place: tuple[int, int]
    cls_label: NDArray[Any]
    box: NDArray[Any]
    keys: tuple[str, ...]
    skipped: tuple[SkippedSample, ...]


class SharedBatches:
    """The shared memory: uint8 [processes, places, B, S, S, 3]."""

    def __init__(self, processes: int, batch_size: int, crop_px: int) -> None:
        self._crops = torch.empty(processes, PREFETCH + 1, batch_size, crop_px, crop_px, 3, dtype=torch.uint8)
        self._crops.share_memory_()
        self._sent = 0  # batches, by this process

    def next_place(self, process: int) -> tuple[int, int]:
        """Where a loading process puts its next batch; the one it sent ``PREFETCH`` + 1 batches ago is overwritten."""
        self._sent += 1
        return process, self._sent % (PREFETCH + 1)

    def send(self, batch: TrainBatch, place: tuple[int, int]) -> SentBatch:
        """A batch whose crops were made in a place."""
        return SentBatch(place, batch.cls_label.numpy(), batch.box.numpy(), batch.keys, batch.skipped)

    def crops(self, place: tuple[int, int]) -> Tensor:
        """Memory of a place, uint8 [B, S, S, 3]."""
        return self._crops[place]

    def receive(self, sent: SentBatch, *, pinned: bool = False) -> TrainBatch:
        """The batch in memory of its own, pinned where a GPU is to copy from it."""
        crops = self._crops[sent.place][: len(sent.keys)]
        image = torch.empty(crops.shape, dtype=crops.dtype, pin_memory=pinned).copy_(crops)
        label, box = torch.from_numpy(sent.cls_label), torch.from_numpy(sent.box)
        return TrainBatch(image, label, box, sent.keys, sent.skipped)


class SentBatches(Dataset[SentBatch]):
    """Batches by the numbers of their samples, made in shared memory by a loading process."""

    def __init__(self, samples: TrainSamples, shared: SharedBatches) -> None:
        self.samples, self.shared = samples, shared

    def __getitem__(self, numbers: list[int]) -> SentBatch:
        worker = get_worker_info()
        place = self.shared.next_place(worker.id if worker else 0)
        return self.shared.send(self.samples.batch(numbers, self.shared.crops(place)), place)


def load_batches(
    samples: TrainSamples, plan: Iterable[list[int]], batch_size: int, processes: int, *, pinned: bool = False
) -> Iterator[TrainBatch]:
    """The batches of a plan, in order; the processes are started at once.

    Args:
        samples: by number.
        plan: the numbers of each batch, at most ``batch_size``.
        batch_size: see there.
        processes: that load; 0 loads in this one.
        pinned: hand out memory that a GPU can copy from by itself.
    """
    if not processes:
        batches = map(samples.batch, plan)
        return (batch.pin_memory() for batch in batches) if pinned else batches
    shared = SharedBatches(processes, batch_size, samples.config.crop_px)
    sent = DataLoader(
        SentBatches(samples, shared), sampler=plan, batch_size=None, collate_fn=as_it_is, num_workers=processes,
        prefetch_factor=PREFETCH,
    )  # fmt: skip
    return _received(iter(sent), shared, pinned)


def as_it_is(batch: Any) -> Any:
    """For a DataLoader, which otherwise makes tensors of what it can."""
    return batch


def _received(batches: Iterator[SentBatch], shared: SharedBatches, pinned: bool) -> Iterator[TrainBatch]:
    for sent in batches:
        yield shared.receive(sent, pinned=pinned)
