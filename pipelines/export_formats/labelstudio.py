"""Label Studio's pre-annotations: tasks whose predictions are brush masks.

    tasks-000.json ...        at most 200 tasks each, as Label Studio reads an imported file whole
    labeling_config.xml       for the project: the picture, and a brush for each class and for ignored pixels
    pictures/KEY.EXTENSION    the pictures, unless they lie in S3

A prediction has a score (the label's confidence), the model's version, and a brush result in run-length code for each
class that the picture shows, written by Label Studio's own converter. Background is what no brush covers; ignored
pixels are a brush of their own, ``ignored``.

A picture in S3 is named by its URI, for a project with that bucket as source storage. Others - local ones and samples
of shards - are copied and named by Label Studio's local-files URL below the export's folder: serve them with
``LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true``, ``LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT`` the folder above the
export, and a local source storage for the export's ``pictures``.
"""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from label_studio_sdk.converter.brush import mask2rle

from afa_core.data.sample import Pixels, decode_seg_label
from infra.object_store import S3
from pipelines.export_formats.exporter import ExportJob, class_confidence, colour, shown_values
from pipelines.export_formats.json_list import JsonList
from pipelines.export_formats.names import nested_name
from pipelines.export_formats.pictures import upright_picture, write_picture
from pipelines.label_pictures import LabelledPicture

TASKS_PER_FILE = 200
PICTURE_TAG, BRUSH_TAG = "image", "mask"
_INK = 255


class LabelStudioExporter:
    """Writes ``--format labelstudio``."""

    def __init__(self, job: ExportJob) -> None:
        self.job, self.files, self.copied = job, 0, 0
        self._tasks: JsonList | None = None

    def add(self, label: LabelledPicture) -> None:
        """Write a label."""
        task = {
            "data": {
                PICTURE_TAG: self._picture_url(label),
                **{name: label.row[name] for name in ("key", "tags_source", "uncertainty")},
                "tags": ", ".join(label.row["tags"]),
                "source": label.row["uri"],
            },
            "predictions": [prediction(self.job, label)],
        }
        if self._tasks is None:
            self._tasks = JsonList(self.job.folder / "tasks.partial")
        self._tasks.append(task)
        if self._tasks.count == TASKS_PER_FILE:
            self._finish(self._tasks)

    def close(self) -> list[str]:
        """Finish the last file of tasks and write the labelling configuration."""
        if self._tasks is not None:
            self._finish(self._tasks)
        (self.job.folder / "labeling_config.xml").write_text(labeling_config(self.job.named_values), encoding="utf-8")
        notes = [f"{self.files} files of tasks; labeling_config.xml is for the project's labelling interface"]
        if self.copied:
            root = self.job.output.parent
            notes.append(
                f"{self.copied} pictures are served with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true"
                f" LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={root} and a local source storage {self.job.output}/pictures"
            )
        return notes

    def _finish(self, tasks: JsonList) -> None:
        tasks.save(self.job.folder / f"tasks-{self.files:03d}.json")
        self.files += 1
        self._tasks = None

    def _picture_url(self, label: LabelledPicture) -> str:
        """Where Label Studio finds the picture; one that it cannot reach is copied."""
        row = label.row
        if str(row["uri"]).startswith(S3) and row["key"] == row["input"]:  # browsers apply EXIF themselves
            return str(row["uri"])
        picture, extension = upright_picture(label, self.job.max_megapixels)
        path = f"pictures/{nested_name(row['key'])}.{extension}"
        write_picture(self.job.folder / path, picture)
        self.copied += 1
        return f"/data/local-files/?d={quote(f'{self.job.output.name}/{path}', safe='/')}"


def prediction(job: ExportJob, label: LabelledPicture) -> dict[str, Any]:
    """The mask as a prediction: a brush result for each label value that it shows, background left out."""
    values = decode_seg_label(label.mask_png, job.max_megapixels)
    return {
        "model_version": f"{job.model}@{job.model_digest[:12]}",
        "score": label.row["confidence"],
        "result": [_brush_result(job, label, values, value) for value in shown_values(values)],
    }


def _brush_result(job: ExportJob, label: LabelledPicture, values: Pixels, value: int) -> dict[str, Any]:
    height, width = values.shape
    name = job.named_values[value]
    rle = mask2rle(np.where(values == value, _INK, 0).astype(np.uint8))
    result = {
        "id": hashlib.sha256(f"{label.row['key']}:{value}".encode()).hexdigest()[:10],
        "from_name": BRUSH_TAG,
        "to_name": PICTURE_TAG,
        "type": "brushlabels",
        "origin": "prediction",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": {"format": "rle", "rle": rle, "brushlabels": [name]},
    }
    confidence = class_confidence(label, name)
    return result if confidence is None else {**result, "score": confidence}


def labeling_config(named_values: dict[int, str]) -> str:
    """Labelling interface with a brush for each label value but background."""
    brushes = "".join(
        f'    <Label value={quoteattr(name)} background="rgb({", ".join(map(str, colour(value)))})"/>\n'
        for value, name in named_values.items()
        if value
    )
    return (
        "<View>\n"
        f'  <Image name="{PICTURE_TAG}" value="${PICTURE_TAG}" zoom="true"/>\n'
        f'  <BrushLabels name="{BRUSH_TAG}" toName="{PICTURE_TAG}">\n{brushes}  </BrushLabels>\n'
        "</View>\n"
    )
