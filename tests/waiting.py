"""Waiting for what other processes do."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any


def wait_until(
    done: Callable[[], object],
    process: subprocess.Popen[Any] | None = None,
    words: Callable[[], object] = lambda: "it does not come so far",
    timeout_s: float = 300,
) -> None:
    """Until ``done`` holds; ``process`` must live so long, and ``words`` tell what there is to know if it does not."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert process is None or process.poll() is None, words()
        assert time.monotonic() < deadline, words()
        time.sleep(0.05)


def http_status(url: str) -> int:
    """What a server answers; 0 if it does not."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
