"""Affinity: labels for learning it, and random-walk propagation along it.

Source: AFA (CVPR 2022), sections 3.2-3.3. Two tokens are alike (1) where the pseudo-label gives them the same
class, unlike (0) where it does not, and nothing is learned (255) where either is ignored or they lie farther
apart than the window. The learned affinity A, restricted to the window, becomes a transition matrix

    T = D^-1 (A . window)^power        column sums D, plus 0.1 as in the published code

and maps are propagated as maps T, once an iteration (equations 7-8).

Shapes: B images, N = h * w tokens, K maps.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_core.classes import IGNORE_INDEX

COLUMN_EPSILON = 0.1


@lru_cache(maxsize=8)  # of pictures of 512 pixels each has 5 MiB
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


def propagate(
    maps: Tensor, affinity: Tensor, grid: tuple[int, int], *, radius: int, power: float, iterations: int
) -> Tensor:
    """Random walk of maps along the affinity.

    Args:
        maps: [B, K, h, w].
        affinity: [B, N, N] in 0..1.
        grid: (h, w).
        radius: pairs farther apart do not interact.
        power: sharpening of the affinity before its columns are normalised.
        iterations: number of steps of the walk.

    Returns:
        [B, K, h, w].
    """
    weights = affinity.masked_fill(~window_mask(grid, radius, affinity.device), 0).pow_(power)
    transition = weights.div_(weights.sum(dim=1, keepdim=True) + COLUMN_EPSILON)
    walked = maps.flatten(2)
    with torch.autocast(maps.device.type, enabled=False):  # in 32 bit always
        for _ in range(iterations):
            walked = walked @ transition
    return walked.unflatten(2, grid)
