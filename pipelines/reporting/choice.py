"""Which labels a gallery shows: the head of the review queue, and what is typical.

Half are the most uncertain; half are drawn by the hash of their key, so that the same label set shows the same
pictures; and every class has one at least, while there is room. Memory holds a multiple of the gallery's size.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.label_set import CommittedUnit, Marker


@dataclass(frozen=True)
class Chosen:
    """A label that the gallery shows.

    Attributes:
        marker: of its unit.
        row: of the manifest.
        why: ``uncertain`` or ``random``.
        distance: from the earlier run's label, see ``changes``; None without one.
    """

    marker: Marker
    row: dict[str, Any]
    why: str
    distance: float | None


class Choice:
    """Sees every row once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._uncertain, self._random = _Largest(size), _Largest(size)
        self._classes: dict[str, _Largest] = {}

    def add(self, unit: CommittedUnit, distances: dict[str, float]) -> None:
        """Consider the rows of a unit."""
        for row in unit.rows:
            if row["status"] != "ok":
                continue
            drawn = hashlib.blake2b(row["key"].encode("utf-8", "surrogatepass"), digest_size=8).digest()
            distance = distances.get(row["key"])
            self._uncertain.add((row["uncertainty"], drawn), Chosen(unit.marker, row, "uncertain", distance))
            chosen = Chosen(unit.marker, row, "random", distance)
            self._random.add((0.0, drawn), chosen)
            for tag, area in zip(row["tags"], row["area"], strict=True):
                if area > 0:
                    self._classes.setdefault(tag, _Largest(1)).add((0.0, drawn), chosen)

    def chosen(self) -> list[Chosen]:
        """Most needed first, each label once."""
        uncertain, drawn = self._uncertain.items(), self._random.items()
        order = [item for first in self._classes.values() for item in first.items()]
        order += [item for pair in zip(uncertain, drawn, strict=True) for item in pair]
        unique: dict[str, Chosen] = {}
        for item in order:
            unique.setdefault(item.row["key"], item)
        return list(unique.values())[: self.size]


class _Largest:
    """The items of the largest ranks."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[tuple[tuple[float, bytes], str, Chosen]] = []

    def add(self, rank: tuple[float, bytes], item: Chosen) -> None:
        entry = (rank, str(item.row["key"]), item)  # keys differ: items are never compared
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, entry)
        elif self._heap and entry[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, entry)

    def items(self) -> list[Chosen]:
        """Largest first."""
        return [item for _, _, item in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


def by_unit(run: str, chosen: list[Chosen]) -> Iterator[CommittedUnit]:
    """The units that have chosen labels, with those rows only."""
    rows: dict[str, list[Chosen]] = {}
    for item in chosen:
        rows.setdefault(item.marker.unit, []).append(item)
    for items in rows.values():
        yield CommittedUnit(run, items[0].marker, [item.row for item in items])
