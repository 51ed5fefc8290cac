"""JSON lists that do not fit into memory: spooled to a file entry by entry, joined into one document at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonList:
    """A list of objects in a file of its own, which goes away when it becomes part of a document."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._stream = path.open("w+", encoding="utf-8")
        self._stream.write("[")

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add an object."""
        self._stream.write(("," if self.count else "") + "\n" + json.dumps(entry))
        self.count += 1

    def save(self, path: Path) -> None:
        """Give the list a file by itself."""
        self._stream.write("\n]\n")
        self._stream.close()
        self.path.replace(path)

    @staticmethod
    def join(path: Path, head: Mapping[str, Any], lists: Mapping[str, JsonList]) -> None:
        """Write an object with the entries of ``head`` and the lists by name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as document:
            document.write("{\n" + "".join(f"{json.dumps(name)}: {json.dumps(head[name])},\n" for name in head))
            for position, (name, entries) in enumerate(lists.items()):
                document.write(f"{',' if position else ''}{json.dumps(name)}: ")
                entries._move_into(document)
            document.write("\n}\n")

    def _move_into(self, document: Any) -> None:
        self._stream.write("\n]")
        self._stream.seek(0)
        shutil.copyfileobj(self._stream, document)
        self._stream.close()
        self.path.unlink()
