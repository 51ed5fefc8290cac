"""Stores that refuse for a while: ask again, and only then fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from infra.errors import ServiceError

# A store that refuses is asked again for so long; then what asked fails, and with it the run.
PATIENCE_S = 600.0
RETRY_S = 5.0

AnswerT = TypeVar("AnswerT")


class LostForGood(ServiceError):
    """What was asked for is gone or damaged: asking again gives the same answer."""


def patiently(action: Callable[[], AnswerT]) -> AnswerT:
    """Do it; while the store refuses, again, for ``PATIENCE_S``.

    Raises:
        LostForGood: at once.
        ServiceError: the store's last answer.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return action()
        except LostForGood:
            raise
        except ServiceError:
            if time.monotonic() > deadline:
                raise
        time.sleep(RETRY_S)
