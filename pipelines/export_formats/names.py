"""File names from keys. A key is foreign text: relative, with ``/`` in it and no dot, of any length and script.

Different keys get different names: percent signs are encoded wherever anything is, and a dot appears only before the
digest of a name that was cut short.
"""

from __future__ import annotations

import hashlib
from urllib.parse import quote

MAX_BYTES = 200  # file systems allow 255, suffixes included
_KEPT_BYTES = 120


def nested_name(key: str) -> str:
    """The key as a path with sub-folders; only parts that are too long for a file system are cut short."""
    return "/".join(_short(part, part) for part in key.split("/"))


def listed_name(key: str) -> str:
    """The same, encoded where a line of a list cannot hold it: blanks at an end of it, or ``#`` at its start."""
    name = nested_name(key)
    return quote(name, safe="/") if name != name.strip() or name.startswith("#") or "%" in name else name


def flat_name(key: str) -> str:
    """The key as one plain ASCII word, for formats with a single folder and lists that are split at blanks."""
    return _short(quote(key, safe=""), key)


def _short(name: str, key: str) -> str:
    encoded = name.encode()
    if len(encoded) <= MAX_BYTES:
        return name
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return f"{encoded[:_KEPT_BYTES].decode(errors='ignore')}.{digest}"
