"""``afa train``: train AFA on a shard set with Ray Train.

The driver checks the configuration and the shards, opens the MLflow run, starts the workers, and records what they
leave behind. Lost workers are started anew and go on from the newest checkpoint; after the loss of the driver the same
command with --resume does. Exit status: 0 trained, 1 failed (the run says why), 2 a mistake in the input, 130 and 143
interrupted by Ctrl-C and by SIGTERM (``ray job stop``, the end of a pod).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from afa_core.data.shards import DatasetIndex, dataset_digest
from afa_core.errors import InputError
from afa_core.model import build_model
from infra.object_store import ObjectError, find_object, join, read_object, write_object
from infra.tracking import RunLogger, answer_soon, open_run, safe_uri, tracking_uri
from pipelines.checkpoints import CheckpointStore
from pipelines.cli import causes, stage_main
from pipelines.config import ExperimentConfig, TrainConfig, experiment_to_values, load_experiment
from pipelines.driver_lease import DriverLease
from pipelines.errors import UsageError
from pipelines.label_sources import absolute_source
from pipelines.local_ray import processor_share, start_ray
from pipelines.patience import patiently
from pipelines.sent_files import send
from pipelines.shard_store import load_shard_set, verify_shard_set
from pipelines.training import WorkerSettings, checkpoints_uri, train_worker

RUN_FILE = "afa_run.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa train``."""
    parser.add_argument("dataset", help="shard set: folder or s3:// prefix with dataset.json")
    parser.add_argument("--config", help="YAML file, or the name of a shipped one (shapes_cpu, voc_mit_b1, ...)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override one value, e.g. optim.lr=1e-4; may be repeated")  # fmt: skip
    parser.add_argument("--storage", default="runs", help="folder or s3:// prefix where runs are kept (default: runs)")
    parser.add_argument("--run-name", help="default: the experiment's name and the time")
    parser.add_argument("--resume", metavar="RUN_NAME", help="go on with a run that was interrupted")
    parser.add_argument("--resume-existing", action="store_true",
                        help="go on with --run-name if it is there (for machines that repeat a command)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Train; prints the run's id and scores."""
    experiment = load_experiment(arguments.config, arguments.overrides)
    if arguments.resume_existing and not arguments.run_name:
        raise UsageError("--resume-existing goes with --run-name NAME")
    dataset, storage = absolute_source(arguments.dataset), absolute_source(arguments.storage)
    answer_soon()
    index = load_shard_set(dataset)
    check_inputs(index, experiment)
    verify_shard_set(dataset, index, ["train", "val"])
    start_ray(dashboard=True)
    workers = scaling(experiment.train)
    name = arguments.resume or arguments.run_name or f"{experiment.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    run_uri = join(storage, name)
    resume = check_name(run_uri, must=arguments.resume is not None, may=arguments.resume_existing)
    with DriverLease(run_uri) as lease:
        logger = attach_or_open(run_uri, experiment, index, dataset, resume=resume)
        print(f"run {name}: MLflow run {logger.run_id} at {safe_uri(logger.uri)}", flush=True)
        settings = WorkerSettings(
            experiment_to_values(experiment), dataset, run_uri, lease.name, logger.uri, logger.run_id,
            weights=send([Path(checkpoint)]) if (checkpoint := experiment.model.checkpoint) else None,
        )  # fmt: skip
        return finish(settings, workers, logger, experiment, name)


def check_inputs(index: DatasetIndex, experiment: ExperimentConfig) -> None:
    """What can be known to go wrong is said before any process starts.

    Raises:
        InputError: a split is missing or empty, or the model cannot be built.
    """
    for split in ("train", "val"):
        if split not in index.splits:
            raise InputError(f"the shard set has no split {split!r}, only {', '.join(index.splits) or 'none'}")
        if not index.splits[split].samples:
            raise InputError(f"the shard set's split {split!r} has no samples")
    build_model(experiment.model, len(index.classes))  # a wrong name or checkpoint shows here, not in every worker


def scaling(train: TrainConfig) -> ScalingConfig:
    """GPUs where the cluster has enough of them or ``train.use_gpu`` says so, else processors shared out evenly.

    Raises:
        UsageError: more workers than processors.
    """
    least = train.min_workers or train.workers
    number: Any = train.workers if least == train.workers else (least, train.workers)  # stubs know no pair
    use_gpu = train.use_gpu
    if use_gpu is None:
        use_gpu = ray.cluster_resources().get("GPU", 0) >= least
    size: dict[str, Any] = {"num_workers": number, "elastic_resize_monitor_interval_s": train.grow_check_s}
    if use_gpu:
        return ScalingConfig(use_gpu=True, **size)
    share = processor_share(train.workers) or processor_share(least)
    if not share:
        raise UsageError(
            f"train.workers={train.workers}, but the cluster has {int(ray.cluster_resources().get('CPU', 0))} "
            "processors; wait for its nodes, or set train.use_gpu=true where it starts nodes with GPUs on demand"
        )
    return ScalingConfig(resources_per_worker={"CPU": share}, **size)


def check_name(run_uri: str, *, must: bool, may: bool) -> bool:
    """Whether to go on with a run of this name, which ``must`` or ``may`` be there.

    Raises:
        UsageError: saying what would be right.
    """
    storage, name = run_uri.rsplit("/", 1)
    there = find_object(join(run_uri, RUN_FILE)) is not None
    if must and not there:
        raise UsageError(f"no interrupted run at {run_uri}: look for its name in {storage}")
    if there and not (must or may):
        raise UsageError(f"there is a run at {run_uri} already: go on with --resume {name} or name another")
    return there


def attach_or_open(
    run_uri: str, experiment: ExperimentConfig, index: DatasetIndex, dataset: str, *, resume: bool
) -> RunLogger:
    """The MLflow run of this training run: a new one, or that of the interrupted run.

    Raises:
        UsageError: the configuration has changed.
    """
    uri = tracking_uri(experiment.tracking.uri)
    record, name = join(run_uri, RUN_FILE), run_uri.rsplit("/", 1)[1]
    # Where it is recorded is no part of the experiment, and may hold a password.
    values = {key: value for key, value in experiment_to_values(experiment).items() if key != "tracking"}
    if resume:
        earlier = read_record(record)
        if earlier["experiment"] != values or earlier["dataset_digest"] != dataset_digest(index):
            raise UsageError(f"run {name} was started with another configuration or shard set: use the same")
        logger = RunLogger.attach(uri, earlier["run_id"])
        logger.reopen()
        logger.set_tags({"afa.status": "running"})
        return logger
    logger = open_run(
        uri,
        experiment.tracking.experiment,
        name,
        {**values, "dataset": dataset},
        {
            "afa.status": "running",
            "afa.dataset_digest": dataset_digest(index),
            "afa.git_commit": git_commit(),
            "afa.val_data": dataset,
            "afa.val_shards": json.dumps([shard.sha256 for shard in index.splits["val"].shards]),
            "afa.classes": json.dumps(index.classes),
        },
    )
    values = {"run_id": logger.run_id, "experiment": values, "dataset_digest": dataset_digest(index)}
    write_object(record, json.dumps(values).encode())
    return logger


def read_record(uri: str) -> dict[str, Any]:
    """What the run's first driver wrote.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        values: dict[str, Any] = json.loads(read_object(uri)[0])
        return {name: values[name] for name in ("run_id", "experiment", "dataset_digest")}
    except (ObjectError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{uri} is no record of a run: {error}") from error


def finish(
    settings: WorkerSettings, workers: ScalingConfig, logger: RunLogger, experiment: ExperimentConfig, name: str
) -> int:
    """Start the workers, wait for them, and record the outcome in the run.

    Raises:
        UsageError, InputError: the data are at fault.
        KeyboardInterrupt: Ctrl-C or SIGTERM, with words on how to go on.
    """
    try:
        # Ray keeps a record of its own, which nothing here depends on.
        with tempfile.TemporaryDirectory(prefix="afa-ray-train-", ignore_cleanup_errors=True) as scratch:
            # In a thread: in the main one Ray Train answers SIGINT by ending the process, with nothing recorded.
            fitted = ThreadPoolExecutor(1).submit(train, settings, workers, experiment, name, scratch)
            outcome = fitted.result()
        if "error" not in outcome:
            return record_success(settings, logger, experiment, outcome)
    except KeyboardInterrupt as interrupt:
        logger.finish("KILLED", {"afa.status": "interrupted"}, patience_s=0)  # there may be three seconds left
        raise type(interrupt)(f"go on with --resume {name}") from None
    except BaseException as error:
        reason = next((cause for cause in causes(error) if not isinstance(cause, ray.train.TrainingFailedError)), error)
        outcome = {"error": f"{type(reason).__name__}: {reason}", "users": False}
        if not isinstance(error, Exception) or any(isinstance(cause, InputError) for cause in causes(error)):
            record_failure(logger, outcome["error"])
            raise
    record_failure(logger, outcome["error"])
    say_what_is_missing(outcome)
    if outcome["users"]:
        raise UsageError(outcome["error"])
    print(f"training failed: {outcome['error']}", file=sys.stderr)
    return 1


def train(
    settings: WorkerSettings, workers: ScalingConfig, experiment: ExperimentConfig, name: str, scratch: str
) -> dict[str, Any]:
    """Run the workers to their end; what rank 0 returns."""
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # as above
        train_loop_config=vars(settings),
        scaling_config=workers,
        run_config=RunConfig(
            name=name,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=experiment.train.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]  # stubs show Train V1
        ),
    )
    outcome: dict[str, Any] = trainer.fit().return_value  # type: ignore[attr-defined]  # as above
    return outcome


def record_failure(logger: RunLogger, reason: str) -> None:
    """Close the run with the reason."""
    logger.finish("FAILED", {"afa.status": "failed", "afa.error": reason[:500]})


def record_success(
    settings: WorkerSettings, logger: RunLogger, experiment: ExperimentConfig, outcome: dict[str, Any]
) -> int:
    """Close the run with its best checkpoint; 0."""
    metric = experiment.train.best_metric
    best = patiently(CheckpointStore(checkpoints_uri(settings.run_uri), metric=metric).best)
    assert best is not None  # the last step is always evaluated
    closed = logger.finish(
        "FINISHED",
        {
            "afa.status": "finished",
            "afa.best_checkpoint": best.uri,
            "afa.best_score": str(best.scores[metric]),
            "afa.speed": outcome["speed"],
        },
        step=experiment.optim.total_steps,
        metrics={f"best.{name}": value for name, value in best.scores.items()},
    )
    print(outcome["speed"])
    print(f"best checkpoint {best.uri}")
    print("  ".join(f"{name} {value:.3f}" for name, value in best.scores.items()))
    say_what_is_missing(outcome)
    if closed:
        print(f"register it:  afa register {logger.run_id} --name NAME")
    else:
        print("MLflow did not take the end of the run; the same command with --resume tells it again", file=sys.stderr)
    return 0


def say_what_is_missing(outcome: dict[str, Any]) -> None:
    """What MLflow did not take of the numbers."""
    if outcome.get("unsent"):
        print(outcome["unsent"], file=sys.stderr)


def git_commit() -> str:
    """Commit of the code that runs, or "unknown" outside a checkout or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(stage_main(add_arguments, run))
