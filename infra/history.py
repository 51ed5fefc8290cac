"""The numbers of a long job, sent to its MLflow run from a thread: a tracking server that is away holds nobody up.

What was not sent is kept and tried again; it can be put into a checkpoint and taken up by whoever goes on. Nothing is
in the run twice: a point that is sent again has the same time, which MLflow takes for the same point; and before
anything is sent, the run is asked for its last step, so that what a job did once more after a restart is left out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from mlflow.entities import Metric

from infra.tracking import METRICS_BATCH, RunLogger

RETRY_S = 10.0
# More is not kept while the server is away; the oldest go.
MAX_ENTRIES = 20_000
MAX_FILES = 20

Entry = tuple[int, int, dict[str, float]]  # step, time in milliseconds, numbers


class HistorySender:
    """Sends what one job records, in order."""

    def __init__(self, logger: RunLogger) -> None:
        self._logger = logger
        self._entries: deque[Entry] = deque()
        self._files: deque[tuple[bytes, str]] = deque(maxlen=MAX_FILES)
        self._dropped = 0
        self._last_steps: dict[str, int] = {}  # that the run had when this job began, by metric
        self._changed = threading.Condition()
        self._wanted = self._ended = False
        self._thread = threading.Thread(target=self._work, name="history", daemon=True)
        self._thread.start()

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the numbers of a step. The first one tells whether a step of this kind is in the run already."""
        with self._changed:
            self._keep((step, int(time.time() * 1000), dict(numbers)))

    def add_file(self, data: bytes, artifact_path: str) -> None:
        """Store a file in the run: a picture, a profile."""
        with self._changed:
            self._files.append((data, artifact_path))

    def send(self) -> None:
        """Have what was recorded sent, soon."""
        with self._changed:
            self._wanted = True
            self._changed.notify_all()

    def unsent(self) -> list[list[Any]]:
        """What the run does not have yet, as plain values for a checkpoint."""
        with self._changed:
            return [list(entry) for entry in self._entries]

    def take_up(self, unsent: Iterable[list[Any]]) -> None:
        """Send what the job before could not."""
        with self._changed:
            for step, recorded_ms, numbers in unsent:
                self._keep((step, recorded_ms, numbers))

    def close(self, timeout_s: float) -> str:
        """Send the rest; words on what could not be sent in time, empty if all was."""
        deadline = time.monotonic() + timeout_s
        self.send()
        with self._changed:
            self._changed.wait_for(lambda: not (self._entries or self._files), deadline - time.monotonic())
            self._ended = True
            self._changed.notify_all()
            if not (self._entries or self._files or self._dropped):
                return ""
            steps = f"those of steps {self._entries[0][0]} to {self._entries[-1][0]}, " if self._entries else ""
            return (
                f"MLflow did not take everything: {len(self._entries)} entries ({steps}kept with the last checkpoint), "
                f"{self._dropped} older ones and {len(self._files)} files are missing"
            )

    def _keep(self, entry: Entry) -> None:
        self._entries.append(entry)
        if len(self._entries) > MAX_ENTRIES:
            self._entries.popleft()
            self._dropped += 1

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._ended)
                if self._ended:
                    return
                self._wanted = False
            if not self._send_all():
                with self._changed:  # again later, whoever asks meanwhile
                    self._changed.wait_for(lambda: self._ended, RETRY_S)
                    self._wanted = True

    def _send_all(self) -> bool:
        """Whether nothing is left of what there was to send."""
        while True:
            with self._changed:
                batch, file = self._batch(), next(iter(self._files), None)
            if batch:
                sent = self._send_batch(batch)
            elif file:
                sent = self._logger.log_file(*file)
            else:
                return True
            if not sent:
                return False
            with self._changed:  # the oldest may have been dropped meanwhile
                while batch and self._entries and self._entries[0] in batch:
                    self._entries.popleft()
                if not batch and self._files and self._files[0] is file:
                    self._files.popleft()
                self._changed.notify_all()

    def _batch(self) -> list[Entry]:
        """The oldest entries that fit into one request: a step is sent whole or not at all."""
        batch: list[Entry] = []
        points = 0
        for entry in self._entries:
            points += len(entry[2])
            if batch and points > METRICS_BATCH:
                break
            batch.append(entry)
        return batch

    def _send_batch(self, batch: list[Entry]) -> bool:
        points: list[Metric] = []
        for step, recorded_ms, numbers in batch:
            last = self._last_step(next(iter(numbers)))
            if last is None:
                return False
            if step > last:
                points += [Metric(key, float(value), recorded_ms, step) for key, value in numbers.items()]
        return not points or self._logger.log_points(points)

    def _last_step(self, metric: str) -> int | None:
        if metric not in self._last_steps:
            last = self._logger.last_step(metric)
            if last is None:
                return None
            self._last_steps[metric] = last
        return self._last_steps[metric]
