"""Class activation maps: single scale, multi-scale with mirror, and as a label map.

Source: AFA (CVPR 2022), section 3.1, equations 2-3. Per scale the picture and its mirror run in one batch; the
raw maps are resized to the picture, the mirror's turned back, the larger of the two kept and rectified; the
scales are summed and each class is brought to 0..1:

    cam_c = (sum_s relu(max(a_s, mirror a_s)) - min) / (max + 1e-5)

Only the backbone runs here, in evaluation mode: no decoder, and no stochastic depth (the published code leaves
it on), so the maps of a picture depend on nothing but the weights.

Shapes: B images, F foreground classes, H x W pixels; h x w the token grid of the largest scale, M = h * w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_core.classes import BACKGROUND, IGNORE_INDEX
from afa_core.model import AFANet

EPSILON = 1e-5


@dataclass(frozen=True)
class MultiScaleCam:
    """Maps of a batch and the affinity that goes with them.

    Attributes:
        cam: [B, F, H, W] in 0..1, every class scaled on its own, labelled or not.
        affinity: [B, M, M] of the un-mirrored pictures at the largest scale.
        grid: (h, w), the token grid of ``affinity``.
    """

    cam: Tensor
    affinity: Tensor
    grid: tuple[int, int]


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
def multi_scale_cam(model: AFANet, image: Tensor, scales: Sequence[float]) -> MultiScaleCam:
    """Class activation maps over scales and mirrors, with the affinity of the largest scale.

    Args:
        model: the network; runs in evaluation mode.
        image: normalised pictures [B, 3, H, W].
        scales: factors on H and W; sizes are truncated.
    """
    batch, _, height, width = image.shape
    total = image.new_zeros(batch, model.num_foreground, height, width)
    with evaluation_mode(model):
        for scale in scales:
            features = model.backbone(scaled_with_mirror(image, scale))
            raw = model.activate(features)
            if scale == max(scales):
                grid = (raw.shape[2], raw.shape[3])
                affinity = model.affinity_head(
                    [query[:batch] for query in features.queries], [key[:batch] for key in features.keys]
                )
            straight, mirrored = resize(raw, (height, width)).chunk(2)
            total += torch.maximum(straight, mirrored.flip(3)).relu()
    lowest, highest = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return MultiScaleCam((total - lowest) / (highest - lowest + EPSILON), affinity, grid)


def valid_cam(cam: Tensor, cls_label: Tensor) -> Tensor:
    """Maps [B, F, H, W] of the labelled classes only; the others are 0."""
    return cam * cls_label[:, :, None, None]


def cam_to_label(
    cam: Tensor,
    cls_label: Tensor,
    background_score: float | tuple[float, float],
    boxes: Tensor | None = None,
) -> Tensor:
    """Label map of the maps alone, without any refinement.

    Args:
        cam: [B, F, H, W] in 0..1.
        cls_label: [B, F] multi-hot.
        background_score: at or below it a pixel is background; with a pair (low, high) a pixel between the two
            is ignored.
        boxes: [B, 4] valid region y0 y1 x0 x1; pixels outside it are ignored.

    Returns:
        [B, H, W] int64: 0 background, 1..F, 255 ignored.
    """
    low, high = background_score if isinstance(background_score, tuple) else (background_score, background_score)
    value, index = valid_cam(cam, cls_label).max(dim=1)
    label = index + 1
    label[value <= high] = IGNORE_INDEX
    label[value <= low] = BACKGROUND
    return label if boxes is None else ignore_outside(label, boxes)


def ignore_outside(label: Tensor, boxes: Tensor) -> Tensor:
    """Label maps [B, H, W] with 255 outside the boxes [B, 4] (y0 y1 x0 x1)."""
    height, width = label.shape[1:]
    y0, y1, x0, x1 = boxes.to(label.device).unsqueeze(2).unbind(1)
    rows, columns = torch.arange(height, device=label.device), torch.arange(width, device=label.device)
    inside = ((rows >= y0) & (rows < y1)).unsqueeze(2) & ((columns >= x0) & (columns < x1)).unsqueeze(1)
    return label.masked_fill(~inside, IGNORE_INDEX)
