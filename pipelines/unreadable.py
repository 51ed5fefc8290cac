"""A file of a label set that cannot be read, whoever wants to read it: one line."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

from infra.errors import ServiceError
from infra.object_store import ObjectError

# Not there, or not what it should be: JSON, Parquet (Arrow's are ValueErrors), tar.
_PROBLEMS = (ObjectError, tarfile.TarError, ValueError, KeyError, TypeError, AttributeError, EOFError)


class UnreadableFile(ServiceError):
    """A file of a label set is gone or damaged.

    Attributes:
        problem: the file, and what is wrong with it.
    """

    def __init__(self, uri: str, error: Exception) -> None:
        words = " ".join(str(error).split())
        self.problem = f"{uri} cannot be read ({type(error).__name__}: {words})"
        super().__init__(f"{self.problem}: afa verify-labels tells more")


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Whatever goes wrong inside is the file's fault."""
    try:
        yield
    except _PROBLEMS as error:
        raise UnreadableFile(uri, error) from error
