"""``itertools.batched`` of Python 3.12: what comes one by one, in lists of bounded size."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` neighbours, the last one shorter; takes no more from ``items`` than it has given."""
    remaining = iter(items)
    while batch := list(itertools.islice(remaining, size)):
        yield batch
