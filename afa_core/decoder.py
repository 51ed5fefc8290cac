"""SegFormer's all-MLP decoder.

Source: Xie et al., SegFormer, NeurIPS 2021, section 3.2, equation 4: one linear map per stage to a common
width, everything resized to the finest grid, fused by a 1x1 convolution, then classified per pixel.

Projection, resizing and fusion are linear, and bilinear resizing keeps constants and treats channels alike, so a
stage's two maps are multiplied into one (W_s = V_s P_s) and applied before its resizing:

    sum_s V_s resize(P_s f_s + p_s)  =  sum_s resize(W_s f_s + V_s p_s)

which is a tenth of the products and never holds the concatenation of all stages at the finest grid.

Shapes: stage s is [B, c_s, h_s, w_s]; E decoder channels; C = F + 1 classes with background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from afa_core.backbone import kernels


class SegFormerDecoder(nn.Module):
    """Feature pyramid -> segmentation logits on the grid of stage 1."""

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        # A linear map of tokens is a 1x1 convolution of their grid.
        self.projections = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.fusion = nn.Conv2d(len(in_channels) * channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout2d(dropout, inplace=True)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Pyramid, finest first -> logits [B, C, h_1, w_1]."""
        finest = tuple(features[0].shape[2:])
        by_grid: dict[tuple[int, ...], Tensor] = {}
        for weight, bias, feature in zip(*self._merged(), features, strict=True):
            grid = tuple(feature.shape[2:])
            projected = kernels.linear(feature.permute(0, 2, 3, 1), weight, bias, fast=True).permute(0, 3, 1, 2)
            by_grid[grid] = by_grid[grid] + projected if grid in by_grid else projected
        fused = by_grid.pop(finest)
        for projected in by_grid.values():
            fused = F.interpolate(projected, size=finest, mode="bilinear", align_corners=False).add_(fused)
        # Dropout scales by numbers that are not negative: in front of the ReLU it gives the same, in the same memory.
        hidden = F.relu_(self.dropout(self.norm(fused))).permute(0, 2, 3, 1)
        logits = kernels.linear(hidden, self.classifier.weight.flatten(1), self.classifier.bias, fast=True)
        return logits.permute(0, 3, 1, 2)

    def _merged(self) -> tuple[list[Tensor], list[Tensor]]:
        """W_s and V_s p_s of every stage, finest first."""
        # Coarsest first: the order the published checkpoints' fusion weights expect.
        fusions = self.fusion.weight.flatten(1).chunk(len(self.projections), dim=1)[::-1]
        weights, biases = [], []
        for fusion, projection in zip(fusions, self.projections, strict=True):
            assert isinstance(projection, nn.Conv2d)
            assert projection.bias is not None
            weights.append(fusion @ projection.weight.flatten(1))
            biases.append(fusion @ projection.bias)
        return weights, biases
