"""Memory and time of the labelling driver, without pictures.

    python tests/benchmarks/scheduling.py ray 15625 [--max-blocks N]
    python tests/benchmarks/scheduling.py model 15625 156250 1562500 15625000 [--workers N]

Both generate a run whose units are committed already, one in ten, and then call what ``afa label`` calls: the table of
units, the plan, the windows, the running totals, the search for leftovers. ``ray`` gives the windows to Ray Data, with
actors that only count. ``model`` gives them to simulated workers that are slow, die and come back (``workers.py``), so
that a billion pictures take minutes. Every unit has to be committed once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from workers import Workers

from pipelines import label_windows
from pipelines.inventory import HEAD, generation_folder
from pipelines.label_job import StageSeconds, UnitResult
from pipelines.label_leftovers import leftovers
from pipelines.label_plan import Plan, count_plan
from pipelines.label_set import (
    LABELS,
    MARKER,
    Counts,
    Marker,
    committed_table,
    scratch_table,
    waiting_units,
)
from pipelines.local_ray import start_ray
from pipelines.pseudo_label import Outcome
from pipelines.unit_table import UNITS, Unit, UnitTableWriter

PICTURES = 64  # of a unit
COMMITTED_EVERY = 10
LEFTOVER_EVERY = 1000  # one unit of so many was attempted twice


class Counting:
    """An actor that labels nothing. It travels by value: its processes need not load torch."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Every picture of every unit is fine."""
        inputs = [json.loads(text)["inputs"] for text in batch["unit"]]
        counts = [{"images": number, "labels": number} for number in inputs]
        return {"result": np.array([json.dumps({"counts": item, "seconds": {}, "error": ""}) for item in counts])}


def unit_names(units: int) -> Iterator[str]:
    """Names as an inventory gives them."""
    digits = max(6, len(str(units * PICTURES)))
    for number in range(units):
        yield f"0000-{number:0{digits}d}-{hashlib.blake2b(number.to_bytes(8), digest_size=6).hexdigest()}"


def committed_before(units: int) -> Iterator[str]:
    return (name for number, name in enumerate(unit_names(units)) if number % COMMITTED_EVERY == 0)


