"""How the units of a run reach its workers: in windows, each of which is one execution of Ray Data.

    unit     what is committed whole, some 64 pictures
    block    up to BLOCK_UNITS neighbours: what Ray hands to a worker, at 10 ms of the driver's time and 10 KiB
    window   up to MAX_BLOCKS blocks, or BLOCKS_PER_WORKER for each: what the driver holds at a time

An execution keeps the references, rows and statistics of all its blocks to its end, so its size has to be bounded; a
window of 4 million pictures is also long enough for the start of its workers not to matter.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.data

from afa_core.bundle import CONFIG, WEIGHTS
from afa_core.errors import InputError
from infra.errors import ServiceError
from pipelines.batched import batched
from pipelines.errors import UsageError
from pipelines.label_job import LabelJob, UnitResult, result_from_json
from pipelines.label_worker import LabelWorker
from pipelines.local_ray import processor_share
from pipelines.sent_files import send
from pipelines.unit_table import Unit

MAX_BLOCKS = 4096
# At the end of a window workers wait for the last block, half a block each: this many make it less than 1 %.
BLOCKS_PER_WORKER = 64
# A driver that hands out 100 blocks a second keeps up with 1,600 units, 100,000 pictures a second.
BLOCK_UNITS = 16


@dataclasses.dataclass(frozen=True)
class Pool:
    """The workers of a job."""

    workers: int
    use_gpu: bool


def find_pool(workers: int | None, *, use_gpu: bool) -> Pool:
    """What is asked for, or one worker for every GPU of the cluster, else for every processor.

    Raises:
        UsageError: there is nothing to label on, and nothing says how many to wait for.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    processors = int(ray.cluster_resources().get("CPU", 0))
    use_gpu = use_gpu or gpus > 0
    workers = workers or (gpus if use_gpu else processors)
    if not workers:
        raise UsageError("the cluster has nothing to label on yet: give --workers N, and --use-gpu to wait for GPUs")
    return Pool(workers, use_gpu)


def in_windows(units: Iterable[Unit], workers: int) -> Iterator[list[Unit]]:
    """Units in order, as many at a time as the driver is to hold."""
    return batched(units, max(MAX_BLOCKS, BLOCKS_PER_WORKER * workers) * BLOCK_UNITS)


def block_count(units: int) -> int:
    """Blocks of a window of so many units: one each while they are few, then longer ones, then more of them."""
    return min(units, max(MAX_BLOCKS, math.ceil(units / BLOCK_UNITS)))


def run_units(
    units: Iterable[Unit], job: LabelJob, workers: int | None, *, use_gpu: bool = False
) -> Iterator[UnitResult]:
    """Label units on a pool of actors, yielding what became of each when it is committed.

    Args:
        units: taken a window at a time.
        job: what every worker knows.
        workers: actors; None: what the cluster has.
        use_gpu: wait for GPUs that are not there yet.

    Raises:
        InputError: no worker can use the model.
        ServiceError: a worker cannot read or write its store.
        UsageError: there is nothing to label on, and nothing says how many to wait for.
    """
    pool = find_pool(workers, use_gpu=use_gpu)
    yield from run_on(pool, units, LabelWorker, job, send([Path(job.bundle_dir) / name for name in (CONFIG, WEIGHTS)]))


def run_on(pool: Pool, units: Iterable[Unit], actor: type[Any], *arguments: object) -> Iterator[UnitResult]:
    """The same with actors of any class; ``arguments`` make them."""
    for window in in_windows(units, pool.workers):
        yield from _run_window(window, pool, actor, arguments)


def _run_window(
    window: list[Unit], pool: Pool, actor: type[Any], arguments: tuple[object, ...]
) -> Iterator[UnitResult]:
    blocks = block_count(len(window))
    rows = [{"unit": json.dumps(dataclasses.asdict(unit))} for unit in window]
    results = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(pool.workers, blocks)),
        num_gpus=1 if pool.use_gpu else 0,
        # Not shared out among fewer workers when few units are left: threads change the last digits of a label.
        num_cpus=0 if pool.use_gpu else max(1, processor_share(pool.workers)),
    )
    for row in results.iter_rows():
        result = result_from_json(row["result"])
        if result.refused:
            raise InputError(result.refused)
        if result.error:
            raise ServiceError(result.error)
        yield result
