"""Pixel-adaptive refinement on the GPU: two kernels, nothing materialised but the weights.

    weights   one program a tile of pixels: statistics, colour kernel and softmax over the neighbours in registers
    one step  one program a tile of pixels and group of maps: a weight is read once for all maps of the group

A step must move D weights and each map twice, (4 D + 8 K) bytes a pixel in 32 bit; what a tile's neighbours share is in
the cache. The form that gathers neighbours moves D times the maps besides. Same numbers as ``par``, which explains the
method. Written in Triton, which comes with torch's builds for CUDA.

Shapes: B images, K maps, H x W pixels, D neighbours at offsets (dy, dx).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 256
# Not compiled anew for sizes that 16 divides: lanes would then take four pixels each, and gather 16 bytes apart.
ANY_SIZE = ["maps_count", "height", "width"]
MOST_MAPS = 8


def neighbour_weights(
    image_unit: Tensor, offsets: Tensor, position: Tensor, bandwidth: float, epsilon: float
) -> Tensor:
    """Weights [B, D, H, W] of pictures [B, 3, H, W]; offsets [D, 2] int32, position terms [D]."""
    batch, _, height, width = image_unit.shape
    weights = image_unit.new_empty(batch, len(offsets), height, width)
    grid = (triton.cdiv(height * width, PIXELS), batch)
    with torch.cuda.device_of(weights):  # which need not be the current one
        _weights_kernel[grid](
            image_unit.contiguous(), weights, offsets, position, height, width, bandwidth, epsilon,
            COUNT=len(offsets), PIXELS=PIXELS,
        )  # fmt: skip
    return weights


def step(maps: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """One iteration: maps [B, K, H, W] and weights [B, D, H, W] -> [B, K, H, W]."""
    batch, count, height, width = maps.shape
    mixed = torch.empty_like(maps)
    group = min(MOST_MAPS, triton.next_power_of_2(count))
    grid = (triton.cdiv(height * width, PIXELS), triton.cdiv(count, group), batch)
    with torch.cuda.device_of(mixed):
        _step_kernel[grid](
            maps, weights, offsets, mixed, count, height, width, COUNT=len(offsets), GROUP=group, PIXELS=PIXELS
        )
    return mixed


@triton.jit
def _neighbour(offsets, index, y, x, height, width):  # type: ignore[no-untyped-def]
    """Place of a neighbour in its plane; beyond the border it is the border."""
    near_y = tl.minimum(tl.maximum(y + tl.load(offsets + 2 * index), 0), height - 1)
    near_x = tl.minimum(tl.maximum(x + tl.load(offsets + 2 * index + 1), 0), width - 1)
    return near_y * width + near_x


@triton.jit(do_not_specialize=ANY_SIZE)
def _weights_kernel(  # type: ignore[no-untyped-def]
    image, weights, offsets, position, height, width, bandwidth, epsilon, COUNT: tl.constexpr, PIXELS: tl.constexpr
):
    plane = height * width
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < plane
    y, x = pixel // width, pixel % width
    picture = tl.program_id(1).to(tl.int64)  # all weights together may be more than 2^31
    image += picture * 3 * plane
    weights += picture * COUNT * plane
    for channel in range(3):
        colours = image + channel * plane
        centre = tl.load(colours + pixel, mask=inside, other=0.0)
        total = tl.zeros([PIXELS], tl.float32)
        for index in range(COUNT):
            near = _neighbour(offsets, index, y, x, height, width)
            total += tl.load(colours + near, mask=inside, other=0.0)
        squares = tl.zeros([PIXELS], tl.float32)
        for index in range(COUNT):
            near = _neighbour(offsets, index, y, x, height, width)
            difference = tl.load(colours + near, mask=inside, other=0.0) - total / COUNT
            squares += difference * difference
        scale = 1.0 / ((tl.sqrt(squares / (COUNT - 1)) + epsilon) * bandwidth)
        for index in range(COUNT):
            near = _neighbour(offsets, index, y, x, height, width)
            term = (tl.load(colours + near, mask=inside, other=0.0) - centre) * scale
            term = -term * term / 3.0
            if channel > 0:
                term += tl.load(weights + index * plane + pixel, mask=inside, other=0.0)
            tl.store(weights + index * plane + pixel, term, mask=inside)
        tl.debug_barrier()  # the next loads may be other threads'
    highest = tl.full([PIXELS], float("-inf"), tl.float32)
    for index in range(COUNT):
        highest = tl.maximum(highest, tl.load(weights + index * plane + pixel, mask=inside, other=0.0))
    total = tl.zeros([PIXELS], tl.float32)
    for index in range(COUNT):
        total += tl.exp(tl.load(weights + index * plane + pixel, mask=inside, other=0.0) - highest)
    for index in range(COUNT):
        at = weights + index * plane + pixel
        share = tl.exp(tl.load(at, mask=inside, other=0.0) - highest) / total
        tl.store(at, share + tl.load(position + index), mask=inside)


@triton.jit(do_not_specialize=ANY_SIZE)
def _step_kernel(  # type: ignore[no-untyped-def]
    maps, weights, offsets, mixed, maps_count, height, width,
    COUNT: tl.constexpr, GROUP: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    plane = height * width
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < plane
    y, x = pixel // width, pixel % width
    channel = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    mine = (channel < maps_count)[:, None] & inside[None, :]
    picture = tl.program_id(2).to(tl.int64)
    rows = (picture * maps_count + channel)[:, None] * plane
    weights += picture * COUNT * plane
    total = tl.zeros([GROUP, PIXELS], tl.float32)
    for index in range(COUNT):
        weight = tl.load(weights + index * plane + pixel, mask=inside, other=0.0)
        near = _neighbour(offsets, index, y, x, height, width)
        total += weight[None, :] * tl.load(maps + rows + near[None, :], mask=mine, other=0.0)
    tl.store(mixed + rows + pixel[None, :], total, mask=mine)
