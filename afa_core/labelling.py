"""Pictures of any size in, label maps out: what a finished model does with a store of pictures.

A picture without tags gets those that the classifier is sure of. Large pictures are labelled at a bounded size and
the label map is brought back; small ones are padded, the padding being outside their box. Refinement is that of
``pseudo_label``, the same as in training.

Shapes: H x W the picture's own size; F foreground classes, C = F + 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from afa_core import crf
from afa_core.backbone import kernels
from afa_core.cam import MultiScaleCam, multi_scale_cam, resize
from afa_core.checkpoint import Bundle
from afa_core.classes import BACKGROUND, IGNORE_INDEX, cls_label_to_tags, tags_to_cls_label
from afa_core.config import CrfConfig, LabelConfig
from afa_core.data.transforms import denormalise_to_unit, resized, to_network_input, to_pixels
from afa_core.host_memory import return_free_memory_if_grown
from afa_core.packing import Packing, strongest
from afa_core.picture_label import Opinions, PictureLabel, describe
from afa_core.pseudo_label import (
    BackgroundScores,
    RefinedMaps,
    ShrunkenCrops,
    low_high_to_label,
    random_walk,
    refine_affinity,
    refine_cam,
)
from afa_core.segmentation import multi_scale_segmentation
from afa_core.transfer import Transfer

# The finest grid must not be smaller than the reduction of the first stage's attention: 8 tokens of 4 pixels.
SMALLEST_SIDE_PX = 32

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class WorkingPicture:
    """A picture at the size it is labelled at; its full-size pixels are given up.

    Attributes:
        image: uint8 [h, w, 3], to be normalised on the device.
        full_size: H, W of the picture, which its label will have.
    """

    image: Tensor
    full_size: tuple[int, int]


def to_working_picture(pixels: Pixels, max_side_px: int, full_size: tuple[int, int] | None = None) -> WorkingPicture:
    """Shrink uint8 [H, W, 3] so that its long side is at most ``max_side_px``, as bytes all the way.

    Args:
        pixels: of the picture; fewer than it has, if it was decoded at a smaller size.
        max_side_px: see ``LabelConfig``.
        full_size: H, W of the picture, which its label will have; None: those of the pixels.
    """
    height, width = full_size or pixels.shape[:2]
    return WorkingPicture(resized(to_pixels(pixels), working_size(height, width, max_side_px)), (height, width))


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


def label_working_pictures(
    bundle: Bundle,
    pictures: Sequence[WorkingPicture],
    tags: Sequence[Sequence[str] | None],
    config: LabelConfig,
) -> list[PictureLabel]:
    """Label pictures and wait for the labels."""
    return begin_labels(bundle, pictures, tags, config).finish()


class BegunLabels:
    """Labels that a GPU makes while the processor reads, decodes and writes others; on the CPU they are made by now."""

    def __init__(self, batches: list[tuple[list[int], _BegunBatch]]) -> None:
        """Batches, each with the places of its pictures among all."""
        self._batches = batches

    def wait(self) -> None:
        """Until the device has made them."""
        for _, batch in self._batches:
            batch.results.arrived()

    def finish(self) -> list[PictureLabel]:
        """The labels in the order of the pictures; waits for them, in any thread."""
        labels: dict[int, PictureLabel] = {}
        for members, batch in self._batches:
            labels.update(zip(members, batch.finish(), strict=True))
        return [labels[index] for index in range(len(labels))]


@torch.no_grad()
def begin_labels(
    bundle: Bundle,
    pictures: Sequence[WorkingPicture],
    tags: Sequence[Sequence[str] | None],
    config: LabelConfig,
    batch_size: int = 8,
) -> BegunLabels:
    """Ask for labels; pictures of the same working size share a batch, large ones on the CPU none (see ``cam``)."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, picture in enumerate(pictures):
        by_size.setdefault((picture.image.shape[0], picture.image.shape[1]), []).append(index)
    begun = []
    device = next(bundle.model.parameters()).device
    for size, members in by_size.items():
        together = 1 if kernels.passes_alone(size, device) else batch_size
        for start in range(0, len(members), together):
            batch = members[start : start + together]
            asked = _begin_batch(bundle, [pictures[i] for i in batch], [tags[i] for i in batch], config)
            begun.append((batch, asked))
    return BegunLabels(begun)


