"""The ``afa`` command as its user runs it, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import wait_until


def afa_command(*words: object) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *map(str, words)]


def afa(*words: object, status: int = 0) -> str:
    """Run to the end; what it printed."""
    answer = subprocess.run(afa_command(*words), capture_output=True, text=True, check=False, timeout=280)
    assert answer.returncode == status, answer.stdout[-3000:] + answer.stderr[-5000:]
    return answer.stdout + answer.stderr


def error_line(printed: str) -> str:
    """The only line of what was printed that speaks of a mistake."""
    [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
    return line


def pip_install(python: str | Path, *words: object) -> None:
    """Install what tests compare with; where that fails they are skipped, and say so."""
    command = [python, "-m", "pip", "install", "--quiet", *map(str, words)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip(f"not tried, as pip install {' '.join(map(str, words))} failed: {answer.stderr[-500:]}")


def outcome(process: subprocess.Popen[str]) -> object:
    """What a process printed that should not have ended."""
    return "it is not yet so far" if process.poll() is None else process.communicate()


@contextmanager
def afa_running(
    *words: object, until: Callable[[], bool], timeout_s: float = 300, log: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A command that has come so far that ``until`` holds; what it prints goes into ``log``, or is for the caller."""
    process = subprocess.Popen(
        afa_command(*words),
        stdout=log.open("w") if log else subprocess.PIPE,
        stderr=subprocess.STDOUT if log else subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Shells start background jobs with Ctrl-C ignored, and so it would be here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        try:
            wait_until(until, process=process, timeout_s=timeout_s, words=lambda: outcome(process))
            yield process
        finally:
            process.kill()
