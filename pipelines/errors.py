"""Errors a user can mend, raised by the stages themselves.

``pipelines.cli`` prints these, ``InputError`` and ``ServiceError`` as one line and exits with code 2.
"""

import signal
from threading import current_thread, main_thread
from types import FrameType
from typing import NoReturn


class UsageError(Exception):
    """A command was asked for something it cannot do; the message names it and the way out."""


class Terminated(KeyboardInterrupt):
    """SIGTERM (``ray job stop``, the end of a pod): like Ctrl-C, but for the exit status."""


def heed_sigterm() -> None:
    """Raise ``Terminated`` on SIGTERM from now on; to be said again after Ray has put its own answer there."""
    if current_thread() is main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
