"""COCO's object segmentation JSON, for ``pycocotools`` and everything that reads its files.

    annotations/instances.json    one annotation for each class that a picture shows, as compressed RLE
    images/KEY.EXTENSION          the pictures, unless they are left out

A category's id is its label value, so the label map is the annotations painted by category id onto zeros. Background
is what no annotation covers. Ignored pixels are an annotation of category 255 with ``iscrowd`` 1: what trains on COCO
leaves crowds out, and its evaluation counts nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from afa_core.classes import IGNORE_INDEX
from afa_core.data.sample import decode_seg_label
from pipelines.export_formats.exporter import ExportJob, class_confidence, shown_values
from pipelines.export_formats.json_list import JsonList
from pipelines.export_formats.names import nested_name
from pipelines.export_formats.pictures import upright_picture, write_picture
from pipelines.label_pictures import LabelledPicture

PICTURES = "images"
ANNOTATIONS = "annotations/instances.json"


class CocoExporter:
    """Writes ``--format coco``."""

    def __init__(self, job: ExportJob) -> None:
        self.job = job
        self._images = JsonList(job.folder / "images.partial")
        self._annotations = JsonList(job.folder / "annotations.partial")

    def add(self, label: LabelledPicture) -> None:
        """Write a label."""
        row = label.row
        picture, extension = upright_picture(label, self.job.max_megapixels)
        image = {
            "id": self._images.count + 1,
            "file_name": f"{nested_name(row['key'])}.{extension}",
            "width": row["width"],
            "height": row["height"],
            "key": row["key"],
            "source": row["uri"],
            "uncertainty": row["uncertainty"],
        }
        if self.job.with_pictures:
            write_picture(self.job.folder / PICTURES / image["file_name"], picture)
        self._images.append(image)
        for annotation in label_annotations(self.job, label):
            self._annotations.append({"id": self._annotations.count + 1, "image_id": image["id"], **annotation})

    def close(self) -> list[str]:
        """Put the file together."""
        values = {value: name for value, name in self.job.named_values.items() if value}
        head = {
            "info": {"description": f"labels of {self.job.run}", "model": self.job.model},
            "licenses": [],
            "categories": [
                {"id": value, "name": name, "supercategory": "ignored" if value == IGNORE_INDEX else "class"}
                for value, name in values.items()
            ],
        }
        JsonList.join(self.job.folder / ANNOTATIONS, head, {"images": self._images, "annotations": self._annotations})
        return [f"ignored pixels are category {IGNORE_INDEX} with iscrowd 1"]


def label_annotations(job: ExportJob, label: LabelledPicture) -> Iterator[dict[str, Any]]:
    """An annotation for each label value that the mask shows, background left out."""
    values = decode_seg_label(label.mask_png, job.max_megapixels)
    for value in shown_values(values):
        rle = coco_mask.encode(np.asfortranarray(values == value).astype(np.uint8))
        annotation = {
            "category_id": value,
            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
            "area": int(coco_mask.area(rle)),
            "bbox": [float(edge) for edge in coco_mask.toBbox(rle)],
            "iscrowd": int(value == IGNORE_INDEX),
        }
        score = class_confidence(label, job.named_values[value])
        yield annotation if score is None else {**annotation, "score": score}
