"""A shard set written sample by sample, masks included: memory holds one sample at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afa_core.data.sample import encode_sample
from afa_core.data.shards import DatasetIndex, ShardEntry, ShardWriter, SplitIndex


class SupervisedShards:
    """Fills ``SPLIT-000000.tar``, ``SPLIT-000001.tar`` ... of several splits side by side."""

    def __init__(self, output: Path, classes: tuple[str, ...], samples_per_shard: int) -> None:
        self.output, self.classes, self.samples_per_shard = output, classes, samples_per_shard
        self._open: dict[str, ShardWriter] = {}
        self._entries: dict[str, list[ShardEntry]] = {}
        self._class_images: dict[str, dict[str, int]] = {}

    def write(
        self,
        split: str,
        key: str,
        picture: bytes,
        extension: str,
        tags: Sequence[str],
        facts: Mapping[str, Any],
        mask_png: bytes | None = None,
    ) -> None:
        """Add a sample.

        Args:
            split: it belongs to.
            key: unique in the set.
            picture: the file as it is.
            extension: of the file, without the dot.
            tags: classes of the list.
            facts: what its JSON says beside the tags: width, height, source, and what else is known.
            mask_png: [height, width] indexed, in display orientation; becomes ``KEY.seg.png``.

        Raises:
            BadSample: the key cannot become a file name.
        """
        members = encode_sample(key, picture, extension, {"tags": list(tags), **facts}, mask_png)
        if split not in self._open:
            entries = self._entries.setdefault(split, [])
            self._class_images.setdefault(split, dict.fromkeys(self.classes, 0))
            self._open[split] = ShardWriter(self.output / f"{split}-{len(entries):06d}.tar")
        writer = self._open[split]
        writer.write(members, tags)
        if writer.samples == self.samples_per_shard:
            self._close(split)

    def close(self) -> DatasetIndex:
        """Finish the tars; the index, which is the caller's to save."""
        for split in list(self._open):
            self._close(split)
        splits = {
            name: SplitIndex(tuple(self._entries[name]), self._class_images[name]) for name in sorted(self._entries)
        }
        return DatasetIndex(self.classes, splits)

    def _close(self, split: str) -> None:
        writer = self._open.pop(split)
        self._entries[split].append(writer.close())
        for name, count in writer.class_images.items():
            self._class_images[split][name] += count
