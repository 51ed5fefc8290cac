"""``afa label --dry-run``: what would be done and how long it might take, from a minute's work that is thrown away."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from afa_core.checkpoint import load_bundle
from pipelines.label_job import LabelJob, StageSeconds
from pipelines.label_plan import Plan
from pipelines.label_units import UnitWriter
from pipelines.labeller import Labeller
from pipelines.unit_table import Unit

SAMPLE_S = 60.0
SAMPLED_UNITS = 32


@dataclass
class Sample:
    """What one worker got done: pictures, and of the units it finished their inputs and pictures."""

    images: int = 0
    seconds: float = 0.0
    finished_inputs: int = 0
    finished_images: int = 0


def describe_plan(job: LabelJob, plan: Plan, waiting: Iterator[Unit], workers: int | None) -> str:
    """Inputs, units and the estimated time."""
    lines = [f"plan: {plan.inputs} inputs in {plan.units} units, {plan.waiting_units} units to do"]
    if not plan.waiting_units:
        return lines[0]
    workers = workers or torch.cuda.device_count() or os.cpu_count() or 1
    step = max(1, plan.waiting_units // SAMPLED_UNITS)
    sample = take_sample(job, itertools.islice(waiting, 0, None, step), workers)
    if not sample.images:
        return "\n".join([*lines, "sample: the inputs that were tried hold no pictures", "nothing was written"])
    rate = sample.images / sample.seconds * workers
    lines.append(
        f"sample: {sample.images} pictures in {sample.seconds:.0f} s on one of {workers} workers of this machine,"
        f" {rate:.1f} images/s with all of them"
    )
    if sample.finished_inputs:
        images = plan.waiting_inputs * sample.finished_images / sample.finished_inputs
        lines.append(f"estimated time: {duration(images / rate)} for about {images:.0f} pictures")
    else:
        lines.append("estimated time: unknown, the first unit takes more than a minute")
    return "\n".join([*lines, "nothing was written"])


def take_sample(job: LabelJob, units: Iterator[Unit], workers: int) -> Sample:
    """Label units from all over the store for a minute, with the threads that a worker will have."""
    sample = Sample()
    with threads(max(1, (os.cpu_count() or 1) // workers)):
        labeller = Labeller(job, load_bundle(job.bundle_dir))
        started = time.monotonic()
        for unit in units:
            images = 0
            for count in labeller.label_batches(unit, UnitWriter(job.run, unit.name), StageSeconds()):
                images += count
                sample.images += count
                sample.seconds = time.monotonic() - started
                if sample.seconds > SAMPLE_S:
                    return sample
            sample.finished_inputs += unit.inputs
            sample.finished_images += images
    return sample


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with so many threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
