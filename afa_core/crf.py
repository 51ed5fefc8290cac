"""Dense conditional random field: mean-field inference on segmentation probabilities, at test time only.

Source: Kraehenbuehl & Koltun (NIPS 2011). Every pixel is tied to every other one by two Gaussian kernels of its
position p and colour I, and mean-field inference (algorithm 1) repeats, from Q = softmax(-unary),

    kernels   k_pos(i, j) = exp(-|p_i - p_j|^2 / 2 s_p^2)                                  smoothness, equation 3
              k_bil(i, j) = exp(-|p_i - p_j|^2 / 2 s_a^2 - |I_i - I_j|^2 / 2 s_b^2)        appearance, equation 3
    update    Q_i(l) ~ exp(-unary_i(l) + sum_m w_m sum_j k_m(i, j) Q_j(l))                 Potts, equation 4

The sums over j are Gaussian filters, done on the permutohedral lattice of Adams, Baek & Davis (2010): a value is
splatted on the d + 1 corners of its simplex by barycentric weights, blurred by (1/4, 1/2, 1/4) along the d + 1
directions of the lattice, and sliced by the same weights. Cost is linear in N, quadratic in d.

Departures, the first three being those of the published code, with which AFA's values were chosen:
    - kernels are normalised from both sides, D^-1/2 K D^-1/2 with D = diag(K 1), so that weights do not depend on how
      many pixels look alike; K 1 comes from the same lattice, whose own gain cancels;
    - a pixel's message to itself is kept: the lattice mixes it with those of its near neighbours;
    - probabilities are at least 1e-5 before their logarithm is taken;
    - a class of probability 0 at every pixel is left out and stays 0, which also saves its time;
    - lattice points are found by sorting packed keys, not by hashing: the same few calls on CPU and GPU.
Points on which no pixel splats are not made, as in the paper: the blur loses what it would move there.

Shapes: C classes, H x W pixels, N = H * W, d features, M lattice points, V values a pixel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_core.config import CrfConfig

PROBABILITY_FLOOR = 1e-5
SUM_TOLERANCE = 1e-2
# Values filtered at once: bounds memory where there are many classes.
_VALUES_AT_ONCE = 32


@torch.no_grad()
def refine(image: Tensor, probability: Tensor, config: CrfConfig) -> Tensor:
    """Mean-field approximation of the CRF's marginals.

    Args:
        image: [H, W, 3] colours in 0..255, uint8 or float, on the device of ``probability``.
        probability: [C, H, W] in 0..1, sums to 1 over C.
        config: iterations, kernel widths and weights.

    Returns:
        [C, H, W] in 0..1, sums to 1 over C; of the type of ``probability``, computed in float32.

    Raises:
        ValueError: shapes do not fit, probabilities do not sum to 1, or a kernel is too narrow for the picture.

    Source: Kraehenbuehl & Koltun (2011), algorithm 1.
    """
    classes, height, width = probability.shape
    if image.shape != (height, width, 3):
        raise ValueError(f"image must be [{height}, {width}, 3] as the probabilities are, not {list(image.shape)}")
    if not ((probability.sum(dim=0, dtype=torch.float32) - 1).abs() <= SUM_TOLERANCE).all():  # or is NaN
        raise ValueError("probabilities must sum to 1 over the classes at every pixel")
    present = probability.flatten(1).amax(dim=1) > 0
    logits = probability[present].flatten(1).t().float().clamp_min(PROBABILITY_FLOOR).log_()
    kernels = _kernels(image, config)
    marginal = logits.softmax(dim=1)
    for _ in range(config.iterations):
        energy = logits.clone()
        for kernel, weight in kernels:
            energy.add_(kernel.filter_normalised(marginal), alpha=weight)
        marginal = energy.softmax(dim=1)
    refined = probability.new_zeros(classes, height * width)
    refined[present] = marginal.t().to(refined.dtype)
    return refined.view(classes, height, width)


def _kernels(image: Tensor, config: CrfConfig) -> list[tuple[Lattice, float]]:
    """The kernels of weight above 0, each with its weight."""
    height, width, _ = image.shape
    rows, columns = (torch.arange(size, device=image.device, dtype=torch.float64) for size in (height, width))
    position = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    kernels = []
    if config.position_weight > 0:
        kernels.append((Lattice(position / config.position_xy_px), config.position_weight))
    if config.bilateral_weight > 0:
        colour = image.flatten(0, 1).double() / config.bilateral_rgb
        features = torch.cat([position / config.bilateral_xy_px, colour], dim=1)
        kernels.append((Lattice(features), config.bilateral_weight))
    return kernels


class Lattice:
    """Gaussian filter of standard deviation 1 over given features, by a permutohedral lattice.

    Lattice points have d + 1 integer coordinates, all congruent modulo d + 1, of sum 0; the first d, packed to one
    integer, are a point's key. Packing is linear: a step along the lattice adds a constant to the key.

    Args:
        features: [N, d], N > 0, in standard deviations of the kernel.

    Raises:
        ValueError: features span so many standard deviations that keys do not fit 63 bits.

    Source: Adams, Baek & Davis (2010).
    """

    def __init__(self, features: Tensor) -> None:
        corner_keys, weights, strides = _corners(features.double())
        ordered, order = corner_keys.flatten().sort(stable=True)
        keys, inverse, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
        corners, period = torch.empty_like(inverse).scatter_(0, order, inverse), features.shape[1] + 1
        # Row M of the lattice's values is 0 and stays so: it stands for the points that were not made.
        self._missing = len(keys)
        self._corners = corners.view_as(corner_keys).int()
        self._corner_weights = weights.float()
        self._splat_pixels = (order // period).int()
        self._splat_weights = self._corner_weights.flatten()[order]
        self._splat_starts = F.pad(counts.cumsum(0), (1, 0)).int()
        # Direction j is (1, ..., 1, -d at j, 1, ..., 1); the last one has its -d in the coordinate left out.
        steps = [sum(strides) - period * stride for stride in (*strides, 0)]
        self._neighbours = [torch.stack([self._find(keys, s * step) for s in (1, -1)], dim=1) for step in steps]
        self._scale = self.filter(self._corner_weights.new_ones(len(features), 1)).rsqrt_()

    def _find(self, keys: Tensor, step: int) -> Tensor:
        """[M + 1] row of each point's neighbour a step away: M where there is none, and for row M itself."""
        row = torch.searchsorted(keys, keys + step).clamp_max_(self._missing - 1)
        return F.pad(row.masked_fill_(keys[row] != keys + step, self._missing), (0, 1), value=self._missing).int()

    def filter(self, values: Tensor) -> Tensor:
        """K values, up to a gain: [N, V] float32 to [N, V]."""
        return torch.cat([self._filter(part) for part in torch.split(values, _VALUES_AT_ONCE, dim=1)], dim=1)

    def filter_normalised(self, values: Tensor) -> Tensor:
        """D^-1/2 K D^-1/2 values with D = diag(K 1): [N, V] float32 to [N, V]."""
        return self.filter(values * self._scale).mul_(self._scale)

    def _filter(self, values: Tensor) -> Tensor:
        """Splat, blur and slice, each a weighted sum of rows, which is what ``embedding_bag`` computes."""
        pixels, starts, weights = self._splat_pixels, self._splat_starts, self._splat_weights
        lattice = F.embedding_bag(pixels, values.contiguous(), starts, mode="sum", per_sample_weights=weights)
        for pair in self._neighbours:
            lattice = F.embedding_bag(pair, lattice, mode="sum").mul_(0.25).add_(lattice, alpha=0.5)
        return F.embedding_bag(self._corners, lattice, mode="sum", per_sample_weights=self._corner_weights)


