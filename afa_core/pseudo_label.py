"""From class activation maps and tags to refined label maps: the one implementation.

Training learns from these labels and batch labelling writes them; both call ``make_pseudo_label``. Source: AFA
(CVPR 2022), figure 2 and sections 3.3-3.4.

    refined CAM        [background score, cam] -> softmax over valid classes -> PAR -> argmax
    refined affinity   the same softmax on the token grid -> random walk along the affinity -> PAR -> argmax

Each is done for a low and a high background score. A pixel is foreground where the high run says so, background
where both runs say so, and ignored where they differ. With low = high nothing is ignored inside the box.

Only the labelled channels and the background are refined, low and high together, so that the colour kernel of a
picture is derived once.

Shapes: B images, F foreground classes, C = F + 1, H x W pixels; boxes [B, 4] as y0 y1 x0 x1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afa_core import par
from afa_core.affinity import propagate
from afa_core.cam import MultiScaleCam, ignore_outside, multi_scale_cam, resize, valid_cam
from afa_core.classes import BACKGROUND, IGNORE_INDEX
from afa_core.config import CamConfig, ParConfig
from afa_core.model import AFANet

BackgroundScores = tuple[float, float]  # low, high


@dataclass(frozen=True)
class RefinedMaps:
    """What refinement gives for the low and the high background score.

    Attributes:
        low: [B, C, H, W]; 0 for classes without a tag and outside the box.
        high: the same for the high score.
        label: [B, H, W] int64 from the two.
    """

    low: Tensor
    high: Tensor
    label: Tensor


@dataclass(frozen=True)
class PseudoLabel:
    """Every stage of the label of a batch, from coarse to fine."""

    cam: MultiScaleCam
    refined_cam: RefinedMaps
    refined_affinity: RefinedMaps | None


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
    cam = multi_scale_cam(model, image, cam_config.scales)
    return PseudoLabel(
        cam=cam,
        refined_cam=refine_cam(image_unit, cam.cam, cls_label, boxes, scores, par_config),
        refined_affinity=refine_affinity(image_unit, cam, cls_label, boxes, scores, cam_config, par_config)
        if with_affinity
        else None,
    )


def refine_cam(
    image_unit: Tensor,
    cam: Tensor,
    cls_label: Tensor,
    boxes: Tensor,
    background_scores: BackgroundScores,
    config: ParConfig,
) -> RefinedMaps:
    """Refined maps of the CAM [B, F, H, W]: softmax and PAR on the whole shrunken crop."""
    size = image_unit.shape[2:]
    small = _shrunk(size, config)
    picture, probability = resize(image_unit, small), resize(cam, small)
    low, high = (softmax_over_valid(probability, cls_label, score) for score in background_scores)
    low, high = (resize(maps, size) for maps in _refine_valid(picture, [low, high], cls_label, config))
    return _to_refined_maps(low, high, boxes)


def refine_affinity(
    image_unit: Tensor,
    cam: MultiScaleCam,
    cls_label: Tensor,
    boxes: Tensor,
    background_scores: BackgroundScores,
    cam_config: CamConfig,
    par_config: ParConfig,
) -> RefinedMaps:
    """Refined maps of the propagated CAM: PAR on the shrunken valid region of each crop."""
    size = image_unit.shape[2:]
    runs = [resize(propagate_cam(cam, cls_label, score, cam_config), size) for score in background_scores]
    refined = [torch.zeros_like(run) for run in runs]
    for index, (y0, y1, x0, x1) in enumerate(boxes.tolist()):
        part = (slice(index, index + 1), slice(None), slice(y0, y1), slice(x0, x1))
        picture = resize(image_unit[part], _shrunk((y1 - y0, x1 - x0), par_config))
        for maps, run in zip(
            refined,
            _refine_valid(picture, [run[part] for run in runs], cls_label[index : index + 1], par_config),
            strict=True,
        ):
            maps[part] = resize(run, (y1 - y0, x1 - x0))
    return _to_refined_maps(refined[0], refined[1], boxes)


def propagate_cam(cam: MultiScaleCam, cls_label: Tensor, background_score: float, config: CamConfig) -> Tensor:
    """CAM with background, walked along the affinity of the largest scale: [B, C, h, w]."""
    maps = resize(valid_cam(cam.cam, cls_label), cam.grid)
    return propagate(
        softmax_over_valid(maps, cls_label, background_score),
        cam.affinity,
        cam.grid,
        radius=config.affinity_radius,
        power=config.propagation_power,
        iterations=config.propagation_iterations,
    )


def softmax_over_valid(cam: Tensor, cls_label: Tensor, background_score: float) -> Tensor:
    """[B, F, H, W] -> [B, C, H, W]: background in front, softmax over it and the labelled classes; others 0."""
    background = torch.full_like(cam[:, :1], background_score)
    maps = torch.cat([background, cam], dim=1)
    return maps.masked_fill(~valid_channels(cls_label)[:, :, None, None], -torch.inf).softmax(dim=1)


def valid_channels(cls_label: Tensor) -> Tensor:
    """Boolean [B, C]: the background and the labelled classes."""
    return torch.cat([torch.ones_like(cls_label[:, :1]), cls_label], dim=1) > 0


def _refine_valid(picture: Tensor, runs: list[Tensor], cls_label: Tensor, config: ParConfig) -> list[Tensor]:
    """PAR of the valid channels of several maps [B, C, h, w] of the same pictures."""
    height, width = picture.shape[2:]
    refined = [run.new_zeros(*run.shape[:2], height, width) for run in runs]
    for index, valid in enumerate(valid_channels(cls_label)):
        stacked = torch.cat([run[index : index + 1, valid] for run in runs], dim=1)
        parts = par.refine(picture[index : index + 1], stacked, config).chunk(len(runs), dim=1)
        for maps, part in zip(refined, parts, strict=True):
            maps[index, valid] = part[0]
    return refined


def _to_refined_maps(low: Tensor, high: Tensor, boxes: Tensor) -> RefinedMaps:
    return RefinedMaps(low, high, ignore_outside(low_high_to_label(low, high), boxes))


def low_high_to_label(low: Tensor, high: Tensor) -> Tensor:
    """[..., C, H, W] twice -> [..., H, W]: class of the high run, background where both say so, else ignored."""
    low_label, label = low.argmax(dim=-3), high.argmax(dim=-3)
    undecided = (label == BACKGROUND) & (low_label != BACKGROUND)
    return label.masked_fill(undecided, IGNORE_INDEX)


def _shrunk(size: torch.Size | tuple[int, int], config: ParConfig) -> tuple[int, int]:
    return max(1, size[0] // config.shrink_factor), max(1, size[1] // config.shrink_factor)
