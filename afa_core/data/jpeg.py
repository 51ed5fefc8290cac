"""JPEG pictures through libjpeg-turbo, several times as fast as Pillow and with the same bits.

Only what is beyond doubt is decoded here: for every other file the answer is None, and Pillow judges it. A picture that
is going to be shrunk can be decoded at a half, a quarter or an eighth of its size, which the inverse DCT does by itself
(other eighths take longer than decoding in full).

Orientations are EXIF's: 1 upright, 2 to 4 mirrored or upside down, 5 to 8 on their side.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

_START = b"\xff\xd8\xff"
# YCCK and CMYK are for Pillow: how they are inverted is a matter of custom.
_COLOUR_SPACES = ("YCbCr", "Gray", "RGB")
_MARKER = 0xFF
_START_OF_SCAN = 0xDA
_APPLICATION_1 = 0xE1  # a segment of EXIF or XMP
_DIVISORS = (8, 4, 2)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """H, W of a JPEG as it is stored, from its header; None if it is for Pillow."""
    if not data.startswith(_START):
        return None
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if colour_space in _COLOUR_SPACES else None


def may_be_turned(data: bytes) -> bool:
    """Whether the file may say how it is to be turned: a segment that could comes before the picture's data."""
    at = len(_START) - 1
    while at + 4 <= len(data) and data[at] == _MARKER and data[at + 1] != _APPLICATION_1:
        if data[at + 1] == _START_OF_SCAN:
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return True


def decode_jpeg(data: bytes, size: tuple[int, int], needed: tuple[int, int]) -> Pixels | None:
    """JPEG of a known size H, W as stored -> uint8 RGB of that size or of the smallest fraction not below ``needed``.

    None if the decoder has anything to remark: a picture that is cut short comes with no more than a warning.
    """
    height, width = next((small for small in _fractions(size) if small[0] >= needed[0] and small[1] >= needed[1]), size)
    try:
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
    except ValueError:
        return None


def _fractions(size: tuple[int, int]) -> list[tuple[int, int]]:
    return [(-(-size[0] // divisor), -(-size[1] // divisor)) for divisor in _DIVISORS]


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Stored [h, w, 3] -> as it is to be shown."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(pixels[rows, columns])
