"""What a worker of batch labelling does: it holds the model and takes one unit at a time from reading to commit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

from ray.util.metrics import Counter

from afa_core.backbone import kernels
from afa_core.checkpoint import Bundle
from afa_core.data.sample import encode_mask
from afa_core.labelling import BegunLabels, begin_labels
from afa_core.picture_label import PictureLabel
from infra.object_store import find_object
from pipelines.ahead import ahead
from pipelines.batched import batched
from pipelines.inventory import unit_rows
from pipelines.label_inputs import Input, read_inputs
from pipelines.label_job import LabelJob, StageSeconds, UnitResult
from pipelines.label_set import MARKER, Counts, label_uri, load_marker
from pipelines.label_units import UnitWriter
from pipelines.unit_table import Unit

# Pictures of one working size are looked for among so many batches.
BATCHES_TOGETHER = 4


class Labeller:
    """The model, on this process's GPU if it has one, and what is done with a unit."""

    def __init__(self, job: LabelJob, bundle: Bundle) -> None:
        self.job, self.bundle = job, bundle
        bundle.model.to(kernels.best_device())
        self._images = Counter("afa_label_images", "Pictures labelled or quarantined.", tag_keys=("status", "reason"))

    def label_unit(self, unit: Unit) -> UnitResult:
        """Read, label, write and commit one unit; one that is committed already is left as it is.

        Ray gives a block to another worker when the first one dies, with the units that were done before.

        Raises:
            ServiceError: the store cannot be read, or takes no more.
        """
        if find_object(label_uri(self.job.run, f"{unit.name}{MARKER}")) is not None:
            return self._told(load_marker(self.job.run, unit.name).counts, StageSeconds(), unit)
        writer, seconds = UnitWriter(self.job.run, unit.name), StageSeconds()
        for _ in self.label_batches(unit, writer, seconds):
            pass
        writer.commit(seconds, {"model": self.job.model, "host": os.uname().nodename})
        return self._told(writer.counts, seconds, unit)

    def label_batches(self, unit: Unit, writer: UnitWriter, seconds: StageSeconds) -> Iterator[int]:
        """Label a unit batch by batch without committing it; yields the number of inputs of each that is written."""
        size = self.job.batch_size
        inputs = read_inputs(unit_rows(unit), self.bundle.classes, self.job.label_config, seconds)
        # One thread decodes what comes next and one waits for labels and writes them, beside the network.
        with closing(ahead(inputs, 2 * size)) as decoded, ThreadPoolExecutor(1, "write") as pen:
            waiting: list[tuple[int, BegunLabels, Future[None]]] = []
            for batch in batched(decoded, BATCHES_TOGETHER * size):
                begun = self._begin(batch, seconds)
                waiting.append((len(batch), begun, pen.submit(self._write, batch, begun, writer, seconds)))
                if len(waiting) > 1:  # one batch waits at most
                    yield self._finished(*waiting.pop(0), seconds)
            for last in waiting:
                yield self._finished(*last, seconds)

    def _finished(self, inputs: int, begun: BegunLabels, written: Future[None], seconds: StageSeconds) -> int:
        """The number of inputs of a batch when it is written."""
        started = time.monotonic()
        begun.wait()
        seconds.label += time.monotonic() - started
        written.result()
        return inputs

    def _begin(self, batch: list[Input], seconds: StageSeconds) -> BegunLabels:
        """Ask for the labels of the inputs that have a picture."""
        started = time.monotonic()
        good = [(item.picture, item.tags) for item in batch if item.picture is not None]
        pictures, tags = [picture for picture, _ in good], [tags for _, tags in good]
        begun = begin_labels(self.bundle, pictures, tags, self.job.label_config, self.job.batch_size)
        seconds.label += time.monotonic() - started
        return begun

    def _write(self, batch: list[Input], begun: BegunLabels, writer: UnitWriter, seconds: StageSeconds) -> None:
        begun.wait()  # which is the label stage's time
        started = time.monotonic()
        labels = iter(begun.finish())
        for item in batch:
            if item.picture is None:
                writer.quarantine(item)
            else:
                label = next(labels)
                writer.add_label(item, encode_mask(label.label), self._facts(item, label), manifest_row(item, label))
        seconds.write += time.monotonic() - started

    def _told(self, counts: Counts, seconds: StageSeconds, unit: Unit) -> UnitResult:
        """The unit's result, its pictures counted in."""
        if counts.labels:
            self._images.inc(counts.labels, {"status": "ok", "reason": ""})
        for reason, count in counts.reasons.items():
            self._images.inc(count, {"status": "quarantined", "reason": reason})
        return UnitResult(counts, seconds, unit.inputs)

    def _facts(self, item: Input, label: PictureLabel) -> dict[str, Any]:
        """What the JSON beside a mask says."""
        return {
            **manifest_row(item, label),
            "by_class": {
                name: {
                    "area": label.area[name],
                    "confidence": label.class_confidence.get(name),
                    "disagreement": label.class_disagreement.get(name),
                }
                for name in label.tags
            },
            "classes": list(self.bundle.classes),
            "model": self.job.model,
            "model_digest": self.job.model_digest,
            "config_digest": self.job.config_digest,
        }


def manifest_row(item: Input, label: PictureLabel) -> dict[str, Any]:
    """The row of a labelled picture, beyond what it was made from.

    The size is the picture's, not the mask's: ``verify-labels`` compares the two.
    """
    height, width = item.size
    return {
        "tags": list(label.tags),
        "tags_source": "given" if label.tags_given else "predicted",
        "unknown_tags": list(label.unknown_tags),
        "width": width,
        "height": height,
        "area": [label.area[name] for name in label.tags],
        "ignored_share": label.ignored_share,
        "confidence": label.confidence,
        "disagreement": label.disagreement,
        "affinity_disagreement": label.affinity_disagreement,
        "tags_without_pixels": list(label.tags_without_pixels),
        "classes_without_tag": list(label.classes_without_tag),
        "uncertainty": label.uncertainty,
    }
