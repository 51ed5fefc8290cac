"""The sample contract: what a member of a shard, or a picture in a folder, may be and what becomes of it.

    KEY.jpg|jpeg|png|webp|gif|bmp|tif|tiff     the picture
    KEY.json                                   {"tags": [...], "width", "height", "source"}
    KEY.cls                                    third parties: an integer index into the class list
    KEY.seg.png                                indexed mask, 255 ignored; only evaluation looks at it

Other members are left alone. Nothing read here is executed. A sample that cannot be used raises ``BadSample`` with a
reason code that stays the same from version to version.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from afa_core.classes import palette
from afa_core.data.jpeg import decode_jpeg, jpeg_size, may_be_turned, upright

Pixels = NDArray[np.uint8]
# H, W of a picture -> the least h, w that it is needed at.
NeededSize = Callable[[int, int], tuple[int, int]]

PICTURE_MEMBERS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
PICTURE_SUFFIXES = frozenset(f".{name}" for name in PICTURE_MEMBERS)
SEG_MEMBER = "seg.png"
STRIP_PIXELS = 2**20  # of a picture that are converted at a time
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# How many pixels are too many is decided below; catch_warnings() is not for threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_KEY = re.compile(r"[^./\\\x00-\x1f][^.\\\x00-\x1f]*")


class BadSample(Exception):
    """A sample that cannot be used.

    Attributes:
        reason: stable code (``undecodable_image``, ``too_many_pixels``, ``no_image``, ``bad_json``, ``bad_key``,
            ``bad_cls``, ``bad_seg``, ``size_mismatch``, ``no_tags``, ...).
        detail: what exactly.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.reason, self.detail)


class Picture(NamedTuple):
    """A decoded picture: uint8 [h, w, 3] RGB in display orientation, and its full size H, W; h, w may be smaller."""

    pixels: Pixels
    full_size: tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """A decoded sample.

    Attributes:
        key: unique name without extension.
        image: uint8 [H, W, 3], RGB, in display orientation.
        tags: class names; None where the sample carries none.
        seg_label: uint8 [H, W], 255 ignored; None unless asked for and there.
        source: where the picture came from.
        unscaled_size: H, W of the picture where it may have been decoded at a smaller size; None: its image's.
    """

    key: str
    image: Pixels
    tags: tuple[str, ...] | None
    seg_label: Pixels | None = None
    source: str = ""
    unscaled_size: tuple[int, int] | None = None

    @property
    def full_size(self) -> tuple[int, int]:
        """H, W of the picture, whatever size it was decoded at."""
        height, width = self.unscaled_size or self.image.shape[:2]
        return height, width


def check_key(key: str) -> str:
    """The key, if it can safely become a file name: relative, no ``..``, no dot, no control characters.

    Raises:
        BadSample: ``bad_key``.
    """
    if not _KEY.fullmatch(key) or "//" in key or key.endswith("/") or len(key) > 512:
        raise BadSample("bad_key", repr(key[:80]))
    return key


def path_to_key(relative: PurePath) -> str:
    """Key of a picture in a folder: its relative path without extension; a key ends at its first dot."""
    return relative.with_suffix("").as_posix().replace(".", "_")


def decode_sample(
    raw: Mapping[str, Any],
    classes: Sequence[str],
    max_megapixels: float,
    *,
    with_seg: bool = False,
    needed_size: NeededSize | None = None,
) -> Sample:
    """Sample from its members, ``{"__key__": ..., extension: bytes}``.

    Args:
        raw: the members by extension, as WebDataset names them.
        classes: the class list, for ``.cls`` members.
        max_megapixels: larger pictures are refused before they are decoded.
        with_seg: also decode the mask, at its full size.
        needed_size: see ``decode_picture``.

    Raises:
        BadSample: with its reason.
    """
    key = check_key(str(raw["__key__"]))
    member = next((name for name in PICTURE_MEMBERS if name in raw), None)
    if member is None:
        raise BadSample("no_image", f"{key} has none of .{', .'.join(PICTURE_MEMBERS)}")
    picture = decode_picture(raw[member], max_megapixels, needed_size)
    facts = _decode_json(raw["json"]) if "json" in raw else {}
    seg_label = None
    if with_seg and SEG_MEMBER in raw:
        seg_label = decode_seg_label(raw[SEG_MEMBER], max_megapixels)
        if seg_label.shape != picture.full_size:
            raise BadSample("size_mismatch", f"mask {seg_label.shape} beside picture {picture.full_size}")
    tags, source = _tags(facts, raw, classes), str(facts.get("source", ""))
    return Sample(key, picture.pixels, tags, seg_label, source, picture.full_size)


def decode_image(data: bytes, max_megapixels: float) -> Pixels:
    """Encoded picture -> uint8 [H, W, 3]: first frame, EXIF orientation applied, any mode brought to RGB.

    Raises:
        BadSample: ``undecodable_image`` or ``too_many_pixels``.
    """
    return decode_picture(data, max_megapixels).pixels


def decode_picture(data: bytes, max_megapixels: float, needed_size: NeededSize | None = None) -> Picture:
    """What ``decode_image`` does, but if possible at a smaller size, though not below the one that is needed.

    Raises:
        BadSample: ``undecodable_image`` or ``too_many_pixels``.
    """
    return _decode_fast(data, max_megapixels, needed_size) or _decode_with_pillow(data, max_megapixels)


