"""From class activation maps and tags to refined label maps: the one implementation.

Training learns from these labels and batch labelling writes them; both call ``make_pseudo_label``. Source: AFA
(CVPR 2022), figure 2 and sections 3.3-3.4.

    refined CAM        [background score, cam] -> softmax over valid classes -> PAR -> argmax
    refined affinity   the same softmax on the token grid -> random walk along the affinity -> PAR -> argmax

Each is done for a low and a high background score. A pixel is foreground where the high run says so, background
where both runs say so, and ignored where they differ. With low = high nothing is ignored inside the box.

Only the labelled channels and the background are refined (``packing``), low and high together. The weights of PAR are
derived once for the crop, and once more only for a box that is smaller.

Shapes: B images, F foreground classes, C = F + 1, K packed ones, H x W pixels; boxes [B, 4] as y0 y1 x0 x1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from afa_core import par
from afa_core.affinity import RandomWalk
from afa_core.cam import MultiScaleCam, ignore_outside, multi_scale_cam, resize
from afa_core.classes import BACKGROUND, IGNORE_INDEX
from afa_core.config import CamConfig, ParConfig
from afa_core.model import AFANet
from afa_core.packing import Packing, strongest

BackgroundScores = tuple[float, float]  # low, high


@dataclass(frozen=True)
class RefinedMaps:
    """What refinement gives for the low and the high background score.

    Attributes:
        runs: [B, 2, K + 1, H, W], the low and the high one, background in front; 0 outside the box.
        packing: which classes the others are of.
        label: [B, H, W] int64 from the two.
    """

    runs: Tensor
    packing: Packing
    label: Tensor

    @property
    def low(self) -> Tensor:
        """[B, C, H, W] of the low score; 0 for classes without a tag."""
        return self.packing.unpack(self.runs[:, 0])

    @property
    def high(self) -> Tensor:
        """The same of the high score."""
        return self.packing.unpack(self.runs[:, 1])


@dataclass(frozen=True)
class PseudoLabel:
    """Every stage of the label of a batch, from coarse to fine, with the walk along the affinity if that was wanted."""

    cam: MultiScaleCam
    refined_cam: RefinedMaps
    walk: RandomWalk | None
    refined_affinity: RefinedMaps | None


class ShrunkenCrops:
    """Crops as PAR sees them, with the weights of their neighbours, derived when they are first asked for."""

    def __init__(self, image_unit: Tensor, config: ParConfig) -> None:
        self.image_unit, self.config = image_unit, config
        self.picture = resize(image_unit, _shrunk(image_unit.shape[2:], config))

    @cached_property
    def _weights(self) -> Tensor:
        """[B, D, h, w]."""
        return par.neighbour_weights(self.picture, self.config)

    def whole(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Picture of one crop, shrunken, and its weights, which nobody needs without iterations."""
        return self.picture[index, None], self._weights[index, None] if self.config.iterations else None

    def of_box(self, index: int, box: tuple[int, int, int, int]) -> tuple[Tensor, Tensor | None]:
        """Picture of one crop's valid region, shrunken, and its weights if they are known."""
        y0, y1, x0, x1 = box
        height, width = self.image_unit.shape[2:]
        if box == (0, height, 0, width):
            return self.whole(index)
        inside = self.image_unit[index, None, :, y0:y1, x0:x1]
        return resize(inside, _shrunk((y1 - y0, x1 - x0), self.config)), None


@torch.no_grad()
def make_pseudo_label(
    model: AFANet,
    image: Tensor,
    image_unit: Tensor,
    cls_label: Tensor,
    boxes: Tensor,
    cam_config: CamConfig,
    par_config: ParConfig,
    *,
    background_scores: BackgroundScores | None = None,
    with_affinity: bool = True,
) -> PseudoLabel:
    """Refined labels of a batch.

    Args:
        model: the network.
        image: normalised pictures [B, 3, H, W].
        image_unit: the same pictures in 0..1, for PAR.
        cls_label: [B, F] multi-hot.
        boxes: [B, 4] the valid region of each picture.
        background_scores: (low, high); None takes the configuration's.
        with_affinity: also refine the CAM propagated along the affinity.
    """
    scores = background_scores or (cam_config.background_score_low, cam_config.background_score_high)
    cam = multi_scale_cam(model, image, cam_config.scales, Packing.of(cls_label))
    crops = ShrunkenCrops(image_unit, par_config)
    walk = random_walk(cam, cam_config) if with_affinity else None
    return PseudoLabel(
        cam=cam,
        refined_cam=refine_cam(crops, cam, boxes, scores),
        walk=walk,
        refined_affinity=refine_affinity(crops, cam, boxes, scores, walk) if walk else None,
    )


