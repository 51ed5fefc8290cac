"""The folder an export is written into: it has another name until it is whole.

    DIR.partial/UNFINISHED ...     while it is written, and what a killed export leaves
    DIR/ ...                       complete

The mark is locked by the process that writes; one that nobody holds is a leftover, which the next export removes.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.object_store import S3
from pipelines.errors import UsageError

PARTIAL = ".partial"
MARK = "UNFINISHED"


@contextmanager
def unfinished_folder(output: str) -> Iterator[tuple[Path, Path]]:
    """Folder to write into, and where it will be: it moves there if nothing is raised.

    Raises:
        UsageError: there is something, somebody else writes, or the file system takes no more.
    """
    final = _new_or_empty(output)
    folder = final.with_name(final.name + PARTIAL)
    try:
        _clear(folder)
        folder.mkdir(parents=True)
        with (folder / MARK).open("w") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX)
            mark.write("afa export writes here, or was cut off while it did\n")
            mark.flush()
            yield folder, final
            (folder / MARK).unlink()
            folder.replace(final)
    except OSError as error:
        if error.errno is None:  # not the file system's: Pillow raises bare ones
            raise
        raise UsageError(f"cannot write {error.filename or folder}: {error.strerror}") from error


def _new_or_empty(output: str) -> Path:
    if output.startswith(S3):
        raise UsageError(f"--output {output}: exports are written to a local folder")
    final = Path(output).resolve()
    if final.is_dir() and any(final.iterdir()):
        raise UsageError(f"--output {output} is not empty: give a new folder, or an empty one")
    if final.exists() and not final.is_dir():
        raise UsageError(f"--output {output} is a file: give a new folder, or an empty one")
    return final


def _clear(folder: Path) -> None:
    """Remove what an export that was cut off has left."""
    if not folder.exists():
        return
    mark = folder / MARK
    if not mark.is_file():
        raise UsageError(f"{folder} is in the way, and no export has made it: move it, or use another --output")
    with mark.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another export writes {folder}: wait for it, or use another --output") from None
    shutil.rmtree(folder)
