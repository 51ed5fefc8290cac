"""Finding a command's processes, to do something unkind to them."""

from __future__ import annotations

import subprocess


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
