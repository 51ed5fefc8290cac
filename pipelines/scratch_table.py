"""Values by key in a scratch file: what has to be looked up by key may be millions of rows."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

LOOK_UP = 500


class ScratchTable:
    """JSON values by key, in an SQLite file."""

    def __init__(self, scratch: Path, name: str) -> None:
        self._database = sqlite3.connect(scratch / f"{name}.sqlite")
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def __len__(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM entries").fetchone()[0])

    def put(self, entries: Iterable[tuple[str, Any]]) -> None:
        """Keep values; a key that is there already gets the new one."""
        rows = ((key, json.dumps(value)) for key, value in entries)
        self._database.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", rows)

    def get(self, keys: Sequence[str]) -> dict[str, Any]:
        """The values of those keys that are there."""
        found: dict[str, Any] = {}
        for start in range(0, len(keys), LOOK_UP):
            some = keys[start : start + LOOK_UP]
            marks = ",".join("?" * len(some))
            rows = self._database.execute(f"SELECT key, value FROM entries WHERE key IN ({marks})", some)
            found.update((key, json.loads(value)) for key, value in rows)
        return found

    def items(self) -> Iterator[tuple[str, Any]]:
        """Every entry, in key order."""
        for key, value in self._database.execute("SELECT key, value FROM entries ORDER BY key"):
            yield key, json.loads(value)
