"""Losses of AFA and the phase plan that weighs them.

Source: AFA (CVPR 2022), equations 1, 5 and 12, section 4.1.

    total = cls + w_seg seg + w_aff aff        (only cls in the first phase)

Departure: where a batch holds no background or no foreground pixel, the published segmentation loss is NaN;
here the empty term contributes 0.

Shapes: B images, F foreground classes, C = F + 1, N tokens.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_core.cam import resize
from afa_core.classes import BACKGROUND, IGNORE_INDEX
from afa_core.config import LossConfig


class Phase(Enum):
    """What a training step learns from."""

    CLASSIFICATION = "classification"  # tags only
    REFINED_CAM = "refined_cam"  # segmentation labels from the CAM refined by PAR
    REFINED_AFFINITY = "refined_affinity"  # ... from the propagated CAM refined by PAR


def phase_at(step: int, config: LossConfig) -> Phase:
    """Phase of optimiser step ``step``, counted from 0."""
    if step < config.classification_steps:
        return Phase.CLASSIFICATION
    return Phase.REFINED_CAM if step < config.affinity_label_step else Phase.REFINED_AFFINITY


def classification_loss(class_logits: Tensor, cls_label: Tensor) -> Tensor:
    """Multi-label soft margin (equation 1) of [B, F] logits against [B, F] multi-hot labels."""
    return F.multilabel_soft_margin_loss(class_logits, cls_label)


def segmentation_loss(seg_logits: Tensor, label: Tensor) -> Tensor:
    """Mean of two cross-entropies, one over background and one over foreground pixels.

    Args:
        seg_logits: [B, C, h, w], resized to the label.
        label: [B, H, W] int64, 255 ignored. A side without pixels contributes 0.

    Logits at the label's size are large (C floats a pixel) and cheap: they live for one picture at a time, for the loss
    and its gradient at once, which takes their memory twice.
    """
    background, foreground = _sides(label)
    weight = background / background.sum().clamp(min=1) + foreground / foreground.sum().clamp(min=1)
    return _WeightedEntropy.apply(seg_logits, label, 0.5 * weight)


class _WeightedEntropy(torch.autograd.Function):
    """Cross-entropy of resized logits, weighted pixel by pixel and summed; its gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, seg_logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
        differentiated = ctx.needs_input_grad[0]
        total, gradients = seg_logits.new_zeros(()), []
        # Resizing of channels that lie apart gives a result that lies apart, which the loss would copy.
        for logits, target, share in zip(seg_logits.split(1), label.split(1), weight[:, None].split(1), strict=True):
            with torch.set_grad_enabled(differentiated):
                small = logits.detach().contiguous().requires_grad_(differentiated)
                large = resize(small, label.shape[1:])
            log_probability = large.detach().log_softmax(1)
            wanted = target.masked_fill(target == IGNORE_INDEX, 0)[:, None]  # there the share is 0
            total -= (log_probability.gather(1, wanted) * share).sum()
            if differentiated:
                slope = log_probability.exp_().mul_(share).scatter_add_(1, wanted, -share)
                gradients += torch.autograd.grad(large, small, slope)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * torch.cat(ctx.saved_tensors), None, None


def _sides(label: Tensor) -> tuple[Tensor, Tensor]:
    """Where a label map says background, and where it says a class."""
    background = label == BACKGROUND
    return background, ~background & (label != IGNORE_INDEX)


def affinity_loss(affinity: Tensor, affinity_label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half the mean of 1 - A over like pairs plus half the mean of A over unlike pairs (equation 5).

    Args:
        affinity: [B, N, N] in 0..1.
        affinity_label: [B, N, N], 1 like, 0 unlike, 255 ignored.

    Returns:
        The loss and the two counts, each + 1 so that none divides by zero.
    """
    like, unlike = affinity_label == 1, affinity_label == 0
    like_count, unlike_count = like.sum() + 1, unlike.sum() + 1
    loss = ((1 - affinity) * like).sum() / like_count + (affinity * unlike).sum() / unlike_count
    return 0.5 * loss, like_count, unlike_count


def total_loss(terms: dict[str, Tensor], config: LossConfig) -> Tensor:
    """Weighted sum of the terms ``cls``, ``seg`` and ``aff``; a term that is not there counts nothing."""
    weights = {"cls": 1.0, "seg": config.segmentation_weight, "aff": config.affinity_weight}
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum()
