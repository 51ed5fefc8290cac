"""Holds this project against the published code where that is at hand, at sizes no golden tensor is kept for.

    python tests/golden/against_published.py CLONE [--case case-b0-96.npz] [--side 320]

CLONE is a clone of github.com/rulixiang/afa. The case's weights, tags and pictures, these resized, go through both;
labels, losses and every gradient are compared. Exits 1 if any is out of tolerance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from check import KINDS, Case, Check, compare

from afa_core.cam import multi_scale_cam, resize
from afa_core.config import CamConfig, LossConfig, ParConfig
from afa_core.data.transforms import denormalise_to_unit, normalise
from afa_core.packing import Packing
from afa_core.pseudo_label import make_pseudo_label
from afa_core.published import published_to_own_name
from afa_core.step import Batch, training_step
from pipelines.benchmarks.published_code import PublishedCode

ALL_LABELS = LossConfig(classification_steps=0, affinity_label_step=0)
CAM, PAR = CamConfig(), ParConfig()


def checks(case: Case, code: PublishedCode, side: int) -> Iterator[Check]:
    """Both on the case's pictures at so many pixels a side."""
    image = normalise(resize(torch.from_numpy(case.expected["image_uint8"]).float(), (side, side)).round())
    cls_label = torch.from_numpy(case.expected["labels"])
    boxes = torch.tensor([[0, side, side // 8, side]] * len(image))
    batch = Batch(image, cls_label, boxes)
    cam, affinity = code.multi_scale_cam(image)
    own = multi_scale_cam(case.model, image, CAM.scales, Packing.of(cls_label))
    valid = cls_label[:, :, None, None]
    yield compare("cam of labelled classes", "absolute", own.packing.unpack(own.cam), cam * valid)
    yield compare("affinity", "absolute", own.affinity(slice(None), slice(None)), affinity[: len(image)])
    refined_cam, refined_affinity = code.refine(batch, cam, affinity)
    made = make_pseudo_label(case.model, image, denormalise_to_unit(image), cls_label, boxes, CAM, PAR)
    assert made.refined_affinity is not None
    yield compare("refined cam label", "labels", made.refined_cam.label, refined_cam)
    yield compare("refined affinity label", "labels", made.refined_affinity.label, refined_affinity)
    case.model.zero_grad()
    code.model.zero_grad()
    loss, own_loss = code.training_loss(batch), training_step(case.model, batch, 0, CAM, PAR, ALL_LABELS).loss
    loss.backward()
    own_loss.backward()
    yield compare("loss", "relative", own_loss.detach(), loss.detach())
    gradients = {name: part.grad for name, part in case.model.named_parameters()}
    worst = max(
        float((gradients[str(published_to_own_name(name))].view_as(part.grad) - part.grad).norm() / part.grad.norm())
        for name, part in code.model.named_parameters()
    )
    yield Check("worst gradient of a parameter", "gradient", worst, KINDS["gradient"][1])


def main() -> int:
    """Exit status: 0 if all is within tolerance."""
    parser = argparse.ArgumentParser(description="compare with the published code")
    parser.add_argument("clone", type=Path)
    parser.add_argument("--case", type=Path, default=Path(__file__).parent / "case-b0-96.npz")
    parser.add_argument("--side", type=int, default=320, help="pixels, a multiple of 32")
    arguments = parser.parse_args()
    case = Case(arguments.case, radius=CAM.affinity_radius, pooling="max", scales=CAM.scales)
    code = PublishedCode(str(arguments.clone), case.arch, case.model)
    code.model.eval()
    failed = 0
    for check in checks(case, code, arguments.side):
        print(check)
        failed += not check.passed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
