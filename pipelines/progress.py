"""The progress line of a long job: how far it is, how fast, how long it will still take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping


class Progress:
    """Counts what is done and prints a line when asked.

    Rates are those of the last ``window`` counts, so that an ETA follows a job that changes its pace and a burst of
    results is no pace. Time that ``pause`` takes out (an evaluation, say) is in no rate.
    """

    def __init__(self, what: str, total: int, done: int = 0, window: int = 50) -> None:
        self.what, self.total, self.done = what, total, done
        self._recent: deque[tuple[int, float]] = deque(maxlen=window)  # images, seconds
        self._last = time.monotonic()

    def count(self, images: int) -> None:
        """One more step, with so many pictures."""
        now = time.monotonic()
        self._recent.append((images, now - self._last))
        self._last = now
        self.done += 1

    def pause(self) -> None:
        """Forget the time since the last ``count``."""
        self._last = time.monotonic()

    def images_per_s(self) -> float:
        """Pictures a second, lately."""
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(images for images, _ in self._recent) / seconds if seconds else 0.0

    def line(self, detail: str = "", values: Mapping[str, float] | None = None) -> str:
        """What is done, how fast, and how long the rest will take."""
        seconds = sum(seconds for _, seconds in self._recent)
        remaining_s = seconds / len(self._recent) * (self.total - self.done) if self._recent else 0.0
        parts = [f"{self.what} {self.done}/{self.total}", detail]
        parts += [f"{name} {value:.4g}" for name, value in (values or {}).items()]
        parts += [f"{self.images_per_s():.1f} images/s", f"ETA {int(remaining_s) // 60}:{int(remaining_s) % 60:02d}"]
        return "  ".join(part for part in parts if part)
