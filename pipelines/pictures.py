"""Pictures for people: label maps in colour, heat maps over pictures, and grids of both.

Shapes: H x W pixels; a tile is uint8 [H, W, 3].
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from afa_core.classes import palette
from pipelines.scoring import ScoredBatch

Tile = NDArray[np.uint8]
COLUMNS = ("image", "CAM", "affinity CAM", "pseudo-label", "prediction", "truth")
CAPTION_PX = 16
_PALETTE = np.array(palette(), dtype=np.uint8).reshape(256, 3)


def image_tile(image_unit: Tensor) -> Tile:
    """[3, H, W] in 0..1 -> tile."""
    return (image_unit.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def label_tile(label: Tensor | NDArray[np.uint8]) -> Tile:
    """Label map [H, W] -> tile in the palette's colours; ignored pixels pale grey."""
    return _PALETTE[np.asarray(label.cpu() if isinstance(label, Tensor) else label).astype(np.uint8)]


def heat_tile(image_unit: Tensor, maps: Tensor) -> Tile:
    """The largest of the maps [F, H, W] in 0..1 laid over its picture, blue over yellow to red."""
    heat = maps.amax(0).clamp(0, 1).cpu().numpy()[..., None]
    hot = np.concatenate([np.clip(2 * heat, 0, 1), 1 - np.abs(2 * heat - 1), np.clip(1 - 2 * heat, 0, 1)], axis=2)
    return (0.45 * image_tile(image_unit) + 0.55 * 255 * hot).astype(np.uint8)


def overlay_tile(image: Tile, label: NDArray[np.uint8]) -> Tile:
    """A picture under its half-transparent label map; background stays as it is."""
    mixed = (0.45 * image + 0.55 * label_tile(label)).astype(np.uint8)
    return np.where((label != 0)[..., None], mixed, image)


def scored_rows(batch: ScoredBatch) -> list[list[Tile]]:
    """A row of tiles per picture, in the order of ``COLUMNS``."""
    return [
        [
            image_tile(batch.image[index]),
            heat_tile(batch.image[index], batch.cam[index]),
            heat_tile(batch.image[index], _stretched(batch.affinity_cam[index])),
            label_tile(batch.labels["refined_affinity"][index]),
            label_tile(batch.labels["segmentation"][index]),
            label_tile(batch.truth[index]),
        ]
        for index in range(len(batch.image))
    ]


def _stretched(maps: Tensor) -> Tensor:
    """Maps [F, H, W] over their own range: a propagated CAM is a share beside the background, never far from it."""
    heat = maps.amax(0, keepdim=True)
    return (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-6)


def grid_png(rows: Sequence[Sequence[Tile]], captions: Sequence[str]) -> bytes:
    """Rows of tiles under captions as PNG; every row is as high as its tallest tile."""
    widths = [max(row[column].shape[1] for row in rows) for column in range(len(captions))]
    heights = [max(tile.shape[0] for tile in row) for row in rows]
    canvas = Image.new("RGB", (sum(widths) + 2 * len(widths), CAPTION_PX + sum(heights) + 2 * len(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    left = 0
    for column, caption in enumerate(captions):
        draw.text((left + 2, 2), caption, fill="black")
        top = CAPTION_PX
        for row, height in zip(rows, heights, strict=True):
            canvas.paste(Image.fromarray(row[column]), (left, top))
            top += height + 2
        left += widths[column] + 2
    return png_bytes(canvas)


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
