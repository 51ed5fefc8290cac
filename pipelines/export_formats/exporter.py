"""What every export format is: labels go in one by one, and the end says what a reader needs to know.

A format is a module of this package with a class that takes an ``ExportJob``. Libraries that only one format needs are
imported at the top of its module, and the module when the format is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from afa_core.classes import BACKGROUND, IGNORE_INDEX, palette
from afa_core.data.sample import Pixels
from pipelines.label_pictures import LabelledPicture

Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """What all labels of an export have in common.

    Attributes:
        folder: that is written into; it gets the name ``output`` when the export is whole.
        output: where people will find it.
        classes: the class list; the n-th of it is label value n + 1.
        model: that made the labels, as MLflow or a folder names it.
        model_digest: of its weights and configuration.
        run: name of the run in the label set.
        label_set: URI of the label set.
        max_megapixels: larger pictures have no label.
        with_pictures: write the pictures too.
        val_share: share of the validation split, of the formats that know splits.
        samples_per_shard: of shards.
    """

    folder: Path
    output: Path
    classes: tuple[str, ...]
    model: str
    model_digest: str
    run: str
    label_set: str
    max_megapixels: float
    with_pictures: bool
    val_share: float
    samples_per_shard: int

    @property
    def ignored_name(self) -> str:
        """Name for the ignored pixels, where a format has to call them something; never that of a class."""
        name = "ignored"
        while name in self.classes:
            name += "_pixels"
        return name

    @property
    def named_values(self) -> dict[int, str]:
        """Every label value by its name: background, the classes, ignored."""
        return {BACKGROUND: "background", **dict(enumerate(self.classes, start=1)), IGNORE_INDEX: self.ignored_name}


class Exporter(Protocol):
    """Writes labels in one format."""

    def __init__(self, job: ExportJob) -> None: ...

    def add(self, label: LabelledPicture) -> None:
        """Write a label; its picture is there.

        Raises:
            BadSample: the picture had to be decoded, and cannot be; nothing of the label was written.
        """

    def close(self) -> list[str]:
        """Finish; lines for whoever wants to read the export."""


def colour(value: int) -> Colour:
    """Colour of a label value in the masks' palette."""
    red, green, blue = palette()[3 * value : 3 * value + 3]
    return red, green, blue


def class_confidence(label: LabelledPicture, name: str) -> float | None:
    """How sure the label is of one of its classes; None where it has no pixel of it."""
    confidence: float | None = label.facts.get("by_class", {}).get(name, {}).get("confidence")
    return confidence


def shown_values(values: Pixels) -> list[int]:
    """Label values in a label map [H, W], background left out."""
    return [int(value) for value in np.unique(values) if value != BACKGROUND]
