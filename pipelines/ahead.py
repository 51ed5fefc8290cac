"""Items of an iterator made in a thread, a few ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item], most: int) -> Generator[Item, None, None]:
    """The same items in order; at most ``most`` wait. What the iterator raises is raised where its item was due.

    The thread ends with the iterator, or soon after the generator is closed.
    """
    made: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue(most)
    closed = threading.Event()

    def put(entry: tuple[Item] | BaseException | None) -> None:
        while not closed.is_set():
            try:
                made.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                put((item,))
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:  # it belongs to whoever uses the items
            put(error)

    threading.Thread(target=work, name="ahead", daemon=True).start()
    try:
        while (entry := made.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]
    finally:
        closed.set()
