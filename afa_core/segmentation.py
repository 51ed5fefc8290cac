"""Test-time segmentation: maximum over scales of the mean of a picture and its mirror.

As in AFA's published evaluation; the paper (section 4.1) only says "multi-scale". Shapes: B images, C classes
with background, h x w = H/4 x W/4 the decoder's grid at scale 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from afa_core.cam import evaluation_mode, resize, scaled_with_mirror
from afa_core.model import AFANet


@torch.no_grad()
def multi_scale_segmentation(model: AFANet, image: Tensor, scales: Sequence[float]) -> Tensor:
    """Segmentation logits [B, C, h, w] of normalised pictures [B, 3, H, W], on the grid of the first scale."""
    best: Tensor | None = None
    with evaluation_mode(model):
        for scale in scales:
            features = model.backbone(scaled_with_mirror(image, scale))
            straight, mirrored = model.segment(features).chunk(2)
            logits = (straight + mirrored.flip(3)) / 2
            best = logits if best is None else torch.maximum(best, resize(logits, best.shape[2:]))
    if best is None:
        raise ValueError("scales is empty")
    return best
