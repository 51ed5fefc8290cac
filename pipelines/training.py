"""What every training worker runs: the loop, evaluation, checkpoints, logging.

``train.py`` starts it in N processes. Rank 0 alone writes checkpoints, to MLflow and to the terminal. A checkpoint is a
bundle (see ``afa_core.checkpoint``) with the optimiser's state and the step beside it. The step is all there is to
know: which samples come next follows from it (``afa_core.data.order``), and so do the random states of every worker,
which are set from (seed, step, rank) before each step.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from afa_core.batch_norm import synchronise_batch_norm
from afa_core.checkpoint import load_training_state, load_weights, save_bundle, save_training_state
from afa_core.data.train_samples import TrainBatch
from afa_core.data.transforms import to_network_input
from afa_core.errors import InputError
from afa_core.model import build_model
from afa_core.optim import apply_schedule, build_optimizer
from afa_core.step import Batch, NonFiniteLossError, check_finite, training_step
from infra.errors import ServiceError
from infra.tracking import RunLogger
from pipelines.checkpoints import CheckpointStore, SavedCheckpoint
from pipelines.config import ExperimentConfig, experiment_from_values
from pipelines.feed import step_batches
from pipelines.pictures import COLUMNS, Tile, grid_png, scored_rows
from pipelines.progress import Progress, peak_memory_gib
from pipelines.scoring import Scores, evaluation_samples, score_samples
from pipelines.shard_store import load_shard_set, split_files

STATE = "training_state.pt"
# A share of bad samples means nothing before so many were seen.
BUDGET_FROM_SAMPLES = 100
NAMED_SKIPS = 3


@dataclass(frozen=True)
class WorkerSettings:
    """What the driver hands to the workers; plain values, so that it travels."""

    experiment: dict[str, Any]
    dataset: str
    checkpoints: str
    tracking_uri: str
    run_id: str


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Entry point of one worker, called by Ray Train with the fields of ``WorkerSettings``.

    Returns:
        ``speed``, words on what limited it; or ``error`` and whether the user can mend it, where all workers stopped
        together and starting them again would end the same.
    """
    # The gradient of a depth-wise convolution has strides of its own; a copy of a few kilobytes is no news.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    settings = WorkerSettings(**config)
    worker = Worker(settings, experiment_from_values(settings.experiment, "the job's configuration"))
    try:
        worker.run()
    except NonFiniteLossError as error:
        return {"error": str(error), "users": False}
    except TooManyBadSamples as error:
        return {"error": str(error), "users": True}
    return {"speed": worker.progress.bottleneck()}


class TooManyBadSamples(InputError):
    """All workers together have seen more unusable samples than is allowed."""


