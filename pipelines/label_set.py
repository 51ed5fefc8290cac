"""A label set: the runs in it, the units of a run, and the rows and masks of those units.

    OUT/run-XXXXXXXX/run.json        model, configuration, input: what the run is
                     inventory/      what is to be labelled (see ``inventory``)
                     labels/         UNIT-DIGEST.tar, UNIT-DIGEST.parquet, and the commit marker UNIT.done.json
                     drivers/        who is at work (see ``driver_lease``)

A run's name derives from the digests of its model and configuration. A unit without its marker does not exist; the
marker names the files of the attempt that counts.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.object_store import (
    CONNECTIONS,
    S3,
    find_object,
    join,
    list_folders,
    list_objects,
    read_object,
    write_object,
)
from pipelines.batched import batched
from pipelines.errors import UsageError
from pipelines.inventory import Generation, inventory_rows, list_generations, load_units
from pipelines.scratch_table import ScratchTable
from pipelines.unit_table import Unit
from pipelines.unreadable import reading

SCHEMA_VERSION = 3
RUN_FILE = "run.json"
RUN_PREFIX = "run-"
LABELS = "labels"
MARKER = ".done.json"
UNKNOWN_TAGS = 50
MARKERS_AHEAD = 4 * CONNECTIONS
NAMES_AHEAD = 4096
MANIFEST = pa.schema(
    [
        ("key", pa.string()),
        ("input", pa.string()),  # key in the inventory; a shard has many rows
        ("uri", pa.string()),
        ("etag", pa.string()),  # of what was read
        ("status", pa.string()),  # ok | quarantined
        ("reason", pa.string()),  # code of a quarantined row
        ("detail", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("tags_source", pa.string()),  # given | predicted
        ("unknown_tags", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("area", pa.list_(pa.float32())),  # share of the pixels, of each of the tags
        ("ignored_share", pa.float32()),
        ("confidence", pa.float32()),  # mean over the decided pixels
        ("disagreement", pa.float32()),  # label and segmentation head, share of the decided pixels
        ("affinity_disagreement", pa.float32()),  # refined CAM with and without the affinity
        ("tags_without_pixels", pa.list_(pa.string())),
        ("classes_without_tag", pa.list_(pa.string())),  # the classifier is sure, the given tags lack them
        ("uncertainty", pa.float32()),  # of the four, the review queue's order
    ]
)


@dataclass
class Counts:
    """What became of inputs."""

    images: int = 0
    labels: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    unknown_tags: dict[str, int] = field(default_factory=dict)

    @property
    def quarantined(self) -> int:
        return self.images - self.labels

    def add(self, other: Counts) -> None:
        """Count others in."""
        self.images += other.images
        self.labels += other.labels
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        for tag, count in other.unknown_tags.items():
            self.see_unknown([tag] * count)

    def see_unknown(self, tags: Iterable[str]) -> None:
        """Count tags that the model has no class for; beyond ``UNKNOWN_TAGS`` different ones under one name."""
        for tag in tags:
            name = tag if tag in self.unknown_tags or len(self.unknown_tags) < UNKNOWN_TAGS else "others"
            self.unknown_tags[name] = self.unknown_tags.get(name, 0) + 1


@dataclass(frozen=True)
class Marker:
    """Commit marker of a unit."""

    unit: str
    images: int
    labels: int
    reasons: dict[str, int]
    unknown_tags: dict[str, int]
    tar: str
    rows: str
    tar_sha256: str
    rows_sha256: str
    finished: float
    stage_seconds: dict[str, float]

    @property
    def counts(self) -> Counts:
        return Counts(self.images, self.labels, dict(self.reasons), dict(self.unknown_tags))


def run_uri(output: str, model_digest: str, config_digest: str) -> str:
    """Where the run of a model and a configuration lies in a label set."""
    digest = hashlib.sha256(f"{model_digest}{config_digest}".encode()).hexdigest()
    return join(output, f"{RUN_PREFIX}{digest[:8]}")


def find_run(output: str, name: str | None = None) -> str:
    """URI of a run: the named one, else the newest.

    Raises:
        UsageError: there is none.
    """
    if find_object(join(output, RUN_FILE)) is not None:
        return output
    runs = {run: load_run(run) for run in list_runs(output)}
    if not runs:
        raise UsageError(f"{output} holds no label set: make one with afa label")
    if name is not None:
        named = {run.rsplit("/", 1)[1]: run for run in runs}
        if name not in named:
            raise UsageError(f"{output} holds no {name}, only {', '.join(sorted(named))}")
        return named[name]
    return max(runs, key=lambda run: runs[run]["created"])


def check_apart(output: str, labels: str) -> None:
    """See that what is made of a label set is not written into it.

    Raises:
        UsageError: it would be.
    """
    if output.startswith(S3):
        inside = join(output, "").startswith(join(labels, ""))
    else:
        inside = Path(output).resolve().is_relative_to(Path(labels).resolve())
    if inside:
        raise UsageError(f"--output {output} lies in the label set {labels}: use another place")


def list_runs(output: str) -> list[str]:
    """URIs of the runs in a label set."""
    return [folder for folder in list_folders(output) if find_object(join(folder, RUN_FILE)) is not None]


def load_run(run: str) -> dict[str, Any]:
    """Content of ``run.json``.

    Raises:
        UsageError: it is of another schema.
        UnreadableFile: it is damaged.
    """
    with reading(uri := join(run, RUN_FILE)):
        record: dict[str, Any] = json.loads(read_object(uri)[0])
        version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{run} has schema version {version}, this program reads {SCHEMA_VERSION}: label into another --output"
        )
    return record


def write_json(uri: str, values: dict[str, Any]) -> None:
    """A JSON object that is there whole or not at all."""
    write_object(uri, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def label_uri(run: str, name: str) -> str:
    """URI of a file of a unit."""
    return join(run, f"{LABELS}/{name}")


def committed_names(run: str) -> Iterator[str]:
    """Names of the units that have their marker, in any order."""
    return (name.removesuffix(MARKER) for name in label_files(run) if name.endswith(MARKER))


@contextmanager
def committed_table(run: str) -> Iterator[ScratchTable]:
    """The names of the committed units, on disk: there may be tens of millions."""
    with scratch_table("committed") as done:
        done.put((name, None) for name in committed_names(run))
        yield done


@contextmanager
def scratch_table(name: str) -> Iterator[ScratchTable]:
    """A table in a scratch folder of its own."""
    with tempfile.TemporaryDirectory(prefix=f"afa-{name}-") as scratch, ScratchTable(Path(scratch), name) as table:
        yield table


def split_units(run: str, generation: Generation, done: ScratchTable) -> Iterator[tuple[Unit, bool]]:
    """The units of a generation in order, each with whether it is committed."""
    for units in batched(load_units(run, generation), NAMES_AHEAD):
        there = done.get([unit.name for unit in units])
        yield from ((unit, unit.name in there) for unit in units)


def waiting_units(run: str, done: ScratchTable) -> Iterator[Unit]:
    """Every unit of a run that is not committed, in order."""
    for generation in list_generations(run):
        yield from (unit for unit, committed in split_units(run, generation, done) if not committed)


def label_files(run: str) -> Iterator[str]:
    """Names of everything in the label folder."""
    if not any(folder.endswith(f"/{LABELS}") for folder in list_folders(run)):
        return
    for found in list_objects(join(run, LABELS)):
        yield found.uri.rsplit("/", 1)[1]


def load_marker(run: str, unit: str) -> Marker:
    """The marker of a committed unit.

    Raises:
        ObjectError: it has none.
        UnreadableFile: it is damaged.
    """
    uri = label_uri(run, f"{unit}{MARKER}")
    data, _ = read_object(uri)
    with reading(uri):
        values = json.loads(data)
        return Marker(**{item.name: values[item.name] for item in dataclasses.fields(Marker)})


def load_markers(run: str, units: Iterable[str]) -> Iterator[Marker]:
    """The markers of committed units, in order, read several at a time."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for some in batched(units, MARKERS_AHEAD):
            yield from pool.map(lambda unit: load_marker(run, unit), some)