def _decode_fast(data: bytes, max_megapixels: float, needed_size: NeededSize | None) -> Picture | None:
    """An ordinary JPEG; None for everything else and for whatever is odd about one, which Pillow then judges."""
    stored = jpeg_size(data)
    if stored is None:
        return None
    _check_pixels(*stored, max_megapixels)
    try:
        orientation = picture_header(data, max_megapixels)[1] if may_be_turned(data) else 1
    except BadSample:
        return None
    on_its_side = orientation >= 5
    full_size = stored[::-1] if on_its_side else stored
    needed = needed_size(*full_size) if needed_size else full_size
    pixels = decode_jpeg(data, stored, needed[::-1] if on_its_side else needed)
    return None if pixels is None else Picture(upright(pixels, orientation), full_size)


def _decode_with_pillow(data: bytes, max_megapixels: float) -> Picture:
    picture = _open(data, max_megapixels, "undecodable_image")
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
            return Picture(_wide_grey_to_rgb(picture), (picture.height, picture.width))
        return Picture(_to_rgb(picture), (picture.height, picture.width))
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSample("undecodable_image", str(error)) from error


def _to_rgb(picture: Image.Image) -> Pixels:
    """Any mode on white -> uint8 [H, W, 3], some rows at a time: every form of the whole would be a multiple of it."""
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        bottom = min(top + rows, picture.height)
        strip = picture.crop((0, top, picture.width, bottom))
        if strip.has_transparency_data:
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip.convert("RGBA"))
        pixels[top:bottom] = np.asarray(strip.convert("RGB"))
    return pixels


def picture_header(data: bytes, max_megapixels: float) -> tuple[str, int]:
    """Format of an encoded picture (``JPEG``, ``PNG``, ...) and its EXIF orientation, 1 for upright; not decoded.

    Raises:
        BadSample: ``undecodable_image`` or ``too_many_pixels``.
    """
    picture = _open(data, max_megapixels, "undecodable_image")
    form = "JPEG" if picture.format == "MPO" else str(picture.format)  # a JPEG with a second one behind it
    try:
        orientation = int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except (OSError, ValueError, SyntaxError, TypeError) as error:
        raise BadSample("undecodable_image", str(error)) from error
    return form, orientation if 1 < orientation <= 8 else 1


def decode_seg_label(data: bytes, max_megapixels: float = 100.0) -> Pixels:
    """Indexed or grey PNG mask -> uint8 [H, W] label map.

    Raises:
        BadSample: ``bad_seg``.
    """
    picture = _open(data, max_megapixels, "bad_seg")
    if picture.mode not in ("P", "L", "1"):
        raise BadSample("bad_seg", f"mode {picture.mode}, must be indexed or 8-bit grey")
    try:
        return np.asarray(picture).astype(np.uint8)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSample("bad_seg", str(error)) from error


def encode_mask(label: Pixels) -> bytes:
    """Label map uint8 [H, W] -> PNG with the palette of ``classes.palette``."""
    picture = Image.fromarray(label)
    picture.putpalette(palette())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def encode_sample(
    key: str, picture: bytes, extension: str, facts: Mapping[str, Any], seg_png: bytes | None = None
) -> dict[str, Any]:
    """Members to write: the picture's own bytes, its JSON, its mask.

    Raises:
        BadSample: ``bad_key``.
    """
    members: dict[str, Any] = {"__key__": check_key(key), extension: picture}
    members["json"] = json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()
    return members if seg_png is None else members | {SEG_MEMBER: seg_png}


def _open(data: bytes, max_megapixels: float, reason: str) -> Image.Image:
    """Header of a picture; nothing is decoded yet, so a bomb costs nothing."""
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample("too_many_pixels", str(error)) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise BadSample(reason, "empty" if not data else "not a picture of a known format") from error
    _check_pixels(picture.height, picture.width, max_megapixels)
    return picture


def _check_pixels(height: int, width: int, max_megapixels: float) -> None:
    if height * width > max_megapixels * 1e6:
        raise BadSample("too_many_pixels", f"{width} x {height}, allowed {max_megapixels} megapixels")


def _wide_grey_to_rgb(picture: Image.Image) -> Pixels:
    """16- and 32-bit grey scaled to 8 bits; Pillow's own conversion clips instead."""
    values = np.asarray(picture)
    highest = max(65535.0, float(values.max(initial=0)))
    grey = np.empty(values.shape, np.uint8)
    for row, value in enumerate(values):  # row by row: as floats a large picture would need eight times its memory
        grey[row] = np.clip(value * (255 / highest), 0, 255)
    return np.repeat(grey[..., None], 3, axis=2)


def _decode_json(data: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from error
    if not isinstance(facts, dict):
        raise BadSample("bad_json", "not an object")
    return facts


def _tags(facts: Mapping[str, Any], raw: Mapping[str, Any], classes: Sequence[str]) -> tuple[str, ...] | None:
    if "tags" in facts:
        tags = facts["tags"]
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise BadSample("bad_json", "tags must be a list of strings")
        return tuple(tags)
    if "cls" in raw:
        try:
            index = int(raw["cls"])
        except ValueError as error:
            raise BadSample("bad_cls", repr(raw["cls"][:20])) from error
        if not 0 <= index < len(classes):
            raise BadSample("bad_cls", f"{index}, but there are {len(classes)} classes")
        return (classes[index],)
    return None
