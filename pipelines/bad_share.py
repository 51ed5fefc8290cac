"""How many samples cannot be used: what stops a run."""

from __future__ import annotations

from collections import deque

# A share of bad samples means nothing before so many were seen.
FROM_SAMPLES = 100
# Of so many of the last samples not more than half may be bad, however good the earlier ones were.
LATELY_SAMPLES = 1000
LATELY_SHARE = 0.5


class BadShare:
    """Counts samples of all workers since they were started; what was mended is given another chance.

    Attributes:
        seen, bad: samples, and those of them that could not be used.
    """

    def __init__(self, allowed: float) -> None:
        """``allowed``: share of all samples that may be bad."""
        self.allowed = allowed
        self.seen = self.bad = 0
        self._lately: deque[tuple[int, int]] = deque()  # seen, bad of the last steps
        self._lately_seen = self._lately_bad = 0

    def count(self, seen: int, bad: int) -> None:
        """One more step."""
        self.seen += seen
        self.bad += bad
        self._lately.append((seen, bad))
        self._lately_seen += seen
        self._lately_bad += bad
        while self._lately_seen - self._lately[0][0] >= LATELY_SAMPLES:
            old_seen, old_bad = self._lately.popleft()
            self._lately_seen -= old_seen
            self._lately_bad -= old_bad

    def problem(self) -> str:
        """What is too much; empty while it is not."""
        if self.seen >= FROM_SAMPLES and self.bad > self.allowed * self.seen:
            return f"{self.bad} of {self.seen} training samples cannot be used (data.max_bad_share={self.allowed})"
        lately = max(self.allowed, LATELY_SHARE)
        if self._lately_seen >= LATELY_SAMPLES and self._lately_bad > lately * self._lately_seen:
            return (
                f"{self._lately_bad} of the last {self._lately_seen} training samples cannot be used "
                f"(data.max_bad_share={self.allowed} of all)"
            )
        return ""
