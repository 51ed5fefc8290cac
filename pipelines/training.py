"""What every training worker runs: the loop, evaluation, checkpoints, logging.

``train.py`` starts it in N processes. Rank 0 alone writes checkpoints, to MLflow and to the terminal. A checkpoint is a
bundle (see ``afa_core.checkpoint``) with the optimiser's state and the step beside it. The step is all there is to
know: which samples come next follows from it (``afa_core.data.order``), and so do the random states of every worker,
which are set from (seed, step, rank) before each step. A checkpoint is taken every half interval, and before more than
``train.checkpoint_every`` steps could be lost, training waits for it to be in the store.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from afa_core.batch_norm import synchronise_batch_norm
from afa_core.data.train_samples import TrainBatch
from afa_core.data.transforms import to_network_input
from afa_core.errors import InputError
from afa_core.finite import NonFiniteStateError, check_finite_gradients
from afa_core.model import AFANet, build_model
from afa_core.optim import apply_schedule, build_optimizer
from afa_core.step import Batch, NonFiniteLossError, check_finite, training_step
from infra.history import HistorySender
from infra.object_store import join
from infra.tracking import CLOSING_S, RunLogger, answer_soon
from pipelines.bad_share import BadShare
from pipelines.checkpoints import CheckpointStore
from pipelines.config import ExperimentConfig, experiment_from_values
from pipelines.feed import step_batches
from pipelines.fence import Fence, Fenced
from pipelines.patience import patiently
from pipelines.pictures import COLUMNS, Tile, grid_png, scored_rows
from pipelines.progress import Progress, peak_memory_gib
from pipelines.run_state import check_state, read_state, seed_step, write_state
from pipelines.scoring import Scores, evaluation_samples, score_samples
from pipelines.sent_files import SentFiles, received
from pipelines.shard_store import load_shard_set, split_files
from pipelines.speed import StepProfiler, apply_speed, check_compiler, uncompiled
from pipelines.worker_group import StepFacts, WorkerGroup

CHECKPOINTS = "checkpoints"
NAMED_SKIPS = 3


@dataclass(frozen=True)
class WorkerSettings:
    """What the driver hands to the workers; plain values, so that it travels, and the file of the first weights."""

    experiment: dict[str, Any]
    dataset: str
    run_uri: str
    driver: str
    tracking_uri: str
    run_id: str
    weights: SentFiles | None = None


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Entry point of one worker, called by Ray Train with the fields of ``WorkerSettings``.

    Returns:
        ``speed``, words on what limited it; or ``error`` and whether the user can mend it, where all workers stopped
        together and starting them again would end the same. ``unsent``: words on what MLflow did not take.
    """
    # The gradient of a depth-wise convolution has strides of its own; a copy of a few kilobytes is no news.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    settings = WorkerSettings(**config)
    answer_soon()
    experiment = experiment_from_values(settings.experiment, "the job's configuration")
    try:
        check_compiler(experiment.speed)
    except InputError as error:
        return {"error": str(error), "users": True, "unsent": ""}
    worker = Worker(settings, experiment)
    try:
        worker.run()
        outcome: dict[str, Any] = {"speed": worker.progress.bottleneck()}
    except (NonFiniteLossError, NonFiniteStateError) as error:
        outcome = {"error": str(error), "users": False}
    except TooManyBadSamples as error:
        outcome = {"error": str(error), "users": True}
    return outcome | {"unsent": worker.close()}


class TooManyBadSamples(InputError):
    """All workers together have seen more unusable samples than is allowed."""