def write_inventory(run: Path, units: int) -> None:
    """The table and the head of a generation; its parts are not needed."""
    folder = Path(generation_folder(str(run), "0000"))
    folder.mkdir(parents=True)
    with UnitTableWriter(folder / UNITS) as table:
        for number, name in enumerate(unit_names(units)):
            table.add(name, number // 64, number % 64, PICTURES)
    head = {"kind": "listing", "inputs": table.inputs, "units": units, "skipped": 0}
    (folder / HEAD).write_text(json.dumps(head))


def label_with_ray(units: int, max_blocks: int) -> dict[str, Any]:
    """Label with actors that count; the driver's memory is looked at in the course of it."""
    label_windows.MAX_BLOCKS = max_blocks
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        write_inventory(run, units)
        (run / LABELS).mkdir()
        for name in committed_before(units):
            (run / LABELS / f"{name}{MARKER}").touch()
        start_ray()
        start_mib = resident_mib()
        with committed_table(str(run)) as done:
            plan, outcome, course = count_plan(str(run), done), Outcome(), []
            began = time.monotonic()
            pool = label_windows.find_pool(2, use_gpu=False)
            for result in label_windows.run_on(pool, waiting_units(str(run), done), Counting):
                outcome.add(result)
                if outcome.counts.images % (plan.waiting_inputs // 6 // PICTURES * PICTURES) == 0:
                    course.append(resident_mib())
    assert outcome.counts.images == plan.waiting_inputs == plan.waiting_units * PICTURES
    seconds = time.monotonic() - began
    return {
        "units": plan.waiting_units,
        "max_blocks": max_blocks,
        "seconds": round(seconds, 1),
        "ms_a_unit": round(1000 * seconds / plan.waiting_units, 2),
        "start_mib": start_mib,
        "course_mib": course,
        "peak_mib": peak_mib(),
    }


def label_with_model(units: int, workers: int) -> dict[str, Any]:
    """Label with simulated workers."""
    start_mib, seconds, course = peak_mib(), dict[str, float](), dict[str, int]()
    with tempfile.TemporaryDirectory() as folder, scratch_table("committed") as done:
        run = Path(folder)
        with timed(seconds, course, "table"):
            write_inventory(run, units)
        with timed(seconds, course, "markers"):
            done.put((name, None) for name in committed_before(units))
        with timed(seconds, course, "plan"):
            plan = count_plan(str(run), done)
        model = Workers(workers)
        with timed(seconds, course, "windows"):
            outcome = label_windows_with(model, waiting_units(str(run), done))
        seconds["windows"] -= model.simulation_s
        with timed(seconds, course, "leftovers"):
            removed = count_leftovers(units)
    check(plan, outcome, units)
    assert removed == units // LEFTOVER_EVERY
    return {
        "units": units,
        "workers": workers,
        **{f"{phase}_us": round(1e6 * value / units, 1) for phase, value in seconds.items()},
        "us_a_unit": round(1e6 * sum(seconds.values()) / units, 1),
        "start_mib": start_mib,
        "peak_mib": peak_mib(),
        "course_mib": course,
        **model.summary(),
    }


def label_windows_with(model: Workers, units: Iterable[Unit]) -> Outcome:
    """What ``run_units`` does, with the simulated workers in the place of Ray Data."""
    outcome = Outcome()
    for window in label_windows.in_windows(units, model.workers):
        for index in model.run_window(len(window), label_windows.block_count(len(window)), PICTURES):
            counts = Counts(window[index].inputs, window[index].inputs)
            outcome.add(UnitResult(counts, StageSeconds(label=1.0)))
    return outcome


def count_leftovers(units: int) -> int:
    """The search of ``remove_leftovers`` in the listing of a finished run."""
    with scratch_table("files") as files:
        files.put((name, None) for name in finished_files(units))
        return sum(1 for _ in leftovers((name for name, _ in files.items()), marker_of))


def finished_files(units: int) -> Iterator[str]:
    for number, name in enumerate(unit_names(units)):
        yield from (f"{name}-00000000.tar", f"{name}-00000000.parquet", f"{name}{MARKER}")
        if number % LEFTOVER_EVERY == LEFTOVER_EVERY - 1:
            yield f"{name}-ffffffff.tar"


def marker_of(unit: str) -> Marker:
    files = {"tar": f"{unit}-00000000.tar", "rows": f"{unit}-00000000.parquet", "tar_sha256": "", "rows_sha256": ""}
    return Marker(unit, PICTURES, PICTURES, {}, {}, **files, finished=0.0, stage_seconds={})


def check(plan: Plan, outcome: Outcome, units: int) -> None:
    """Nothing is lost and nothing is done twice."""
    assert plan.units == units
    assert plan.done_units == len(range(0, units, COMMITTED_EVERY))
    assert outcome.counts.images == plan.waiting_inputs == plan.waiting_units * PICTURES


@contextmanager
def timed(seconds: dict[str, float], course: dict[str, int], phase: str) -> Iterator[None]:
    """Processor time, as what else the machine does is not to count, and the memory at the end of a phase."""
    began = time.process_time()
    yield
    seconds[phase] = time.process_time() - began
    course[phase] = resident_mib()


def resident_mib() -> int:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Every number of units in a process of its own, whose peak is then its own; prints JSON lines."""
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=["ray", "model"])
    parser.add_argument("units", type=int, nargs="+")
    parser.add_argument("--max-blocks", type=int, default=label_windows.MAX_BLOCKS)
    parser.add_argument("--workers", type=int, default=512)
    arguments = parser.parse_args()
    for units in arguments.units:
        if len(arguments.units) > 1:
            options = ["--max-blocks", str(arguments.max_blocks), "--workers", str(arguments.workers)]
            subprocess.run([sys.executable, __file__, arguments.how, str(units), *options], check=True)
        elif arguments.how == "ray":
            print(json.dumps(label_with_ray(units, arguments.max_blocks)), flush=True)
        else:
            print(json.dumps(label_with_model(units, arguments.workers)), flush=True)


if __name__ == "__main__":
    main()
