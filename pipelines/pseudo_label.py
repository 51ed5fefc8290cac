"""``afa label``: write refined masks for a store of pictures or shards, as a Ray Data job.

The store is listed once into an inventory, which is cut into work units (``inventory``); actors that each hold the
model take one unit at a time from reading to commit (``labeller``). Running the same command again does only the units
that are missing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.data
from tqdm import tqdm

from afa_core.checkpoint import load_bundle
from infra.errors import ServiceError
from pipelines.cli import stage_main
from pipelines.driver_lease import DriverLease
from pipelines.errors import UsageError
from pipelines.inventory import Unit, list_generations, load_units
from pipelines.label_estimate import describe_plan
from pipelines.label_options import add_label_options, config_digest, label_config
from pipelines.label_plan import add_generations, check_output, open_run
from pipelines.label_set import Counts, committed_names, count_rows, remove_leftovers, run_uri
from pipelines.label_sources import absolute_source, check_source
from pipelines.labeller import LabelJob, Labeller, UnitResult, result_from_json
from pipelines.local_ray import processor_share, start_ray
from pipelines.model_files import find_model

# Every block costs the driver 10 ms and 10 KiB. With more units than this, a block is several of them in a row.
MAX_BLOCKS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa label``."""
    parser.add_argument("--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION or a bundle folder")
    parser.add_argument(
        "--input", required=True, help="folder or s3:// prefix of pictures or shards, a shard, or a table of URIs"
    )
    parser.add_argument("--output", required=True, help="folder or s3:// prefix of the label set")
    parser.add_argument("--incremental", action="store_true", help="list again and label what is new or has changed")
    parser.add_argument("--only", choices=["quarantined"], help="try the quarantined inputs again")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and an estimate from a minute's sample")
    parser.add_argument("--workers", type=int, help="actors (default: one per GPU, else one per processor)")
    parser.add_argument("--use-gpu", action="store_true", help="wait for GPUs that the cluster has not started yet")
    parser.add_argument("--unit-size", type=int, default=64, help="most pictures in a work unit (default: 64)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures decoded at a time (default: 8)")
    parser.add_argument("--tracking-uri", help="MLflow server (default: MLFLOW_TRACKING_URI, then runs/mlflow.db)")
    add_label_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Label; prints images, labels, quarantined, images/s."""
    for option in ("workers", "unit_size", "batch_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} {value}: must be at least 1")
    if arguments.incremental and arguments.only:
        raise UsageError("--incremental and --only quarantined are two commands: give one of them")
    source, output = absolute_source(arguments.input), absolute_source(arguments.output)
    check_source(source)
    with tempfile.TemporaryDirectory(prefix="afa-model-") as scratch:
        bundle_dir, model = find_model(arguments.model, arguments.tracking_uri, Path(scratch))
        job = build_job(arguments, bundle_dir, model, output)
        if arguments.dry_run:
            dry_run(arguments, job, source, output, Path(scratch))
            return 0
        try:
            label(arguments, job, source, output)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on with what is missing") from None
    return 0


def label(arguments: argparse.Namespace, job: LabelJob, source: str, output: str) -> None:
    """List, label what is missing, clear up, sum up."""
    check_output(output, source)
    with DriverLease(job.run):
        add_generations(job, source, output, arguments)
        open_run(job, source)
        units, waiting = planned_units(job.run)
        if len(waiting) < len(units):
            print(f"{len(units) - len(waiting)} of {len(units)} units are done already", flush=True)
        started = time.monotonic()
        results = label_units(waiting, job, arguments.workers, use_gpu=arguments.use_gpu)
        seconds = time.monotonic() - started
        remove_leftovers(job.run)
    print(summary(count_rows(job.run), results, seconds, job.run))


def dry_run(arguments: argparse.Namespace, job: LabelJob, source: str, output: str, scratch: Path) -> None:
    """Print what ``label`` would do; a store that is not listed yet is listed into ``scratch``."""
    check_output(output, source)
    if arguments.incremental or arguments.only:
        raise UsageError("--dry-run plans the labelling of what is listed: leave --incremental and --only out")
    if not list_generations(job.run):
        job = dataclasses.replace(job, run=str(scratch / "plan"))
        add_generations(job, source, output, arguments)
    units, waiting = planned_units(job.run)
    print(describe_plan(job, units, waiting, arguments.workers))


def planned_units(run_uri: str) -> tuple[list[Unit], list[Unit]]:
    """Every unit of every generation, and those that are not committed yet."""
    units = [unit for generation in list_generations(run_uri) for unit in load_units(run_uri, generation)]
    done = committed_names(run_uri)
    return units, [unit for unit in units if unit.name not in done]


def build_job(arguments: argparse.Namespace, bundle_dir: Path, model: str, output: str) -> LabelJob:
    """Job from the model's own labelling configuration and the options that override it.

    Raises:
        InputError: the folder holds no usable model.
        UsageError: an option is out of range.
    """
    bundle = load_bundle(bundle_dir)
    config = label_config(arguments, bundle)
    digest = config_digest(config, bundle)
    return LabelJob(
        bundle_dir=str(bundle_dir),
        model=model,
        model_digest=bundle.digest,
        classes=bundle.classes,
        label_config=config,
        config_digest=digest,
        run=run_uri(output, bundle.digest, digest),
        batch_size=arguments.batch_size,
    )


def label_units(units: list[Unit], job: LabelJob, workers: int | None, *, use_gpu: bool = False) -> list[UnitResult]:
    """Label units, with a bar that shows images/s, what is left and how many were quarantined."""
    results: list[UnitResult] = []
    if not units:
        return results
    start_ray()
    interval_s = 0.5 if sys.stderr.isatty() else 10.0
    quarantined = 0
    with tqdm(total=sum(unit.inputs for unit in units), unit="image", mininterval=interval_s) as bar:
        for result in run_units(units, job, workers, use_gpu=use_gpu):
            results.append(result)
            quarantined += result.counts.quarantined
            bar.set_postfix(quarantined=quarantined, refresh=False)
            bar.update(result.counts.images)
    return results


def run_units(units: list[Unit], job: LabelJob, workers: int | None, *, use_gpu: bool = False) -> Iterator[UnitResult]:
    """Label units on a pool of actors, yielding what became of each when it is committed.

    Raises:
        ServiceError: a worker cannot read or write its store.
        UsageError: there is nothing to label on, and nothing says how many to wait for.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    processors = int(ray.cluster_resources().get("CPU", 0))
    use_gpu = use_gpu or gpus > 0
    workers = workers or (gpus if use_gpu else processors)
    if not workers:
        raise UsageError("the cluster has nothing to label on yet: give --workers N, and --use-gpu to wait for GPUs")
    rows = [{"unit": json.dumps(dataclasses.asdict(unit))} for unit in units]
    results = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map_batches(
        Labeller,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(units))),
        num_gpus=1 if use_gpu else 0,
        # Not shared out among fewer workers when few units are left: threads change the last digits of a label.
        num_cpus=0 if use_gpu else max(1, processor_share(workers)),
    )
    for row in results.iter_rows():
        result = result_from_json(row["result"])
        if result.error:
            raise ServiceError(f"{result.error}; the same command goes on with what is missing")
        yield result


