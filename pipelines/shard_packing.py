"""Packing one tar of a shard set: what a task of ``afa shards`` does with its plan."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa_core.classes import BACKGROUND, IGNORE_INDEX
from afa_core.data.sample import BadSample, check_key, decode_image, decode_seg_label, encode_mask, encode_sample
from afa_core.data.shapes import draw
from afa_core.data.shards import ShardEntry, ShardWriter
from pipelines.shard_sources import PictureRef, annotation_tags, mask_tags


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that could not be used: a reason code, the key, the detail."""

    reason: str
    key: str
    detail: str


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One tar to write."""

    name: str
    split: str
    output: str
    classes: tuple[str, ...]
    max_megapixels: float
    pictures: tuple[PictureRef, ...]


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """What became of a plan."""

    entry: ShardEntry
    class_images: dict[str, int]
    problems: list[Problem]


def write_shard(plan: ShardPlan) -> ShardResult:
    """Write one tar."""
    writer = ShardWriter(Path(plan.output) / plan.name)
    problems: list[Problem] = []
    for picture in plan.pictures:
        try:
            members, tags = pack(picture, plan.classes, plan.max_megapixels)
        except BadSample as bad:
            problems.append(Problem(bad.reason, picture.key, bad.detail))
            continue
        unknown = [tag for tag in tags if tag not in plan.classes]
        problems += [Problem("unknown_tag", picture.key, tag) for tag in unknown]
        writer.write(members, [tag for tag in tags if tag in plan.classes])
    return ShardResult(writer.close(), writer.class_images, problems)


def pack(
    picture: PictureRef, classes: tuple[str, ...], max_megapixels: float
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Members of a sample and its tags, known to the class list or not.

    Raises:
        BadSample: with its reason.
    """
    check_key(picture.key)
    if not picture.mask_classes:
        return _pack_drawn(picture)
    data, extension = _read_file(picture.path), Path(picture.path).suffix.lower().lstrip(".")
    height, width = decode_image(data, max_megapixels).shape[:2]
    mask = _read_file(picture.mask) if picture.mask else None
    if picture.tags is not None:
        tags = picture.tags
    elif picture.annotation:
        tags = annotation_tags(_read_file(picture.annotation))
    elif mask is not None:
        tags = mask_tags(mask, picture.mask_classes)
    else:
        raise BadSample("no_tags", "neither an annotation nor a mask")
    facts = {
        "tags": [tag for tag in tags if tag in classes],
        "width": width,
        "height": height,
        "source": Path(picture.path).name,
    }
    seg = encode_mask(_to_class_list(decode_seg_label(mask), picture.mask_classes, classes)) if mask else None
    return encode_sample(picture.key, data, extension, facts, seg), tags


def _read_file(path: str) -> bytes:
    """A picture, mask or annotation.

    Raises:
        BadSample: ``bad_path``, ``missing_file`` or ``unreadable``.
    """
    if ".." in Path(path).parts:
        raise BadSample("bad_path", path)
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise BadSample("missing_file", path) from error
    except OSError as error:
        raise BadSample("unreadable", f"{path}: {error.strerror}") from error


def _to_class_list(label: NDArray[np.uint8], mask_classes: Sequence[str], classes: Sequence[str]) -> NDArray[np.uint8]:
    """A mask in the numbers of the class list. Objects of other classes are no background: they become ignored."""
    table = np.full(256, IGNORE_INDEX, np.uint8)
    table[BACKGROUND] = BACKGROUND
    for value, name in enumerate(mask_classes, start=1):
        if name in classes:
            table[value] = classes.index(name) + 1
    return table[label]


def _pack_drawn(picture: PictureRef) -> tuple[dict[str, Any], tuple[str, ...]]:
    seed, index, size_px = map(int, picture.path.split("/"))
    drawn = draw(seed, index, size_px)
    buffer = io.BytesIO()
    Image.fromarray(drawn.image).save(buffer, "PNG")
    facts = {"tags": list(drawn.tags), "width": size_px, "height": size_px, "source": f"shapes:{seed}/{index}"}
    return encode_sample(picture.key, buffer.getvalue(), "png", facts, encode_mask(drawn.label)), drawn.tags
