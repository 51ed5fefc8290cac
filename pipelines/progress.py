"""The progress line of a long job: how far it is, how fast, how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Progress:
    """Counts what is done and prints a line when asked.

    Rates are those since the line before, so that an ETA follows a job that changes its pace. Time that ``pause``
    takes out (an evaluation, say) is in no rate.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self._images = 0
        self._steps = 0
        self._seconds = 0.0
        self._last = time.monotonic()

    def count(self, images: int, steps: int = 1) -> None:
        """So many more steps, with so many pictures in all."""
        now = time.monotonic()
        self._seconds += now - self._last
        self._last = now
        self._images += images
        self._steps += steps
        self.done += steps

    def pause(self) -> None:
        """Forget the time since the last ``count``."""
        self._last = time.monotonic()

    def images_per_s(self) -> float:
        """Pictures a second since the last line."""
        return self._images / self._seconds if self._seconds else 0.0

    def line(self, detail: str = "", values: Mapping[str, float] | None = None) -> str:
        """The line; begins a new interval."""
        rate = self.images_per_s()
        remaining_s = self._seconds / self._steps * (self.total - self.done) if self._steps else 0.0
        self._images, self._steps, self._seconds = 0, 0, 0.0
        parts = [f"{self.what} {self.done}/{self.total}", detail]
        parts += [f"{name} {value:.4g}" for name, value in (values or {}).items()]
        parts += [f"{rate:.1f} images/s", f"ETA {int(remaining_s) // 60}:{int(remaining_s) % 60:02d}"]
        return "  ".join(part for part in parts if part)
