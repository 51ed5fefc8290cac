"""Pictures beside foreign masks: the file's own bytes wherever a reader will see the same picture as the model did.

Masks are in display orientation, and most readers of pictures ignore EXIF: a turned picture is written anew, upright.
What is written anew is what the model saw - 8-bit RGB, first frame, transparency on white.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from afa_core.data.sample import decode_image, picture_header
from pipelines.label_pictures import LabelledPicture

JPEG_QUALITY = 95
_UPRIGHT = 1


def upright_picture(label: LabelledPicture, max_megapixels: float) -> tuple[bytes, str]:
    """The picture with pixels in display orientation, and its extension.

    A turned JPEG stays a JPEG of quality 95, any other turned picture becomes a PNG.

    Raises:
        BadSample: it had to be decoded, and cannot be.
    """
    assert label.picture is not None
    form, orientation = picture_header(label.picture, max_megapixels)
    if orientation == _UPRIGHT:
        return label.picture, label.extension
    if form == "JPEG":
        return _encoded(label.picture, max_megapixels, "JPEG"), label.extension
    return _encoded(label.picture, max_megapixels, "PNG"), "png"


def jpeg_picture(label: LabelledPicture, max_megapixels: float) -> tuple[bytes, bool]:
    """The picture as an upright JPEG, and whether it was written anew for that.

    Raises:
        BadSample: it had to be decoded, and cannot be.
    """
    assert label.picture is not None
    if picture_header(label.picture, max_megapixels) == ("JPEG", _UPRIGHT):
        return label.picture, False
    return _encoded(label.picture, max_megapixels, "JPEG"), True


def write_picture(path: Path, data: bytes) -> None:
    """Write a picture or mask below folders that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _encoded(data: bytes, max_megapixels: float, form: str) -> bytes:
    picture = Image.fromarray(decode_image(data, max_megapixels))
    buffer = io.BytesIO()
    picture.save(buffer, form, **({"quality": JPEG_QUALITY} if form == "JPEG" else {}))
    return buffer.getvalue()
