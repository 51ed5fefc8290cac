"""``afa label``: write refined masks for a folder of pictures or of shards, as a Ray Data job.

The input is cut into work units (see ``label_units``); actors that each hold the model take one unit at a time from
reading to commit. Running the same command again does only the units that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from afa_core.checkpoint import Bundle, load_bundle
from afa_core.config import LabelConfig
from afa_core.data.sample import encode_mask
from afa_core.labelling import PictureLabel, label_pictures
from pipelines.cli import stage_main
from pipelines.errors import UsageError
from pipelines.label_units import Counts, Input, Unit, UnitWriter, committed, plan_units, read_unit, write_json
from pipelines.local_ray import start_ray
from pipelines.model_files import find_model
from pipelines.progress import Progress

RUN_FILE = "run.json"


@dataclasses.dataclass(frozen=True)
class LabelJob:
    """What every actor knows of the job; plain values, so that it travels."""

    bundle_dir: str
    model: str
    model_digest: str
    label_config: LabelConfig
    config_digest: str
    output: str
    batch_size: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa label``."""
    parser.add_argument("--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION or a bundle folder")
    parser.add_argument("--input", required=True, type=Path, help="folder of pictures, folder of shards, or a shard")
    parser.add_argument("--output", required=True, type=Path, help="folder of the label set")
    parser.add_argument("--workers", type=int, help="actors (default: one per GPU, else one per processor)")
    parser.add_argument("--unit-size", type=int, default=64, help="pictures in a work unit (default: 64)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures decoded at a time (default: 8)")
    parser.add_argument("--ignore-band", action="store_true", help="leave doubtful pixels 255 instead of deciding them")
    parser.add_argument("--tag-probability", type=float, help="from which a class counts in an untagged picture")
    parser.add_argument("--max-side-px", type=int, help="larger pictures are labelled at this long side")
    parser.add_argument("--tracking-uri", help="MLflow server (default: MLFLOW_TRACKING_URI, then runs/mlflow.db)")


def run(arguments: argparse.Namespace) -> int:
    """Label; prints images, labels, quarantined, images/s."""
    for option in ("workers", "unit_size", "batch_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} {value}: must be at least 1")
    source, output = arguments.input.absolute(), arguments.output.absolute()
    units = plan_units(source, arguments.unit_size)
    with tempfile.TemporaryDirectory(prefix="afa-model-") as scratch:
        bundle_dir, model = find_model(arguments.model, arguments.tracking_uri, Path(scratch))
        job = build_job(arguments, bundle_dir, model, output)
        open_label_set(output, source, job, arguments.unit_size)
        done = {unit.name: counts for unit in units if (counts := committed(output, unit)) is not None}
        waiting = [unit for unit in units if unit.name not in done]
        total = Counts()
        for counts in done.values():
            total.add(counts)
        if done:
            print(f"{len(done)} of {len(units)} units are done already", flush=True)
        started = time.monotonic()
        labelled = Counts()
        if waiting:
            start_ray()
            progress = Progress("unit", len(units), len(done))
            try:
                for counts in run_units(waiting, job, arguments.workers):
                    labelled.add(counts)
                    progress.count(counts.images)
                    print(progress.line(values={"quarantined": labelled.quarantined}), flush=True)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("the same command goes on with what is missing") from None
        seconds = time.monotonic() - started
    total.add(labelled)
    print(summary(total, labelled, seconds, output))
    return 0


def build_job(arguments: argparse.Namespace, bundle_dir: Path, model: str, output: Path) -> LabelJob:
    """Job from the model's own labelling configuration and the options that override it.

    Raises:
        InputError: the folder holds no usable model.
        UsageError: an option is out of range.
    """
    bundle = load_bundle(bundle_dir)
    probability, side = arguments.tag_probability, arguments.max_side_px
    if probability is not None and not 0 <= probability <= 1:
        raise UsageError(f"--tag-probability {probability}: must lie between 0 and 1")
    if side is not None and side < 64:
        raise UsageError(f"--max-side-px {side}: must be at least 64")
    overrides = {"tag_probability": probability, "max_side_px": side, "ignore_band": arguments.ignore_band or None}
    config = dataclasses.replace(
        bundle.label_config, **{name: value for name, value in overrides.items() if value is not None}
    )
    parts = [dataclasses.asdict(part) for part in (config, bundle.cam_config, bundle.par_config)]
    return LabelJob(
        bundle_dir=str(bundle_dir),
        model=model,
        model_digest=bundle.digest,
        label_config=config,
        config_digest=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
        output=str(output),
        batch_size=arguments.batch_size,
    )


