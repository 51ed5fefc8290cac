"""What inventory rows stand for, undecoded: a picture's bytes, the samples of a shard, or the reason why not.

Reading runs ahead in a few threads and holds a bounded number of compressed pictures; whoever decodes takes them in
order. Only a shard brings torch, with webdataset: exports and reports of pictures would wait for it.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from afa_core.data.sample import BadSample
from afa_core.data.shards import BadShard, iterate_shard
from infra.object_store import ObjectError, fetch_file, read_object
from pipelines.inventory import is_shard
from pipelines.label_keys import bad_sample_key, rest_key, sample_key
from pipelines.label_sources import Listed, storable

READERS = 8


@dataclass(frozen=True)
class RawInput:
    """An input before it is decoded: members of a sample, or why there are none."""

    key: str
    parent: str
    uri: str
    etag: str
    members: dict[str, Any] | BadSample


def raw_inputs(rows: list[Listed], max_bytes: int) -> Iterator[RawInput]:
    """Undecoded inputs of some inventory rows, in order; ``READERS`` are fetched ahead, together ``max_bytes``."""
    waiting: deque[tuple[int, Future[RawInput]]] = deque()
    ahead = 0

    def next_one() -> RawInput:
        nonlocal ahead
        size, future = waiting.popleft()
        ahead -= size
        return future.result()

    with ThreadPoolExecutor(READERS) as pool:
        for row in rows:
            if is_shard(row):
                yield from _shard_inputs(row)
                continue
            size = max(0, row.size)
            while waiting and (len(waiting) == READERS or ahead + size > max_bytes):
                yield next_one()
            waiting.append((size, pool.submit(_fetch, row, max_bytes)))
            ahead += size
        while waiting:
            yield next_one()


def _fetch(row: Listed, max_bytes: int) -> RawInput:
    """A picture's bytes."""
    etag = row.etag
    members: dict[str, Any] | BadSample
    try:
        if row.problem:
            raise BadSample(row.problem, row.uri)
        if row.size > max_bytes:
            raise BadSample("too_large", f"{row.size} bytes, allowed {max_bytes}")
        data, etag = read_object(row.uri, max_bytes)
        if row.etag and etag != row.etag:
            raise BadSample("changed_since_listing", f"{row.uri}: label it with --incremental")
        suffix = PurePosixPath(row.uri).suffix.lower().lstrip(".")
        members = {"__key__": row.key, suffix: data}
        if row.tags is not None:
            members["json"] = json.dumps({"tags": row.tags}).encode()
    except ObjectError as error:
        members = BadSample(error.reason, error.detail)
    except BadSample as bad:
        members = bad
    return RawInput(row.key, row.key, row.uri, etag, members)


def _shard_inputs(row: Listed) -> Iterator[RawInput]:
    """The samples of a shard; it is fetched whole, so that no retry can lose a sample in its middle."""
    if row.problem:
        yield RawInput(row.key, row.key, row.uri, row.etag, BadSample(row.problem, row.uri))
        return
    with tempfile.TemporaryDirectory(prefix="afa-shard-") as scratch:
        try:
            path, etag = fetch_file(row.uri, Path(scratch))
        except ObjectError as error:
            yield RawInput(row.key, row.key, row.uri, row.etag, BadSample(error.reason, error.detail))
            return
        seen: Counter[str] = Counter()
        try:
            for raw in iterate_shard(path):
                yield _shard_input(row, etag, raw, seen)
        except BadShard as error:
            detail = str(error).replace(str(path), row.uri)
            yield RawInput(rest_key(row.key), row.key, row.uri, etag, BadSample("bad_shard", detail))


def _shard_input(row: Listed, etag: str, raw: dict[str, Any], seen: Counter[str]) -> RawInput:
    name = str(raw["__key__"])
    seen[name] += 1
    members: dict[str, Any] | BadSample = raw
    try:
        key = sample_key(row.key, name, seen[name])
        if seen[name] > 1:
            members = BadSample("duplicate_key", name)
    except BadSample as bad:
        key, members = bad_sample_key(row.key, name, seen[name]), bad
    return RawInput(key, row.key, f"{row.uri}#{storable(name)}", etag, members)
