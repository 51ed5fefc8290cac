"""Batches out of loading processes, through memory that is used over and over.

A DataLoader sends every batch in new shared memory, and to map that costs both sides together more than to decode the
pictures in it. Here each loading process has a few places for a batch in memory shared from the start. It sends the
number of the place; the receiver copies the crops out before it asks for the next batch. A process is never asked for
more than ``PREFETCH`` batches beyond those that were received, so one place more is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, get_worker_info

from afa_core.data.train_samples import SkippedSample, TrainBatch, TrainSamples, collate
from afa_core.data.transforms import TrainItem

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

    def send(self, items: Sequence[TrainItem | SkippedSample]) -> SentBatch:
        """Collate at most B samples, in a loading process; what it sent ``PREFETCH`` + 1 batches ago is overwritten."""
        worker = get_worker_info()
        place = worker.id if worker else 0, self._sent % (PREFETCH + 1)
        self._sent += 1
        batch = collate(items, self._crops[place])
        return SentBatch(place, batch.cls_label.numpy(), batch.box.numpy(), batch.keys, batch.skipped)

    def receive(self, sent: SentBatch, *, pinned: bool = False) -> TrainBatch:
        """The batch in memory of its own, pinned where a GPU is to copy from it."""
        crops = self._crops[sent.place][: len(sent.keys)]
        image = torch.empty(crops.shape, dtype=crops.dtype, pin_memory=pinned).copy_(crops)
        label, box = torch.from_numpy(sent.cls_label), torch.from_numpy(sent.box)
        return TrainBatch(image, label, box, sent.keys, sent.skipped)


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
        return iter(DataLoader(samples, batch_sampler=plan, collate_fn=collate, pin_memory=pinned))
    shared = SharedBatches(processes, batch_size, samples.config.crop_px)
    sent = DataLoader(
        samples, batch_sampler=plan, collate_fn=shared.send, num_workers=processes, prefetch_factor=PREFETCH
    )
    return _received(iter(sent), shared, pinned)


def _received(batches: Iterator[SentBatch], shared: SharedBatches, pinned: bool) -> Iterator[TrainBatch]:
    for sent in batches:
        yield shared.receive(sent, pinned=pinned)