class Worker:
    """One process of a training job."""

    def __init__(self, settings: WorkerSettings, experiment: ExperimentConfig) -> None:
        self.settings = settings
        self.experiment = experiment
        train = experiment.train
        self.group = WorkerGroup()
        self.device = self.group.device
        leads = self.group.rank == 0
        self.fence = Fence(settings.run_uri, settings.driver) if leads else None
        if self.fence:
            patiently(self.fence.take)  # before anybody looks for the newest checkpoint
        self.index = patiently(partial(load_shard_set, settings.dataset))
        self.checkpoints = CheckpointStore(
            checkpoints_uri(settings.run_uri), self.fence,
            keep_last=train.keep_last, keep_best=train.keep_best, metric=train.best_metric,
        )  # fmt: skip
        self.model = self._first_model().to(self.device)
        apply_speed(experiment.speed, self.model.backbone)
        if self.group.size > 1:
            synchronise_batch_norm(self.model, self.device)
        self.optimizer = build_optimizer(
            self.model, experiment.optim, pretrained=experiment.model.pretrained is not None
        )
        self.bad_share = BadShare(experiment.data.max_bad_share)
        self.skips: Counter[str] = Counter()  # this worker's, by reason
        self.history = HistorySender(RunLogger.attach(settings.tracking_uri, settings.run_id)) if leads else None
        self.step = self.saved_step = 0
        self._resume()
        self.forward = self._wrap()
        self.progress = Progress("step", experiment.optim.total_steps, self.step, window=train.log_every)

    def _first_model(self) -> AFANet:
        """The network as training begins, the same for all workers."""
        config, classes = self.experiment.model, len(self.index.classes)
        torch.manual_seed(self.experiment.train.seed)
        if self.settings.weights is None:
            return build_model(config, classes)
        with received(self.settings.weights) as folder:
            (checkpoint,) = folder.iterdir()
            return build_model(replace(config, pretrained=str(checkpoint)), classes)

    def run(self) -> None:
        """Train to the last step, evaluating and saving on the way and at the end."""
        experiment = self.experiment
        train, total = experiment.train, experiment.optim.total_steps
        save_every = max(1, train.checkpoint_every // 2)
        self._say(f"{self.group.size} of {train.workers} workers, {train.global_batch} pictures a step")
        batches = step_batches(
            self.settings.dataset, self.index, experiment,
            first_step=self.step, rank=self.group.rank, world_size=self.group.size, pinned=self.device.type == "cuda",
        )  # fmt: skip
        profiler = StepProfiler(experiment.speed.profile_steps if self.history else 0, self._store)
        self.model.train()
        while self.step < total:
            if self.group.rank == 0 and self.step + 1 - self.checkpoints.safe_step > train.checkpoint_every:
                self._wait_for_upload()  # or this step would be one too many to lose
            began = time.monotonic()
            parts = next(batches)
            waited_s = time.monotonic() - began
            profiler.before_step()
            self._train_step(parts, waited_s)
            profiler.after_step(self.step)
            self.step += 1
            if self.step % train.eval_every == 0 or self.step == total:
                self._save(self._evaluate())
                self.progress.pause()
            elif self.step % save_every == 0:
                self._save({})
        profiler.close(self.step - 1)
        self._wait_for_upload()

    def close(self) -> str:
        """Let go of the run; words on what MLflow did not take."""
        if self.fence:
            self.fence.release()
        return self.history.close(CLOSING_S) if self.history else ""

    def _train_step(self, parts: list[TrainBatch], waited_s: float) -> None:
        """One optimiser step over this worker's parts of the global batch.

        Every sample of all workers weighs the same, however many a worker or a part has. Nothing is saved that the step
        has spoiled: where a loss or gradient is not finite, the newest checkpoint stays the one from before.
        """
        experiment = self.experiment
        apply_schedule(self.optimizer, self.step, experiment.optim)
        seed_step(experiment.train.seed, self.step, self.group.rank)
        facts = self._meet(parts, waited_s)
        samples = int(facts.samples)
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            synchronised = self.group.size == 1 or number == len(parts) - 1
            with nullcontext() if synchronised else self.forward.no_sync():  # type: ignore[operator]
                result = training_step(
                    self.model, self._to_batch(part), self.step, experiment.cam, experiment.par, experiment.loss,
                    forward=self.forward, bfloat16=experiment.speed.precision == "bfloat16",
                )  # fmt: skip
                (result.loss * (len(part.keys) * self.group.size / max(1, samples))).backward()
            for name, term in result.terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + term.detach() * (
                    len(part.keys) / max(1, samples)
                )
        terms = self.group.sum(sums)
        self._record(terms, facts)
        check_finite(terms, self.step)
        check_finite_gradients(self.model, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.count(samples)
        if self.step % experiment.train.log_every == 0:
            self._say(self.progress.line(result.phase.value, self._numbers(terms)))
            if self.history:
                self.history.send()

    def _meet(self, parts: list[TrainBatch], waited_s: float) -> StepFacts:
        """What all workers tell each other before a step; they stop, or save what they have, together.

        Raises:
            TooManyBadSamples: in every worker at the same step.
            Fenced: likewise: these workers do not hold the run any more.
        """
        skipped = [skip for part in parts for skip in part.skipped]
        for skip in skipped:
            if self.skips.total() < NAMED_SKIPS:
                sys.stdout.write(f"skipped sample {skip.key}: {skip.reason}\n")
            self.skips[skip.reason] += 1
        usable = sum(len(part.keys) for part in parts)
        facts = self.group.meet(
            StepFacts(
                usable, len(skipped), waited_s, peak_memory_gib(self.device),
                fenced=self.fence is not None and bool(self.fence.lost),
            )
        )  # fmt: skip
        self.progress.waited(facts.waited_s)
        if facts.fenced:
            raise Fenced(self.fence.lost if self.fence else "another group of workers has taken the run")
        self.bad_share.count(int(facts.samples + facts.bad), int(facts.bad))
        problem = self.bad_share.problem()
        if problem:
            reasons: Counter[str] = sum(self.group.gather(self.skips), Counter())
            self._save({})
            self._wait_for_upload()
            raise TooManyBadSamples(f"{problem}: {dict(reasons)}")
        return facts

    def _numbers(self, terms: dict[str, Tensor]) -> dict[str, float]:
        losses = {f"loss.{name}": float(value) for name, value in terms.items()}
        return {**losses, "lr": self.optimizer.param_groups[0]["lr"]}

    def _record(self, terms: dict[str, Tensor], facts: StepFacts) -> None:
        """Keep this step's numbers, to be sent with those of other steps."""
        if self.history:
            rest = {"data.skipped": float(self.bad_share.bad), "memory_gib": facts.memory_gib}
            self.history.add(self.step, {**self._numbers(terms), **self.progress.rates(), **rest})

    def _to_batch(self, part: TrainBatch) -> Batch:
        """A part on the device; where none of its samples could be used a blank one, which weighs nothing."""
        side = self.experiment.data.crop_px
        if part.keys:
            crops = part.crops(side, self.device)
            cls_label = part.cls_label.to(self.device, non_blocking=True)
            return Batch(to_network_input(crops, self.device), cls_label, part.box)
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
            files.paths(), self.index.classes, rank=self.group.rank, world_size=self.group.size,
            limit=experiment.train.eval_samples,
        )  # fmt: skip
        scores = Scores(len(self.index.classes))
        rows: list[list[Tile]] = []
        pictures = experiment.train.grid_pictures if self.history else 0
        with uncompiled(experiment.speed):
            for batch in score_samples(self.model, samples, self.index.classes, experiment.cam, experiment.par, scores):
                if len(rows) < pictures:
                    rows += scored_rows(batch)[: pictures - len(rows)]
        scores.all_reduce(self.device)
        summary = scores.summary()
        self._say(f"step {self.step}  validation  " + "  ".join(f"{k} {v:.3f}" for k, v in summary.items()))
        if self.history:
            self.history.add(self.step, {f"val.{name}": value for name, value in summary.items()})
            if rows:
                self.history.add_file(grid_png(rows, COLUMNS), f"pictures/step-{self.step:06d}.png")
        return summary

    def _wrap(self) -> nn.Module:
        """The network on its device, wrapped for data parallelism where there are several workers."""
        # Gradients lie in the buckets they are summed in: no second copy of them.
        options = {"gradient_as_bucket_view": True}
        wrapped: nn.Module = ray.train.torch.prepare_model(self.model, parallel_strategy_kwargs=options)
        return wrapped

    def _save(self, scores: dict[str, float]) -> None:
        """Save the state of before the next step, unless it is saved already; rank 0 has all there is to save.

        Raises:
            NonFiniteStateError: in every worker; nothing is saved.
        """
        if self.step == self.saved_step and not scores:
            return
        self.saved_step = self.step
        check_state(self.model, self.optimizer, self.step)
        if self.history:
            self.history.send()
            began = time.monotonic()
            folder = Path(tempfile.mkdtemp(prefix="afa-checkpoint-"))
            # Who goes on from here will not do these steps again: what MLflow does not have of them goes along.
            write_state(
                folder, self.model, self.optimizer, self.index.classes, self.experiment,
                step=self.step, unsent=self.history.unsent(),
            )  # fmt: skip
            self.checkpoints.save(self.step, folder, scores)
            self.progress.leave_out(time.monotonic() - began)
        if scores:  # what Ray's dashboard shows; all workers wait for each other in it
            ray.train.report({"step": self.step, **scores})

    def _wait_for_upload(self) -> None:
        """Return when what rank 0 saved is there; no step is blamed for the time."""
        began = time.monotonic()
        self.checkpoints.wait()
        self.progress.leave_out(time.monotonic() - began)

    def _resume(self) -> None:
        """Load the run's newest checkpoint, if it has one."""
        with tempfile.TemporaryDirectory(prefix="afa-resume-") as scratch:
            # The newest may be younger for one worker than for another, or damaged: rank 0 decides.
            folder = Path(scratch)
            newest = self.checkpoints.fetch_newest(folder) if self.group.rank == 0 else None
            newest = self.group.gather(newest)[0]
            if newest is None:
                return
            if self.group.rank != 0:
                patiently(partial(newest.fetch, folder))
            state = read_state(folder, self.model, self.optimizer)
        self.step = self.saved_step = self.checkpoints.safe_step = state["step"]
        if self.history:
            self.history.take_up(state["unsent"])
        self._say(f"goes on from step {self.step}")

    def _store(self, data: bytes, artifact_path: str) -> None:
        if self.history:
            self.history.add_file(data, artifact_path)

    def _say(self, line: str) -> None:
        if self.group.rank == 0:
            # Not print(): Ray Train sends that to its own log as well, and the terminal shows both.
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


def checkpoints_uri(run_uri: str) -> str:
    """Where a run's checkpoints are."""
    return join(run_uri, CHECKPOINTS)
