"""Memory of this process outside of GPUs.

Glibc keeps what was freed between blocks that are in use; new large blocks rarely fit there and come on top. Pictures
of ever new sizes make a process grow without end that way: 2 GiB after a hundred sizes, of which 0.7 are in use.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

# What a process may grow by until free memory is returned.
GROWTH_BYTES = 2**28
_STATM = Path("/proc/self/statm")
_resident_then = 0  # as memory was last returned


def return_free_memory() -> None:
    """Give back to the system what malloc holds and nobody uses, if this C library can."""
    trim = _malloc_trim()
    if trim:
        trim(0)


def return_free_memory_if_grown() -> None:
    """The same if the process has grown a good deal since: what is given back has to be had again, which takes time."""
    global _resident_then
    if _STATM.exists() and _resident() - _resident_then > GROWTH_BYTES:
        return_free_memory()
        _resident_then = _resident()


def _resident() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@lru_cache
def _malloc_trim() -> Callable[[int], int] | None:
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found