def refine_cam(crops: ShrunkenCrops, cam: MultiScaleCam, boxes: Tensor, scores: BackgroundScores) -> RefinedMaps:
    """Refined maps of the CAM: softmax and PAR on the whole shrunken crop."""
    probability = resize(cam.cam, crops.picture.shape[2:])
    runs = torch.stack([softmax_over_valid(probability, cam.packing, score) for score in scores], dim=1)
    refined = torch.zeros_like(runs)
    for index, count in enumerate(cam.packing.counts):
        valid = runs[index, None, :, : 1 + count].flatten(1, 2)
        picture, weights = crops.whole(index)
        made = par.refine(picture, valid, crops.config, weights)
        refined[index, :, : 1 + count] = made.unflatten(1, (2, 1 + count))
    return _to_refined_maps(_resize_runs(refined, crops.image_unit.shape[2:]), cam.packing, boxes)


def refine_affinity(
    crops: ShrunkenCrops, cam: MultiScaleCam, boxes: Tensor, scores: BackgroundScores, walk: RandomWalk
) -> RefinedMaps:
    """Refined maps of the propagated CAM: PAR on the shrunken valid region of each crop."""
    runs = _resize_runs(propagate_cam(cam, scores, walk), crops.image_unit.shape[2:])
    refined = torch.zeros_like(runs)
    for index, (count, (y0, y1, x0, x1)) in enumerate(zip(cam.packing.counts, boxes.tolist(), strict=True)):
        picture, weights = crops.of_box(index, (y0, y1, x0, x1))
        inside = (index, slice(None), slice(0, 1 + count), slice(y0, y1), slice(x0, x1))
        made = par.refine(picture, runs[inside].flatten(0, 1)[None], crops.config, weights)
        refined[inside] = resize(made, (y1 - y0, x1 - x0)).unflatten(1, (2, 1 + count))[0]
    return _to_refined_maps(refined, cam.packing, boxes)


def random_walk(cam: MultiScaleCam, config: CamConfig) -> RandomWalk:
    """The walk along the affinity of the largest scale."""
    return RandomWalk(
        cam.affinity,
        cam.grid,
        radius=config.affinity_radius,
        power=config.propagation_power,
        iterations=config.propagation_iterations,
        device=cam.cam.device,
    )


def propagate_cam(cam: MultiScaleCam, scores: Sequence[float], walk: RandomWalk) -> Tensor:
    """CAM with background of S scores, propagated: [B, S, K + 1, h, w]."""
    maps = resize(cam.cam, cam.grid)
    runs = torch.stack([softmax_over_valid(maps, cam.packing, score) for score in scores], dim=1)
    return walk(runs.flatten(1, 2)).unflatten(1, runs.shape[1:3])


def softmax_over_valid(cam: Tensor, packing: Packing, background_score: float) -> Tensor:
    """[B, K, H, W] -> [B, K + 1, H, W]: background in front, softmax over it and the labelled classes; others 0."""
    maps = torch.cat([torch.full_like(cam[:, :1], background_score), cam], dim=1)
    return maps.masked_fill(~packing.with_background()[:, :, None, None], -torch.inf).softmax(dim=1)


def _resize_runs(runs: Tensor, size: torch.Size) -> Tensor:
    return resize(runs.flatten(1, 2), size).unflatten(1, runs.shape[1:3])


def _to_refined_maps(runs: Tensor, packing: Packing, boxes: Tensor) -> RefinedMaps:
    low, high = (packing.to_class(strongest(runs[:, index])) for index in (0, 1))
    return RefinedMaps(runs, packing, ignore_outside(low_high_to_label(low, high), boxes))


def low_high_to_label(low: Tensor, high: Tensor) -> Tensor:
    """Label maps [...] of both runs -> one: class of the high run, background where both say so, else ignored."""
    undecided = (high == BACKGROUND) & (low != BACKGROUND)
    return high.masked_fill(undecided, IGNORE_INDEX)


def _shrunk(size: torch.Size | tuple[int, int], config: ParConfig) -> tuple[int, int]:
    return max(1, size[0] // config.shrink_factor), max(1, size[1] // config.shrink_factor)
