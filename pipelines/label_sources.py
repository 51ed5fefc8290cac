"""What there is to label: a folder or prefix of pictures and shards, one shard, or a table of URIs with tags.

Sources are listed once, into the inventory; nothing else looks at them before the pictures are read.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from afa_core.data.sample import PICTURE_SUFFIXES
from afa_core.errors import InputError
from infra.errors import ServiceError
from infra.object_store import CONNECTIONS, S3, ObjectError, StoredObject, find_object, list_objects, read_object
from pipelines.batched import batched
from pipelines.label_keys import foreign_key, wished_key
from pipelines.tag_tables import SUFFIXES as TABLE_SUFFIXES
from pipelines.tag_tables import table_rows

SHARD_SUFFIX = ".tar"
NAME_COLUMNS = ("uri", "path", "image")
TAGS_COLUMN = "tags"
LOOK_UP = 1024


@dataclass(frozen=True)
class Listed:
    """A picture or shard as its source knows it.

    Attributes:
        key: wished for; two that wish for the same get different ones.
        uri: where it is.
        size: bytes; -1 where the source does not tell.
        etag: changes with the content; empty where the source does not tell.
        tags: given ones; None where there are none.
        problem: reason code if it is clear already that it cannot be read, else empty.
    """

    key: str
    uri: str
    size: int = -1
    etag: str = ""
    tags: tuple[str, ...] | None = None
    problem: str = ""


def absolute_source(source: str) -> str:
    """The source under a name that means the same from another working directory."""
    return source.rstrip("/") if source.startswith(S3) else str(Path(source).absolute())


def list_source(source: str, leave_out: str | None = None) -> Iterator[Listed | None]:
    """Everything in a source, in any order; None for an object that is neither picture nor shard.

    Args:
        source: as ``absolute_source`` gives it.
        leave_out: URI of a folder whose content is no input, as the label set itself.

    Raises:
        InputError: there is no such source.
        ServiceError: its store cannot be read.
    """
    suffix = PurePosixPath(source).suffix.lower()
    if suffix in TABLE_SUFFIXES:
        yield from _list_table(source)
    elif suffix == SHARD_SUFFIX and (found := find_object(source)):
        yield _listed(PurePosixPath(source).relative_to(_parent(source)), found)
    elif source.startswith(S3) or Path(source).is_dir():
        yield from _list_prefix(source, leave_out)
    else:
        raise _no_such_input(source)


def check_source(source: str) -> None:
    """See at once that a local source is there and is one; what is on a store shows when it is listed.

    Raises:
        InputError: it is not.
    """
    known = PurePosixPath(source).suffix.lower() in (*TABLE_SUFFIXES, SHARD_SUFFIX)
    # pathlib has an error for a name that is too long.
    if not source.startswith(S3) and not (os.path.exists(source) if known else os.path.isdir(source)):  # noqa: PTH110, PTH112
        raise _no_such_input(source)


def _no_such_input(source: str) -> InputError:
    what = "cannot be taken as input" if os.path.isfile(source) else "no such input"  # noqa: PTH113
    return InputError(
        f"{what}: {source}; give a folder or s3:// prefix of pictures or shards, a .tar shard, or a table"
        f" ({', '.join(TABLE_SUFFIXES)}) of URIs"
    )


def _list_prefix(prefix: str, leave_out: str | None) -> Iterator[Listed | None]:
    for found in list_objects(prefix):
        if leave_out and found.uri.startswith(f"{leave_out}/"):
            continue
        name = PurePosixPath(found.uri[len(prefix.rstrip("/")) + 1 :])
        if found.problem or name.suffix.lower() in PICTURE_SUFFIXES or name.suffix.lower() == SHARD_SUFFIX:
            yield _listed(name, found)
        else:
            yield None


def _listed(name: PurePosixPath, found: StoredObject) -> Listed:
    uri = storable(found.uri)
    problem = found.problem or ("" if uri == found.uri else "bad_path")
    return Listed(wished_key(name), uri, found.size, found.etag, problem=problem)


def storable(text: str) -> str:
    """The text, with an escape for what UTF-8 cannot hold: names of local files, and JSON's strings, may have that."""
    return text.encode("utf-8", "backslashreplace").decode()


def _list_table(source: str) -> Iterator[Listed]:
    """Rows of a table, with what their store knows of them; relative names are looked for beside it."""
    if not source.startswith(S3):
        yield from _looked_up(_table_pictures(Path(source), _parent(source)))
        return
    try:
        data, _ = read_object(source)
    except ObjectError as error:
        raise InputError(f"no such input: {source} ({error.reason})") from error
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / PurePosixPath(source).name
        path.write_bytes(data)
        yield from _looked_up(_table_pictures(path, _parent(source)))


def _looked_up(rows: Iterable[Listed]) -> Iterator[Listed]:
    """The rows with size and etag, many asked for at a time: without these nobody would see that a picture changed."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for some in batched(rows, LOOK_UP):
            yield from pool.map(as_it_is_now, some)


def as_it_is_now(row: Listed) -> Listed:
    """The row with the size and etag that its object has by now; if it cannot be had, whoever reads it will say so."""
    if row.problem:
        return row
    try:
        found = find_object(row.uri)
    except ServiceError:
        return row
    return row if found is None else dataclasses.replace(row, size=found.size, etag=found.etag)


def _table_pictures(table: Path, base: str) -> Iterator[Listed]:
    for row in table_rows(table, NAME_COLUMNS, TAGS_COLUMN):
        absolute = row.name.startswith((S3, "/"))
        uri = row.name if absolute else f"{base}/{row.name}"
        below = uri.removeprefix(f"{base}/").removeprefix(S3).lstrip("/")
        key = foreign_key(row.key) if row.key else wished_key(PurePosixPath(below))
        problem = ""
        if not key or ".." in PurePosixPath(row.name).parts or "\x00" in row.name or storable(uri) != uri:
            problem = "bad_path"
        elif "://" in uri.removeprefix(S3):
            problem = "bad_uri"
        tags = None if row.tags is None else tuple(map(storable, row.tags))
        yield Listed(key, storable(uri), tags=tags, problem=problem)


def _parent(uri: str) -> str:
    return uri.rsplit("/", 1)[0]
