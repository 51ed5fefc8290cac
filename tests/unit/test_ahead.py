"""Items made ahead: order, bounds, errors, and an end in the middle."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from pipelines.ahead import ahead


def test_the_same_items_in_order_and_no_more_than_asked_ahead() -> None:
    started: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            started.append(number)
            yield number

    seen = []
    for item in ahead(items(), 2):
        seen.append(item)
        assert len(started) <= len(seen) + 2 + 1  # those that wait, and one in the making
    assert seen == list(range(20))


def test_an_error_comes_where_its_item_was_due() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    made = ahead(items(), 5)
    assert next(made) == 1
    with pytest.raises(OSError, match="gone"):
        next(made)


def test_the_thread_ends_when_nobody_wants_more() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 0

    with closing(ahead(endless(), 1)) as made:
        assert next(made) == 0
    deadline = time.monotonic() + 5
    while any(thread.name == "ahead" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
