"""A folder that FiftyOne imports as ``fo.types.FiftyOneDataset``, and any reader of plain files understands.

    data/KEY.EXTENSION                 the pictures
    fields/pseudo_label/KEY.png        the masks, grey: FiftyOne takes the colours of a palette for values
    samples.json                       a sample for each picture: paths, tags, and what the label knows of its doubts
    metadata.json                      class list and mask targets

It is written as plain samples, the layout that FiftyOne reads from every version on; its newer one is a dump of its
database and bound to a version. Mask targets name every label value: FiftyOne draws nothing for 0, background, and
255 is the target ``ignored``. ``samples.json`` is streamed here, but FiftyOne reads it whole.
"""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image

from afa_core.data.sample import decode_seg_label
from pipelines.export_formats.exporter import ExportJob, class_confidence
from pipelines.export_formats.json_list import JsonList
from pipelines.export_formats.names import nested_name
from pipelines.export_formats.pictures import upright_picture, write_picture
from pipelines.label_pictures import LabelledPicture

FIELD = "pseudo_label"
DOUBTS = ("confidence", "disagreement", "affinity_disagreement", "ignored_share", "uncertainty")


class FiftyOneExporter:
    """Writes ``--format fiftyone``."""

    def __init__(self, job: ExportJob) -> None:
        self.job = job
        self._samples = JsonList(job.folder / "samples.partial")

    def add(self, label: LabelledPicture) -> None:
        """Write a label."""
        picture, extension = upright_picture(label, self.job.max_megapixels)
        name = nested_name(label.row["key"])
        picture_path, mask_path = f"data/{name}.{extension}", f"fields/{FIELD}/{name}.png"
        write_picture(self.job.folder / picture_path, picture)
        write_picture(self.job.folder / mask_path, _grey_png(label, self.job.max_megapixels))
        self._samples.append(self._sample(label, picture_path, mask_path))

    def close(self) -> list[str]:
        """Put the JSON files together."""
        JsonList.join(self.job.folder / "samples.json", {}, {"samples": self._samples})
        info = {
            "default_classes": list(self.job.classes),
            "default_mask_targets": {str(value): name for value, name in self.job.named_values.items()},
            **{name: getattr(self.job, name) for name in ("label_set", "run", "model", "model_digest")},
        }
        text = json.dumps({"media_type": "image", "info": info}, indent=2)
        (self.job.folder / "metadata.json").write_text(text + "\n")
        return [f"fo.Dataset.from_dir({str(self.job.output)!r}, dataset_type=fo.types.FiftyOneDataset)"]

    def _sample(self, label: LabelledPicture, picture_path: str, mask_path: str) -> dict[str, Any]:
        row = label.row
        return {
            "filepath": picture_path,
            "tags": [row["tags_source"]],
            "metadata": {"_cls": "ImageMetadata", "width": row["width"], "height": row["height"]},
            FIELD: {"_cls": "Segmentation", "mask_path": mask_path},
            "image_tags": {
                "_cls": "Classifications",
                "classifications": [
                    {"_cls": "Classification", "label": name, "confidence": class_confidence(label, name)}
                    for name in row["tags"]
                ],
            },
            "key": row["key"],
            "source": row["uri"],
            **{name: row[name] for name in DOUBTS},
        }


def _grey_png(label: LabelledPicture, max_megapixels: float) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(decode_seg_label(label.mask_png, max_megapixels)).save(buffer, "PNG")
    return buffer.getvalue()
