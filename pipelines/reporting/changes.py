"""What became different since an earlier run over the same pictures, picture by picture.

The distance of two labels of a picture is half the sum of the differences of all areas, background and ignored pixels
included: at least this share of the pixels has another class now. It needs no masks, only rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.reporting.numbers import Histogram
from pipelines.scratch_table import ScratchTable

BACKGROUND, IGNORED = 0, 1  # beside class names, which are strings


@dataclass
class Changes:
    """Pictures that both runs labelled.

    Attributes:
        compared: how many.
        other_classes: of these, the ones that show other classes than before.
        distance: histogram of the distances.
    """

    compared: int = 0
    other_classes: int = 0
    distance: Histogram = field(default_factory=Histogram)


class EarlierLabels:
    """The areas that an earlier run gave to each picture."""

    def __init__(self, table: ScratchTable) -> None:
        self._table = table
        self.changes = Changes()

    def keep(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Remember rows of the earlier run."""
        labelled = (row for row in rows if row["status"] == "ok")
        self._table.put((row["key"], [row["tags"], row["area"], row["ignored_share"]]) for row in labelled)

    def compare(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Count rows of the newer run; the distance by key, where the earlier run has a label."""
        labelled = {row["key"]: row for row in rows if row["status"] == "ok"}
        distances = {}
        for key, (tags, area, ignored) in self._table.get(list(labelled)).items():
            row = labelled[key]
            before, now = _areas(tags, area, ignored), _areas(row["tags"], row["area"], row["ignored_share"])
            shares = before.keys() | now.keys()
            distances[key] = sum(abs(before.get(name, 0.0) - now.get(name, 0.0)) for name in shares) / 2
            self.changes.compared += 1
            self.changes.other_classes += _shown(before) != _shown(now)
            self.changes.distance.add(distances[key])
        return distances


def _areas(tags: list[str], area: list[float], ignored: float) -> dict[str | int, float]:
    """Share of the pixels by class; together 1."""
    return {**dict(zip(tags, area, strict=True)), BACKGROUND: 1 - sum(area) - ignored, IGNORED: ignored}


def _shown(areas: dict[str | int, float]) -> set[str]:
    return {name for name, area in areas.items() if isinstance(name, str) and area > 0}
