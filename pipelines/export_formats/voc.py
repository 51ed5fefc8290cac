"""PASCAL VOC's layout for segmentation, as torchvision's ``VOCSegmentation`` and the VOC kit read it.

    JPEGImages/NAME.jpg                       the pictures
    SegmentationClass/NAME.png                the masks, byte for byte: palette PNG, 0 background, 255 void
    ImageSets/Segmentation/train.txt          names, a line each; val.txt with a share for validation, trainval.txt all
    labelmap.txt                              name:red,green,blue:: of every label value, as CVAT and datumaro write it
    pictures.csv                              name, key, split, source and uncertainty of each

255 is VOC's own void label: readers leave those pixels out. The folders are flat and lists are split at blanks, so a
NAME is the key percent-encoded (``a/b c`` becomes ``a%2Fb%20c``). VOC knows JPEG only: other pictures, and turned
ones, are written anew as JPEG of quality 95 and counted.
"""

from __future__ import annotations

import csv

from pipelines.export_formats.exporter import ExportJob
from pipelines.export_formats.labelmap import label_map
from pipelines.export_formats.names import flat_name
from pipelines.export_formats.pictures import JPEG_QUALITY, jpeg_picture
from pipelines.label_pictures import LabelledPicture
from pipelines.shard_sources import split_of

PICTURES = "JPEGImages"
MASKS = "SegmentationClass"
LISTS = "ImageSets/Segmentation"
COLUMNS = ("name", "key", "split", "source", "uncertainty")


class VocExporter:
    """Writes ``--format voc``."""

    def __init__(self, job: ExportJob) -> None:
        text = label_map(job)
        self.job, self.anew = job, 0
        for name in (PICTURES, MASKS, LISTS):
            (job.folder / name).mkdir(parents=True)
        (job.folder / "labelmap.txt").write_text(text)
        splits = ("train", "val", "trainval") if job.val_share else ("train", "trainval")
        self._lists = {split: (job.folder / LISTS / f"{split}.txt").open("w") for split in splits}
        self._table = (job.folder / "pictures.csv").open("w", newline="")
        self._rows = csv.writer(self._table)
        self._rows.writerow(COLUMNS)

    def add(self, label: LabelledPicture) -> None:
        """Write a label."""
        key = label.row["key"]
        name, split = flat_name(key), split_of(key, self.job.val_share)
        picture, anew = jpeg_picture(label, self.job.max_megapixels)
        (self.job.folder / PICTURES / f"{name}.jpg").write_bytes(picture)
        (self.job.folder / MASKS / f"{name}.png").write_bytes(label.mask_png)
        for listed in (split, "trainval"):
            self._lists[listed].write(f"{name}\n")
        self._rows.writerow((name, key, split, label.row["uri"], label.row["uncertainty"]))
        self.anew += anew

    def close(self) -> list[str]:
        """Finish the lists."""
        for stream in (*self._lists.values(), self._table):
            stream.close()
        if not self.anew:
            return []
        return [f"{self.anew} pictures were no upright JPEG and were written anew with quality {JPEG_QUALITY}"]