def summary(total: Counts, results: list[UnitResult], seconds: float, run_uri: str) -> str:
    """The last lines that a job prints: what there is, how fast it went, what took the time."""
    labelled = sum(result.counts.images for result in results)
    rate = labelled / seconds if seconds and labelled else 0.0
    stages: collections.Counter[str] = collections.Counter()
    for result in results:
        stages.update(vars(result.seconds))
    lines = [
        f"images {total.images}  labels {total.labels}  quarantined {total.quarantined}  {rate:.1f} images/s",
        *(f"  quarantined {count}: {reason}" for reason, count in sorted(total.reasons.items())),
    ]
    if total.unknown_tags:
        counted = ", ".join(f"{tag} ({count})" for tag, count in sorted(total.unknown_tags.items()))
        lines.append(f"  tags that the model has no class for: {counted}")
    if total.quarantined:
        lines.append("  try these again with --only quarantined")
    if stages.total():
        shares = "  ".join(f"{stage} {value / stages.total():.0%}" for stage, value in stages.most_common())
        lines.append(f"slowest stage: {stages.most_common(1)[0][0]}  (workers' time: {shares})")
    return "\n".join([*lines, f"label set {run_uri}"])


if __name__ == "__main__":
    sys.exit(stage_main(add_arguments, run))
