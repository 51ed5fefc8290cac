"""Pictures of any size in, label maps out: what a finished model does with a store of pictures.

A picture without tags gets those that the classifier is sure of. Large pictures are labelled at a bounded size and
the label map is brought back; small ones are padded, the padding being outside their box. Refinement is
``pseudo_label.make_pseudo_label``, the same as in training, with the affinity.

Shapes: H x W the picture's own size; F foreground classes, C = F + 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from afa_core.cam import resize
from afa_core.checkpoint import Bundle
from afa_core.classes import IGNORE_INDEX, cls_label_to_tags, tags_to_cls_label
from afa_core.config import LabelConfig
from afa_core.data.transforms import denormalise_to_unit, normalise
from afa_core.pseudo_label import BackgroundScores, RefinedMaps, make_pseudo_label, valid_channels

# The finest grid must not be smaller than the reduction of the first stage's attention: 8 tokens of 4 pixels.
SMALLEST_SIDE_PX = 32

# Pictures so many times the working size are averaged over blocks before they become floats.
BLOCK_ABOVE = 4

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class PictureLabel:
    """The label of one picture and what is known about it.

    Attributes:
        label: [H, W] uint8, 0 background, 1..F, 255 ignored.
        tags: classes that were looked for, in list order.
        tags_given: whether they came with the picture; else the classifier predicted them.
        unknown_tags: given tags that the model has no class for.
        area: share of the pixels per tag, 0..1.
        confidence: mean over the class's pixels of its share of the refined maps, per tag with pixels, 0..1.
        ignored_share: share of the pixels that are 255.
        disagreement: share of the decided pixels where the segmentation head, asked for the same tags, says
            another class.
    """

    label: Pixels
    tags: tuple[str, ...]
    tags_given: bool
    unknown_tags: tuple[str, ...]
    area: dict[str, float]
    confidence: dict[str, float]
    ignored_share: float
    disagreement: float


@dataclass(frozen=True)
class WorkingPicture:
    """A picture at the size it is labelled at; its full-size pixels are given up.

    Attributes:
        image: normalised float32 [3, h, w].
        full_size: H, W of the picture, which its label will have.
    """

    image: Tensor
    full_size: tuple[int, int]


def to_working_picture(pixels: Pixels, max_side_px: int) -> WorkingPicture:
    """Shrink uint8 [H, W, 3] so that its long side is at most ``max_side_px``.

    Far larger ones are first averaged over whole blocks of pixels, as bytes: as floats they would need gigabytes.
    """
    height, width = pixels.shape[:2]
    size = working_size(height, width, max_side_px)
    factor = max(height, width) // (BLOCK_ABOVE * max_side_px)
    if factor > 1:
        reduced = Image.fromarray(pixels).reduce((min(factor, width), min(factor, height)))
        pixels = np.asarray(reduced)
    return WorkingPicture(_shrunk(normalise(pixels), size), (height, width))


def label_pictures(
    bundle: Bundle,
    images: Sequence[Pixels],
    tags: Sequence[Sequence[str] | None],
    label_config: LabelConfig | None = None,
) -> list[PictureLabel]:
    """Label pictures.

    Args:
        bundle: the model, on the device to use.
        images: uint8 [H, W, 3] each.
        tags: of each picture; None where the classifier is to predict them.
        label_config: None takes the bundle's.
    """
    config = label_config or bundle.label_config
    pictures = [to_working_picture(image, config.max_side_px) for image in images]
    return label_working_pictures(bundle, pictures, tags, config)


@torch.no_grad()
def label_working_pictures(
    bundle: Bundle, pictures: Sequence[WorkingPicture], tags: Sequence[Sequence[str] | None], config: LabelConfig
) -> list[PictureLabel]:
    """Label pictures; those of the same working size share a batch."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        by_size.setdefault(tuple(picture.image.shape[1:]), []).append(index)
    labels: dict[int, PictureLabel] = {}
    for members in by_size.values():
        made = _label_batch(bundle, [pictures[i] for i in members], [tags[i] for i in members], config)
        labels.update(zip(members, made, strict=True))
    return [labels[index] for index in range(len(pictures))]