def open_label_set(output: Path, source: Path, job: LabelJob, unit_size: int) -> None:
    """Write ``run.json``, or see that the one that is there is of the same job.

    Raises:
        UsageError: the folder holds something else.
    """
    record = {
        "schema_version": 1,
        "input": str(source),
        "unit_size": unit_size,
        "model": job.model,
        "model_digest": job.model_digest,
        "label_config": dataclasses.asdict(job.label_config),
        "config_digest": job.config_digest,
    }
    path = output / RUN_FILE
    if path.is_file():
        earlier = json.loads(path.read_text())
        changed = [key for key in record if key != "model" and earlier.get(key) != record[key]]
        if changed:
            raise UsageError(
                f"{output} holds labels of another job ({', '.join(changed)} differ): use another --output"
            )
        return
    if output.is_dir() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty and holds no label set: use another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def run_units(units: list[Unit], job: LabelJob, workers: int | None) -> Iterator[Counts]:
    """Label units on a pool of actors, yielding the counts of each when it is committed."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    processors = int(ray.cluster_resources().get("CPU", 1))
    size = min(workers or gpus or processors, len(units))
    rows = [{"unit": json.dumps(dataclasses.asdict(unit))} for unit in units]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Labeller,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size),
        num_gpus=1 if gpus else 0,
        num_cpus=0 if gpus else max(1, processors // size),
    )
    for row in results.iter_rows():
        yield Counts(int(row["images"]), int(row["labels"]), json.loads(row["reasons"]))


class Labeller:
    """An actor: the model, and one unit at a time from reading to commit."""

    def __init__(self, job: LabelJob) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.job = job
        self.bundle: Bundle = load_bundle(job.bundle_dir, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Label the units of the batch; gives back their counts."""
        counts = [self.label_unit(unit_from_json(text)) for text in batch["unit"]]
        return {
            "images": np.array([count.images for count in counts]),
            "labels": np.array([count.labels for count in counts]),
            "reasons": np.array([json.dumps(count.reasons) for count in counts]),
        }

    def label_unit(self, unit: Unit) -> Counts:
        """Read, label, write and commit one unit."""
        started = time.monotonic()
        writer = UnitWriter(Path(self.job.output), unit.name)
        try:
            inputs = read_unit(unit, self.bundle.classes, self.job.label_config.max_megapixels)
            for batch in in_batches(inputs, self.job.batch_size):
                self._label_batch(batch, writer)
            writer.commit({"seconds": round(time.monotonic() - started, 3), "model": self.job.model})
        except BaseException:
            writer.abandon()
            raise
        return writer.counts

    def _label_batch(self, batch: list[Input], writer: UnitWriter) -> None:
        good = [(item, item.sample) for item in batch if item.sample is not None]
        images = [sample.image for _, sample in good]
        made = label_pictures(self.bundle, images, [sample.tags for _, sample in good], self.job.label_config)
        for (item, _), label in zip(good, made, strict=True):
            writer.add_label(item, encode_mask(label.label), self._facts(label), _manifest_row(label))
        for item in batch:
            if item.sample is None:
                writer.quarantine(item)

    def _facts(self, label: PictureLabel) -> dict[str, Any]:
        """What the JSON beside a mask says."""
        return {
            "tags": list(label.tags),
            "tags_source": "given" if label.tags_given else "predicted",
            "unknown_tags": list(label.unknown_tags),
            "area": label.area,
            "confidence": label.confidence,
            "ignored_share": label.ignored_share,
            "disagreement": label.disagreement,
            "classes": list(self.bundle.classes),
            "model": self.job.model,
            "model_digest": self.job.model_digest,
            "config_digest": self.job.config_digest,
        }


def unit_from_json(text: str) -> Unit:
    """Unit from what ``run_units`` sends."""
    values = json.loads(text)
    return Unit(values["name"], values["shard"], tuple((key, path) for key, path in values["pictures"]))


def in_batches(items: Iterator[Input], size: int) -> Iterator[list[Input]]:
    """Lists of at most ``size`` neighbours."""
    batch: list[Input] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def summary(total: Counts, labelled: Counts, seconds: float, output: Path) -> str:
    """The last lines that a job prints."""
    rate = labelled.images / seconds if seconds and labelled.images else 0.0
    lines = [
        f"images {total.images}  labels {total.labels}  quarantined {total.quarantined}  {rate:.1f} images/s",
        *(f"  quarantined {count}: {reason}" for reason, count in sorted(total.reasons.items())),
        f"label set {output}",
    ]
    return "\n".join(lines)


def _manifest_row(label: PictureLabel) -> dict[str, Any]:
    height, width = label.label.shape
    return {
        "tags": list(label.tags),
        "tags_source": "given" if label.tags_given else "predicted",
        "unknown_tags": list(label.unknown_tags),
        "width": width,
        "height": height,
        "ignored_share": label.ignored_share,
        "disagreement": label.disagreement,
    }


if __name__ == "__main__":
    sys.exit(stage_main(add_arguments, run))
