"""One training step: tensors in, tensors out.

Source: AFA (CVPR 2022), figure 2 and section 4.1. The pseudo-labels come from the network as it is before the
step. In the classification phase none are made and the other heads do not run; their parameters have a gradient of 0,
so that every parameter has one in every phase and data-parallel training needs no search for unused ones.

Shapes: B images, F foreground classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afa_core.affinity import label_to_affinity_label
from afa_core.backbone import kernels
from afa_core.config import CamConfig, LossConfig, ParConfig
from afa_core.data.transforms import denormalise_to_unit
from afa_core.host_memory import return_free_memory
from afa_core.losses import Phase, affinity_loss, classification_loss, phase_at, segmentation_loss, total_loss
from afa_core.model import AFANet, AFAOutput, TagLogits
from afa_core.pseudo_label import make_pseudo_label


class NonFiniteLossError(ArithmeticError):
    """A loss term is infinite or not a number; the message names the step and the term."""


@dataclass(frozen=True)
class Batch:
    """Input of a training step.

    Attributes:
        image: normalised crops [B, 3, H, W].
        cls_label: [B, F] multi-hot.
        boxes: [B, 4] valid region y0 y1 x0 x1 of each crop.
    """

    image: Tensor
    cls_label: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class StepResult:
    """Losses of a step and what they were computed from.

    Attributes:
        loss: scalar to differentiate.
        terms: unweighted scalars by name: ``cls``, and outside the classification phase ``seg`` and ``aff``.
        phase: of this step.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    phase: Phase


def training_step(
    model: AFANet,
    batch: Batch,
    step: int,
    cam_config: CamConfig,
    par_config: ParConfig,
    loss_config: LossConfig,
    *,
    forward: Callable[..., Any] | None = None,
    bfloat16: bool = False,
) -> StepResult:
    """Losses of one batch at optimiser step ``step``, counted from 0.

    Args:
        model: the bare network, which makes the pseudo-labels.
        batch: the crops.
        step: decides the phase.
        cam_config: scales and thresholds.
        par_config: refinement.
        loss_config: weights and phase lengths.
        forward: the network wrapped for data parallelism, if it is; the differentiated pass goes through it.
        bfloat16: run the network under autocast; logits, affinity, refinement and losses stay in 32 bit.
    """
    phase = phase_at(step, loss_config)
    forward = forward or model
    mixed = torch.autocast(batch.image.device.type, torch.bfloat16, enabled=bfloat16)
    if phase is Phase.CLASSIFICATION:
        with mixed:
            logits: TagLogits = forward(batch.image, tags_only=True)
        cls = classification_loss(logits.class_logits, batch.cls_label)
        return StepResult(cls + logits.unused, {"cls": cls}, phase)
    with mixed:
        label, refined_cam_label = _labels(model, batch, phase, cam_config, par_config)
        if kernels.passes_alone(batch.image.shape[2:], batch.image.device):
            return_free_memory()  # else what the labels of large pictures took stays beside what the gradient needs
    with mixed:  # anew: before torch 2.11 weights cast without a gradient would serve here, and get none
        output: AFAOutput = forward(batch.image)
    affinity_label = label_to_affinity_label(refined_cam_label, output.backbone.grid, cam_config.affinity_radius)
    terms = {
        "cls": classification_loss(output.class_logits, batch.cls_label),
        "seg": segmentation_loss(output.seg_logits, label),
        "aff": affinity_loss(output.affinity, affinity_label)[0],
    }
    return StepResult(total_loss(terms, loss_config), terms, phase)


def _labels(
    model: AFANet, batch: Batch, phase: Phase, cam_config: CamConfig, par_config: ParConfig
) -> tuple[Tensor, Tensor]:
    """What segmentation learns from and what the affinity does, [B, H, W]; the maps behind them are given up."""
    made = make_pseudo_label(
        model,
        batch.image,
        denormalise_to_unit(batch.image),
        batch.cls_label,
        batch.boxes,
        cam_config,
        par_config,
        with_affinity=phase is Phase.REFINED_AFFINITY,
    )
    return (made.refined_affinity or made.refined_cam).label, made.refined_cam.label


def check_finite(terms: dict[str, Tensor], step: int) -> None:
    """Raise if a loss term cannot be learned from.

    Raises:
        NonFiniteLossError: naming the step and the terms.
    """
    bad = {name: float(value) for name, value in terms.items() if not value.isfinite()}
    if bad:
        listed = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise NonFiniteLossError(f"loss is not finite at step {step}: {listed}")
