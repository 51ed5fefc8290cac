"""How fast a run went over time, from what its commit markers tell.

A marker says when its unit was finished and how many seconds its stages took, so it was at work from
``finished - sum(stage_seconds)`` on. Its pictures are spread evenly over that time. Where no unit was at work for
``PAUSE_S``, the run stood still (killed and resumed, or waiting for a machine): such pauses are cut out of the time
axis, marked where they were, and count in no rate.
"""

from __future__ import annotations

import collections
from array import array
from dataclasses import dataclass

from pipelines.label_set import Marker

PAUSE_S = 30.0
BUCKETS = 60


@dataclass(frozen=True)
class Pause:
    """A time without any unit at work: how long, and after how many seconds of work."""

    after_s: float
    seconds: float


@dataclass(frozen=True)
class Curve:
    """Pictures per second in equal parts of the time at work.

    Attributes:
        rates: images/s, one for each part.
        active_s: time in which a unit was at work.
        pauses: where time was cut out.
        began: of the first unit, seconds since 1970.
        ended: of the last.
    """

    rates: list[float]
    active_s: float
    pauses: list[Pause]
    began: float
    ended: float


class Throughput:
    """Units by the time they were at work: three numbers each."""

    def __init__(self) -> None:
        self.stage_seconds: collections.Counter[str] = collections.Counter()
        self._starts, self._ends, self._images = array("d"), array("d"), array("d")

    def add(self, marker: Marker) -> None:
        """Count a unit in."""
        self.stage_seconds.update(marker.stage_seconds)
        self._starts.append(marker.finished - max(1e-3, sum(marker.stage_seconds.values())))
        self._ends.append(marker.finished)
        self._images.append(marker.images)

    def curve(self) -> Curve | None:
        """The rates over time; None without units."""
        if not self._starts:
            return None
        units = sorted(zip(self._starts, self._ends, self._images, strict=True))
        began, reached = units[0][0], units[0][0]
        paused, pauses, shifted = 0.0, list[Pause](), []
        for start, end, images in units:
            if start - reached > PAUSE_S:
                pauses.append(Pause(reached - began - paused, start - reached))
                paused += start - reached
            reached = max(reached, end)
            shifted.append((start - began - paused, end - began - paused, images))
        active_s = reached - began - paused
        return Curve(_rates(shifted, active_s), active_s, pauses, began, reached)


def _rates(units: list[tuple[float, float, float]], active_s: float) -> list[float]:
    """Pictures of (start, end, images) spread over equal buckets, by their length."""
    width = active_s / BUCKETS
    totals = [0.0] * BUCKETS
    for start, end, images in units:
        first, last = (min(BUCKETS - 1, int(moment / width)) for moment in (start, end))
        for bucket in range(first, last + 1):
            overlap = min(end, (bucket + 1) * width) - max(start, bucket * width)
            totals[bucket] += images * max(0.0, overlap) / (end - start)
    return [total / width for total in totals]
