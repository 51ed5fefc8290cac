"""Maps of the labelled classes alone.

A picture carries a few of perhaps eighty classes, and only theirs take part in a pseudo-label. Behind the network
every map is therefore kept packed: K channels, K the largest number of labels of a picture in the batch, with the
background in front where there is one. Pictures with fewer labels have empty channels at the end.

Shapes: B images, F foreground classes, C = F + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def strongest(maps: Tensor) -> Tensor:
    """[B, K, ...] -> [B, ...] int64: the channel with the largest value, the first of equal ones.

    ``argmax`` is the same and takes ten times as long on a CPU for a few channels of many pixels.
    """
    return maps.max(dim=1).indices


@dataclass(frozen=True)
class Packing:
    """Which class each packed channel of each picture is.

    Attributes:
        index: [B, K] int64, foreground classes 0..F-1 in ascending order; 0 in empty channels.
        valid: [B, K] boolean, False for the empty channels, which come last.
        num_foreground: F.
        counts: labels of each picture; known here, as a GPU would be waited for wherever they are counted.
    """

    index: Tensor
    valid: Tensor
    num_foreground: int
    counts: list[int]

    @classmethod
    def of(cls, cls_label: Tensor) -> Packing:
        """Of multi-hot labels [B, F]; K is at least 1."""
        labelled = cls_label > 0
        counts = labelled.sum(1).tolist()
        channels = max(1, *counts)
        order = torch.sort((~labelled).to(torch.uint8), dim=1, stable=True).indices[:, :channels]
        valid = labelled.gather(1, order)
        return cls(order.masked_fill(~valid, 0), valid, cls_label.shape[1], counts)

    @classmethod
    def of_all(cls, batch: int, num_foreground: int, device: torch.device) -> Packing:
        """Every class of every picture."""
        index = torch.arange(num_foreground, device=device).expand(batch, num_foreground)
        return cls(index, torch.ones_like(index, dtype=torch.bool), num_foreground, [num_foreground] * batch)

    def part(self, images: slice) -> Packing:
        """That of some of the pictures."""
        return Packing(self.index[images], self.valid[images], self.num_foreground, self.counts[images])

    def pack(self, maps: Tensor) -> Tensor:
        """[B, F, H, W] -> [B, K, H, W]; empty channels are 0."""
        index = self.index[:, :, None, None].expand(-1, -1, *maps.shape[2:])
        return maps.gather(1, index).masked_fill(~self.valid[:, :, None, None], 0)

    def unpack(self, maps: Tensor) -> Tensor:
        """[B, K, H, W] -> [B, F, H, W], or with background [B, K + 1, H, W] -> [B, C, H, W]; other classes are 0."""
        background = maps.shape[1] - self.index.shape[1]
        # Empty channels hold 0 and are added to class 0, which leaves it as it is.
        index = F.pad(self.index + background, (background, 0))[:, :, None, None].expand_as(maps)
        dense = maps.new_zeros(len(maps), self.num_foreground + background, *maps.shape[2:])
        return dense.scatter_add_(1, index, maps)

    def with_background(self) -> Tensor:
        """Boolean [B, K + 1]: the channels in use, background in front."""
        return F.pad(self.valid, (1, 0), value=True)

    def to_class(self, position: Tensor) -> Tensor:
        """[B, ...] int64 number of a channel, background in front -> number of the class, 0..F."""
        classes = F.pad(self.index + 1, (1, 0))
        return classes.gather(1, position.flatten(1)).view_as(position)
