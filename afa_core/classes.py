"""Class lists, label values and palettes.

A label map holds 0 for background, 1..F for the F foreground classes in the order of the list, and
255 where a pixel is ignored. A class list never names the background.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from afa_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

BACKGROUND = 0
IGNORE_INDEX = 255
MAX_FOREGROUND_CLASSES = 254

SHAPES = ("disc", "square", "triangle", "star", "ring")

VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

COCO = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

BUILT_IN = {"shapes": SHAPES, "voc": VOC, "coco": COCO}


def load_classes(name_or_path: str) -> tuple[str, ...]:
    """Class list by built-in name (``shapes``, ``voc``, ``coco``) or from a text file, one class a line.

    Raises:
        InputError: neither a built-in name nor a readable file, or the list is not usable.
    """
    if name_or_path in BUILT_IN:
        return BUILT_IN[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(
            f"no class list {name_or_path!r}: give one of {', '.join(BUILT_IN)} or a text file, one class a line"
        )
    return check_classes(line.strip() for line in path.read_text().splitlines() if line.strip())


def check_classes(classes: Iterable[str]) -> tuple[str, ...]:
    """The list as a tuple, if it can be a class list: 1 to 254 distinct, non-empty names, no background.

    Raises:
        InputError: it cannot; the message names the offending entry.
    """
    names = tuple(classes)
    if not 1 <= len(names) <= MAX_FOREGROUND_CLASSES:
        raise InputError(f"a class list holds 1 to {MAX_FOREGROUND_CLASSES} classes, this one {len(names)}")
    seen: set[str] = set()
    for name in names:
        if not name or name.lower() == "background" or name in seen:
            raise InputError(f"class {name!r} is empty, repeated or the background: leave it out of the list")
        seen.add(name)
    return names


def tags_to_cls_label(tags: Iterable[str], classes: Sequence[str]) -> Tensor:
    """Multi-hot float vector [F] of the tags; tags outside the list are left out."""
    import torch  # whoever has labels checked or exported does not wait for it

    cls_label = np.zeros(len(classes), np.float32)
    for tag in tags:
        if tag in classes:
            cls_label[classes.index(tag)] = 1
    return torch.from_numpy(cls_label)


def cls_label_to_tags(cls_label: Tensor, classes: Sequence[str]) -> list[str]:
    """Names of the classes whose entry of the vector [F] is above 0.5, in list order."""
    return [name for name, value in zip(classes, cls_label.tolist(), strict=True) if value > 0.5]


def palette() -> list[int]:
    """PASCAL VOC's colour map as 768 flat values 0..255, the palette of every mask that is written.

    Each label's bits are dealt out to red, green and blue from the most significant bit down (the
    construction of the VOC development kit); 0 is black and 255 a pale grey.
    """
    labels = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((labels >> channel) & 1) << (7 - bit)).astype(np.uint8)
        labels >>= 3
    return [int(value) for value in colours.reshape(-1)]
