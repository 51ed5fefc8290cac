"""Finding a command's processes, to do something unkind to them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from waiting import wait_until


def descendants(pid: int) -> dict[int, str]:
    """Processes below one, with their command lines."""
    table = subprocess.run(["ps", "-ewwo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    found: dict[int, str] = {}
    parents = {pid}
    while parents:
        children = {int(row[0]): row[2] for row in rows if int(row[1]) in parents}
        found |= children
        parents = set(children)
    return found


def first_named(pid: int, name: str) -> int | None:
    return next((child for child, command in sorted(descendants(pid).items()) if name in command), None)


def kill(pids: Iterable[int]) -> None:
    """SIGKILL those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_tree(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """SIGKILL a process with all below it; none of them is there any more when this returns.

    A killed parent is often gone while those it takes along are still at work.
    """
    pids = [process.pid, *descendants(process.pid)]
    kill(pids)
    process.wait()
    wait_until(lambda: not any(map(lives, pids)))


def lives(pid: int) -> bool:
    """Whether a process is there, and not only waits to be reaped."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return stat_fields(pid)[0] != "Z"
    return False


def stat_fields(pid: int) -> list[str]:
    """What Linux says of a process behind its name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
