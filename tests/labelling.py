"""Pictures to label, and what was made of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from commands import afa
from PIL import Image

from afa_core.data.shapes import draw
from infra.object_store import list_objects
from pipelines.label_set import committed_units, find_run


def picture(index: int, size_px: int = 64, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw(9, index, size_px).image).save(buffer, kind)
    return buffer.getvalue()


def rows_of(output: str | Path) -> list[dict[str, Any]]:
    return [row for unit in committed_units(find_run(str(output))) for row in unit.rows]


def masks_of(output: str | Path) -> dict[str, Image.Image]:
    units = committed_units(find_run(str(output)))
    return {key: Image.open(io.BytesIO(mask)) for unit in units for key, (mask, _) in unit.members().items()}


def done_units(output: str | Path) -> list[str]:
    return [found.uri for found in list_objects(str(output)) if found.uri.endswith(".done.json")]


def verified(output: str | Path) -> bool:
    return "clean" in afa("verify-labels", output)
