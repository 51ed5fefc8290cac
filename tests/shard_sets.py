"""Small shard sets for tests."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from afa_core.classes import SHAPES
from afa_core.data.sample import encode_sample
from afa_core.data.shards import DatasetIndex, ShardWriter, SplitIndex, save_dataset_index
from pipelines.build_shards import plan_shards, to_index
from pipelines.shard_packing import write_shard
from pipelines.shard_sources import shapes_pictures

CLASSES = ("cat", "dog")


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), (value % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_set(folder: Path, shards: int = 4, samples: int = 5, bad: int = 0) -> DatasetIndex:
    """A set of pictures ``s0-0`` ...; in each shard the first ``bad`` ones are damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for shard in range(shards):
        writer = ShardWriter(folder / f"train-{shard:06d}.tar")
        for sample in range(samples):
            data = b"damaged" if sample < bad else picture(sample)
            writer.write(encode_sample(f"s{shard}-{sample}", data, "png", {"tags": ["dog"]}), ["dog"])
        entries.append(writer.close())
    index = DatasetIndex(CLASSES, {"train": SplitIndex(tuple(entries), {"cat": 0, "dog": shards * samples})})
    save_dataset_index(folder, index)
    return index


def write_shapes(folder: Path, train: int, val: int, size_px: int, samples_per_shard: int) -> None:
    """What ``afa shards shapes`` writes, without the start of a Ray."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = shapes_pictures(train, val, 0, size_px)
    plans = list(plan_shards(pictures, samples_per_shard, SHAPES, folder, 100.0))
    save_dataset_index(folder, to_index([(plan, write_shard(plan)) for plan in plans], SHAPES))
