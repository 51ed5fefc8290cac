"""The inventory of a label run: what is to be labelled, in key order, cut into work units.

    inventory/GG/part-00000.parquet ...   a row an input; a row group is a unit
    inventory/GG/units.parquet            a row a unit: name, part, row group, inputs
    inventory/GG/inventory.json           how it came to be; written last, without it the generation does not exist

A run has one generation for its first listing; each ``--incremental`` adds one with what is new, each ``--only
quarantined`` one with what is tried again. The last generation that has a key decides about it.

Listing, sorting and comparing go through an SQLite file in a scratch folder: memory does not grow with the store.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.object_store import find_object, join, read_object, remove_folder, write_file, write_object
from pipelines.batched import batched
from pipelines.label_keys import input_key, key_problem, other_key, wish_of
from pipelines.label_sources import SHARD_SUFFIX, Listed
from pipelines.unit_table import UNITS, Unit, UnitTableWriter, part_name, read_units
from pipelines.unreadable import reading

INVENTORY = "inventory"
HEAD = "inventory.json"
UNITS_PER_PART = 64
DUPLICATE = "duplicate_key"
ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("uri", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True)
class Generation:
    """One listing of a run."""

    name: str
    kind: str  # listing | incremental | retry
    inputs: int
    units: int
    skipped: int


class InventoryWriter:
    """Gathers what a source lists, then writes it as one generation."""

    def __init__(self, scratch: Path) -> None:
        self._database = sqlite3.connect(scratch / "inventory.sqlite")
        self._database.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536; PRAGMA temp_store = FILE;
            CREATE TABLE listed (key TEXT, uri TEXT, size INTEGER, etag TEXT, tags TEXT, problem TEXT);
            CREATE TABLE known (
                uri TEXT, wish TEXT, key TEXT, etag TEXT, tags TEXT, PRIMARY KEY (uri, wish)
            ) WITHOUT ROWID;
            CREATE INDEX known_key ON known (key);
            """
        )
        self._database.execute(f"PRAGMA temp_store_directory = '{scratch}'")
        self._scratch = scratch
        self.gathered = 0
        self.skipped = 0

    def close(self) -> None:
        """Give the scratch file up."""
        self._database.close()

    def know(self, earlier: Iterable[Listed]) -> None:
        """What earlier generations have; the same URI again replaces what was known of it."""
        rows = (
            (row.uri, wish_of(row.key), row.key, row.etag, _tags_json(row))
            for row in earlier
            if row.problem != DUPLICATE
        )
        self._database.executemany("INSERT OR REPLACE INTO known VALUES (?, ?, ?, ?, ?)", rows)

    def gather(self, listed: Iterable[Listed | None]) -> None:
        """Take in what a source lists; None is something that is no input."""

        def rows() -> Iterator[tuple[Any, ...]]:
            for item in listed:
                if item is None:
                    self.skipped += 1
                    continue
                self.gathered += 1
                problem = item.problem or key_problem(item.key)
                key = input_key(item.key, item.uri)
                yield key, item.uri, item.size, item.etag, _tags_json(item), problem

        self._database.executemany("INSERT INTO listed VALUES (?, ?, ?, ?, ?, ?)", rows())

    def new_rows(self) -> Iterator[Listed]:
        """What is not known yet or has changed, in key order, each under a key of its own.

        Of several rows with one key and URI the first counts; beside one that is known the others are no news.
        """
        cursor = self._database.execute(
            """
            SELECT coalesce(known.key, listed.key) AS name, listed.uri, size, listed.etag, listed.tags, problem,
                   known.uri IS NOT NULL,
                   known.etag = listed.etag AND known.tags IS listed.tags,
                   known.uri IS NULL AND EXISTS (SELECT 1 FROM known AS other WHERE other.key = listed.key)
            FROM listed LEFT JOIN known ON known.uri = listed.uri AND known.wish = listed.key
            ORDER BY name, listed.uri, listed.rowid
            """
        )
        last_key, last_uri, repeats = None, None, 0
        for key, uri, size, etag, tags_json, problem, known, unchanged, taken in cursor:
            repeats = repeats + 1 if (key, uri) == (last_key, last_uri) else 0
            own_key = other_key(key, uri) if not known and (key == last_key or taken) else key
            last_key, last_uri = key, uri
            if known and (unchanged or repeats):
                continue
            if repeats:
                own_key, problem = f"{own_key}-{repeats}", DUPLICATE
            tags = None if tags_json is None else tuple(json.loads(tags_json))
            yield Listed(own_key, uri, size, etag, tags, problem)

    def write(
        self,
        run_uri: str,
        name: str,
        kind: str,
        identity: str,
        unit_size: int,
        unit_bytes: int,
    ) -> Generation:
        """Write the generation: parts, then the units, then its head. Without inputs nothing is written.

        Args:
            run_uri: of the label run.
            name: of the generation.
            kind: ``listing``, ``incremental`` or ``retry``.
            identity: digests of model and configuration; unit names derive from it and from their inputs.
            unit_size: most inputs of a unit.
            unit_bytes: from so many bytes on a unit is full.
        """
        folder = generation_folder(run_uri, name)
        remove_folder(folder)  # what a listing that was cut off has left
        table = self._scratch / UNITS
        # As many digits as the last unit can need, so that a store lists the units' files in the units' order.
        digits = max(6, len(str(self.gathered)))
        with UnitTableWriter(table) as units:
            cuts = batched(_cut(self.new_rows(), unit_size, unit_bytes), UNITS_PER_PART)
            for part, in_part in enumerate(cuts):
                buffer = io.BytesIO()
                with pq.ParquetWriter(buffer, ROWS) as writer:
                    for row_group, rows in enumerate(in_part):
                        writer.write_table(_table(rows), row_group_size=len(rows))
                        unit = f"{name}-{units.units:0{digits}d}-{unit_digest(identity, rows)}"
                        units.add(unit, part, row_group, len(rows))
                write_object(join(folder, part_name(part)), buffer.getvalue())
        if units.units:
            write_file(join(folder, UNITS), table)
            head = {"kind": kind, "inputs": units.inputs, "units": units.units, "skipped": self.skipped}
            text = json.dumps(head | {"time": time.time()}, indent=2, sort_keys=True) + "\n"
            write_object(join(folder, HEAD), text.encode())
        return Generation(name, kind, units.inputs, units.units, self.skipped)


