"""The training step in its plain form, to measure against: what the paper says, computed as the release computes it.

Whole forward passes for every CAM scale, decoder included; affinity by a convolution over all heads' N x N logits, of
mirrors too; attention spelled out, with a copy of every block's logits kept, pooled over the grid of its queries; PAR
four times a step and picture by picture, its neighbours gathered and its colour kernel derived anew each time; the
decoder on the concatenation of all stages. Written from the paper, from a list of what the release does beyond it, and
from this project's own parts, and tested against them. It takes the time and the memory of the release
(docs/performance.md).

Shapes: as in ``afa_core``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_core.affinity import COLUMN_EPSILON, label_to_affinity_label, window_mask
from afa_core.backbone import kernels
from afa_core.backbone.features import BackboneOutput
from afa_core.cam import evaluation_mode, ignore_outside, resize, scaled_with_mirror
from afa_core.classes import BACKGROUND, IGNORE_INDEX
from afa_core.config import CamConfig, LossConfig, ParConfig
from afa_core.data.transforms import denormalise_to_unit
from afa_core.losses import affinity_loss, classification_loss, total_loss
from afa_core.model import AFANet
from afa_core.pseudo_label import low_high_to_label
from afa_core.step import Batch

# Copies of the logits of the newest pass.
_kept_logits: list[Tensor] = []


def use_plain_kernels() -> None:
    """From now on this process computes backbones the plain way, whatever the size; for processes that only measure."""
    kernels.FAST_FROM_PIXELS = 2**62
    kernels.attend = _attend_keeping_logits


def _attend_keeping_logits(query: Tensor, key: Tensor, value: Tensor, *, fast: bool) -> Tensor:
    """Attention of square pictures, [B, n, N, d], [B, n, M, d], [B, n, M, d] -> [B, n, N, d]."""
    del fast
    logits = query @ key.transpose(2, 3)
    copy, side, reduction = logits.clone(), math.isqrt(query.shape[2]), math.isqrt(query.shape[2] // key.shape[2])
    if reduction > 1:
        copy = F.avg_pool2d(copy.transpose(2, 3).unflatten(3, (side, side)).flatten(0, 1), reduction)
    _kept_logits.append(copy)
    return (logits * query.shape[3] ** -0.5).softmax(dim=3) @ value


def training_loss(
    model: AFANet, batch: Batch, cam_config: CamConfig, par_config: ParConfig, loss_config: LossConfig
) -> Tensor:
    """The loss of a step whose segmentation labels come from the refined affinity CAM."""
    refined_cam, refined_affinity = pseudo_labels(model, batch, cam_config, par_config)
    features, seg_logits, affinity = forward(model, batch.image)
    affinity_label = label_to_affinity_label(refined_cam, features.grid, cam_config.affinity_radius)
    terms = {
        "cls": classification_loss(model.classify(features), batch.cls_label),
        "seg": segmentation_loss(seg_logits, refined_affinity),
        "aff": affinity_loss(affinity, affinity_label)[0],
    }
    return total_loss(terms, loss_config)


def forward(model: AFANet, image: Tensor) -> tuple[BackboneOutput, Tensor, Tensor]:
    """Features, segmentation logits, affinity."""
    _kept_logits.clear()
    features = model.backbone(image)
    logits = features.attention_logits
    weight = model.affinity_head.head_weight[None, :, None, None]
    affinity = F.conv2d(logits + logits.transpose(2, 3), weight, model.affinity_head.bias[None])[:, 0].sigmoid().float()
    return features, decode(model, features.features), affinity


def decode(model: AFANet, features: Sequence[Tensor]) -> Tensor:
    """The decoder on the concatenated stages."""
    decoder = model.decoder
    size = features[0].shape[2:]
    projected = [resize(project(part), size) for project, part in zip(decoder.projections, features, strict=True)]
    fused = decoder.fusion(torch.cat(projected[::-1], dim=1))
    hidden = F.dropout2d(F.relu(decoder.norm(fused)), decoder.dropout.p, decoder.training)
    return cast(Tensor, decoder.classifier(hidden))


@torch.no_grad()
def multi_scale_cam(model: AFANet, image: Tensor, scales: Sequence[float]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Maps [B, F, H, W] of all classes, affinity of the largest scale, its grid."""
    total = torch.zeros(())
    with evaluation_mode(model):
        for scale in scales:
            features, _, own_affinity = forward(model, scaled_with_mirror(image, scale))
            if scale == max(scales):
                affinity, grid = own_affinity[: len(image)], features.grid
            straight, mirrored = resize(model.activate(features), image.shape[2:]).chunk(2)
            total = total.to(image.device) + torch.maximum(straight, mirrored.flip(3)).relu()
    lowest, highest = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return (total - lowest) / (highest - lowest + 1e-5), affinity, grid


@torch.no_grad()
def pseudo_labels(model: AFANet, batch: Batch, cam_config: CamConfig, par_config: ParConfig) -> tuple[Tensor, Tensor]:
    """Labels [B, H, W] of the refined CAM and of the refined affinity CAM."""
    cam, affinity, grid = multi_scale_cam(model, batch.image, cam_config.scales)
    return refine(batch, cam, affinity, grid, cam_config, par_config)


