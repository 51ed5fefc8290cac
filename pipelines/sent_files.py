"""Files of the driver's machine for its workers, wherever they are: through Ray's object store.

A path means nothing on another machine, and a relative one nothing in a worker, which has a working folder of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import ray
from numpy.typing import NDArray

# By name. As arrays, of which Ray keeps one copy a machine.
SentFiles: TypeAlias = "ray.ObjectRef[dict[str, NDArray[np.uint8]]]"


def send(paths: Iterable[Path]) -> SentFiles:
    """Files of different names; they can be had as long as the driver holds what is given back."""
    return ray.put({path.name: np.fromfile(path, np.uint8) for path in paths})


@contextmanager
def received(files: SentFiles) -> Iterator[Path]:
    """A folder with the files, for a while."""
    with tempfile.TemporaryDirectory(prefix="afa-files-") as folder:
        for name, data in ray.get(files).items():
            (Path(folder) / name).write_bytes(data.data)
        yield Path(folder)
