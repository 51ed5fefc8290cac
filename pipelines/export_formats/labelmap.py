"""``labelmap.txt``: names and colours of label values, as CVAT and datumaro read it beside masks in VOC's layout."""

from __future__ import annotations

from pipelines.errors import UsageError
from pipelines.export_formats.exporter import ExportJob, colour


def label_map(job: ExportJob) -> str:
    """A line for each label value, background first and ignored last.

    Raises:
        UsageError: a class name cannot be written in it.
    """
    lines = ["# label:color_rgb:parts:actions"]
    for value, name in job.named_values.items():
        if ":" in name or len(name.splitlines()) != 1 or name != name.strip() or name.startswith("#"):
            raise UsageError(
                f"class {name!r} cannot be written in labelmap.txt: a name there has no colon or line end, no blank at"
                " an end and no # in front; use --format coco, labelstudio, fiftyone or webdataset"
            )
        lines.append(f"{name}:{','.join(map(str, colour(value)))}::")
    return "\n".join(lines) + "\n"