def working_size(height: int, width: int, max_side_px: int) -> tuple[int, int]:
    """Size at which a picture is labelled: its own, or shrunk so that its long side is ``max_side_px``."""
    factor = min(1.0, max_side_px / max(height, width))
    return max(1, int(height * factor)), max(1, int(width * factor))


def background_scores(bundle: Bundle, config: LabelConfig) -> BackgroundScores:
    """(low, high) that labelling decides with."""
    cam = bundle.cam_config
    score = cam.background_score if config.background_score is None else config.background_score
    if config.ignore_band:
        return min(score, cam.background_score_low), max(score, cam.background_score_high)
    return score, score


@dataclass(frozen=True)
class _Batch:
    """Pictures of one working size with what the network says of them.

    Attributes:
        image: [B, 3, h', w'], padded where they are small.
        size: (h, w) without the padding.
        given: tags that are used; None where the classifier's are.
        predicted: [B, F] what the classifier is sure of.
        cls_label: [B, F] what is looked for.
        cam: maps of these classes, and affinity.
        segmentation: [B, K + 1, h', w'] probabilities of the head, over the classes looked for.
    """

    image: Tensor
    size: tuple[int, int]
    given: list[Sequence[str] | None]
    predicted: Tensor
    cls_label: Tensor
    cam: MultiScaleCam
    segmentation: Tensor


def _run(
    bundle: Bundle, pictures: Sequence[WorkingPicture], tags: Sequence[Sequence[str] | None], config: LabelConfig
) -> _Batch:
    return_free_memory_if_grown()  # pictures of ever new sizes would make it grow without end
    height, width = pictures[0].image.shape[:2]
    scales = config.scales or bundle.cam_config.scales
    image = _network_input(bundle, pictures, scales)
    features = bundle.model.backbone(image)
    predicted = _predicted(bundle.model.classify(features), config)
    given = [None if config.tags == "predicted" else names for names in tags]
    # Pictures without tags are marked by -1, so that one copy tells the device everything.
    unnamed = torch.full((len(bundle.classes),), -1.0)
    rows = [unnamed if names is None else tags_to_cls_label(names, bundle.classes) for names in given]
    named = torch.stack(rows).to(image.device, non_blocking=True)
    cls_label = torch.where(named < 0, predicted, named)
    packing = Packing.of(cls_label)
    several = config.head != "cam"
    logits = multi_scale_segmentation(bundle.model, image, scales) if several else bundle.model.segment(features)
    wanted = resize(torch.cat([logits[:, :1], packing.pack(logits[:, 1:])], dim=1), image.shape[2:])
    segmentation = wanted.masked_fill(~packing.with_background()[:, :, None, None], -torch.inf).softmax(1)
    cam = multi_scale_cam(bundle.model, image, scales, packing, features)
    return _Batch(image, (height, width), given, predicted, cls_label, cam, segmentation)


@dataclass(frozen=True)
class _BegunBatch:
    """Labels of one batch that the device makes.

    Attributes:
        full_sizes: H, W of each picture.
        given: tags that are used; None where the classifier's are.
        classes: of the model.
        results: on their way: [B, F] what the classifier is sure of, [B, F] what is looked for, labels uint8
            [B, h, w], and the ``Opinions.sums`` of all pictures, one behind the other.
        lengths: of the sums of each picture.
    """

    full_sizes: list[tuple[int, int]]
    given: list[Sequence[str] | None]
    classes: tuple[str, ...]
    results: Transfer
    lengths: list[int]

    def finish(self) -> Iterator[PictureLabel]:
        """The label of each picture."""
        predicted, looked_for, labels, all_sums = self.results.arrived()
        sums = all_sums.split(self.lengths)
        for index, full_size in enumerate(self.full_sizes):
            full = to_full_size(labels[index].numpy(), full_size)
            sure_of, tags = (tuple(cls_label_to_tags(rows[index], self.classes)) for rows in (predicted, looked_for))
            yield describe(sums[index].tolist(), full, self.classes, tags, self.given[index], sure_of)


