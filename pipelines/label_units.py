"""Work units of batch labelling: what is scheduled, committed and resumed.

A unit is a bounded list of pictures, or one shard. Its output is three files in the label set: ``UNIT.tar`` (masks and
what is known about them), ``UNIT.parquet`` (a row for every input) and, written last, the commit marker
``UNIT.done.json``. Each appears whole under its name or not at all; a unit without its marker does not exist.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds

from afa_core.data.sample import PICTURE_SUFFIXES, BadSample, Sample, decode_sample, path_to_key
from afa_core.data.shards import BadShard, iterate_shard
from afa_core.errors import InputError

MARKER = ".done.json"
MANIFEST = pa.schema(
    [
        ("key", pa.string()),
        ("uri", pa.string()),
        ("status", pa.string()),  # ok | quarantined
        ("reason", pa.string()),  # code of a quarantined row
        ("detail", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("tags_source", pa.string()),  # given | predicted
        ("unknown_tags", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("ignored_share", pa.float32()),
        ("disagreement", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Unit:
    """Name of a unit and its inputs: one shard, or pictures by (key, path)."""

    name: str
    shard: str | None = None
    pictures: tuple[tuple[str, str], ...] = ()


@dataclass
class Counts:
    """What became of a unit's inputs."""

    images: int = 0
    labels: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def quarantined(self) -> int:
        return self.images - self.labels

    def add(self, other: Counts) -> None:
        """Count another unit in."""
        self.images += other.images
        self.labels += other.labels
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count


def plan_units(source: Path, unit_size: int) -> list[Unit]:
    """Units of a shard, a folder of shards, or a folder of pictures, in an order that never changes.

    Raises:
        InputError: there is nothing to label.
    """
    if source.is_file() and source.suffix == ".tar":
        return [Unit(name=source.stem, shard=str(source))]
    if not source.is_dir():
        raise InputError(f"no such input: {source}; give a folder of pictures, a folder of shards or a .tar shard")
    if shards := sorted(source.glob("*.tar")):
        return [Unit(name=shard.stem, shard=str(shard)) for shard in shards]
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"{source} holds neither pictures ({', '.join(sorted(PICTURE_SUFFIXES))}) nor .tar shards")
    pictures = list(_keyed(paths, source))
    return [
        Unit(name=f"unit-{start // unit_size:06d}", pictures=tuple(pictures[start : start + unit_size]))
        for start in range(0, len(pictures), unit_size)
    ]


def _keyed(paths: list[Path], root: Path) -> Iterator[tuple[str, str]]:
    """Keys from relative paths; a WebDataset key ends at its first dot, and ``a.jpg`` may lie beside ``a.png``."""
    taken: set[str] = set()
    for path in paths:
        relative = path.relative_to(root)
        key = path_to_key(relative)
        if key in taken:
            key = relative.as_posix().replace(".", "_")
        while key in taken:
            key += "_"
        taken.add(key)
        yield key, str(path)


@dataclass(frozen=True)
class Input:
    """One input of a unit: decoded, or the reason why not."""

    key: str
    uri: str
    sample: Sample | None
    reason: str = ""
    detail: str = ""


def read_unit(unit: Unit, classes: tuple[str, ...], max_megapixels: float) -> Iterator[Input]:
    """Every input of a unit, decoded one by one; bad ones come with their reason."""
    for key, uri, raw in _raw_samples(unit):
        if isinstance(raw, BadSample):
            yield Input(key, uri, None, raw.reason, raw.detail)
            continue
        try:
            yield Input(key, uri, decode_sample(raw, classes, max_megapixels))
        except BadSample as bad:
            yield Input(key, uri, None, bad.reason, bad.detail)


def _raw_samples(unit: Unit) -> Iterator[tuple[str, str, dict[str, Any] | BadSample]]:
    """(key, URI, members) of every input; a reason in place of the members where they cannot be read."""
    if unit.shard is None:
        for key, path in unit.pictures:
            suffix = Path(path).suffix.lower().lstrip(".")
            try:
                yield key, path, {"__key__": key, suffix: Path(path).read_bytes()}
            except OSError as error:
                yield key, path, BadSample("unreadable", error.strerror or str(error))
        return
    seen: set[str] = set()
    try:
        for raw in iterate_shard(unit.shard):
            key = str(raw["__key__"])
            duplicate = key in seen
            seen.add(key)
            yield key, f"{unit.shard}#{key}", BadSample("duplicate_key", key) if duplicate else raw
    except BadShard as error:
        yield f"{unit.name}/rest", unit.shard, BadSample("bad_shard", str(error))


class UnitWriter:
    """Writes the three files of a unit; nothing carries its final name before ``commit``."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.rows: list[dict[str, Any]] = []
        self.counts = Counts()
        self._tar_path = folder / f".{name}.{os.getpid()}.tar"
        self._stream = self._tar_path.open("wb")
        self._tar = wds.TarWriter(self._stream, mtime=0, encoder=False)

    def add_label(self, item: Input, mask_png: bytes, facts: dict[str, Any], row: dict[str, Any]) -> None:
        """A labelled picture: its mask, its JSON and its manifest row."""
        self._tar.write({"__key__": item.key, "png": mask_png, "json": json.dumps(facts, sort_keys=True).encode()})
        self._add_row(item, "ok", row)
        self.counts.labels += 1

    def quarantine(self, item: Input) -> None:
        """An input that has no label; the row says why."""
        self._add_row(item, "quarantined", {"reason": item.reason, "detail": item.detail})
        self.counts.reasons[item.reason] = self.counts.reasons.get(item.reason, 0) + 1

    def commit(self, facts: dict[str, Any]) -> None:
        """Data first, manifest part next, marker last."""
        self._tar.close()
        self._stream.close()
        tar = self.folder / f"{self.name}.tar"
        digest = hashlib.sha256(self._tar_path.read_bytes()).hexdigest()
        self._tar_path.replace(tar)
        part = self.folder / f".{self.name}.{os.getpid()}.parquet"
        pq.write_table(pa.Table.from_pylist(self.rows, schema=MANIFEST), part)
        part.replace(self.folder / f"{self.name}.parquet")
        marker = {
            "unit": self.name,
            "images": self.counts.images,
            "labels": self.counts.labels,
            "reasons": self.counts.reasons,
            "tar_sha256": digest,
            **facts,
        }
        write_json(self.folder / f"{self.name}{MARKER}", marker)

    def abandon(self) -> None:
        """Remove what is not committed."""
        self._stream.close()
        self._tar_path.unlink(missing_ok=True)

    def _add_row(self, item: Input, status: str, values: dict[str, Any]) -> None:
        self.rows.append({"key": item.key, "uri": item.uri, "status": status, **values})
        self.counts.images += 1


def committed(folder: Path, unit: Unit) -> Counts | None:
    """Counts of a unit that is done, else None."""
    marker = folder / f"{unit.name}{MARKER}"
    if not marker.is_file():
        return None
    values = json.loads(marker.read_text())
    return Counts(values["images"], values["labels"], values["reasons"])


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    partial.replace(path)
