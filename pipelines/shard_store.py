"""Shard sets where they lie: a folder, or an ``s3://`` prefix whose shards are fetched whole into the machine's cache.

A fetched shard is used only if its SHA-256 is the index's. The cache is named by content, so workers and later
runs share it; a lock lets one of them fetch what all wait for.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from afa_core.data.sample import BadSample
from afa_core.data.shards import (
    INDEX,
    DatasetIndex,
    ShardEntry,
    check_split,
    file_sha256,
    load_dataset_index,
    verify_shards,
)
from afa_core.errors import InputError
from infra.errors import ServiceError
from infra.object_store import S3, ObjectError, fetch_file, join, list_objects
from pipelines.patience import patiently

CACHE_VARIABLE = "AFA_CACHE"
PREFETCH_THREADS = 4


def load_shard_set(source: str) -> DatasetIndex:
    """Index of a shard set.

    Raises:
        InputError: there is no usable ``dataset.json``.
        ServiceError: the store cannot be read.
    """
    if not source.startswith(S3):
        return load_dataset_index(source)
    with tempfile.TemporaryDirectory(prefix="afa-index-") as scratch:
        try:
            fetch_file(join(source, INDEX), Path(scratch))
        except ObjectError as error:
            if error.reason == "unavailable":
                raise ServiceError(f"cannot read {join(source, INDEX)}: the store does not answer") from error
            raise InputError(f"{source} is no shard set: {INDEX}: {error.reason}") from error
        return load_dataset_index(scratch)


def verify_shard_set(source: str, index: DatasetIndex, splits: Iterable[str]) -> None:
    """See that the shards are there: by content in a folder, by size in a store, where they are hashed when fetched.

    Raises:
        InputError: naming the first shard that differs.
    """
    if not source.startswith(S3):
        verify_shards(source, index, splits)
        return
    sizes = {found.uri: found.size for found in list_objects(source)}
    for entry in (shard for split in splits for shard in index.splits[split].shards):
        size = sizes.get(join(source, entry.name))
        if size is None:
            raise InputError(f"shard {join(source, entry.name)} is missing; {INDEX} lists it")
        if size != entry.bytes:
            raise InputError(f"shard {join(source, entry.name)} has {size} bytes, {INDEX} says {entry.bytes}")


def split_files(source: str, index: DatasetIndex, split: str, cache_gib: float = 50.0) -> ShardFiles:
    """The shards of a split.

    Raises:
        InputError: no such split.
    """
    check_split(source, index, split)
    return ShardFiles(source, index.splits[split].shards, cache_gib * 2**30)


@dataclass
class ShardFiles:
    """The shards of a split as files of this machine, by number; any thread may ask.

    Attributes:
        source: folder or ``s3://`` prefix.
        shards: of the split.
        cache_bytes: more than that the cache does not keep.
    """

    source: str
    shards: tuple[ShardEntry, ...]
    cache_bytes: float
    _unusable: dict[int, str] = field(default_factory=dict)

    def __call__(self, number: int) -> Path:
        """File of a shard.

        Raises:
            BadSample: ``bad_shard``: it is gone, or not what the index says. Asking again gives the same answer.
            ServiceError: the store does not answer.
        """
        entry = self.shards[number]
        if not self.source.startswith(S3):
            return Path(self.source) / entry.name
        if number in self._unusable:
            raise BadSample("bad_shard", self._unusable[number])
        try:
            return self._cached(entry)
        except BadSample as bad:
            self._unusable[number] = bad.detail
            raise

    def paths(self) -> Iterator[Path]:
        """Files of all shards, one by one.

        Raises:
            InputError: one is not what the index says.
        """
        for number in range(len(self.shards)):
            try:
                yield self(number)
            except BadSample as bad:
                raise InputError(f"shard {bad.detail}") from bad

    def _cached(self, entry: ShardEntry) -> Path:
        folder = cache_folder()
        path = folder / f"{entry.sha256}.tar"
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.is_file():
                os.utime(path)
                return path
            scratch = path.with_suffix(".partial")
            scratch.mkdir(exist_ok=True)
            fetched = patiently(partial(_fetch_shard, join(self.source, entry.name), scratch))
            if file_sha256(fetched) != entry.sha256:
                fetched.unlink()
                raise BadSample("bad_shard", f"{entry.name} differs from its SHA-256 in {INDEX}")
            fetched.replace(path)
            scratch.rmdir()
        self._evict(folder, keep=path)
        return path

    def _evict(self, folder: Path, keep: Path) -> None:
        """Delete what was not used for longest; who has it open reads on. Locks stay: others may be waiting for one."""
        found = []
        for path in folder.glob("*.tar"):
            try:
                found.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another worker was faster
                continue
        excess = sum(size for _, size, _ in found) - self.cache_bytes
        for _, size, path in sorted(found):
            if excess <= 0:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                excess -= size


class Prefetch:
    """Fetches shards before they are needed; in a folder there is nothing to do."""

    def __init__(self, files: ShardFiles) -> None:
        self._files = files if files.source.startswith(S3) else None
        self._asked: dict[int, None] = {}
        self._pool = ThreadPoolExecutor(PREFETCH_THREADS, thread_name_prefix="prefetch")

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def want(self, shards: Iterable[int]) -> None:
        """These will be needed; those asked for lately are on their way. In a folder nobody looks at them."""
        if self._files is None:
            return
        for shard in shards:
            if self._asked.pop(shard, self) is self:
                self._pool.submit(self._fetch, shard)
            self._asked[shard] = None
        # What was evicted meanwhile is asked for again when its turn comes in the next epoch.
        while len(self._asked) > len(self._files.shards) // 2 + 1:
            del self._asked[next(iter(self._asked))]

    def _fetch(self, shard: int) -> None:
        assert self._files is not None
        try:
            self._files(shard)
        except (BadSample, ServiceError):
            return  # whoever needs the shard meets the same and says so


def _fetch_shard(uri: str, scratch: Path) -> Path:
    """An object as a file.

    Raises:
        BadSample: ``bad_shard``: it is gone or refused.
        ServiceError: the store does not answer.
    """
    try:
        return fetch_file(uri, scratch)[0]
    except ObjectError as error:
        if error.reason != "unavailable":
            raise BadSample("bad_shard", str(error)) from error
        raise ServiceError(f"cannot read {uri}: no answer") from error


def cache_folder() -> Path:
    """Where fetched shards are kept: ``AFA_CACHE``, or a private folder among the temporary files.

    Raises:
        ServiceError: the folder belongs to somebody else.
    """
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path(tempfile.gettempdir()) / f"afa-cache-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ServiceError(f"{folder} belongs to another user: name a cache of your own in {CACHE_VARIABLE}")
    return folder
