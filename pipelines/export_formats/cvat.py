"""CVAT's "Segmentation mask 1.1": zip archives to import as a data set, or to upload onto a task that has the pictures.

    labels-000.zip            ...  at most 2,000 pictures each: an archive becomes a task
        labelmap.txt                           name:red,green,blue:: of every label value
        ImageSets/Segmentation/default.txt     names, a line each
        SegmentationClass/NAME.png             the masks, byte for byte: palette PNG in the label map's colours
        SegmentationObject/NAME.png            the same: one object for each class
        JPEGImages/NAME.EXTENSION              the pictures, unless they are left out
    labels.json               the labels for CVAT's label constructor ("Raw")

CVAT knows no void pixels: ignored ones are a label of their own, ``ignored``, for people to give away. Background is
black. Without SegmentationObject CVAT would make background a mask as well. A NAME is the key with its sub-folders, so
that an archive without pictures finds the task's own; a key with a blank at an end, a ``#`` in front or a percent sign
is percent-encoded, as CVAT reads its lists line by line.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from pipelines.export_formats.exporter import ExportJob, colour
from pipelines.export_formats.labelmap import label_map
from pipelines.export_formats.names import listed_name
from pipelines.export_formats.pictures import upright_picture
from pipelines.label_pictures import LabelledPicture

PICTURES_PER_ARCHIVE = 2000


class CvatExporter:
    """Writes ``--format cvat``."""

    def __init__(self, job: ExportJob) -> None:
        self.job, self.archives = job, 0
        self._label_map = label_map(job)
        self._archive: zipfile.ZipFile | None = None
        self._names: list[str] = []

    def add(self, label: LabelledPicture) -> None:
        """Write a label."""
        picture, extension = upright_picture(label, self.job.max_megapixels)
        name = listed_name(label.row["key"])
        if self._archive is None:
            self._archive = zipfile.ZipFile(self._path(), "w", zipfile.ZIP_STORED)  # PNG and JPEG are compressed
            self.archives += 1
        self._names.append(name)
        self._archive.writestr(f"SegmentationClass/{name}.png", label.mask_png)
        self._archive.writestr(f"SegmentationObject/{name}.png", label.mask_png)
        if self.job.with_pictures:
            self._archive.writestr(f"JPEGImages/{name}.{extension}", picture)
        if len(self._names) == PICTURES_PER_ARCHIVE:
            self._finish(self._archive)

    def close(self) -> list[str]:
        """Finish the last archive and list the labels."""
        if self._archive is not None:
            self._finish(self._archive)
        labels = [
            {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*colour(value)), "type": "mask", "attributes": []}
            for value, name in self.job.named_values.items()
        ]
        (self.job.folder / "labels.json").write_text(json.dumps(labels, indent=2) + "\n")
        return [f"{self.archives} archives; labels.json is for the project's label constructor (Raw)"]

    def _path(self) -> Path:
        return self.job.folder / f"labels-{self.archives:03d}.zip"

    def _finish(self, archive: zipfile.ZipFile) -> None:
        archive.writestr("labelmap.txt", self._label_map)
        archive.writestr("ImageSets/Segmentation/default.txt", "".join(f"{name}\n" for name in self._names))
        archive.close()
        self._archive = None
        self._names.clear()