def unit_digest(identity: str, rows: Iterable[Listed]) -> str:
    """Identity of a unit's labels: model, configuration, and key, place, content and tags of every input."""
    digest = hashlib.sha256(identity.encode())
    for row in rows:
        digest.update(json.dumps([row.key, row.uri, row.etag, row.tags]).encode())
    return digest.hexdigest()[:12]


def list_generations(run_uri: str) -> list[Generation]:
    """The generations of a run that are complete, oldest first."""
    generations: list[Generation] = []
    while True:
        name = generation_name(len(generations))
        head_uri = join(run_uri, f"{INVENTORY}/{name}/{HEAD}")
        if find_object(head_uri) is None:
            return generations
        with reading(head_uri):
            head = json.loads(read_object(head_uri)[0])
            generation = Generation(name, head["kind"], head["inputs"], head["units"], head["skipped"])
        generations.append(generation)


def generation_name(number: int) -> str:
    """Names sort as they were made."""
    return f"{number:04d}"


def generation_folder(run_uri: str, name: str) -> str:
    """Where a generation lies."""
    return join(join(run_uri, INVENTORY), name)


def load_units(run_uri: str, generation: Generation) -> Iterator[Unit]:
    """The units of a generation, in key order, with memory that does not grow with their number."""
    return read_units(generation_folder(run_uri, generation.name))


def unit_rows(unit: Unit) -> list[Listed]:
    """The inputs of a unit.

    Raises:
        UnreadableFile: their file is gone or damaged.
    """
    with reading(unit.part_uri):
        return _listed(pq.ParquetFile(io.BytesIO(_part(unit.part_uri))).read_row_group(unit.row_group))


def inventory_rows(run_uri: str, generation: Generation) -> Iterator[Listed]:
    """Every input of a generation, in key order."""
    for part_uri, _ in itertools.groupby(load_units(run_uri, generation), lambda unit: unit.part_uri):
        with reading(part_uri):
            file = pq.ParquetFile(io.BytesIO(read_object(part_uri)[0]))
            for row_group in range(file.num_row_groups):
                yield from _listed(file.read_row_group(row_group))


@lru_cache(maxsize=4)
def _part(uri: str) -> bytes:
    """Neighbouring units share a part."""
    return read_object(uri)[0]


def _cut(rows: Iterable[Listed], unit_size: int, unit_bytes: int) -> Iterator[list[Listed]]:
    """Neighbours up to a number and a size; a shard is a unit of its own."""
    unit: list[Listed] = []
    size = 0
    for row in rows:
        shard = is_shard(row)
        if unit and (shard or is_shard(unit[-1]) or len(unit) == unit_size or size >= unit_bytes):
            yield unit
            unit, size = [], 0
        unit.append(row)
        size += max(0, row.size)
    if unit:
        yield unit


def _tags_json(row: Listed) -> str | None:
    return None if row.tags is None else json.dumps(row.tags)


def is_shard(row: Listed) -> bool:
    """Whether an input is a tar of samples."""
    return row.uri.lower().endswith(SHARD_SUFFIX)


def _table(rows: list[Listed]) -> pa.Table:
    return pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=ROWS)


def _listed(table: pa.Table) -> list[Listed]:
    return [Listed(**row | {"tags": None if row["tags"] is None else tuple(row["tags"])}) for row in table.to_pylist()]
