"""Memory of a labelling worker for 100 megapixels: ``PYTHONPATH=tests python tests/benchmarks/large_pictures.py``.

One picture a run and the smallest model. A line of JSON for each kind: the first picture is small, and what the others
need above it is what their size costs.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from growth import measured, write_bundle
from labelling import rows_of
from PIL import Image

SIDE_PX, TILE_PX = 10_000, 50
ROTATED = 6  # EXIF orientation: turned by a quarter
ORIENTATION = 0x0112
KINDS = {
    "small": ("RGB", ".jpg", 64, 1),
    "JPEG": ("RGB", ".jpg", SIDE_PX, 1),
    "JPEG, rotated": ("RGB", ".jpg", SIDE_PX, ROTATED),
    "JPEG, CMYK, rotated": ("CMYK", ".jpg", SIDE_PX, ROTATED),
    "PNG, rotated": ("RGB", ".png", SIDE_PX, ROTATED),
    "PNG, transparent": ("RGBA", ".png", SIDE_PX, 1),
    "PNG, transparent, rotated": ("RGBA", ".png", SIDE_PX, ROTATED),
    "PNG, 16 bit, rotated": ("I;16", ".png", SIDE_PX, ROTATED),
}


def write_picture(path: Path, mode: str, side_px: int, orientation: int) -> None:
    """A picture of repeated noise, which compresses."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    deep = mode == "I;16"
    values = np.uint16 if deep else np.uint8
    tile = np.random.default_rng(0).integers(0, np.iinfo(values).max, (side_px, TILE_PX, bands), dtype=values)
    pixels = np.tile(tile, (1, -(-side_px // TILE_PX), 1))[:, :side_px]
    image = Image.frombytes(mode, (side_px, side_px), np.ascontiguousarray(pixels).tobytes())
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(path, exif=exif, compress_level=1, quality=60)


def main() -> None:
    """Label one picture of each kind."""
    for kind, (mode, suffix, side_px, orientation) in KINDS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            store, output = folder / "store", folder / "out"
            store.mkdir()
            write_picture(store / f"picture{suffix}", mode, side_px, orientation)
            write_bundle(folder / "bundle")
            words = ["--model", folder / "bundle", "--input", store, "--output", output, "--workers", 1]
            facts = measured("label", *words)
            (row,) = rows_of(output)
            assert row["status"] == "ok", row
            print(json.dumps({"kind": kind, "worker_mib": facts["worker_mib"], "s": facts["s"]}), flush=True)


if __name__ == "__main__":
    main()
