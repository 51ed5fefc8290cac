"""What every backbone gives: a feature pyramid and the queries and keys behind the affinity.

Shapes: B images; stage s has c_s channels on an h_s x w_s grid; N = h4 * w4 tokens of the last stage;
n heads of d channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class BackboneOutput:
    """One forward pass.

    Attributes:
        features: four maps [B, c_s, h_s, w_s], from the finest to the coarsest stage.
        queries: of the last block but one and of the last block, each [B, n, N, d].
        keys: of the same blocks, each [B, n, N, d].
    """

    features: tuple[Tensor, Tensor, Tensor, Tensor]
    queries: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]

    def part(self, images: slice) -> BackboneOutput:
        """That of some of the pictures."""
        one, two, three, four = (feature[images] for feature in self.features)
        (query_a, query_b), (key_a, key_b) = self.queries, self.keys
        return BackboneOutput(
            (one, two, three, four), (query_a[images], query_b[images]), (key_a[images], key_b[images])
        )

    @property
    def grid(self) -> tuple[int, int]:
        """(h4, w4), the token grid of the queries, keys and the affinity."""
        return (self.features[-1].shape[2], self.features[-1].shape[3])

    @property
    def attention_logits(self) -> Tensor:
        """S = Q K^T of the two blocks, before scale and softmax: [B, 2 n, N, N].

        The model itself never forms it (see ``AffinityHead``); it is here to be looked at.
        """
        return torch.cat([q @ k.transpose(-2, -1) for q, k in zip(self.queries, self.keys, strict=True)], dim=1)


class Backbone(Protocol):
    """What AFANet asks of a backbone module."""

    channels: tuple[int, int, int, int]
    affinity_heads: int  # n of the last two blocks

    def __call__(self, image: Tensor) -> BackboneOutput: ...
