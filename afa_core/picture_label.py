"""The label of one picture, and what weakly supervised segmentation knows about its own doubt.

Three opinions come for free with every label: the class activation maps, the same after the walk along the affinity,
and the segmentation head. Where they differ, where tags and mask contradict each other, where the maps are flat, a
person should look first.

Shapes: H x W the picture's own size; h x w its working size; F foreground classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa_core.classes import IGNORE_INDEX

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class PictureLabel:
    """The label of one picture and what is known about it; shares are 0..1.

    Attributes:
        label: [H, W] uint8, 0 background, 1..F, 255 ignored.
        tags: classes that were looked for, in list order.
        tags_given: whether they came with the picture; else the classifier predicted them.
        unknown_tags: given tags that the model has no class for.
        area: share of the pixels, per tag.
        class_confidence: mean over the class's pixels of its share of the maps, per tag with pixels.
        confidence: the same over all decided pixels, background included; 0 where the classifier found no class, as
            nothing then speaks for the background but that nobody looked for anything else.
        ignored_share: share of the pixels that are 255.
        disagreement: share of the pixels decided by the activation maps where the segmentation head, asked for the
            same tags, says another class.
        class_disagreement: 1 - IoU of the class in the two, per tag with pixels in one.
        affinity_disagreement: share of the pixels that the walk along the affinity changes; None if it was not taken.
        tags_without_pixels: tags of which the label has no pixel.
        classes_without_tag: classes the classifier is sure of that the given tags lack.
    """

    label: Pixels
    tags: tuple[str, ...]
    tags_given: bool
    unknown_tags: tuple[str, ...]
    area: dict[str, float]
    class_confidence: dict[str, float]
    confidence: float
    ignored_share: float
    disagreement: float
    class_disagreement: dict[str, float]
    affinity_disagreement: float | None
    tags_without_pixels: tuple[str, ...]
    classes_without_tag: tuple[str, ...]

    @property
    def uncertainty(self) -> float:
        """0..1, what a review queue sorts by: the mean of disagreements, doubt, contradiction and ignored share."""
        doubts = [self.disagreement, 1 - self.confidence, self.ignored_share]
        doubts.append(float(bool(self.tags_without_pixels or self.classes_without_tag)))
        if self.affinity_disagreement is not None:
            doubts.append(self.affinity_disagreement)
        return sum(doubts) / len(doubts)


@dataclass(frozen=True)
class Opinions:
    """What was found for one picture at its working size.

    Attributes:
        label: [h, w] int64, the label.
        share: [h, w] the label's own share of the maps behind it, 0..1.
        cam: [h, w] int64, the label by the activation maps.
        segmentation: [h, w] int64, the label by the segmentation head.
        affinity_changes: [h, w] boolean, where the walk along the affinity changes the label; None if not taken.
    """

    label: Tensor
    share: Tensor
    cam: Tensor
    segmentation: Tensor
    affinity_changes: Tensor | None

    def sums(self, channels: Tensor) -> Tensor:
        """What ``describe`` needs, on the opinions' device.

        Args:
            channels: [T] int64, classes 1..F that were looked for.

        Returns:
            [6 + 4 T] float64. Of the picture: all pixels, decided ones, their shares, those that the walk changes (NaN
            if it was not taken), those in which the two heads can be compared and those of them in which they differ.
            Then of each channel: its pixels; their shares; what both heads give it; what either gives it.
        """
        decided, comparable = self.label != IGNORE_INDEX, self.cam != IGNORE_INDEX
        changes = self.affinity_changes
        whole = [
            self.share.new_full((), self.label.numel(), dtype=torch.float64),
            decided.sum(),
            (self.share * decided).sum(),
            self.share.new_full((), torch.nan) if changes is None else changes.sum(),
            comparable.sum(),
            ((self.cam != self.segmentation) & comparable).sum(),
        ]
        of_channel = channels[:, None, None]
        here, one = self.label == of_channel, self.cam == of_channel
        other = (self.segmentation == of_channel) & comparable
        parts = [here, self.share * here, one & other, one | other]
        return torch.cat(
            [torch.stack([value.double() for value in whole]), *(part.sum((1, 2)).double() for part in parts)]
        )


def describe(
    sums: Sequence[float],
    full_label: Pixels,
    classes: tuple[str, ...],
    tags: tuple[str, ...],
    given: Sequence[str] | None,
    predicted: Sequence[str],
) -> PictureLabel:
    """What is known about a label.

    Args:
        sums: of the opinions, for the channels of ``tags``.
        full_label: [H, W] the label as it is written.
        classes: of the model.
        tags: that were looked for.
        given: tags that came with the picture and were used; None if the classifier's were.
        predicted: classes that the classifier is sure of.
    """
    pixels, decided, decided_share, changed, comparable, differ = sums[:6]
    per_tag = np.reshape(sums[6:], (4, len(tags))).T.tolist()
    area, confidence, disagreement = {}, {}, {}
    for name, (here, share, both, either) in zip(tags, per_tag, strict=True):
        area[name] = here / pixels
        if here:
            confidence[name] = share / here
        if either:
            disagreement[name] = 1 - both / either
    searched = tags or given is not None
    return PictureLabel(
        label=full_label,
        tags=tags,
        tags_given=given is not None,
        unknown_tags=tuple(tag for tag in given or () if tag not in classes),
        area=area,
        class_confidence=confidence,
        confidence=decided_share / decided if decided and searched else 0.0,
        ignored_share=1 - decided / pixels,
        disagreement=differ / max(1, comparable),
        class_disagreement=disagreement,
        affinity_disagreement=None if math.isnan(changed) else changed / pixels,
        tags_without_pixels=tuple(name for name in tags if area[name] == 0),
        classes_without_tag=() if given is None else tuple(name for name in predicted if name not in tags),
    )
