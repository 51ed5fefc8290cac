"""The progress line of a long job: how far it is, how fast, how long it will still take."""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import torch

# From this share of waiting on, more compute would not help.
DATA_BOUND = 0.2


class Progress:
    """Counts what is done and prints a line when asked.

    Rates are those of the last ``window`` counts, so that an ETA follows a job that changes its pace and a burst of
    results is no pace. Time that ``pause`` or ``leave_out`` takes out (evaluations, checkpoints) is in no rate.
    """

    def __init__(self, what: str, total: int, done: int = 0, window: int = 50) -> None:
        self.what, self.total, self.done = what, total, done
        self._recent: deque[tuple[int, float]] = deque(maxlen=window)  # images, seconds
        self._last = time.monotonic()
        self._waited_s = self._left_out_s = self._waited_total_s = self._total_s = 0.0

    def count(self, images: int) -> None:
        """One more step, with so many pictures."""
        now = time.monotonic()
        self._recent.append((images, now - self._last))
        self._total_s += now - self._last
        self._waited_total_s += self._waited_s
        self._waited_s = self._left_out_s = 0.0
        self._last = now
        self.done += 1

    def waited(self, seconds: float) -> None:
        """So much of the present step was spent waiting for its pictures, by the worker that waited longest."""
        self._waited_s += seconds

    def leave_out(self, seconds: float) -> None:
        """So much of the time since the last step was spent on a checkpoint."""
        self._last += seconds
        self._left_out_s += seconds

    def pause(self) -> None:
        """Forget the time since the last ``count``."""
        self._last = time.monotonic()

    def images_per_s(self) -> float:
        """Pictures a second, lately."""
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(images for images, _ in self._recent) / seconds if seconds else 0.0

    def rates(self) -> dict[str, float]:
        """Numbers of the present step for a log: how fast lately, how long it took, waits for data and checkpoints."""
        return {
            "images_per_s": self.images_per_s(),
            "time.step_s": time.monotonic() - self._last,
            "time.data_s": self._waited_s,
            "time.checkpoint_s": self._left_out_s,
        }

    def bottleneck(self) -> str:
        """Words on what limited the speed, over all steps."""
        if not self._total_s:
            return "no step was left to do"
        share = self._waited_total_s / self._total_s
        what = "data" if share > DATA_BOUND else "compute"
        return f"{what} was the bottleneck: {share:.0%} of the steps' time was spent waiting for data"

    def line(self, detail: str = "", values: Mapping[str, float] | None = None) -> str:
        """What is done, how fast, and how long the rest will take."""
        seconds = sum(seconds for _, seconds in self._recent)
        remaining_s = seconds / len(self._recent) * (self.total - self.done) if self._recent else 0.0
        parts = [f"{self.what} {self.done}/{self.total}", detail]
        parts += [f"{name} {value:.4g}" for name, value in (values or {}).items()]
        parts += [f"{self.images_per_s():.1f} images/s", f"ETA {int(remaining_s) // 60}:{int(remaining_s) % 60:02d}"]
        return "  ".join(part for part in parts if part)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far: of the GPU if it works on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure is never below that of the process which started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
