"""What a labelling run is, and which generations of inputs it has: decided before the first picture is read."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from afa_core.errors import InputError
from infra.object_store import S3, delete_object, find_object, join, list_objects, remove_folder
from pipelines.batched import batched
from pipelines.errors import UsageError
from pipelines.inventory import (
    INVENTORY,
    Generation,
    InventoryWriter,
    generation_name,
    inventory_rows,
    list_generations,
)
from pipelines.label_job import LabelJob
from pipelines.label_set import (
    NAMES_AHEAD,
    RUN_FILE,
    RUN_PREFIX,
    SCHEMA_VERSION,
    committed_names,
    committed_table,
    committed_units,
    list_runs,
    load_run,
    scratch_table,
    split_units,
    write_json,
)
from pipelines.label_sources import Listed, as_it_is_now, list_source
from pipelines.scratch_table import ScratchTable

# A unit is full from so many bytes on, however few pictures they are.
UNIT_BYTES = 256 * 10**6


@dataclass
class Plan:
    """How much there is to do."""

    inputs: int = 0
    units: int = 0
    waiting_inputs: int = 0
    waiting_units: int = 0

    @property
    def done_units(self) -> int:
        return self.units - self.waiting_units


def count_plan(run: str, done: ScratchTable) -> Plan:
    """Count the units of a run, and those that are not committed yet."""
    plan = Plan()
    for generation in list_generations(run):
        for unit, committed in split_units(run, generation, done):
            plan.inputs += unit.inputs
            plan.units += 1
            if not committed:
                plan.waiting_inputs += unit.inputs
                plan.waiting_units += 1
    return plan


def check_output(output: str, source: str) -> None:
    """See that labels of a source may go to a place.

    Raises:
        UsageError: the place holds something else, or labels of another input.
    """
    if not output.startswith(S3) and Path(output).is_file():
        raise UsageError(f"--output {output} is a file: name a folder")
    exists = output.startswith(S3) or Path(output).is_dir()
    first = next(list_objects(output), None) if exists else None
    if first is not None and not first.uri.startswith(join(output, RUN_PREFIX)):
        raise UsageError(f"{output} is not empty and holds no label set: use another --output")
    for run in list_runs(output):
        if load_run(run)["input"] != source:
            raise UsageError(f"{output} holds labels of {load_run(run)['input']}: use another --output")


def open_run(job: LabelJob, source: str) -> None:
    """Write ``run.json``, unless it is there: a run of the same name is of the same model and configuration."""
    if find_object(join(job.run, RUN_FILE)) is None:
        record = {
            "schema_version": SCHEMA_VERSION,
            "created": time.time(),
            "input": source,
            "model": job.model,
            "model_digest": job.model_digest,
            "classes": job.classes,
            "label_config": dataclasses.asdict(job.label_config),
            "config_digest": job.config_digest,
        }
        write_json(join(job.run, RUN_FILE), record)


def take_back(job: LabelJob) -> None:
    """Remove a run that nobody can begin, so that no one misses its labels; one with labels stays."""
    if next(iter(committed_names(job.run)), None) is None:
        delete_object(join(job.run, RUN_FILE))
        remove_folder(join(job.run, INVENTORY))


def add_generations(job: LabelJob, source: str, output: str, arguments: argparse.Namespace) -> None:
    """See that the run has its first listing, and the generation that the command asks for.

    A retry that was cut off is finished before another one begins.

    Raises:
        InputError: there is nothing to label.
    """
    generations = list_generations(job.run)
    if not generations:
        added = _write(job, arguments.unit_size, generations, "listing", lambda: _listed(source, output))
        if not added.inputs:
            raise InputError(f"{source} has neither pictures nor .tar shards, only {added.skipped} other objects")
        return
    if arguments.incremental:
        added = _write(job, arguments.unit_size, generations, "incremental", lambda: _listed(source, output))
        print(f"{added.inputs} new or changed", flush=True)
    if arguments.only == "quarantined" and not _unfinished_retry(job.run, generations):
        added = _write(job, arguments.unit_size, generations, "retry", lambda: _quarantined(job.run))
        print(f"{added.inputs} quarantined inputs are tried again", flush=True)


def _write(
    job: LabelJob,
    unit_size: int,
    earlier: list[Generation],
    kind: str,
    inputs: Callable[[], Iterator[Listed | None]],
) -> Generation:
    """One more generation; an empty one after the first is not written."""
    with (
        tempfile.TemporaryDirectory(prefix="afa-inventory-") as scratch,
        closing(InventoryWriter(Path(scratch))) as writer,
    ):
        if kind == "incremental":
            for generation in earlier:
                writer.know(inventory_rows(job.run, generation))
        interval_s = 0.5 if sys.stderr.isatty() else 10.0
        writer.gather(tqdm(inputs(), desc="listing", unit=" objects", mininterval=interval_s, delay=1))
        return writer.write(
            job.run,
            generation_name(len(earlier)),
            kind,
            f"{job.model_digest}{job.config_digest}",
            unit_size,
            UNIT_BYTES,
        )


def _listed(source: str, output: str) -> Iterator[Listed | None]:
    return list_source(source, leave_out=output)


def _quarantined(run: str) -> Iterator[Listed]:
    """Inventory rows with a quarantined label, as they stand in the newest generation that has them."""
    with scratch_table("quarantined") as wanted:
        for unit in committed_units(run, ["status"]):
            wanted.put((row["input"], True) for row in unit.rows if row["status"] != "ok")
        for generation in reversed(list_generations(run)):
            for rows in batched(inventory_rows(run, generation), NAMES_AHEAD):
                found = wanted.get([row.key for row in rows])
                again = [row for row in rows if found.get(row.key) and not row.problem]
                wanted.put((row.key, False) for row in again)  # older rows of the same key are passed over
                yield from map(as_it_is_now, again)


def _unfinished_retry(run: str, generations: list[Generation]) -> bool:
    if generations[-1].kind != "retry":
        return False
    with committed_table(run) as done:
        return any(not committed for _, committed in split_units(run, generations[-1], done))
