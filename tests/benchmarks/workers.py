"""A discrete-event model of a pool of labelling workers: what Ray Data's actors do with a window, in simulated time.

A worker takes the next block, labels its units one by one, commits each. It dies now and then: what it has committed
stays, the rest of its block is given to another worker, and a new worker is there after a while. The driver hands out
one block at a time. A window begins when the one before it is done, with workers that have to start.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Workers:
    """A pool, and the time that has gone by.

    Attributes:
        workers: of the pool.
        images_per_s: that one labels.
        spread: standard deviation of the logarithm of a unit's time.
        life_s: mean time until a worker dies.
        start_s: from its start until it labels: process, libraries, model.
        dispatch_s: of the driver's time for every block.
        simulation_s: processor time that the model itself took.
    """

    workers: int
    images_per_s: float = 40.0
    spread: float = 0.3
    life_s: float = 24 * 3600.0
    start_s: float = 30.0
    dispatch_s: float = 0.01
    now_s: float = 0.0
    useful_s: float = 0.0
    lost_s: float = 0.0
    deaths: int = 0
    windows: int = 0
    simulation_s: float = 0.0
    _random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def run_window(self, units: int, blocks: int, pictures: int) -> list[int]:
        """Label a window; gives back the index of each unit that was committed, each once if all went well.

        Args:
            units: of the window.
            blocks: it is cut into, as even as can be.
            pictures: of a unit.
        """
        began = time.process_time()
        self.windows += 1
        commits: list[int] = []
        bounds = [index * units // blocks for index in range(blocks + 1)]
        waiting = [(0.0, bounds[index], bounds[index + 1]) for index in range(blocks)]  # from when, from unit, to unit
        free = [(self.now_s + self.start_s, self._end_of_life()) for _ in range(min(self.workers, blocks))]
        heapq.heapify(free)
        driver_s, last_s = self.now_s, self.now_s
        while waiting:
            ready_s, first, end = heapq.heappop(waiting)
            free_s, dies_s = heapq.heappop(free)
            start_s = max(free_s, ready_s, driver_s)
            driver_s = start_s + self.dispatch_s
            ends_s = start_s + np.cumsum(self._unit_seconds(end - first, pictures))
            committed = int(np.searchsorted(ends_s, dies_s)) if dies_s < ends_s[-1] else end - first
            commits.extend(range(first, first + committed))
            at_s = float(ends_s[committed - 1]) if committed else start_s
            self.useful_s += at_s - start_s
            last_s = max(last_s, at_s)
            if first + committed < end:
                self.deaths += 1
                self.lost_s += max(0.0, dies_s - at_s)
                heapq.heappush(waiting, (max(dies_s, start_s), first + committed, end))
                heapq.heappush(free, (max(dies_s, start_s) + self.start_s, self._end_of_life(dies_s)))
            else:
                heapq.heappush(free, (at_s, dies_s))
        self.now_s = last_s
        self.simulation_s += time.process_time() - began
        return commits

    def summary(self) -> dict[str, float]:
        """How long it would have taken, and which share of the workers' time went into labels that count."""
        return {
            "windows": self.windows,
            "hours": round(self.now_s / 3600, 2),
            "busy_share": round(self.useful_s / (self.now_s * self.workers), 4),
            "lost_share": round(self.lost_s / (self.now_s * self.workers), 6),
            "deaths": self.deaths,
        }

    def _unit_seconds(self, units: int, pictures: int) -> np.ndarray:
        """Log-normal around the mean."""
        factors = self._random.lognormal(-(self.spread**2) / 2, self.spread, units)
        return factors * (pictures / self.images_per_s)

    def _end_of_life(self, after_s: float | None = None) -> float:
        return (self.now_s if after_s is None else after_s) + float(self._random.exponential(self.life_s))