@torch.no_grad()
def refine(
    batch: Batch, cam: Tensor, affinity: Tensor, grid: tuple[int, int], cam_config: CamConfig, par_config: ParConfig
) -> tuple[Tensor, Tensor]:
    """The four PAR calls of a step, and labels from them."""
    unit = denormalise_to_unit(batch.image)
    scores = (cam_config.background_score_low, cam_config.background_score_high)
    from_cam = [_refined_cam(unit, cam, batch.cls_label, score, par_config) for score in scores]
    from_affinity = [
        _refined_affinity(unit, cam, affinity, grid, batch, score, cam_config, par_config) for score in scores
    ]
    labels = [low_high_to_label(low.argmax(1), high.argmax(1)) for low, high in (from_cam, from_affinity)]
    return ignore_outside(labels[0], batch.boxes), ignore_outside(labels[1], batch.boxes)


def _refined_cam(unit: Tensor, cam: Tensor, cls_label: Tensor, score: float, config: ParConfig) -> Tensor:
    size = [side // config.shrink_factor for side in unit.shape[2:]]
    small, maps = resize(unit, size), resize(_with_background(cam, score), size)
    refined = torch.zeros_like(_with_background(cam, score))
    for index, valid in enumerate(_valid(cls_label)):
        probability = maps[index, None, valid].softmax(1)
        refined[index, valid] = resize(par(small[index, None], probability, config), unit.shape[2:])[0]
    return refined


def _refined_affinity(
    unit: Tensor, cam: Tensor, affinity: Tensor, grid: tuple[int, int], batch: Batch, score: float,
    cam_config: CamConfig, config: ParConfig,
) -> Tensor:  # fmt: skip
    maps = resize(cam * batch.cls_label[:, :, None, None], grid)
    valid = _valid(batch.cls_label)
    maps = _with_background(maps, score).masked_fill(~valid[:, :, None, None], -torch.inf).softmax(1)
    walked = resize(propagate(maps, affinity, grid, cam_config), unit.shape[2:])
    refined = torch.zeros_like(walked)
    for index, (y0, y1, x0, x1) in enumerate(batch.boxes.tolist()):
        inside = unit[index, None, :, y0:y1, x0:x1]
        small = resize(inside, [side // config.shrink_factor for side in inside.shape[2:]])
        made = par(small, walked[index, None, valid[index], y0:y1, x0:x1], config)
        refined[index, valid[index], y0:y1, x0:x1] = resize(made, inside.shape[2:])[0]
    return refined


def propagate(maps: Tensor, affinity: Tensor, grid: tuple[int, int], config: CamConfig) -> Tensor:
    """The walk along all N x N pairs."""
    far = ~window_mask(grid, config.affinity_radius, affinity.device)
    weights = affinity.masked_fill(far, 0).pow(config.propagation_power)
    transition = weights / (weights.sum(dim=1, keepdim=True) + COLUMN_EPSILON)
    walked = maps.flatten(2)
    with torch.autocast(maps.device.type, enabled=False):
        for _ in range(config.propagation_iterations):
            walked = walked @ transition
    return walked.unflatten(2, grid)


def par(image_unit: Tensor, maps: Tensor, config: ParConfig) -> Tensor:
    """PAR with gathered neighbours [B, K, D, H, W]."""
    maps = F.interpolate(maps, size=image_unit.shape[2:], mode="bilinear", align_corners=True)
    near = gather(image_unit, config)
    difference = (near - image_unit[:, :, None]).abs()
    deviation = near.std(2, keepdim=True) + 1e-8
    colour = -((difference / deviation / config.colour_bandwidth) ** 2).mean(1, keepdim=True)
    steps = torch.tensor([2**0.5, 1, 2**0.5, 1, 1, 2**0.5, 1, 2**0.5], device=maps.device)
    distance = torch.cat([steps * dilation for dilation in config.dilations])
    position = -((distance / (distance.std() + 1e-8) / config.colour_bandwidth) ** 2)
    weights = colour.softmax(2) + config.position_weight * position.softmax(0)[:, None, None]
    for _ in range(config.iterations):
        maps = (gather(maps, config) * weights).sum(2)
    return maps


def gather(maps: Tensor, config: ParConfig) -> Tensor:
    """[B, K, H, W] -> [B, K, D, H, W], every neighbour a copy."""
    kernel = torch.zeros(8, 1, 3, 3, device=maps.device)
    for number, place in enumerate(place for place in range(9) if place != 4):
        kernel[number, 0, place // 3, place % 3] = 1
    batch, count, height, width = maps.shape
    flat = maps.reshape(batch * count, 1, height, width)
    near = [
        F.conv2d(F.pad(flat, [dilation] * 4, mode="replicate"), kernel, dilation=dilation)
        for dilation in config.dilations
    ]
    return torch.cat(near, dim=1).view(batch, count, -1, height, width)


def segmentation_loss(seg_logits: Tensor, label: Tensor) -> Tensor:
    """Mean of two cross-entropies over the whole batch at the label's size."""
    logits = resize(seg_logits, label.shape[1:])
    terms = []
    for other in (label != BACKGROUND, label == BACKGROUND):  # what the term leaves out
        target = label.masked_fill(other, IGNORE_INDEX)
        count = (target != IGNORE_INDEX).sum().clamp(min=1)
        terms.append(F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum") / count)
    return 0.5 * (terms[0] + terms[1])


def _with_background(cam: Tensor, score: float) -> Tensor:
    return torch.cat([torch.full_like(cam[:, :1], score), cam], dim=1)


def _valid(cls_label: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(cls_label[:, :1]), cls_label], dim=1) > 0
