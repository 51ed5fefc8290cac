"""``afa verify-labels``: prove that a label set has lost nothing and has nothing twice.

Every inventory key has exactly one row (a shard's samples one each), every ok row exactly one decodable mask of the
right size, every file belongs to a committed unit. Reads only the label set, not the store it was made from.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import itertools
import math
import sqlite3
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from afa_core.classes import IGNORE_INDEX
from afa_core.data.sample import BadSample, decode_seg_label
from infra.object_store import CONNECTIONS, ObjectError, join, list_objects, read_object
from pipelines.batched import batched
from pipelines.cli import stage_main
from pipelines.driver_lease import DRIVERS, left_behind
from pipelines.inventory import (
    HEAD,
    INVENTORY,
    Generation,
    generation_folder,
    is_shard,
    list_generations,
    load_units,
    unit_rows,
)
from pipelines.label_set import (
    LABELS,
    MARKER,
    MARKERS_AHEAD,
    NAMES_AHEAD,
    RUN_FILE,
    Counts,
    Marker,
    count_rows,
    find_run,
    label_files,
    label_uri,
    list_runs,
    load_marker,
    load_run,
    scratch_table,
)
from pipelines.label_sources import absolute_source
from pipelines.scratch_table import ScratchTable
from pipelines.unit_table import UNITS, Unit
from pipelines.unreadable import UnreadableFile, reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa verify-labels``."""
    parser.add_argument("output", help="folder or s3:// prefix of a label set, or of one run in it")
    parser.add_argument("--run", help="only the run of this name (default: every run)")


def run(arguments: argparse.Namespace) -> int:
    """Verify; prints counts, and every problem."""
    try:
        return verify(arguments)
    except UnreadableFile as error:  # without which nothing else can be told
        print(f"PROBLEM {error.problem}")
        return 1


def verify(arguments: argparse.Namespace) -> int:
    """Verify every run that is asked for, or the one.

    Raises:
        UnreadableFile: a run's own record is damaged.
    """
    output = absolute_source(arguments.output)
    newest = find_run(output, arguments.run)
    runs = [newest] if arguments.run or newest == output else list_runs(output)
    strays = list(stray_files(output, runs)) if newest != output and not arguments.run else []
    broken = len(strays)
    for problem in strays:
        print(f"PROBLEM {problem}")
    for run_uri in runs:
        report = verify_run(run_uri)
        broken += len(report.problems)
        print(f"{run_uri}\n  inputs {report.inputs}  units {report.committed} of {report.units} committed")
        print(f"  {counted(report.counts)}")
        for problem in report.problems:
            print(f"  PROBLEM {problem}")
        print("  clean" if not report.problems else f"  {len(report.problems)} problems")
    if broken:
        print("to have a damaged unit labelled again, delete its UNIT.done.json and run the afa label command")
    return 1 if broken else 0


def counted(counts: Counts | None) -> str:
    """A run's rows in words."""
    if counts is None:
        return "rows are counted once all units are committed"
    return f"rows {counts.images}  labels {counts.labels}  quarantined {counts.quarantined}"


@dataclass
class Report:
    """What verification found in a run."""

    inputs: int = 0
    units: int = 0
    committed: int = 0
    counts: Counts | None = None  # known once all units are committed
    damaged: list[str] = field(default_factory=list)  # units of which it cannot be told what files they have
    problems: list[str] = field(default_factory=list)


def verify_run(run_uri: str) -> Report:
    """Check one run, unit by unit, several at a time."""
    report = Report()
    try:
        _verify_run(run_uri, report)
    except UnreadableFile as error:  # of the inventory
        report.problems.append(error.problem)
    return report


def _verify_run(run_uri: str, report: Report) -> None:
    generations = list_generations(run_uri)
    if not generations:
        report.problems.append("the inventory is not complete: run the afa label command again")
        return
    with scratch_table("expected") as expected:
        check_units(run_uri, generations, expected, report)
        report.problems += stray_label_files(run_uri, expected, report.damaged)
    report.problems += stray_inventory_files(run_uri)
    report.problems += [f"{uri} is of no driver at work" for uri in left_behind(run_uri)]
    report.problems += [f"{uri} belongs to nothing" for uri in stray_run_files(run_uri)]
    if report.committed == report.units:
        report.counts = count_rows(run_uri)


