"""What the driver of a labelling job and its workers tell each other: plain values, without torch."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from afa_core.config import LabelConfig
from pipelines.label_set import Counts

GOES_ON = "the same command goes on with what is missing"


@dataclasses.dataclass(frozen=True)
class LabelJob:
    """What every worker knows of the job; ``bundle_dir`` lies on the driver's machine."""

    bundle_dir: str
    model: str
    model_digest: str
    classes: tuple[str, ...]
    label_config: LabelConfig
    config_digest: str
    run: str
    batch_size: int


@dataclasses.dataclass
class StageSeconds:
    """Where a unit's time goes."""

    read: float = 0.0
    decode: float = 0.0
    label: float = 0.0
    write: float = 0.0


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """What a worker tells of a unit.

    Attributes:
        counts: of what it committed.
        seconds: where its time went.
        inputs: of the inventory, that it has.
        error: why the job cannot go on for now; then nothing else counts.
        refused: why no worker can use the model; then nothing else counts.
    """

    counts: Counts = dataclasses.field(default_factory=Counts)
    seconds: StageSeconds = dataclasses.field(default_factory=StageSeconds)
    inputs: int = 0
    error: str = ""
    refused: str = ""

    def to_json(self) -> str:
        """As ``result_from_json`` takes it."""
        return json.dumps(dataclasses.asdict(self))


def result_from_json(text: str) -> UnitResult:
    """What a worker told."""
    values: dict[str, Any] = json.loads(text)
    counts, seconds = Counts(**values.pop("counts")), StageSeconds(**values.pop("seconds"))
    return UnitResult(counts, seconds, **values)
