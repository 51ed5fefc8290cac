"""Memory of this process outside of GPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache


def return_free_memory() -> None:
    """Give back to the system what malloc holds and nobody uses, if this C library can.

    Glibc keeps what was freed between blocks that are in use; new large blocks rarely fit there and come on top.
    """
    trim = _malloc_trim()
    if trim:
        trim(0)


@lru_cache
def _malloc_trim() -> Callable[[int], int] | None:
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found
