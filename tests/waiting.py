"""Waiting for what other processes do."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any


def wait_until(
    done: Callable[[], object],
    process: subprocess.Popen[Any] | None = None,
    words: Callable[[], object] = lambda: "it does not come so far",
    timeout_s: float = 150,
) -> None:
    """Until ``done`` holds; ``process`` must live so long, and ``words`` tell what there is to know if it does not."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert process is None or process.poll() is None, words()
        assert time.monotonic() < deadline, words()
        time.sleep(0.05)
