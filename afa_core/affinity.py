"""Affinity: of pairs of tokens, labels for learning it, and random walks along it.

Source: AFA (CVPR 2022), sections 3.2-3.3. Two tokens are alike (1) where the pseudo-label gives them the same
class, unlike (0) where it does not, and nothing is learned (255) where either is ignored or they lie farther
apart than the window. The learned affinity A, restricted to the window, becomes a transition matrix

    T = W D^-1,  W = (A . window)^power        column sums D, plus 0.1 as in the published code

and maps are propagated as maps T, once an iteration (equations 7-8). W is symmetric, and 0 but for pairs some rows of
the grid apart: it is made in strips of rows, each with the rows in reach that follow, and never as N x N.

Shapes: B images, N = h * w tokens, K maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_core.backbone import kernels
from afa_core.classes import IGNORE_INDEX

COLUMN_EPSILON = 0.1
# Tokens of a strip of a walk, on the CPU and elsewhere: few pairs beside the window's, or few launches.
CPU_STRIP_TOKENS, STRIP_TOKENS = 160, 4096

# Tokens and other tokens, of n and m -> their affinity [B, n, m].
AffinityBetween = Callable[[slice, slice], Tensor]


@dataclass(frozen=True)
class PairAffinity:
    """The affinity sigmoid(M + M^T + b), M = Q K^T, of the pairs that it is asked for; in 32 bit also under autocast.

    Attributes:
        query: Q [B, N, c], of all heads, weighted.
        key: K [B, N, c].
        bias: b.
    """

    query: Tensor
    key: Tensor
    bias: Tensor

    @classmethod
    def joined(cls, parts: Sequence[PairAffinity]) -> PairAffinity:
        """That of several batches of pictures."""
        query, key = (torch.cat(tensors) for tensors in zip(*((part.query, part.key) for part in parts), strict=True))
        return cls(query, key, parts[0].bias)

    def all(self) -> Tensor:
        """Of all pairs, [B, N, N]."""
        with torch.autocast(self.query.device.type, enabled=False):
            merged = kernels.similarity(self.query, self.key)
            return torch.sigmoid(merged + merged.transpose(1, 2) + self.bias)

    def __call__(self, some: slice, others: slice) -> Tensor:
        """Of n tokens with m, [B, n, m]."""
        with torch.autocast(self.query.device.type, enabled=False):
            there = kernels.similarity(self.query[:, some], self.key[:, others])
            back = kernels.similarity(self.key[:, some], self.query[:, others])
            return torch.sigmoid(there + back + self.bias)


@lru_cache(maxsize=8)  # of crops of 512 pixels a step needs one of 1 MiB, a walk on a GPU one of 5
def window_mask(grid: tuple[int, int], radius: int, device: torch.device | None = None) -> Tensor:
    """Boolean [N, N]: pairs of tokens at most ``radius`` rows and ``radius`` columns apart; None: on the CPU."""
    rows, columns = (_near(side, radius, device) for side in grid)
    tokens = grid[0] * grid[1]
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(tokens, tokens)


def _near(side: int, radius: int, device: torch.device | None) -> Tensor:
    places = torch.arange(side, device=device)
    return (places[:, None] - places).abs() <= radius


def label_to_affinity_label(label: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """Pairwise labels from a label map (section 3.3).

    Args:
        label: [B, H, W] class per pixel, 255 ignored.
        grid: token grid (h, w); the label is taken there by nearest neighbour.
        radius: of the window, in tokens.

    Returns:
        [B, N, N] uint8: 1 same class, 0 different, 255 ignored.
    """
    tokens = F.interpolate(label[:, None].float(), size=grid, mode="nearest").flatten(1)
    same = (tokens[:, :, None] == tokens[:, None, :]).to(torch.uint8)
    ignored = tokens == IGNORE_INDEX
    unused = ignored[:, :, None] | ignored[:, None, :] | ~window_mask(grid, radius, label.device)
    return same.masked_fill(unused, IGNORE_INDEX)


@dataclass(frozen=True)
class _Strip:
    """Some rows of W.

    Attributes:
        tokens: of these rows of the grid.
        ahead: the tokens in their reach, themselves first, that do not lie before them.
        weights: [B, tokens, ahead].
    """

    tokens: slice
    ahead: slice
    weights: Tensor


class RandomWalk:
    """Random walks of maps along an affinity."""

    def __init__(
        self,
        affinity: AffinityBetween,
        grid: tuple[int, int],
        *,
        radius: int,
        power: float,
        iterations: int,
        device: torch.device | None = None,
    ) -> None:
        """Make the transition.

        Args:
            affinity: in 0..1, symmetric.
            grid: (h, w).
            radius: pairs farther apart, in rows or in columns, do not interact.
            power: sharpening of the affinity before its columns are normalised.
            iterations: number of steps of a walk.
            device: of the affinity; None: the CPU.
        """
        self.iterations = iterations
        self._strips = list(_strips(affinity, grid, radius, power, device or torch.device("cpu")))
        first = self._strips[0].weights
        everywhere = first.new_ones(len(first), 1, grid[0] * grid[1])
        self._column_sums = self._spread(everywhere) + COLUMN_EPSILON

    def __call__(self, maps: Tensor) -> Tensor:
        """Maps [B, K, h, w] -> [B, K, h, w]."""
        walked = maps.flatten(2)
        for _ in range(self.iterations):
            walked = self._spread(walked) / self._column_sums
        return walked.unflatten(2, maps.shape[2:])

    def _spread(self, maps: Tensor) -> Tensor:
        """Maps [B, K, N] times W, in 32 bit also under autocast."""
        spread = torch.zeros_like(maps)
        with torch.autocast(maps.device.type, enabled=False):
            for strip in self._strips:
                spread[..., strip.tokens] += maps[..., strip.ahead] @ strip.weights.transpose(1, 2)
                following = slice(strip.tokens.stop, strip.ahead.stop)
                beside = strip.weights[..., following.start - strip.tokens.start :]
                spread[..., following] += maps[..., strip.tokens] @ beside
        return spread


def _strips(
    affinity: AffinityBetween, grid: tuple[int, int], radius: int, power: float, device: torch.device
) -> Iterator[_Strip]:
    height, width = grid
    strip_tokens = CPU_STRIP_TOKENS if device.type == "cpu" else STRIP_TOKENS
    for first, last in kernels.even_cuts(height, max(1, strip_tokens // width)):
        reach = min(height, last + radius)
        tokens, ahead = slice(first * width, last * width), slice(first * width, reach * width)
        far = ~window_mask((reach - first, width), radius, device)[: (last - first) * width]
        yield _Strip(tokens, ahead, affinity(tokens, ahead).masked_fill(far, 0).pow_(power))
