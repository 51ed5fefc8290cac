"""What every training worker runs: the loop, evaluation, checkpoints, logging.

``train.py`` starts it in N processes. Rank 0 alone writes to MLflow and to the terminal. A checkpoint is a bundle
(see ``afa_core.checkpoint``) with training state beside it: optimiser and step, and the random state of every rank.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from afa_core.checkpoint import (
    load_training_state,
    load_weights,
    random_state,
    save_bundle,
    save_training_state,
    set_random_state,
)
from afa_core.data.shards import load_dataset_index
from afa_core.data.stream import SampleStream
from afa_core.data.transforms import TrainTransform, collate
from afa_core.model import build_model
from afa_core.optim import apply_schedule, build_optimizer
from afa_core.step import Batch, NonFiniteLossError, check_finite, training_step
from infra.tracking import RunLogger
from pipelines.config import ExperimentConfig, experiment_from_values
from pipelines.pictures import COLUMNS, Tile, grid_png, scored_rows
from pipelines.progress import Progress
from pipelines.scoring import Scores, evaluation_samples, score_samples

STATE = "training_state.pt"


@dataclass(frozen=True)
class WorkerSettings:
    """What the driver hands to the workers; plain values, so that it travels."""

    experiment: dict[str, Any]
    dataset: str
    tracking_uri: str
    run_id: str


def train_worker(config: dict[str, Any]) -> None:
    """Entry point of one worker, called by Ray Train with the fields of ``WorkerSettings``."""
    # The gradient of a depth-wise convolution has strides of its own; a copy of a few kilobytes is no news.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    settings = WorkerSettings(**config)
    worker = Worker(settings, experiment_from_values(settings.experiment, "the job's configuration"))
    worker.run()


class Worker:
    """One process of a training job."""

    def __init__(self, settings: WorkerSettings, experiment: ExperimentConfig) -> None:
        self.settings = settings
        self.experiment = experiment
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.index = load_dataset_index(settings.dataset)
        # Ranks draw different augmentations, but start from the same weights.
        torch.manual_seed(experiment.train.seed)
        self.model = build_model(experiment.model, len(self.index.classes))
        self.optimizer = build_optimizer(
            self.model, experiment.optim, pretrained=experiment.model.pretrained is not None
        )
        self.step = self._resume()
        self.forward = self._wrap()
        torch.manual_seed(experiment.train.seed + 1 + self.rank)
        self.history: dict[int, dict[str, float]] = {}  # what each step recorded since it was last sent
        self.logger = RunLogger.attach(settings.tracking_uri, settings.run_id) if self.rank == 0 else None
        self.progress = Progress("step", experiment.optim.total_steps, self.step, window=experiment.train.log_every)

    def run(self) -> None:
        """Train to the last step, evaluating and saving on the way and at the end."""
        train, total = self.experiment.train, self.experiment.optim.total_steps
        if self.restored_random_state is not None:
            set_random_state(self.restored_random_state)
        batches = self._batches()
        self.model.train()
        while self.step < total:
            self._train_step(next(batches))
            self.step += 1
            if self.step % train.eval_every == 0 or self.step == total:
                self._log_history()
                self._save(self._evaluate())
                self.progress.pause()

    def _train_step(self, batch: Batch) -> None:
        experiment = self.experiment
        apply_schedule(self.optimizer, self.step, experiment.optim)
        result = training_step(
            self.model,
            batch,
            self.step,
            experiment.cam,
            experiment.par,
            experiment.loss,
            forward=self.forward,
        )
        terms = self._mean_over_workers(result.terms)
        losses = {f"loss.{name}": float(value) for name, value in terms.items()}
        lr = self.optimizer.param_groups[0]["lr"]
        self.history[self.step] = {**losses, "lr": lr, "images_per_s": self.progress.images_per_s()}
        try:
            check_finite(terms, self.step)
        except NonFiniteLossError:
            self._log_history()
            self._save({"diverged": 1.0})  # the weights of before this step
            raise
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        self.optimizer.step()
        self.progress.count(len(batch.image) * self.world_size)
        if self.step % experiment.train.log_every == 0:
            self._log_history()
            self._say(self.progress.line(result.phase.value, {**losses, "lr": lr}))

    def _evaluate(self) -> dict[str, float]:
        """Scores on the validation shards, over all workers."""
        experiment = self.experiment
        samples = evaluation_samples(
            self.settings.dataset, self.index, rank=self.rank, world_size=self.world_size,
            limit=experiment.train.eval_samples,
        )  # fmt: skip
        scores = Scores(len(self.index.classes))
        rows: list[list[Tile]] = []
        for batch in score_samples(self.model, samples, self.index.classes, experiment.cam, experiment.par, scores):
            rows += scored_rows(batch)[: experiment.train.grid_pictures - len(rows)]
        scores.all_reduce(self.device)
        summary = scores.summary()
        self._say(f"step {self.step}  validation  " + "  ".join(f"{k} {v:.3f}" for k, v in summary.items()))
        if self.logger:
            self.logger.log_metrics({f"val.{name}": value for name, value in summary.items()}, self.step)
            if rows:
                self.logger.log_picture(grid_png(rows, COLUMNS), f"pictures/step-{self.step:06d}.png")
        return summary

    def _batches(self) -> Iterator[Batch]:
        """An endless stream of augmented batches of this rank's own shards."""
        data, train = self.experiment.data, self.experiment.train
        stream = SampleStream(
            self.settings.dataset,
            self.index,
            "train",
            TrainTransform(data, self.index.classes),
            data,
            seed=train.seed + self.step,  # a resumed run does not see the same beginning again
            rank=self.rank,
            world_size=self.world_size,
        )
        loader = DataLoader(stream, train.batch_size, num_workers=data.loader_workers, collate_fn=collate)
        for item in loader:
            yield Batch(item.image.to(self.device), item.cls_label.to(self.device), item.box)

    def _wrap(self) -> nn.Module:
        """The network on its device, wrapped for data parallelism where there are several workers."""
        if self.world_size > 1 and self.device.type == "cuda":
            # As published; on the CPU the layer does not exist and every worker keeps its own statistics.
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        wrapped: nn.Module = ray.train.torch.prepare_model(self.model)
        return wrapped

    def _mean_over_workers(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms averaged over workers, so that all see a non-finite one and stop together."""
        values = torch.stack([term.detach() for term in terms.values()])
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return dict(zip(terms, values, strict=True))

    def _save(self, metrics: dict[str, float]) -> None:
        """Report metrics with a checkpoint: weights and optimiser from rank 0, random state from every rank."""
        experiment = self.experiment
        with tempfile.TemporaryDirectory() as folder:
            if self.rank == 0:
                save_bundle(
                    folder, self.model, self.index.classes, experiment.model, experiment.cam, experiment.par,
                    experiment.label,
                )  # fmt: skip
                state = {"step": self.step, "optimizer": self.optimizer.state_dict()}
                save_training_state(Path(folder) / STATE, state)
            save_training_state(Path(folder) / f"random_state-{self.rank}.pt", random_state())
            ray.train.report({"step": self.step, **metrics}, checkpoint=Checkpoint.from_directory(folder))

    def _resume(self) -> int:
        """Load the run's last checkpoint, if it has one; the step to go on with."""
        self.restored_random_state: dict[str, Any] | None = None
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            load_weights(self.model, folder)
            state = load_training_state(Path(folder) / STATE)
            own = Path(folder) / f"random_state-{self.rank}.pt"
            if own.is_file():  # not there if the number of workers has grown
                self.restored_random_state = load_training_state(own)
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def _say(self, line: str) -> None:
        if self.rank == 0:
            # Not print(): Ray Train sends that to its own log as well, and the terminal shows both.
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def _log_history(self) -> None:
        """Send every step's numbers; together, so that a step does not wait for the tracking server."""
        if self.logger:
            self.logger.log_history(self.history)
        self.history.clear()
