"""``afa train``: train AFA on a shard set with Ray Train.

The driver checks the configuration and the shards, opens the MLflow run, starts the workers, and records what they
leave behind. Exit status: 0 trained, 1 failed (the run says why), 2 a mistake in the input.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import ray
import ray.train
from ray.train import CheckpointConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from afa_core.data.shards import DatasetIndex, dataset_digest, load_dataset_index, verify_shards
from afa_core.data.stream import check_enough_shards
from afa_core.errors import InputError
from afa_core.model import build_model
from infra.tracking import RunLogger, open_run, safe_uri, tracking_uri
from pipelines.cli import causes, stage_main
from pipelines.config import ExperimentConfig, TrainConfig, experiment_to_values, load_experiment
from pipelines.errors import UsageError
from pipelines.local_ray import processor_share, start_ray
from pipelines.training import WorkerSettings, train_worker

RUN_FILE = "afa_run.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa train``."""
    parser.add_argument("dataset", type=Path, help="shard set (folder with dataset.json)")
    parser.add_argument("--config", help="YAML file, or the name of a shipped one (shapes_cpu, voc_mit_b1, ...)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override one value, e.g. optim.lr=1e-4; may be repeated")  # fmt: skip
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    parser.add_argument("--run-name", help="default: the experiment's name and the time")
    parser.add_argument("--resume", metavar="RUN_NAME", help="go on with a run that was interrupted")
    parser.add_argument("--resume-existing", action="store_true",
                        help="go on with --run-name if it is there (for machines that repeat a command)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Train; prints the run's id and scores."""
    experiment = load_experiment(arguments.config, arguments.overrides)
    if arguments.resume_existing and not arguments.run_name:
        raise UsageError("--resume-existing goes with --run-name NAME")
    dataset = arguments.dataset.absolute()
    index = load_dataset_index(dataset)
    check_inputs(index, experiment)
    verify_shards(dataset, index, ["train", "val"])
    start_ray()
    storage = arguments.storage.absolute()
    name = arguments.resume or arguments.run_name or f"{experiment.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    resume = arguments.resume is not None or (arguments.resume_existing and (storage / name / RUN_FILE).is_file())
    logger = attach_or_open(storage / name, experiment, index, dataset, resume=resume)
    print(f"run {name}: MLflow run {logger.run_id} at {safe_uri(logger.uri)}", flush=True)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=asdict(
            WorkerSettings(experiment_to_values(experiment), str(dataset), logger.uri, logger.run_id)
        ),
        scaling_config=scaling(experiment.train),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]  # stubs show Train V1
            checkpoint_config=CheckpointConfig(
                num_to_keep=experiment.train.keep_checkpoints,
                checkpoint_score_attribute=experiment.train.best_metric,
                checkpoint_score_order="max",
            ),
        ),
    )
    return finish(trainer, logger, experiment, name)


def check_inputs(index: DatasetIndex, experiment: ExperimentConfig) -> None:
    """What can be known to go wrong is said before any process starts.

    Raises:
        InputError: a split is missing, there are fewer training shards than readers, or the model cannot be built.
    """
    for split in ("train", "val"):
        if split not in index.splits:
            raise InputError(f"the shard set has no split {split!r}, only {', '.join(index.splits) or 'none'}")
    readers = experiment.train.workers * max(1, experiment.data.loader_workers)
    check_enough_shards(len(index.splits["train"].shards), readers)
    build_model(experiment.model, len(index.classes))  # a wrong name or checkpoint shows here, not in every worker


def scaling(train: TrainConfig) -> ScalingConfig:
    """GPUs where the cluster has enough of them or ``train.use_gpu`` says so, else processors shared out evenly.

    Raises:
        UsageError: more workers than processors.
    """
    workers = train.workers
    use_gpu = train.use_gpu
    if use_gpu is None:
        use_gpu = ray.cluster_resources().get("GPU", 0) >= workers
    if use_gpu:
        return ScalingConfig(num_workers=workers, use_gpu=True)
    share = processor_share(workers)
    if not share:
        raise UsageError(
            f"train.workers={workers}, but the cluster has {int(ray.cluster_resources().get('CPU', 0))} processors; "
            "wait for its nodes, or set train.use_gpu=true where it starts nodes with GPUs on demand"
        )
    return ScalingConfig(num_workers=workers, resources_per_worker={"CPU": share})


