"""``afa label``: write refined masks for a store of pictures or shards, as a Ray Data job.

The store is listed once into an inventory, which is cut into work units (``inventory``); actors that each hold the
model (``label_worker``) take one unit at a time from reading to commit (``labeller``), and the driver holds a window of
them at a time (``label_windows``). Running the same command again does only the units that are missing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ray.exceptions import RayError, RayTaskError

from afa_core.bundle import read_bundle_config
from afa_core.errors import InputError
from pipelines.cli import stage_main
from pipelines.driver_lease import DriverLease
from pipelines.errors import UsageError
from pipelines.inventory import list_generations
from pipelines.label_job import GOES_ON, LabelJob, UnitResult
from pipelines.label_leftovers import remove_leftovers
from pipelines.label_options import add_label_options, config_digest, label_config
from pipelines.label_plan import Plan, add_generations, check_output, count_plan, open_run, take_back
from pipelines.label_progress import LabelProgress
from pipelines.label_set import Counts, committed_table, count_rows, run_uri, waiting_units
from pipelines.label_sources import absolute_source, check_source
from pipelines.label_windows import run_units
from pipelines.last_words import last_words
from pipelines.local_ray import start_ray
from pipelines.model_files import find_model
from pipelines.unit_table import Unit

# Of these no other attempt is made: what is wrong stands in the inventory, or in a shard that would be read alike.
WRONG_NAMES = frozenset({"bad_key", "duplicate_key", "bad_path", "bad_uri"})


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
            with last_words(f"error: ended by force, or by Ray: {GOES_ON}"):
                label(arguments, job, source, output)
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(GOES_ON) from None
        except RayError as error:
            if isinstance(error, RayTaskError):  # this program's own error, which is to be seen
                raise
            said = str(error).splitlines()[0]
            print(f"error: Ray failed ({said}): {GOES_ON}", file=sys.stderr)
            return 1
    return 0


def label(arguments: argparse.Namespace, job: LabelJob, source: str, output: str) -> None:
    """List, label what is missing, clear up, sum up."""
    check_output(output, source)
    with DriverLease(job.run):
        add_generations(job, source, output, arguments)
        open_run(job, source)
        with committed_table(job.run) as done:
            plan = count_plan(job.run, done)
            if plan.done_units:
                print(f"{plan.done_units} of {plan.units} units are done already", flush=True)
            started = time.monotonic()
            try:
                outcome = label_units(waiting_units(job.run, done), plan, job, arguments)
            except InputError:  # the workers' of the model, which they are the first to load
                take_back(job)
                raise
        seconds = time.monotonic() - started
        remove_leftovers(job.run)
    # What this job did itself it has counted; a store of a billion pictures has 16 million markers to read.
    alone = not plan.done_units and len(list_generations(job.run)) == 1
    total = outcome.counts if alone else count_rows(job.run)
    print(summary(total, outcome, seconds, job.run))


def dry_run(arguments: argparse.Namespace, job: LabelJob, source: str, output: str, scratch: Path) -> None:
    """Print what ``label`` would do; a store that is not listed yet is listed into ``scratch``."""
    check_output(output, source)
    if arguments.incremental or arguments.only:
        raise UsageError("--dry-run plans the labelling of what is listed: leave --incremental and --only out")
    if not list_generations(job.run):
        job = dataclasses.replace(job, run=str(scratch / "plan"))
        add_generations(job, source, output, arguments)
    from pipelines.label_estimate import describe_plan  # and torch with it, for which nothing else here waits

    with committed_table(job.run) as done:
        plan = count_plan(job.run, done)
        print(describe_plan(job, plan, waiting_units(job.run, done), arguments.workers))


def build_job(arguments: argparse.Namespace, bundle_dir: Path, model: str, output: str) -> LabelJob:
    """Job from the model's own labelling configuration and the options that override it.

    Raises:
        InputError: the folder holds no usable model.
        UsageError: an option is out of range.
    """
    bundle = read_bundle_config(bundle_dir)
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


@dataclasses.dataclass
class Outcome:
    """What a job has done so far."""

    counts: Counts = dataclasses.field(default_factory=Counts)
    stages: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, result: UnitResult) -> None:
        """Count a unit in."""
        self.counts.add(result.counts)
        self.stages.update(vars(result.seconds))


def label_units(units: Iterator[Unit], plan: Plan, job: LabelJob, arguments: argparse.Namespace) -> Outcome:
    """Label units, with a bar that shows images/s, what is left and how many were quarantined."""
    outcome = Outcome()
    if not plan.waiting_units:
        return outcome
    start_ray()
    with LabelProgress(plan.waiting_inputs) as progress:
        for result in run_units(units, job, arguments.workers, use_gpu=arguments.use_gpu):
            outcome.add(result)
            progress.add(result)
    return outcome


def summary(total: Counts, outcome: Outcome, seconds: float, run_uri: str) -> str:
    """The last lines that a job prints: what there is, how fast it went, what took the time."""
    labelled, stages = outcome.counts.images, outcome.stages
    rate = labelled / seconds if seconds and labelled else 0.0
    lines = [
        f"images {total.images}  labels {total.labels}  quarantined {total.quarantined}  {rate:.1f} images/s",
        *(f"  quarantined {count}: {reason}" for reason, count in sorted(total.reasons.items())),
    ]
    if total.unknown_tags:
        counted = ", ".join(f"{tag} ({count})" for tag, count in sorted(total.unknown_tags.items()))
        lines.append(f"  tags that the model has no class for: {counted}")
    again = sum(count for reason, count in total.reasons.items() if reason not in WRONG_NAMES)
    if again:
        lines.append("  --only quarantined tries again what may be read another time")
    if stages.total():
        shares = "  ".join(f"{stage} {value / stages.total():.0%}" for stage, value in stages.most_common())
        lines.append(f"slowest stage: {stages.most_common(1)[0][0]}  (workers' time: {shares})")
    return "\n".join([*lines, f"label set {run_uri}"])


if __name__ == "__main__":
    sys.exit(stage_main(add_arguments, run))
