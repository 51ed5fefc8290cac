"""Thumbnails and facts of the labels that a gallery shows, ready for its page."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from afa_core.classes import BACKGROUND, palette
from afa_core.data.sample import BadSample, decode_image, decode_seg_label
from pipelines.errors import UsageError
from pipelines.label_pictures import LabelledPicture, labelled_pictures
from pipelines.label_set import CommittedUnit
from pipelines.page import data_uri
from pipelines.reporting.choice import Chosen, by_unit
from pipelines.reporting.numbers import cut, main_doubt

SIDE_PX = 320
JPEG_QUALITY = 80
UNITS_AT_A_TIME = 4


@dataclass(frozen=True)
class Thumbnails:
    """Small pictures as data URIs; empty where there is none."""

    picture: str
    mask: str
    problem: str = ""


def load_cards(run: str, chosen: list[Chosen], max_megapixels: float) -> Iterator[dict[str, Any]]:
    """A card for each chosen label, in the given order.

    Raises:
        UsageError: masks are missing from the label set.
    """

    def of_unit(unit: CommittedUnit) -> dict[str, Thumbnails]:
        return {item.row["key"]: thumbnails(item, max_megapixels) for item in labelled_pictures(unit)}

    found: dict[str, Thumbnails] = {}
    with ThreadPoolExecutor(UNITS_AT_A_TIME) as pool:
        try:
            for some in pool.map(of_unit, by_unit(run, chosen)):
                found.update(some)
        except BadSample as error:  # of a mask
            raise UsageError(f"{run} is damaged ({error}): afa verify-labels tells more") from error
    for item in chosen:
        yield card(item, found[item.row["key"]])


def thumbnails(item: LabelledPicture, max_megapixels: float) -> Thumbnails:
    """Picture and mask of one size; the mask's background is transparent."""
    label = Image.fromarray(decode_seg_label(item.mask_png, max_megapixels))
    label.putpalette(palette())
    factor = min(1.0, SIDE_PX / max(label.size))
    size = (max(1, round(label.width * factor)), max(1, round(label.height * factor)))
    small = label.resize(size, Image.Resampling.NEAREST)
    mask = _encoded(small, "PNG", transparency=BACKGROUND, optimize=True)
    if item.picture is None:
        return Thumbnails("", mask, item.problem)
    try:
        picture = Image.fromarray(decode_image(item.picture, max_megapixels))
    except BadSample as bad:
        return Thumbnails("", mask, bad.reason)
    resized = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    return Thumbnails(_encoded(resized, "JPEG", quality=JPEG_QUALITY), mask)


def card(item: Chosen, images: Thumbnails) -> dict[str, Any]:
    """What the page knows of a label. Names and tags in it are as untrusted as where they came from."""
    row: Mapping[str, Any] = item.row
    return {
        "key": row["key"],
        "uri": cut(row["uri"]),
        "picture": images.picture,
        "mask": images.mask,
        "problem": images.problem,
        "width": row["width"],
        "height": row["height"],
        "given": row["tags_source"] == "given",
        "areas": [[tag, round(area, 4)] for tag, area in zip(row["tags"], row["area"], strict=True)],
        "lacking": row["classes_without_tag"],
        "ignored": round(row["ignored_share"], 4),
        "uncertainty": round(row["uncertainty"], 4),
        "confidence": round(row["confidence"], 4),
        "disagreement": round(row["disagreement"], 4),
        "distance": None if item.distance is None else round(item.distance, 4),
        "doubt": main_doubt(row),
        "why": item.why,
    }


def _encoded(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return data_uri(kind.lower(), buffer.getvalue())