def _begin_batch(
    bundle: Bundle, pictures: Sequence[WorkingPicture], tags: Sequence[Sequence[str] | None], config: LabelConfig
) -> _BegunBatch:
    batch = _run(bundle, pictures, tags, config)
    maps = _Refinement(bundle, batch, config).at(background_scores(bundle, config))
    opinions = [_opinions(maps, batch, index, config) for index in range(len(pictures))]
    packing = batch.cam.packing
    channels = [row[:count] + 1 for row, count in zip(packing.index, packing.counts, strict=True)]
    labels = torch.stack([opinion.label.to(torch.uint8) for opinion in opinions])
    sums = [opinion.sums(looked_for) for opinion, looked_for in zip(opinions, channels, strict=True)]
    results = Transfer(batch.predicted, batch.cls_label, labels, torch.cat(sums))
    full_sizes = [picture.full_size for picture in pictures]
    return _BegunBatch(full_sizes, batch.given, bundle.classes, results, [len(part) for part in sums])


@torch.no_grad()
def label_at_scores(
    bundle: Bundle, picture: WorkingPicture, tags: Sequence[str] | None, config: LabelConfig, scores: Sequence[float]
) -> tuple[list[Pixels], Pixels]:
    """Labels [h, w] of one picture at several background scores, and the segmentation head's; without the CRF."""
    batch = _run(bundle, [picture], [tags], config)
    refinement = _Refinement(bundle, batch, config)
    labels: list[Pixels] = []
    for low, high in zip(scores[::2], [*scores[1::2], scores[-1]], strict=False):
        maps = refinement.at((low, high))
        chosen = maps.walked or maps.plain
        labels += [to_bytes(_class_label(run[0], batch, 0)) for run in chosen.runs.unbind(1)]
    return labels[: len(scores)], to_bytes(_class_label(batch.segmentation[0], batch, 0))


@torch.no_grad()
def found_tags(bundle: Bundle, picture: WorkingPicture, config: LabelConfig) -> list[str]:
    """What the classifier is sure of in one picture."""
    image = _network_input(bundle, [picture], config.scales or bundle.cam_config.scales)
    logits = bundle.model.classify(bundle.model.backbone(image))
    return cls_label_to_tags(_predicted(logits, config)[0], bundle.classes)


def _predicted(class_logits: Tensor, config: LabelConfig) -> Tensor:
    """[B, F] what the classifier is sure of."""
    return (class_logits.sigmoid() > config.tag_probability).float()


@dataclass(frozen=True)
class _CamMaps:
    """Refined maps of the CAM, and of the CAM walked along the affinity if that is wanted."""

    plain: RefinedMaps
    walked: RefinedMaps | None


class _Refinement:
    """What ``config.refine`` makes of the CAM; without PAR the maps are only resized."""

    def __init__(self, bundle: Bundle, batch: _Batch, config: LabelConfig) -> None:
        par = bundle.par_config
        if "par" not in config.refine:
            par = dataclasses.replace(par, iterations=0, shrink_factor=1)
        self._cam = batch.cam
        self._boxes = torch.tensor([[0, batch.size[0], 0, batch.size[1]]]).expand(len(batch.image), 4)
        self._crops = ShrunkenCrops(denormalise_to_unit(batch.image), par)
        self._walk = random_walk(batch.cam, bundle.cam_config) if "affinity" in config.refine else None

    def at(self, scores: BackgroundScores) -> _CamMaps:
        """The maps at a low and a high score."""
        plain = refine_cam(self._crops, self._cam, self._boxes, scores)
        if self._walk is None:
            return _CamMaps(plain, None)
        return _CamMaps(plain, refine_affinity(self._crops, self._cam, self._boxes, scores, self._walk))