def check_units(run_uri: str, generations: list[Generation], expected: ScratchTable, report: Report) -> None:
    """Check every unit, several at a time; the names of the files that count go into ``expected``."""
    classes = len(load_run(run_uri)["classes"])
    with ThreadPoolExecutor(CONNECTIONS) as pool, tempfile.TemporaryDirectory() as scratch:
        keys = _Keys(Path(scratch))
        with closing(keys):
            for generation in generations:
                report.units += generation.units
                for units in batched(load_units(run_uri, generation), MARKERS_AHEAD):
                    for check in pool.map(lambda unit: check_unit(run_uri, unit, classes), units):
                        report.inputs += check.inputs
                        report.committed += bool(check.files)
                        report.damaged += check.damaged
                        report.problems += check.problems
                        twice = keys.add(generation.name, check.keys)
                        report.problems += [f"key {key} is in two units" for key in twice]
                        expected.put((name, None) for name in check.files)


@dataclass
class UnitCheck:
    """What was found in one unit."""

    inputs: int = 0
    keys: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)  # its name, if it cannot be told what files it has
    problems: list[str] = field(default_factory=list)


def check_unit(run_uri: str, unit: Unit, classes: int) -> UnitCheck:
    """Marker, rows and masks of a unit against its inventory and the number of classes."""
    check = UnitCheck()
    try:
        rows = unit_rows(unit)
        check.inputs = len(rows)
        marker = load_marker(run_uri, unit.name)
        check.files = [f"{unit.name}{MARKER}", marker.tar, marker.rows]
        rows_uri = label_uri(run_uri, marker.rows)
        rows_bytes = read_object(rows_uri)[0]
        with reading(rows_uri):
            table = pq.read_table(io.BytesIO(rows_bytes)).to_pylist()
        check.keys = [row["key"] for row in table]
        check.problems += check_rows(unit, marker, {row.key: is_shard(row) for row in rows}, table)
        if hashlib.sha256(rows_bytes).hexdigest() != marker.rows_sha256:
            check.problems.append(f"{marker.rows} differs from its SHA-256")
        check.problems += check_masks(unit, marker, read_object(label_uri(run_uri, marker.tar))[0], table, classes)
    except ObjectError as error:
        if error.reason == "missing_object" and f"{unit.name}{MARKER}" in error.detail:
            check.problems.append(f"unit {unit.name} is not committed: run the afa label command again")
            return check
        check.problems.append(f"unit {unit.name} cannot be read: {error}")
    except UnreadableFile as error:
        check.problems.append(f"unit {unit.name} is damaged: {error.problem}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        check.problems.append(f"unit {unit.name} is damaged: {type(error).__name__} {error}")
    check.damaged = [] if check.files else [unit.name]
    return check


def check_rows(unit: Unit, marker: Marker, inputs: dict[str, bool], table: list[dict[str, Any]]) -> Iterator[str]:
    """Every input has its row, no key two, and the marker counts what is there.

    Args:
        unit: that is checked.
        marker: of the unit.
        inputs: inventory key -> whether it is a shard, which has a row for each of its samples.
        table: the rows.
    """
    counted = collections.Counter(row["input"] for row in table)
    for key, shard in inputs.items():
        if counted[key] == 0 and not (shard and not table):
            yield f"input {key} has no row (unit {unit.name})"
        elif counted[key] > 1 and not shard:
            yield f"input {key} has {counted[key]} rows (unit {unit.name})"
    yield from (f"row of unknown input {key} (unit {unit.name})" for key in counted.keys() - inputs.keys())
    labels = sum(row["status"] == "ok" for row in table)
    if (marker.images, marker.labels) != (len(table), labels):
        said, there = f"{marker.images} rows, {marker.labels} ok", f"{len(table)}, {labels}"
        yield f"unit {unit.name}: the marker says {said}; there are {there}"


def check_masks(
    unit: Unit, marker: Marker, tar_bytes: bytes, table: list[dict[str, Any]], classes: int
) -> Iterator[str]:
    """Every ok row has one mask of its picture's size, and nothing else has one."""
    if hashlib.sha256(tar_bytes).hexdigest() != marker.tar_sha256:
        yield f"{marker.tar} differs from its SHA-256"
        return
    sizes = {row["key"]: (row["height"], row["width"]) for row in table if row["status"] == "ok"}
    seen: collections.Counter[str] = collections.Counter()
    with tarfile.open(fileobj=io.BytesIO(tar_bytes)) as tar:
        for member in tar:
            seen[member.name] += 1
            stream = tar.extractfile(member)
            key, suffix = member.name.rsplit(".", 1)
            if key not in sizes or stream is None or suffix not in ("png", "json"):
                yield f"{marker.tar} holds {member.name}, which no row is of"
            elif suffix == "png":
                yield from check_mask(key, stream.read(), sizes[key], classes)
    for key in sizes:
        for name in (f"{key}.png", f"{key}.json"):
            if seen[name] != 1:
                yield f"{name} is {seen[name]} times in {marker.tar} (unit {unit.name})"


def check_mask(key: str, data: bytes, size: tuple[int, int], classes: int) -> Iterator[str]:
    """A mask that can be decoded, has its picture's size, and shows nothing but classes of the list."""
    try:
        label = decode_seg_label(data, max_megapixels=math.inf)
    except BadSample as bad:
        yield f"mask of {key}: {bad.detail}"
        return
    if label.shape != size:
        yield f"mask of {key} is {label.shape[1]} x {label.shape[0]}, its picture {size[1]} x {size[0]}"
    foreign = [int(value) for value in np.flatnonzero(np.bincount(label.ravel())) if classes < value < IGNORE_INDEX]
    if foreign:
        yield f"mask of {key} has values {foreign}, the run has {classes} classes"


def stray_files(output: str, runs: list[str]) -> Iterator[str]:
    """What lies in a label set beside its runs, and folders that look like runs but have no ``run.json``."""
    inside = tuple(f"{run}/" for run in runs)
    yield from (f"{found.uri} is of no run" for found in list_objects(output) if not found.uri.startswith(inside))


def stray_label_files(run_uri: str, expected: ScratchTable, damaged: list[str]) -> Iterator[str]:
    """Files of the label folder that are not expected; those of damaged units are excused."""
    excused = tuple(f"{unit}{end}" for unit in damaged for end in "-.")
    for names in batched(label_files(run_uri), NAMES_AHEAD):
        strays = sorted(set(names) - expected.get(names).keys())
        yield from (f"{name} belongs to no committed unit" for name in strays if not name.startswith(excused))


def stray_run_files(run_uri: str) -> Iterator[str]:
    """What lies in a run beside its known folders, which are checked by themselves."""
    known = (join(run_uri, RUN_FILE), *(f"{join(run_uri, name)}/" for name in (INVENTORY, LABELS, DRIVERS)))
    yield from (found.uri for found in list_objects(run_uri) if not found.uri.startswith(known))


def stray_inventory_files(run_uri: str) -> Iterator[str]:
    """Inventory files that no generation counts: a listing that was cut off and never begun anew."""
    with scratch_table("inventory") as wanted:
        for generation in list_generations(run_uri):
            folder = generation_folder(run_uri, generation.name)
            parts = itertools.groupby(unit.part_uri for unit in load_units(run_uri, generation))
            wanted.put((uri, None) for uri in (join(folder, HEAD), join(folder, UNITS), *(uri for uri, _ in parts)))
        for some in batched(list_objects(join(run_uri, INVENTORY)), NAMES_AHEAD):
            uris = [found.uri for found in some]
            yield from (f"{uri} belongs to no generation" for uri in sorted(set(uris) - wanted.get(uris).keys()))


class _Keys:
    """Keys of a generation seen so far, on disk: there may be tens of millions."""

    def __init__(self, scratch: Path) -> None:
        self._database = sqlite3.connect(scratch / "keys.sqlite")
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE keys (generation TEXT, key TEXT, PRIMARY KEY (generation, key)) WITHOUT ROWID;"
        )

    def add(self, generation: str, keys: list[str]) -> list[str]:
        """Remember keys; gives back those that were there already."""
        known = []
        for key in keys:
            inserted = self._database.execute("INSERT OR IGNORE INTO keys VALUES (?, ?)", (generation, key)).rowcount
            if not inserted:
                known.append(key)
        return known

    def close(self) -> None:
        """Give the scratch file up."""
        self._database.close()


if __name__ == "__main__":
    sys.exit(stage_main(add_arguments, run))