def _corners(features: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Keys [N, d + 1] and barycentric weights [N, d + 1] of the corners of each pixel's simplex, and the d strides
    by which coordinates are packed."""
    dimensions, period = features.shape[1], features.shape[1] + 1
    # Orthogonal columns that span the plane of sum 0. At this length splat, blur and slice together have variance 1.
    basis = torch.ones(period, dimensions, dtype=features.dtype, device=features.device).triu_()
    column = torch.arange(1, period, device=features.device, dtype=features.dtype)
    basis[1:].diagonal().copy_(-column)
    elevated = (features * (period * math.sqrt(2 / 3) / (column * (column + 1)).sqrt())) @ basis.t()

    low = (elevated.amin(dim=0) - 3 * period).floor()  # corners and their neighbours lie within this margin
    sizes = (elevated.amax(dim=0) + 3 * period - low + 1).tolist()[:dimensions]
    if not math.prod(sizes) < 2**62:
        raise ValueError("the kernel is too narrow for the range of its features: widen its standard deviations")
    strides = [math.prod(math.ceil(size) for size in sizes[index + 1 :]) for index in range(dimensions)]

    # The nearest point of remainder 0: round, then mend the sum where rounding moved most.
    nearest = (elevated / period).round() * period
    excess = (nearest.sum(dim=1, keepdim=True) / period).round().long()
    rank = (nearest - elevated).argsort(dim=1, stable=True).argsort(dim=1) + excess
    wraps = (rank > dimensions).long() - (rank < 0).long()
    rank, nearest = rank - wraps * period, nearest.long() - wraps * period

    # Corner k adds k to every coordinate, less d + 1 where the rank is above d - k.
    offset = torch.empty_like(elevated).scatter_(1, rank, (elevated - nearest) / period)
    drops = (offset[:, :-1] - offset[:, 1:]).flip(1)
    weights = torch.cat([1 - drops.sum(dim=1, keepdim=True), drops], dim=1)

    stride = torch.tensor(strides, device=features.device)
    base = ((nearest - low.long())[:, :dimensions] * stride).sum(dim=1)
    keys = [
        base + sum(strides) * k - period * ((rank[:, :dimensions] > dimensions - k) * stride).sum(dim=1)
        for k in range(period)
    ]
    return torch.stack(keys, dim=1), weights, strides
