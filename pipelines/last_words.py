"""A line on the terminal for a process that ends where Python has no say.

Ray's core ends a driver whose raylet is gone by ``_exit``, after pages of its own lines; the kernel kills who takes too
much memory. No ``except`` and no ``atexit`` sees that, a process beside does: its input ends without a word.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def last_words(words: str) -> Iterator[None]:
    """Have the words printed on standard error should this process end within the block."""
    listener = ["/bin/sh", "-c", 'read -r word || echo "$0" >&2', words]
    # In a session of its own: Ctrl-C is not meant for it.
    with subprocess.Popen(listener, stdin=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield
        finally:
            process.communicate(b"well\n")