def attach_or_open(
    folder: Path, experiment: ExperimentConfig, index: DatasetIndex, dataset: Path, *, resume: bool
) -> RunLogger:
    """The MLflow run of this training run: a new one, or that of the interrupted run.

    Raises:
        UsageError: the name is taken, or there is nothing to resume, or the configuration has changed.
    """
    uri = tracking_uri(experiment.tracking.uri)
    record = folder / RUN_FILE
    # Where it is recorded is no part of the experiment, and may hold a password.
    values = {key: value for key, value in experiment_to_values(experiment).items() if key != "tracking"}
    if resume:
        if not record.is_file():
            raise UsageError(f"no interrupted run at {folder}: look for its name in {folder.parent}")
        earlier = json.loads(record.read_text())
        if earlier["experiment"] != values or earlier["dataset_digest"] != dataset_digest(index):
            raise UsageError(f"run {folder.name} was started with another configuration or shard set: use the same")
        logger = RunLogger.attach(uri, earlier["run_id"])
        logger.reopen()
        logger.set_tags({"afa.status": "running"})
        return logger
    if folder.exists():
        raise UsageError(f"there is a run at {folder} already: go on with --resume {folder.name} or name another")
    logger = open_run(
        uri,
        experiment.tracking.experiment,
        folder.name,
        {**values, "dataset": str(dataset)},
        {
            "afa.status": "running",
            "afa.dataset_digest": dataset_digest(index),
            "afa.git_commit": git_commit(),
            "afa.val_data": str(dataset),
            "afa.val_shards": json.dumps([shard.sha256 for shard in index.splits["val"].shards]),
            "afa.classes": json.dumps(index.classes),
        },
    )
    folder.mkdir(parents=True)
    record.write_text(
        json.dumps({"run_id": logger.run_id, "experiment": values, "dataset_digest": dataset_digest(index)})
    )
    return logger


def finish(trainer: TorchTrainer, logger: RunLogger, experiment: ExperimentConfig, name: str) -> int:
    """Wait for the workers and record the outcome in the run."""
    try:
        # In a thread: in the main one Ray Train answers SIGINT by ending the process, with nothing recorded.
        result = ThreadPoolExecutor(1).submit(trainer.fit).result()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            logger.set_tags({"afa.status": "interrupted"})
            logger.finish("KILLED")
            ray.shutdown()  # ends the workers, and with them the thread
            raise KeyboardInterrupt(f"go on with --resume {name}") from None
        reason = next((cause for cause in causes(error) if not isinstance(cause, ray.train.TrainingFailedError)), error)
        logger.set_tags({"afa.status": "failed", "afa.error": f"{type(reason).__name__}: {reason}"[:500]})
        logger.finish("FAILED")
        if not isinstance(error, Exception) or any(isinstance(cause, InputError) for cause in causes(error)):
            raise
        print(f"training failed: {type(reason).__name__}: {reason}", file=sys.stderr)
        return 1
    metric = experiment.train.best_metric
    best, scores = max(result.best_checkpoints or [], key=lambda pair: pair[1].get(metric, float("-inf")))
    scores = {name: value for name, value in scores.items() if isinstance(value, float)}
    logger.log_metrics({f"best.{name}": value for name, value in scores.items()}, experiment.optim.total_steps)
    logger.set_tags(
        {"afa.status": "finished", "afa.best_checkpoint": best.path, "afa.best_score": str(scores.get(metric))}
    )
    logger.finish("FINISHED")
    print(f"best checkpoint {best.path}")
    print("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    print(f"register it:  afa register {logger.run_id} --name NAME")
    return 0


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
