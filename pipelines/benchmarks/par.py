"""``afa bench par``: all refinement of a training step, low and high, of the CAM and of the affinity CAM."""

from __future__ import annotations

import argparse

import torch

from afa_core.cam import MultiScaleCam
from afa_core.config import CamConfig, ParConfig
from afa_core.data.transforms import denormalise_to_unit
from afa_core.packing import Packing
from afa_core.pseudo_label import ShrunkenCrops, random_walk, refine_affinity, refine_cam
from pipelines.benchmarks import plain_form
from pipelines.benchmarks.cases import PUBLISHED, Size, add_size_arguments, forms_in_turns, prepare
from pipelines.benchmarks.measure import Measurement, peak_mib, repeat
from pipelines.benchmarks.published_code import PublishedCode

CAM, PAR = CamConfig(), ParConfig()
FLOAT_BYTES = 4

add_arguments = add_size_arguments


def run(arguments: argparse.Namespace) -> list[Measurement]:
    """The plain form and this project's, for every crop."""
    return forms_in_turns("par", measure, arguments)


@torch.no_grad()
def measure(size: Size, form: str, repetitions: int) -> Measurement:
    """One form, in this process; walk along the affinity and labels included, as in a step."""
    model, batch = prepare(size)
    code = PublishedCode(size.published, size.backbone, model) if form == PUBLISHED else None
    labelled = Packing.of(batch.cls_label)
    side = int(max(CAM.scales) * size.crop_px) // 16
    cam = torch.rand(size.batch, size.classes, size.crop_px, size.crop_px, device=size.device)
    affinity = torch.rand(size.batch, side * side, side * side, device=size.device)
    maps = MultiScaleCam(labelled.pack(cam), lambda some, others: affinity[:, some, others], (side, side), labelled)
    scores = (CAM.background_score_low, CAM.background_score_high)

    def refine() -> None:
        if code:
            code.refine(batch, cam, affinity)
        elif form == "plain":
            plain_form.refine(batch, cam, affinity, (side, side), CAM, PAR)
        else:
            crops = ShrunkenCrops(denormalise_to_unit(batch.image), PAR)
            refine_cam(crops, maps, batch.boxes, scores)
            refine_affinity(crops, maps, batch.boxes, scores, random_walk(maps, CAM))

    return Measurement(
        name=form,
        seconds=repeat(refine, repetitions),
        images=size.batch,
        peak_mib=peak_mib(),
        moved_bytes=least_traffic(size),
        operations=least_operations(size),
    )


def least_traffic(size: Size) -> float:
    """Bytes that must move: weights written once and read in every iteration, every map read and written."""
    pixels = size.batch * (size.crop_px // PAR.shrink_factor) ** 2
    neighbours, runs = 8 * len(PAR.dilations), 2 * (1 + size.tags)
    iterations = 2 * PAR.iterations  # of the CAM and of the affinity CAM
    return float(FLOAT_BYTES * pixels * (3 + neighbours + iterations * (neighbours + 2 * runs)))


def least_operations(size: Size) -> float:
    """A product and a sum for every neighbour of every map in every iteration."""
    pixels = size.batch * (size.crop_px // PAR.shrink_factor) ** 2
    return float(2 * pixels * 8 * len(PAR.dilations) * 2 * (1 + size.tags) * 2 * PAR.iterations)