class Worker:
    """One process of a training job."""

    def __init__(self, settings: WorkerSettings, experiment: ExperimentConfig) -> None:
        self.settings = settings
        self.experiment = experiment
        train = experiment.train
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.index = load_shard_set(settings.dataset)
        self.checkpoints = CheckpointStore(
            settings.checkpoints, keep_last=train.keep_last, keep_best=train.keep_best, metric=train.best_metric
        )
        torch.manual_seed(train.seed)  # all workers start from the same weights
        self.model = build_model(experiment.model, len(self.index.classes))
        if self.world_size > 1:
            synchronise_batch_norm(self.model, self.device)
        self.optimizer = build_optimizer(
            self.model, experiment.optim, pretrained=experiment.model.pretrained is not None
        )
        self.step = 0
        # Of all workers since they were started: shards that were mended are given another chance.
        self.seen = self.skipped = 0
        self.skips: Counter[str] = Counter()  # this worker's, by reason
        self._resume()
        self.forward = self._wrap()
        self.history: dict[int, dict[str, float]] = {}  # what each step recorded since it was last sent
        self.logger = RunLogger.attach(settings.tracking_uri, settings.run_id) if self.rank == 0 else None
        # Steps that are done once more after a restart are in the run already.
        self.logged_to = self.logger.last_step("loss.cls") if self.logger else -1
        self.scored_to = self.logger.last_step("val.cam_miou") if self.logger else -1
        self.progress = Progress("step", experiment.optim.total_steps, self.step, window=train.log_every)

    def run(self) -> None:
        """Train to the last step, evaluating and saving on the way and at the end."""
        train, total = self.experiment.train, self.experiment.optim.total_steps
        self._say(f"{self.world_size} of {train.workers} workers, {train.global_batch} pictures a step")
        batches = step_batches(
            self.settings.dataset, self.index, self.experiment,
            first_step=self.step, rank=self.rank, world_size=self.world_size,
        )  # fmt: skip
        self.model.train()
        while self.step < total:
            began = time.monotonic()
            parts = next(batches)
            self.progress.waited(time.monotonic() - began)
            self._train_step(parts)
            self.step += 1
            if self.step % train.eval_every == 0 or self.step == total:
                self._save(self._evaluate())
                self.progress.pause()
            elif self.step % train.checkpoint_every == 0:
                self._save({})
        self.checkpoints.wait()

    def _train_step(self, parts: list[TrainBatch]) -> None:
        """One optimiser step over this worker's parts of the global batch.

        Every sample of all workers weighs the same, however many a worker or a part has.
        """
        experiment = self.experiment
        apply_schedule(self.optimizer, self.step, experiment.optim)
        seed_step(experiment.train.seed, self.step, self.rank)
        samples = self._count(parts)
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            synchronised = self.world_size == 1 or number == len(parts) - 1
            with nullcontext() if synchronised else self.forward.no_sync():  # type: ignore[operator]
                result = training_step(
                    self.model, self._to_batch(part), self.step, experiment.cam, experiment.par, experiment.loss,
                    forward=self.forward,
                )  # fmt: skip
                (result.loss * (len(part.keys) * self.world_size / max(1, samples))).backward()
            for name, term in result.terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + term.detach() * (
                    len(part.keys) / max(1, samples)
                )
        terms = self._sum_over_workers(sums)
        losses = {f"loss.{name}": float(value) for name, value in terms.items()}
        lr = self.optimizer.param_groups[0]["lr"]
        self.history[self.step] = {**losses, "lr": lr, **self.progress.rates(), "data.skipped": float(self.skipped)}
        try:
            check_finite(terms, self.step)
        except NonFiniteLossError:
            self._save({})  # the weights of before this step
            self.checkpoints.wait()
            raise
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.count(samples)
        if self.step % experiment.train.log_every == 0:
            self._log_history()
            self._say(self.progress.line(result.phase.value, {**losses, "lr": lr}))

    def _count(self, parts: list[TrainBatch]) -> int:
        """Usable samples of this step, of all workers; also keeps count of the others.

        Raises:
            TooManyBadSamples: in every worker at the same step.
        """
        skipped = [skip for part in parts for skip in part.skipped]
        for skip in skipped:
            if self.skips.total() < NAMED_SKIPS:
                sys.stdout.write(f"skipped sample {skip.key}: {skip.reason}\n")
            self.skips[skip.reason] += 1
        counts = torch.tensor([sum(len(part.keys) for part in parts), len(skipped)], device=self.device)
        if self.world_size > 1:
            dist.all_reduce(counts)
        samples, bad = counts.tolist()
        self.seen += samples + bad
        self.skipped += bad
        allowed = self.experiment.data.max_bad_share
        if self.seen >= BUDGET_FROM_SAMPLES and self.skipped > allowed * self.seen:
            reasons: Counter[str] = sum(self._gather(self.skips), Counter())
            self._save({})
            self.checkpoints.wait()
            raise TooManyBadSamples(
                f"{self.skipped} of {self.seen} training samples cannot be used (data.max_bad_share={allowed}): "
                f"{dict(reasons)}"
            )
        return int(samples)

    def _to_batch(self, part: TrainBatch) -> Batch:
        """A part on the device; where none of its samples could be used a blank one, which weighs nothing."""
        if part.keys:
            cls_label = part.cls_label.to(self.device, non_blocking=True)
            return Batch(to_network_input(part.image, self.device), cls_label, part.box)
        side = self.experiment.data.crop_px
        return Batch(
            torch.zeros(1, 3, side, side, device=self.device),
            torch.zeros(1, len(self.index.classes), device=self.device),
            torch.tensor([[0, side, 0, side]]),
        )

    def _evaluate(self) -> dict[str, float]:
        """Scores on the validation shards, over all workers."""
        experiment = self.experiment
        files = split_files(self.settings.dataset, self.index, "val", experiment.data.cache_gib)
        samples = evaluation_samples(
            files.paths(), self.index.classes, rank=self.rank, world_size=self.world_size,
            limit=experiment.train.eval_samples,
        )  # fmt: skip
        scores = Scores(len(self.index.classes))
        rows: list[list[Tile]] = []
        for batch in score_samples(self.model, samples, self.index.classes, experiment.cam, experiment.par, scores):
            rows += scored_rows(batch)[: experiment.train.grid_pictures - len(rows)]
        scores.all_reduce(self.device)
        summary = scores.summary()
        self._say(f"step {self.step}  validation  " + "  ".join(f"{k} {v:.3f}" for k, v in summary.items()))
        if self.logger and self.step > self.scored_to:
            self.logger.log_metrics({f"val.{name}": value for name, value in summary.items()}, self.step)
            if rows:
                self.logger.log_picture(grid_png(rows, COLUMNS), f"pictures/step-{self.step:06d}.png")
        return summary

    def _wrap(self) -> nn.Module:
        """The network on its device, wrapped for data parallelism where there are several workers."""
        wrapped: nn.Module = ray.train.torch.prepare_model(self.model)
        return wrapped

    def _sum_over_workers(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms summed over workers, so that all see a non-finite one and stop together."""
        values = torch.stack(list(terms.values()))
        if self.world_size > 1:
            dist.all_reduce(values)
        return dict(zip(terms, values, strict=True))

    def _gather(self, value: Any) -> list[Any]:
        """The values of all workers, by rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def _save(self, scores: dict[str, float]) -> None:
        """Save the state of before the next step; rank 0 has all there is to save."""
        experiment = self.experiment
        self._log_history()  # who goes on from here will not do these steps again
        if self.rank == 0:
            folder = Path(tempfile.mkdtemp(prefix="afa-checkpoint-"))
            save_bundle(
                folder, self.model, self.index.classes, experiment.model, experiment.cam, experiment.par,
                experiment.label,
            )  # fmt: skip
            save_training_state(folder / STATE, {"step": self.step, "optimizer": self.optimizer.state_dict()})
            self.checkpoints.save(self.step, folder, scores)
        if scores:  # what Ray's dashboard shows; all workers wait for each other in it
            ray.train.report({"step": self.step, **scores})

    def _resume(self) -> None:
        """Load the run's newest checkpoint, if it has one."""
        with tempfile.TemporaryDirectory(prefix="afa-resume-") as scratch:
            # The newest may be younger for one worker than for another, or damaged: rank 0 decides.
            newest = self._newest(Path(scratch)) if self.rank == 0 else None
            step = self._gather(newest.step if newest else None)[0]
            if step is None:
                return
            if newest is None:
                newest = next(saved for saved in self.checkpoints.load_all() if saved.step == step)
                newest.fetch(Path(scratch) / str(step))
            folder = Path(scratch) / str(step)
            load_weights(self.model, folder)
            state = load_training_state(folder / STATE)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self._say(f"goes on from step {self.step}")

    def _newest(self, scratch: Path) -> SavedCheckpoint | None:
        """The newest checkpoint that can be read, fetched."""
        for saved in reversed(self.checkpoints.load_all()):
            try:
                saved.fetch(scratch / str(saved.step))
            except ServiceError as error:
                self._say(f"{error}; taking the one before")
            else:
                return saved
        return None

    def _say(self, line: str) -> None:
        if self.rank == 0:
            # Not print(): Ray Train sends that to its own log as well, and the terminal shows both.
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def _log_history(self) -> None:
        """Send every step's numbers; together, so that a step does not wait for the tracking server."""
        if self.logger:
            memory = {"memory_gib": peak_memory_gib(self.device)}
            new = {step: values | memory for step, values in self.history.items() if step > self.logged_to}
            self.logger.log_history(new)
        self.history.clear()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set the random generators of this process for one step."""
    state = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
    random.seed(state)
    np.random.seed(state % 2**32)
    torch.manual_seed(state % 2**63)
