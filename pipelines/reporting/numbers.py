"""What a report counts, row by row: its memory does not grow with the label set."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.label_set import Counts

BINS = 20
MEASURES = ("uncertainty", "confidence", "disagreement")
ROWS_PER_REASON = 25
REASONS = 40
TEXT = 300  # characters of a foreign text that are shown

# What speaks most against a label, and how the page says it.
DOUBTS = {
    "no_class": "no class found",
    "tag_without_pixels": "a tag without pixels",
    "class_without_tag": "a class the tags lack",
    "opinions_differ": "maps and segmentation head differ",
    "affinity_differs": "the affinity changes much",
    "low_confidence": "low confidence",
    "ignored_pixels": "many ignored pixels",
}


@dataclass
class Histogram:
    """Counts of values 0..1 in bins of one width."""

    bins: list[int] = field(default_factory=lambda: [0] * BINS)
    total: float = 0.0

    def add(self, value: float) -> None:
        """Count one value; 1 belongs to the last bin."""
        self.bins[min(BINS - 1, max(0, int(value * BINS)))] += 1
        self.total += value

    @property
    def mean(self) -> float:
        return self.total / max(1, sum(self.bins))


@dataclass
class ClassNumbers:
    """One class over all labels: pictures that have its tag, pictures with its pixels, sum of its shares."""

    tagged: int = 0
    present: int = 0
    area: float = 0.0

    @property
    def mean_area(self) -> float:
        """Share of a picture, mean over those that show the class."""
        return self.area / max(1, self.present)


class Numbers:
    """Everything that is counted about the rows of a run."""

    def __init__(self, classes: Iterable[str]) -> None:
        self.counts = Counts()
        self.given = 0
        self.ignored = 0.0
        self.classes = {name: ClassNumbers() for name in classes}
        self.histograms = {name: Histogram() for name in MEASURES}
        self.doubts: collections.Counter[str] = collections.Counter()
        self.quarantined: dict[str, list[dict[str, str]]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one row of the manifest."""
        self.counts.images += 1
        if row["status"] != "ok":
            self._quarantine(row)
            return
        self.counts.labels += 1
        self.counts.see_unknown(row["unknown_tags"] or ())
        self.given += row["tags_source"] == "given"
        self.ignored += row["ignored_share"]
        self.doubts[main_doubt(row)] += 1
        for name in MEASURES:
            self.histograms[name].add(row[name])
        for tag, area in zip(row["tags"], row["area"], strict=True):
            numbers = self.classes.setdefault(tag, ClassNumbers())
            numbers.tagged += 1
            numbers.present += area > 0
            numbers.area += area

    def presence(self, name: str) -> float:
        """Share of the labelled pictures that show a class."""
        return self.classes[name].present / max(1, self.counts.labels) if name in self.classes else 0.0

    def mean_area(self, name: str) -> float:
        """Share of a picture that a class has where it is."""
        return self.classes[name].mean_area if name in self.classes else 0.0

    def _quarantine(self, row: Mapping[str, Any]) -> None:
        """Count the reason; the first rows of each are kept to be shown."""
        reason = str(row["reason"])
        self.counts.reasons[reason] = self.counts.reasons.get(reason, 0) + 1
        if reason not in self.quarantined and len(self.quarantined) == REASONS:
            return
        kept = self.quarantined.setdefault(reason, [])
        if len(kept) < ROWS_PER_REASON:
            kept.append({name: cut(str(row[name] or "")) for name in ("key", "reason", "detail", "uri")})


def main_doubt(row: Mapping[str, Any]) -> str:
    """Which of the terms of a label's uncertainty weighs most: a key of ``DOUBTS``."""
    if not row["tags"]:
        return "no_class"
    if row["tags_without_pixels"]:
        return "tag_without_pixels"
    if row["classes_without_tag"]:
        return "class_without_tag"
    terms = {
        "opinions_differ": row["disagreement"],
        "affinity_differs": row["affinity_disagreement"] or 0.0,
        "low_confidence": 1 - row["confidence"],
        "ignored_pixels": row["ignored_share"],
    }
    return max(terms, key=lambda name: terms[name])


def cut(text: str) -> str:
    """The beginning of a text that others wrote."""
    return text if len(text) <= TEXT else f"{text[:TEXT]}..."
