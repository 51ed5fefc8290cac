"""Pixel-adaptive refinement (PAR).

Source: AFA (CVPR 2022), section 3.4, equations 9-11. A pixel's maps become a weighted mean of those of its 8
neighbours at several dilations, repeatedly:

    colour    k_rgb = -(|I_i - I_j| / (w1 sigma_rgb))^2      mean over R, G, B
    position  k_pos = -(|P_i - P_j| / (w1 sigma_pos))^2
    weights   softmax_j(k_rgb) + w2 softmax_j(k_pos)

sigma is the standard deviation (unbiased) over the neighbours of a pixel: of their colours, and of their
distances. The border is replicated. Neighbours are slices of one padded tensor and are never gathered. On a GPU the
same is done by the kernels of ``par_gpu``.

Shapes: B images, K maps, H x W pixels, D = 8 * number of dilations neighbours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from subprocess import SubprocessError

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_core.config import ParConfig

SIGMA_EPSILON = 1e-8
_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def refine(image_unit: Tensor, maps: Tensor, config: ParConfig, weights: Tensor | None = None) -> Tensor:
    """PAR of some maps by the edges of their picture.

    Args:
        image_unit: [B, 3, H, W] in 0..1.
        maps: [B, K, h, w]; brought to H x W with ``align_corners=True``.
        config: dilations, iterations and weights.
        weights: ``neighbour_weights`` of the picture, if they are known already.

    Returns:
        [B, K, H, W].
    """
    if maps.shape[2:] != image_unit.shape[2:]:
        maps = F.interpolate(maps, size=image_unit.shape[2:], mode="bilinear", align_corners=True)
    if not config.iterations:
        return maps
    if weights is None:
        weights = neighbour_weights(image_unit, config)
    if _on_gpu(maps):
        from afa_core import par_gpu

        offsets = _offsets(config, maps.device)
        maps = maps.contiguous()
        for _ in range(config.iterations):
            maps = par_gpu.step(maps, weights, offsets)
        return maps
    for _ in range(config.iterations):
        mixed = torch.zeros_like(maps)
        for index, neighbour in enumerate(_neighbours(maps, config.dilations)):
            mixed.addcmul_(neighbour, weights[:, index : index + 1])
        maps = mixed
    return maps


def neighbour_weights(image_unit: Tensor, config: ParConfig) -> Tensor:
    """Weight of each neighbour of each pixel, [B, D, H, W]."""
    position = config.position_weight * _position_weights(config, image_unit.device).to(image_unit.dtype)
    if _on_gpu(image_unit):
        from afa_core import par_gpu

        offsets = _offsets(config, image_unit.device)
        return par_gpu.neighbour_weights(image_unit, offsets, position, config.colour_bandwidth, SIGMA_EPSILON)
    count = len(_DIRECTIONS) * len(config.dilations)
    mean = sum(_neighbours(image_unit, config.dilations)) / count
    variance = torch.zeros_like(image_unit)
    for neighbour in _neighbours(image_unit, config.dilations):
        variance += (neighbour - mean) ** 2
    scale = 1 / ((variance / (count - 1)).sqrt_().add_(SIGMA_EPSILON) * config.colour_bandwidth)
    batch, _, height, width = image_unit.shape
    kernel = image_unit.new_empty(batch, count, height, width)
    for index, neighbour in enumerate(_neighbours(image_unit, config.dilations)):
        kernel[:, index] = -((neighbour - image_unit) * scale).square_().mean(dim=1)
    return kernel.softmax(dim=1).add_(position[:, None, None])


def _on_gpu(maps: Tensor) -> bool:
    """Whether the fused kernels serve."""
    return maps.is_cuda and maps.dtype == torch.float32 and kernels_run(maps.device)


@lru_cache
def kernels_run(device: torch.device) -> bool:
    """Whether the fused kernels can be had; at its first launch Triton compiles itself a helper.

    A build of torch without Triton, or for another GPU, goes without them, and so does a machine that cannot compile,
    which is said.
    """
    if find_spec("triton") is None:
        return False
    from afa_core import par_gpu

    try:
        pixel = torch.zeros(1, 1, 1, 1, device=device)
        par_gpu.step(pixel, pixel, torch.zeros(1, 2, dtype=torch.int32, device=device))
    except (RuntimeError, OSError, ImportError, SubprocessError) as error:
        reason = str(error).partition("\n")[0]
        sys.stderr.write(
            f"PAR goes without its GPU kernels, which is slower: {reason} (Triton wants gcc and Python's headers)\n"
        )
        return False
    return True


@lru_cache(maxsize=16)
def _offsets(config: ParConfig, device: torch.device) -> Tensor:
    """(dy, dx) of the neighbours, [D, 2] int32."""
    offsets = [(d * dy, d * dx) for d in config.dilations for dy, dx in _DIRECTIONS]
    return torch.tensor(offsets, dtype=torch.int32, device=device)


@lru_cache(maxsize=16)  # else a GPU would be waited for each time
def _position_weights(config: ParConfig, device: torch.device) -> Tensor:
    """Softmax of the position term over the neighbours, [D]; the same for every pixel."""
    distances = torch.tensor(
        [d * (abs(dy) + abs(dx)) ** 0.5 for d in config.dilations for dy, dx in _DIRECTIONS], dtype=torch.float32
    )
    scaled = distances / (distances.std() + SIGMA_EPSILON) / config.colour_bandwidth
    return torch.softmax(-(scaled**2), dim=0).to(device)


def _neighbours(maps: Tensor, dilations: tuple[int, ...]) -> Iterator[Tensor]:
    """The D shifted views [B, K, H, W] of ``maps``, dilation by dilation."""
    height, width = maps.shape[2:]
    margin = max(dilations)
    padded = F.pad(maps, (margin, margin, margin, margin), mode="replicate")
    for dilation in dilations:
        for dy, dx in _DIRECTIONS:
            top, left = margin + dy * dilation, margin + dx * dilation
            yield padded[:, :, top : top + height, left : left + width]
