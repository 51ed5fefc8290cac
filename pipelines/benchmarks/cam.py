"""``afa bench cam``: multi-scale class activation maps with the affinity of the largest scale.

The published code makes the affinity of all pairs, this project that of a walk's window.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from afa_core.cam import multi_scale_cam, scaled_with_mirror
from afa_core.config import CamConfig
from afa_core.model import AFANet
from afa_core.packing import Packing
from afa_core.pseudo_label import random_walk
from afa_core.step import Batch
from pipelines.benchmarks import plain_form
from pipelines.benchmarks.cases import PUBLISHED, Size, add_size_arguments, forms_in_turns, prepare
from pipelines.benchmarks.measure import Measurement, peak_mib, repeat
from pipelines.benchmarks.published_code import PublishedCode

SCALES = CamConfig().scales

add_arguments = add_size_arguments


def run(arguments: argparse.Namespace) -> list[Measurement]:
    """The plain form and this project's, for every crop."""
    return forms_in_turns("cam", measure, arguments)


def measure(size: Size, form: str, repetitions: int) -> Measurement:
    """One form, in this process; its operations are those of the encoder, the least there is to do."""
    model, batch = prepare(size)
    if form == PUBLISHED:
        code = PublishedCode(size.published, size.backbone, model)
        seconds = repeat(lambda: code.multi_scale_cam(batch.image), repetitions)
    elif form == "plain":
        plain_form.use_plain_kernels()
        seconds = repeat(lambda: plain_form.multi_scale_cam(model, batch.image, SCALES), repetitions)
    else:
        seconds = repeat(lambda: maps_and_walk(model, batch), repetitions)
    peak = peak_mib()
    operations = encoder_operations(model, batch.image)
    return Measurement(name=form, seconds=seconds, images=size.batch, peak_mib=peak, operations=operations)


@torch.no_grad()
def maps_and_walk(model: AFANet, batch: Batch) -> None:
    """The maps, and the affinity as far as a walk needs it."""
    random_walk(multi_scale_cam(model, batch.image, SCALES, Packing.of(batch.cls_label)), CamConfig())


@torch.no_grad()
def encoder_operations(model: AFANet, image: torch.Tensor) -> float:
    """Floating-point operations of products and convolutions in all passes, counted on one picture."""
    plain_form.use_plain_kernels()  # the counter does not know oneDNN's products
    total = 0
    for scale in SCALES:
        with FlopCounterMode(display=False) as counter:
            model.backbone(scaled_with_mirror(image[:1], scale))
        total += counter.get_total_flops()
    return float(total * len(image))