def working_size(height: int, width: int, max_side_px: int) -> tuple[int, int]:
    """Size at which a picture is labelled: its own, or shrunk so that its long side is ``max_side_px``."""
    factor = min(1.0, max_side_px / max(height, width))
    return max(1, int(height * factor)), max(1, int(width * factor))


def background_scores(bundle: Bundle, config: LabelConfig) -> BackgroundScores:
    """(low, high) that labelling decides with."""
    cam = bundle.cam_config
    if config.ignore_band:
        return cam.background_score_low, cam.background_score_high
    return cam.background_score, cam.background_score


def _label_batch(
    bundle: Bundle,
    pictures: Sequence[WorkingPicture],
    tags: Sequence[Sequence[str] | None],
    config: LabelConfig,
) -> list[PictureLabel]:
    device = next(bundle.model.parameters()).device
    image = torch.stack([picture.image for picture in pictures])
    height, width = image.shape[2:]
    image = pad_small(image, bundle.cam_config.scales).to(device)
    boxes = torch.tensor([[0, height, 0, width]]).expand(len(pictures), 4)
    output = bundle.model(image)
    predicted = (output.class_logits.sigmoid() > config.tag_probability).float().cpu()
    cls_label = torch.stack(
        [
            predicted[index] if given is None else tags_to_cls_label(given, bundle.classes)
            for index, given in enumerate(tags)
        ]
    ).to(device)
    made = make_pseudo_label(
        bundle.model,
        image,
        denormalise_to_unit(image),
        cls_label,
        boxes,
        bundle.cam_config,
        bundle.par_config,
        background_scores=background_scores(bundle, config),
    )
    assert made.refined_affinity is not None
    invalid = ~valid_channels(cls_label)[:, :, None, None]
    seg_label = resize(output.seg_logits.masked_fill(invalid, -torch.inf), image.shape[2:]).argmax(1)
    return [
        _picture_label(bundle, pictures[index], given, cls_label[index], made.refined_affinity, seg_label, index)
        for index, given in enumerate(tags)
    ]


def _picture_label(
    bundle: Bundle,
    picture: WorkingPicture,
    given: Sequence[str] | None,
    cls_label: Tensor,
    refined: RefinedMaps,
    seg_label: Tensor,
    index: int,
) -> PictureLabel:
    height, width = picture.image.shape[1:]
    inside = (index, slice(0, height), slice(0, width))
    label, maps = refined.label[inside], refined.low[index, :, :height, :width]
    decided = label != IGNORE_INDEX
    share = maps / maps.sum(0).clamp(min=1e-8)
    names = cls_label_to_tags(cls_label, bundle.classes)
    area, confidence = {}, {}
    for name in names:
        channel = bundle.classes.index(name) + 1
        here = label == channel
        area[name] = float(here.float().mean())
        if here.any():
            confidence[name] = float(share[channel][here].mean())
    differing = (label != seg_label[inside]) & decided
    return PictureLabel(
        label=to_full_size(label.to(torch.uint8).cpu().numpy(), picture.full_size),
        tags=tuple(names),
        tags_given=given is not None,
        unknown_tags=tuple(tag for tag in given or () if tag not in bundle.classes),
        area=area,
        confidence=confidence,
        ignored_share=float((~decided).float().mean()),
        disagreement=float(differing.sum() / decided.sum().clamp(min=1)),
    )


def to_full_size(label: Pixels, full_size: tuple[int, int]) -> Pixels:
    """Label map [h, w] -> [H, W]: each pixel takes the nearest one's class, as bytes all the way."""
    rows, columns = (np.arange(full) * small // full for full, small in zip(full_size, label.shape, strict=True))
    return label if label.shape == full_size else label[rows][:, columns]


def _shrunk(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, H, W] -> [3, *size] with a filter wide enough not to alias."""
    if tuple(image.shape[1:]) == size:
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def pad_small(image: Tensor, scales: Sequence[float]) -> Tensor:
    """Pictures [B, 3, H, W] padded below and right to what the smallest CAM scale needs; padding is the mean colour."""
    smallest = math.ceil(SMALLEST_SIDE_PX / min(1.0, *scales))
    bottom, right = (max(0, smallest - side) for side in image.shape[2:])
    return F.pad(image, (0, right, 0, bottom)) if bottom or right else image
