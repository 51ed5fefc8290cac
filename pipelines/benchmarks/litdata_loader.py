"""The same pictures out of LitData's format, through the same transform; only imported where it is installed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import litdata
import torch

from afa_core.config import DataConfig
from afa_core.data.transforms import TrainItem, TrainTransform
from pipelines.benchmarks.loader import CLASSES, FACTS, SEED, Stamped, augmented, loading_processes, stamped


class LitSamples(litdata.StreamingDataset):
    """Shuffled by LitData, decoded and augmented as everywhere."""

    def __init__(self, folder: Path, config: DataConfig) -> None:
        super().__init__(str(folder), shuffle=True, seed=SEED)
        self.augmentation, self.number = TrainTransform(config, CLASSES), 0

    def __getitem__(self, index: Any) -> TrainItem:
        self.number += 1
        return augmented(super().__getitem__(index), self.augmentation, self.number)


def write_litdata(pictures: Sequence[bytes], folder: Path) -> None:
    """Chunks of about the size of the shards."""
    writer = litdata.streaming.cache.BinaryWriter(str(folder), chunk_bytes="16MB")
    for number, picture in enumerate(pictures):
        writer.add_item(number, {"__key__": f"{number:06d}", "jpg": picture, "json": FACTS})
    writer.done()
    writer.merge()


def build_litdata_loader(folder: Path, config: DataConfig, batch_size: int, processes: int) -> Iterable[Stamped]:
    """LitData's own loader."""
    data = LitSamples(folder, config)
    put_together = partial(stamped_crops, crop_px=config.crop_px) if processes else stamped
    return litdata.StreamingDataLoader(
        data, batch_size=batch_size, collate_fn=put_together, **loading_processes(processes)
    )


def stamped_crops(items: Sequence[TrainItem], crop_px: int) -> Stamped:
    """Crops, which are sent as one tensor, with the clock of the process that made them."""
    batch, process, _ = stamped(items)
    return batch.crops(crop_px, torch.device("cpu")), process, time.process_time()