def _opinions(maps: _CamMaps, batch: _Batch, index: int, config: LabelConfig) -> Opinions:
    """The label of one picture by the head that decides, and the others' for comparison."""
    inside = (index, ..., slice(0, batch.size[0]), slice(0, batch.size[1]))
    chosen = maps.walked or maps.plain
    seg_probability = batch.segmentation[inside]
    low, high = (_shares(run) for run in chosen.runs[inside])
    if config.crf:
        colours = denormalise_to_unit(batch.image)[inside].permute(1, 2, 0) * 255
        same = torch.equal(low, high)
        low = crf.refine(colours, low, CrfConfig())
        high = low if same else crf.refine(colours, high, CrfConfig())
        if config.head != "cam":
            seg_probability = crf.refine(colours, seg_probability, CrfConfig())
    seg_label = _class_label(seg_probability, batch, index)
    cam_label = low_high_to_label(_class_label(low, batch, index), _class_label(high, batch, index))
    label, share = cam_label, low
    if config.head == "segmentation":
        label, share = seg_label, seg_probability
    elif config.head == "agreement":
        label = label.masked_fill(label != seg_label, IGNORE_INDEX)
    # Which of the packed maps is the label's own; empty channels hold 0.
    own = F.pad(batch.cam.packing.index[index] + 1, (1, 0))[:, None, None] == label
    changed = None if maps.walked is None else maps.walked.label[inside] != maps.plain.label[inside]
    return Opinions(label, (share * own).sum(0), cam_label, seg_label, changed)


def _class_label(maps: Tensor, batch: _Batch, index: int) -> Tensor:
    """Packed maps [K + 1, h', w'] of one picture -> the class of the highest [h, w]."""
    inside = maps[:, : batch.size[0], : batch.size[1]]
    return batch.cam.packing.part(slice(index, index + 1)).to_class(strongest(inside[None]))[0]


def _shares(maps: Tensor) -> Tensor:
    """[K + 1, h, w] brought to a sum of 1; where there is nothing it is background."""
    total = maps.sum(0)
    shares = maps / total.clamp(min=1e-8)
    shares[BACKGROUND][total < 1e-8] = 1.0
    return shares


def to_bytes(label: Tensor) -> Pixels:
    """Label map int64 [h, w] -> uint8."""
    return label.to(torch.uint8).cpu().numpy()


def to_full_size(label: Pixels, full_size: tuple[int, int]) -> Pixels:
    """Label map [h, w] -> [H, W], a copy: each pixel takes the nearest one's class, as bytes all the way."""
    rows, columns = (np.arange(full) * small // full for full, small in zip(full_size, label.shape, strict=True))
    return label.copy() if label.shape == full_size else label[rows][:, columns]


def _network_input(bundle: Bundle, pictures: Sequence[WorkingPicture], scales: Sequence[float]) -> Tensor:
    """Pictures of one working size -> [B, 3, h', w'] on the device, padded where they are small."""
    pixels, device = torch.stack([picture.image for picture in pictures]), next(bundle.model.parameters()).device
    if device.type == "cuda":
        pixels = pixels.pin_memory()  # else the copy might wait for the batch before
    return pad_small(to_network_input(pixels, device), scales)


def pad_small(image: Tensor, scales: Sequence[float]) -> Tensor:
    """Pictures [B, 3, H, W] padded below and right to what the smallest CAM scale needs; padding is the mean colour."""
    smallest = math.ceil(SMALLEST_SIDE_PX / min(1.0, *scales))
    bottom, right = (max(0, smallest - side) for side in image.shape[2:])
    return F.pad(image, (0, right, 0, bottom)) if bottom or right else image
