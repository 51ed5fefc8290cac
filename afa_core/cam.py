"""Class activation maps: single scale, multi-scale with mirror, and as a label map.

Source: AFA (CVPR 2022), section 3.1, equations 2-3. Per scale the picture and its mirror run in one batch; the
raw maps are resized to the picture, the mirror's turned back, the larger of the two kept and rectified; the
scales are summed and each class is brought to 0..1:

    cam_c = (sum_s relu(max(a_s, mirror a_s)) - min) / (max + 1e-5)

Only the backbone runs here, in evaluation mode: no decoder, and no stochastic depth (the published code leaves
it on), so the maps of a picture depend on nothing but the weights. Only the labelled classes' maps are resized.

On the CPU large pictures pass one by one: their intermediate results are then small enough for the cache, and for
memory that the allocator keeps; fresh pages cost more than what is computed in them.

Shapes: B images, F foreground classes, K packed ones (``packing``), H x W pixels; h x w the token grid of the largest
scale, M = h * w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_core.affinity import AffinityBetween, PairAffinity
from afa_core.backbone import kernels
from afa_core.backbone.features import BackboneOutput
from afa_core.classes import BACKGROUND, IGNORE_INDEX
from afa_core.model import AFANet
from afa_core.packing import Packing

EPSILON = 1e-5


@dataclass(frozen=True)
class MultiScaleCam:
    """Maps of a batch and the affinity that goes with them.

    Attributes:
        cam: [B, K, H, W] in 0..1, every class scaled on its own.
        affinity: between tokens of the un-mirrored pictures at the largest scale; made when it is asked for.
        grid: (h, w), the token grid of ``affinity``.
        packing: which classes the K maps are of.
    """

    cam: Tensor
    affinity: AffinityBetween
    grid: tuple[int, int]
    packing: Packing


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; puts back the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, ``align_corners=False``: [B, K, ...] -> [B, K, *size]."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def scaled_with_mirror(image: Tensor, scale: float) -> Tensor:
    """[B, 3, H, W] -> [2B, 3, int(sH), int(sW)]: the pictures, then their mirrors."""
    if scale != 1:
        image = resize(image, [int(scale * side) for side in image.shape[2:]])
    return torch.cat([image, image.flip(3)])


@torch.no_grad()
def multi_scale_cam(
    model: AFANet,
    image: Tensor,
    scales: Sequence[float],
    packing: Packing | None = None,
    known: BackboneOutput | None = None,
) -> MultiScaleCam:
    """Class activation maps over scales and mirrors, with the affinity of the largest scale.

    Args:
        model: the network; runs in evaluation mode.
        image: normalised pictures [B, 3, H, W].
        scales: factors on H and W; sizes are truncated.
        packing: the classes that are wanted; None: all.
        known: what the backbone said of the pictures as they are, if it was asked already, in evaluation mode.
    """
    batch = len(image)
    packing = packing or Packing.of_all(batch, model.num_foreground, image.device)
    together = 1 if kernels.passes_alone(image.shape[2:], image.device) else batch
    groups = [slice(start, start + together) for start in range(0, batch, together)]
    with evaluation_mode(model):
        parts = [
            _scaled_cam(model, image[group], scales, packing.part(group), known and known.part(group))
            for group in groups
        ]
    totals, affinities, grids = zip(*parts, strict=True)
    total = torch.cat(totals)
    lowest, highest = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    cam = (total - lowest) / (highest - lowest + EPSILON)
    return MultiScaleCam(cam, PairAffinity.joined(affinities), grids[0], packing)


def _scaled_cam(
    model: AFANet, image: Tensor, scales: Sequence[float], packing: Packing, known: BackboneOutput | None
) -> tuple[Tensor, PairAffinity, tuple[int, int]]:
    """The rectified maps summed over scales, [B, K, H, W]; affinity of the largest, and its grid."""
    batch, _, height, width = image.shape
    total = image.new_zeros(batch, packing.index.shape[1], height, width)
    for scale in scales:
        both = scaled_with_mirror(image, scale)
        if scale == 1 and known is not None:
            passes = [known, model.backbone(both[batch:])]
        else:  # the mirror is a pass of its own where pictures pass one by one
            alone = kernels.passes_alone(image.shape[2:], image.device)
            passes = [model.backbone(half) for half in (both.split(1) if alone else (both,))]
        raw = torch.cat([model.activate(features) for features in passes])
        if scale == max(scales):
            straight = passes[0]
            affinity = model.affinity_head.pairs(
                [query[:batch] for query in straight.queries], [key[:batch] for key in straight.keys]
            )
        straight_cam, mirrored = (resize(packing.pack(half), (height, width)) for half in (raw[:batch], raw[batch:]))
        total += torch.maximum(straight_cam, mirrored.flip(3)).relu_()
    return total, affinity, straight.grid


def cam_to_label(
    cam: Tensor,
    packing: Packing,
    background_score: float | tuple[float, float],
    boxes: Tensor | None = None,
) -> Tensor:
    """Label map of the maps alone, without any refinement.

    Args:
        cam: [B, K, H, W] in 0..1.
        packing: which classes they are of.
        background_score: at or below it a pixel is background; with a pair (low, high) a pixel between the two
            is ignored.
        boxes: [B, 4] valid region y0 y1 x0 x1; pixels outside it are ignored.

    Returns:
        [B, H, W] int64: 0 background, 1..F, 255 ignored.
    """
    low, high = background_score if isinstance(background_score, tuple) else (background_score, background_score)
    value, position = cam.max(dim=1)
    label = packing.to_class(position + 1)
    label[value <= high] = IGNORE_INDEX
    label[value <= low] = BACKGROUND
    return label if boxes is None else ignore_outside(label, boxes)


def ignore_outside(label: Tensor, boxes: Tensor) -> Tensor:
    """Label maps [B, H, W] with 255 outside the boxes [B, 4] (y0 y1 x0 x1), which lie on the CPU."""
    limited = torch.full_like(label, IGNORE_INDEX)
    for made, given, (y0, y1, x0, x1) in zip(limited, label, boxes.tolist(), strict=True):
        made[y0:y1, x0:x1] = given[y0:y1, x0:x1]
    return limited
