"""Shards to train a fully supervised model on: the shard set of ``afa shards``, each sample with its mask.

Pictures and masks keep their bytes, 255 stays 255: the readers of this project apply EXIF and know the ignored label.
"""

from __future__ import annotations

import dataclasses

from afa_core.data.shards import save_dataset_index
from pipelines.export_formats.exporter import ExportJob
from pipelines.label_pictures import LabelledPicture
from pipelines.shard_sources import mask_tags, split_of
from pipelines.supervised_shards import SupervisedShards


class WebDatasetExporter:
    """Writes ``--format webdataset``."""

    def __init__(self, job: ExportJob) -> None:
        self.job = job
        self._shards = SupervisedShards(job.folder, job.classes, job.samples_per_shard)

    def add(self, label: LabelledPicture) -> None:
        """Write a label; tags that somebody gave stay, guessed ones are what the mask shows."""
        row = label.row
        given = row["tags_source"] == "given"
        tags = row["tags"] if given else mask_tags(label.mask_png, self.job.classes)
        facts = {
            "width": row["width"],
            "height": row["height"],
            "source": row["uri"],
            "label": {name: row[name] for name in ("tags_source", "confidence", "uncertainty")},
        }
        assert label.picture is not None
        split = split_of(row["key"], self.job.val_share)
        self._shards.write(split, row["key"], label.picture, label.extension, tags, facts, label.mask_png)

    def close(self) -> list[str]:
        """Finish the tars and write the index."""
        index = self._shards.close()
        lineage = {
            "kind": "export",
            "label_set": self.job.label_set,
            "run": self.job.run,
            "model": self.job.model,
            "model_digest": self.job.model_digest,
        }
        save_dataset_index(self.job.folder, dataclasses.replace(index, lineage=lineage))
        return ["  ".join(f"{name} {split.samples}" for name, split in index.splits.items())]
