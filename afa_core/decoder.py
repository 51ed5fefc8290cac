"""SegFormer's all-MLP decoder.

Source: Xie et al., SegFormer, NeurIPS 2021, section 3.2, equation 4: one linear map per stage to a common
width, everything resized to the finest grid, fused by a 1x1 convolution, then classified per pixel.

Shapes: stage s is [B, c_s, h_s, w_s]; E decoder channels; C = F + 1 classes with background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SegFormerDecoder(nn.Module):
    """Feature pyramid -> segmentation logits on the grid of stage 1."""

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        # A linear map of tokens is a 1x1 convolution of their grid.
        self.projections = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.fusion = nn.Conv2d(len(in_channels) * channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Pyramid, finest first -> logits [B, C, h_1, w_1]."""
        grid = features[0].shape[2:]
        projected = [
            F.interpolate(projection(feature), size=grid, mode="bilinear", align_corners=False)
            for projection, feature in zip(self.projections, features, strict=True)
        ]
        # Coarsest first: the order the published checkpoints' fusion weights expect.
        fused = self.fusion(torch.cat(projected[::-1], dim=1))
        return self.classifier(self.dropout(F.relu(self.norm(fused))))
