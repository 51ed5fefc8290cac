"""Where pictures and tags come from: PASCAL VOC's layout, one's own folder, or the built-in shapes.

Each source gives references, not pixels: the driver plans with them, the tasks open them.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from afa_core.classes import VOC
from afa_core.data.sample import PICTURE_SUFFIXES, BadSample, decode_seg_label, path_to_key
from afa_core.errors import InputError
from pipelines.tag_tables import require_column, table_rows


@dataclass(frozen=True)
class PictureRef:
    """A picture to be packed.

    Attributes:
        key: of the sample.
        split: it belongs to.
        path: of the picture; for shapes "SEED/INDEX/SIZE_PX".
        tags: as given; None where they are to be derived from the mask.
        mask: path of its mask, if it has one.
        mask_classes: names of the mask's values 1, 2, ...
        annotation: VOC XML that holds the tags, if there is one.
    """

    key: str
    split: str
    path: str
    tags: tuple[str, ...] | None = None
    mask: str | None = None
    mask_classes: tuple[str, ...] = ()
    annotation: str | None = None


def voc_pictures(root: Path, lists: dict[str, str]) -> list[PictureRef]:
    """Pictures of VOC's layout, split -> name of a list in ``ImageSets/Segmentation`` or ``ImageSets/Main``.

    Raises:
        InputError: the layout or a list is not there.
    """
    if not (root / "JPEGImages").is_dir():
        raise InputError(f"{root} has no JPEGImages: give the folder that holds JPEGImages and ImageSets")
    masks = next(
        (root / name for name in ("SegmentationClassAug", "SegmentationClass") if (root / name).is_dir()), None
    )
    pictures = []
    for split, name in lists.items():
        for key in _read_list(root, name):
            mask = masks / f"{key}.png" if masks else None
            annotation = root / "Annotations" / f"{key}.xml"
            pictures.append(
                PictureRef(
                    key=key,
                    split=split,
                    path=str(root / "JPEGImages" / f"{key}.jpg"),
                    mask=str(mask) if mask and mask.is_file() else None,
                    mask_classes=VOC,
                    annotation=str(annotation) if annotation.is_file() else None,
                )
            )
    return pictures


def _read_list(root: Path, name: str) -> list[str]:
    folders = [root / "ImageSets" / kind for kind in ("Segmentation", "Main")]
    path = next((folder / f"{name}.txt" for folder in folders if (folder / f"{name}.txt").is_file()), None)
    if path is None:
        known = sorted(path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.txt"))
        raise InputError(f"no list {name!r} under {root / 'ImageSets'}: there are {', '.join(known) or 'none'}")
    # Lists of ImageSets/Main have a second column.
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def annotation_tags(data: bytes) -> tuple[str, ...]:
    """Class names in a VOC annotation.

    Raises:
        BadSample: ``bad_annotation``; XML that declares entities is refused.
    """
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise BadSample("bad_annotation", "declares a document type")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise BadSample("bad_annotation", str(error)) from error
    return tuple(sorted({name.text.strip() for name in root.iterfind("object/name") if name.text}))


def mask_tags(data: bytes, mask_classes: Sequence[str]) -> tuple[str, ...]:
    """Names of the classes that a mask shows.

    Raises:
        BadSample: ``bad_seg``.
    """
    values = np.unique(decode_seg_label(data))
    return tuple(mask_classes[value - 1] for value in values if 1 <= value <= len(mask_classes))


def folder_pictures(
    folder: Path,
    labels: Path | None,
    *,
    path_column: str,
    tags_column: str,
    val_share: float,
    masks: Path | None,
) -> list[PictureRef]:
    """Pictures of a folder with the tags of a table, or with their sub-folder as tag.

    Raises:
        InputError: the folder, the table or a column is not there.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    rows = list(_table_rows(labels, path_column, tags_column) if labels else _sub_folder_rows(folder))
    if not rows:
        raise InputError(f"{labels or folder} names no pictures")
    pictures = []
    for name, tags in rows:
        relative = PurePosixPath(name)
        key = path_to_key(relative)
        mask = masks / relative.with_suffix(".png") if masks else None
        pictures.append(
            PictureRef(
                key=key,
                split=split_of(key, val_share),
                path=str(folder / relative),
                tags=tags,
                mask=str(mask) if mask and mask.is_file() else None,
            )
        )
    return pictures


def split_of(key: str, val_share: float) -> str:
    """Split of a picture by the hash of its key: it stays the same when others come or go."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) / 2**32
    return "val" if share < val_share else "train"


def _sub_folder_rows(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.suffix.lower() in PICTURE_SUFFIXES and len(relative.parts) > 1:
            yield relative.as_posix(), (relative.parts[0],)


def _table_rows(path: Path, path_column: str, tags_column: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    require_column(path, tags_column)
    for row in table_rows(path, [path_column], tags_column):
        yield row.name, row.tags or ()


def shapes_pictures(train: int, val: int, seed: int, size_px: int) -> list[PictureRef]:
    """Built-in pictures; the validation split has a seed of its own."""
    return [
        PictureRef(key=f"shape-{split}-{index:07d}", split=split, path=f"{own_seed}/{index}/{size_px}")
        for split, count, own_seed in (("train", train, 2 * seed), ("val", val, 2 * seed + 1))
        for index in range(count)
    ]
