"""One experiment: everything a run can be told, its defaults, and how it is read.

Defaults stand in the dataclasses alone; a YAML file holds what differs; ``--set optim.lr=1e-4`` overrides both. One
pydantic pass validates the result: an unknown key, a wrong type or a value out of range is a one-line error.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from annotated_types import MinLen
from pydantic import TypeAdapter, ValidationError

from afa_core.config import (
    STRICT,
    CamConfig,
    Count,
    CountOrZero,
    DataConfig,
    LabelConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParConfig,
    Positive,
)
from pipelines.errors import UsageError
from pipelines.speed import SpeedConfig, can_checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a training job runs. Intervals are in optimiser steps."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    # Workers, and the fewest with which the job starts or goes on when machines are lost; None: as many as workers.
    # The global batch and with them the learning rate stay: fewer workers accumulate gradients.
    workers: Count = 1
    min_workers: Count | None = None
    # Seconds between two looks for machines to grow onto while there are fewer workers than that.
    grow_check_s: Positive = 60.0
    # A GPU for each worker. None: if the cluster has that many now; one that starts nodes on demand may have none yet.
    use_gpu: bool | None = None
    batch_size: Count = 2  # pictures a step and worker
    # Times that lost workers are started anew before the run fails.
    max_failures: CountOrZero = 3
    seed: CountOrZero = 0
    log_every: Count = 50
    # A checkpoint is written with every evaluation as well.
    eval_every: Count = 2_000
    # The most steps that the loss of a machine or of everything can cost: a checkpoint is taken twice as often.
    checkpoint_every: Count = 500
    # Validation pictures an evaluation looks at; None: all.
    eval_samples: Count | None = None
    # Pictures of the grid that is logged with an evaluation.
    grid_pictures: CountOrZero = 6
    # Which score makes a checkpoint the best one.
    best_metric: Literal["cam_miou", "refined_cam_miou", "refined_affinity_miou", "segmentation_miou"] = (
        "refined_affinity_miou"
    )
    # Newest checkpoints that are kept, and best ones besides.
    keep_last: Count = 2
    keep_best: Count = 2

    def __post_init__(self) -> None:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError("min_workers must not be above workers")

    @property
    def global_batch(self) -> int:
        """Pictures a step, of all workers."""
        return self.workers * self.batch_size


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are recorded; without a URI the environment's MLFLOW_TRACKING_URI, then runs/mlflow.db."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    uri: str | None = None
    experiment: Annotated[str, MinLen(1)] = "afa"


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything a training run can be told."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: Annotated[str, MinLen(1)] = "afa"
    model: ModelConfig = field(default_factory=ModelConfig)
    cam: CamConfig = field(default_factory=CamConfig)
    par: ParConfig = field(default_factory=ParConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.speed.gradient_checkpointing and not can_checkpoint(self.model.backbone):
            raise ValueError("speed.gradient_checkpointing needs a Mix Transformer (model.backbone=mit_...)")


def load_experiment(source: str | None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment.

    Args:
        source: path of a YAML file, or the name of one in ``pipelines/configs``; None: only defaults.
        overrides: ``section.key=value`` each, the value in YAML.

    Raises:
        UsageError: no such file, or a key or value is wrong; one line naming it.
    """
    values = {} if source is None else _read(source)
    for override in overrides:
        _apply(values, override)
    return experiment_from_values(values, origin=source or "the configuration")


def experiment_from_values(values: Mapping[str, Any], origin: str) -> ExperimentConfig:
    """Validate plain values.

    Raises:
        UsageError: naming the first wrong key and ``origin``.
    """
    try:
        return TypeAdapter(ExperimentConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        if first["type"] == "unexpected_keyword_argument":
            raise UsageError(f"{origin}: unknown key {key!r}{_known(first['loc'])}") from error
        given = f" = {first['input']!r}" if first["loc"] else ""
        raise UsageError(f"{origin}: {key}{given}: {first['msg']}") from error


def experiment_to_values(experiment: ExperimentConfig) -> dict[str, Any]:
    """The resolved configuration as plain JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(experiment)))
    return values


def _read(source: str) -> dict[str, Any]:
    shipped = resources.files("pipelines") / "configs"
    path = Path(source)
    if path.is_file():
        text = path.read_text()
    elif (shipped / f"{source}.yaml").is_file():
        text = (shipped / f"{source}.yaml").read_text()
    else:
        names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir())
        raise UsageError(f"no configuration {source!r}: give a YAML file or one of {', '.join(names)}")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{source} must hold keys and values at its top")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UsageError(f"--set {override!r}: write section.key=value")
    *sections, leaf = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UsageError(f"--set {override!r}: {section!r} is not a section")
    try:
        values[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override!r}: the value is not YAML") from error


def _known(location: tuple[int | str, ...]) -> str:
    """The keys that would have been right where an unknown one stood."""
    kind: Any = ExperimentConfig
    for part in location[:-1]:
        kind = next((f.default_factory for f in dataclasses.fields(kind) if f.name == part), None)
        if not dataclasses.is_dataclass(kind):
            return ""
    return f"; known are {', '.join(f.name for f in dataclasses.fields(kind))}"
