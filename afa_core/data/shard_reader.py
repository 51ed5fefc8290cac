"""Single samples out of a shard, in any order: an uncompressed tar is an archive one can seek in.

Where its members lie is learned from the headers when it is opened; nothing is held but that.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext, group_by_keys

from afa_core.data.sample import BadSample
from afa_core.data.shards import MAX_MEMBER_BYTES, skip_repeated_member

Extent = tuple[int, int]  # where a member's bytes begin, how many they are


class ShardReader:
    """An open shard."""

    def __init__(self, path: Path) -> None:
        """Find the samples.

        Raises:
            OSError: the file cannot be opened.
        """
        self.path = path
        self._stream = path.open("rb")
        self._samples: list[dict[str, Any]] = list(
            group_by_keys(self._members(), keys=base_plus_ext, handler=skip_repeated_member)
        )

    def read(self, number: int) -> dict[str, Any]:
        """Members of a sample, ``{"__key__": ..., extension: bytes}``.

        Raises:
            BadSample: ``bad_shard``: the tar is damaged, and the sample is not in what is left of it.
        """
        if number >= len(self._samples):
            raise BadSample("bad_shard", f"{self.path.name} has no sample {number}")
        sample = self._samples[number]
        return {name: value if name.startswith("__") else self._bytes(value) for name, value in sample.items()}

    def _bytes(self, extent: Extent) -> bytes:
        start, size = extent
        try:
            data = os.pread(self._stream.fileno(), size, start)  # which several threads may do at once
        except OSError as error:
            raise BadSample("bad_shard", f"{self.path.name}: {error.strerror}") from error
        if len(data) < size:
            raise BadSample("bad_shard", f"{self.path.name} is cut short")
        return data

    def _members(self) -> Iterator[dict[str, Any]]:
        """Regular files of bounded size up to the first damage; links, devices and giants are passed over."""
        try:
            with tarfile.open(fileobj=self._stream, mode="r:") as tar:
                for member in tar:
                    if member.isreg() and member.size <= MAX_MEMBER_BYTES:
                        extent = (member.offset_data, member.size)
                        yield {"fname": member.name, "data": extent, "__url__": str(self.path)}
                    tar.members = []  # type: ignore[attr-defined]  # else the list of members grows with the shard
        except (tarfile.TarError, OSError, EOFError):
            return
