"""Shard sets: WebDataset tars with an index beside them, written and read.

    SPLIT-000000.tar ...     samples as in ``sample.py``
    dataset.json             schema version, classes; per split the shards with their number of samples, size and
                             SHA-256, and the number of pictures per class

A shard that does not match its entry is found before training starts. Tars are read with ``tarfile`` and grouped by
the webdataset library; none of its decoders runs. It is imported as a tar is read or written: it imports torch, for
which whoever only looks at an index or at masks need not wait.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from afa_core.classes import check_classes
from afa_core.data.sample import BadSample, NeededSize, Sample, decode_sample
from afa_core.errors import InputError

SCHEMA_VERSION = 1
INDEX = "dataset.json"
MAX_MEMBER_BYTES = 256 * 2**20


class BadShard(Exception):
    """A tar that cannot be read to its end."""


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the index knows it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitIndex:
    """The shards of a split and how many of its pictures carry each class."""

    shards: tuple[ShardEntry, ...]
    class_images: Mapping[str, int]

    @property
    def samples(self) -> int:
        """Pictures in the split."""
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class DatasetIndex:
    """Content of ``dataset.json``.

    Attributes:
        classes: the class list.
        splits: by name.
        schema_version: of the file.
        lineage: what the set was made from, where that is another artifact; no part of the set's identity.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, SplitIndex]
    schema_version: int = SCHEMA_VERSION
    lineage: Mapping[str, Any] | None = None


def save_dataset_index(folder: str | Path, index: DatasetIndex) -> None:
    """Write ``dataset.json``; it appears whole or not at all."""
    path = Path(folder) / INDEX
    partial = path.with_suffix(".partial")
    values = asdict(index)
    if index.lineage is None:
        del values["lineage"]
    partial.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    partial.replace(path)


def load_dataset_index(folder: str | Path) -> DatasetIndex:
    """Read ``dataset.json``.

    Raises:
        InputError: there is none, or it is not of this schema.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise InputError(f"{folder} is no shard set: it has no {INDEX}; make one with afa shards")
    try:
        values = json.loads(path.read_text())
        version = values["schema_version"]
        if version != SCHEMA_VERSION:
            raise InputError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}")
        splits = {
            name: SplitIndex(
                tuple(ShardEntry(**entry) for entry in split["shards"]),
                {str(key): int(count) for key, count in split["class_images"].items()},
            )
            for name, split in values["splits"].items()
        }
        classes = check_classes(values["classes"])
        lineage = dict(values["lineage"]) if "lineage" in values else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}") from error
    for split in splits.values():
        for shard in split.shards:
            if Path(shard.name).name != shard.name:
                raise InputError(f"{path} names a shard outside its folder: {shard.name!r}")
    return DatasetIndex(classes, splits, lineage=lineage)


def shard_paths(folder: str | Path, index: DatasetIndex, split: str) -> list[Path]:
    """Paths of a split's shards, in order.

    Raises:
        InputError: no such split.
    """
    check_split(folder, index, split)
    return [Path(folder) / shard.name for shard in index.splits[split].shards]


def check_split(source: str | Path, index: DatasetIndex, split: str) -> None:
    """See that the set has a split.

    Raises:
        InputError: it has not.
    """
    if split not in index.splits:
        raise InputError(f"{source} has no split {split!r}, only {', '.join(index.splits) or 'none'}")


def verify_shards(folder: str | Path, index: DatasetIndex, splits: Iterable[str]) -> None:
    """Compare size and SHA-256 of every shard of the splits with the index.

    Raises:
        InputError: naming the first shard that differs.
    """
    for split in splits:
        for path, entry in zip(shard_paths(folder, index, split), index.splits[split].shards, strict=True):
            if not path.is_file():
                raise InputError(f"shard {path} is missing; {INDEX} lists it")
            size = path.stat().st_size
            if size != entry.bytes:
                raise InputError(f"shard {path} has {size} bytes, {INDEX} says {entry.bytes}: write it anew")
            if file_sha256(path) != entry.sha256:
                raise InputError(f"shard {path} differs from its SHA-256 in {INDEX}: write it anew")


def dataset_digest(index: DatasetIndex) -> str:
    """SHA-256 over classes and shard digests, hexadecimal: the identity of a shard set."""
    shards = {name: [shard.sha256 for shard in split.shards] for name, split in sorted(index.splits.items())}
    return hashlib.sha256(json.dumps([index.classes, shards]).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass
class ShardWriter:
    """Writes one tar whose bytes depend on its samples alone; it has its name only once it is closed."""

    path: Path
    samples: int = 0
    class_images: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from webdataset import TarWriter

        self._partial = self.path.with_suffix(".partial")
        self._stream = self._partial.open("wb")
        self._tar = TarWriter(self._stream, mtime=0, encoder=False)

    def write(self, members: Mapping[str, Any], tags: Iterable[str]) -> None:
        """Add a sample, ``{"__key__": ..., extension: bytes}``, and count its classes."""
        self._tar.write(dict(members))
        self.samples += 1
        for tag in set(tags):
            self.class_images[tag] = self.class_images.get(tag, 0) + 1

    def close(self) -> ShardEntry:
        """Finish the tar; its index entry."""
        self._tar.close()
        self._stream.close()
        entry = ShardEntry(self.path.name, self.samples, self._partial.stat().st_size, file_sha256(self._partial))
        self._partial.replace(self.path)
        return entry


def iterate_shard(path: str | Path) -> Iterator[dict[str, Any]]:
    """Raw samples of an uncompressed tar, ``{"__key__": ..., extension: bytes}``, in file order.

    Raises:
        BadShard: after the last sample that could be read whole, if the tar is cut short or damaged.
    """
    from webdataset.tariterators import base_plus_ext, group_by_keys

    try:
        with tarfile.open(path, "r:") as tar:
            yield from group_by_keys(_members(tar, str(path)), keys=base_plus_ext, handler=skip_repeated_member)
            tar.fileobj.seek(tar.offset)
            if not tar.fileobj.read(tarfile.BLOCKSIZE):  # tarfile takes a cut between two members for the end
                raise EOFError("cut short: it has no end marker")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadShard(f"{path}: {error}") from error


def _members(tar: tarfile.TarFile, url: str) -> Iterator[dict[str, Any]]:
    """Regular files of bounded size; links, devices and giants are passed over."""
    for member in tar:
        stream = tar.extractfile(member) if member.isreg() and member.size <= MAX_MEMBER_BYTES else None
        if stream is not None:
            yield {"fname": member.name, "data": stream.read(), "__url__": url}
        tar.members = []  # type: ignore[attr-defined]  # else the list of members grows with the shard


def skip_repeated_member(error: Exception) -> bool:
    """A member of the same name as one before it is passed over: the first one counts."""
    return isinstance(error, ValueError)


def iterate_samples(
    paths: Iterable[str | Path],
    classes: tuple[str, ...],
    max_megapixels: float = 100.0,
    *,
    with_seg: bool = False,
    needed_size: NeededSize | None = None,
) -> Iterator[Sample]:
    """Decoded samples (see ``decode_sample``) of some shards, once each and in order; bad samples are passed over.

    Raises:
        BadShard: a tar cannot be read to its end.
    """
    for path in paths:
        for raw in iterate_shard(path):
            try:
                yield decode_sample(raw, classes, max_megapixels, with_seg=with_seg, needed_size=needed_size)
            except BadSample:
                continue