@dataclass(frozen=True)
class CommittedUnit:
    """A unit with its marker and those of its rows that count."""

    run: str
    marker: Marker
    rows: list[dict[str, Any]]

    def members(self) -> dict[str, tuple[bytes, dict[str, Any]]]:
        """Mask (PNG) and facts by key, of every labelled picture of the unit that counts.

        Raises:
            UnreadableFile: they are gone or damaged.
        """
        uri = label_uri(self.run, self.marker.tar)
        with reading(uri):
            return self._members(read_object(uri)[0])

    def _members(self, tar_bytes: bytes) -> dict[str, tuple[bytes, dict[str, Any]]]:
        wanted = {row["key"] for row in self.rows if row["status"] == "ok"}
        masks: dict[str, bytes] = {}
        facts: dict[str, dict[str, Any]] = {}
        with tarfile.open(fileobj=io.BytesIO(tar_bytes)) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                key, suffix = member.name.rsplit(".", 1)
                if stream is None or key not in wanted:
                    continue
                if suffix == "png":
                    masks[key] = stream.read()
                else:
                    facts[key] = json.loads(stream.read())
        return {key: (masks[key], facts[key]) for key in wanted}


def committed_units(run: str, columns: list[str] | None = None) -> Iterator[CommittedUnit]:
    """Every committed unit, newest generation first; rows that a newer generation replaces are left out.

    Args:
        run: URI of the run.
        columns: of the rows; None: all of ``MANIFEST``. ``key`` and ``input`` are always there.
    """
    wanted = None if columns is None else list(dict.fromkeys(["key", "input", *columns]))
    generations = list_generations(run)
    with committed_table(run) as done, scratch_table("replaced") as replaced:
        for generation in reversed(generations):
            names = (unit.name for unit, committed in split_units(run, generation, done) if committed)
            for marker in load_markers(run, names):
                with reading(uri := label_uri(run, marker.rows)):
                    rows = pq.read_table(io.BytesIO(read_object(uri)[0]), columns=wanted).to_pylist()
                gone = replaced.get([row["input"] for row in rows])
                yield CommittedUnit(run, marker, [row for row in rows if row["input"] not in gone])
            if generation is not generations[0]:
                replaced.put((row.key, None) for row in inventory_rows(run, generation))


def count_rows(run: str) -> Counts:
    """What became of every input of a run, as far as it is done."""
    total = Counts()
    if len(list_generations(run)) == 1:  # the markers know
        for marker in load_markers(run, committed_names(run)):
            total.add(marker.counts)
        return total
    for unit in committed_units(run, ["status", "reason", "unknown_tags"]):
        quarantined = [row["reason"] for row in unit.rows if row["status"] != "ok"]
        labels = len(unit.rows) - len(quarantined)
        total.add(Counts(len(unit.rows), labels, dict(collections.Counter(quarantined))))
        total.see_unknown(tag for row in unit.rows for tag in row["unknown_tags"] or ())
    return total
