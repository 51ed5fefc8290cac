"""The background score without ground truth, and with a little of it.

Where the background ends is the one number that users of CAM methods must set, on masks they do not have. Unlabelled
pictures tell something about it: a good score makes labels that do not depend on how one looks. Two comparisons,

    heads   the label against the segmentation head's, asked for the same tags
    views   the label against the label of the same picture at ``VIEW_SCALE`` of its size

are taken over all pixels of all pictures, as Cohen's kappa (agreement beyond chance): plain agreement is perfect where
everything is background, kappa is 0 there. The choice is the score with the largest mean of the two.

With masks it is the score of the best mIoU; its interval comes from drawing pictures with replacement (bootstrap).

Shapes: H x W pixels of a picture; C classes with background; S scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from afa_core.checkpoint import Bundle
from afa_core.config import LabelConfig
from afa_core.data.transforms import resized
from afa_core.labelling import WorkingPicture, found_tags, label_at_scores, to_full_size
from afa_core.metrics import ConfusionMatrix

SCORES = tuple(round(0.05 * step, 2) for step in range(1, 20))
VIEW_SCALE = 0.75
RESAMPLES = 1000

Pixels = NDArray[np.uint8]


def kappa(matrix: ConfusionMatrix) -> float:
    """Cohen's kappa of two label maps counted against each other: 1 perfect, 0 no better than chance."""
    counts = matrix.counts[:, : matrix.num_classes].double()
    total = counts.sum().clamp(min=1)
    observed = counts.diagonal().sum() / total
    expected = (counts.sum(0) * counts.sum(1)).sum() / total**2
    return float((observed - expected) / (1 - expected)) if expected < 1 else 0.0


@dataclass
class Agreement:
    """What unlabelled pictures say about each score."""

    num_classes: int
    heads: dict[float, ConfusionMatrix] = field(default_factory=dict)
    views: dict[float, ConfusionMatrix] = field(default_factory=dict)

    def count(self, score: float, label: Pixels, segmentation: Pixels, view: Pixels) -> None:
        """Three label maps [H, W] of one picture, made with the same tags."""
        for matrices, other in ((self.heads, segmentation), (self.views, view)):
            matrix = matrices.setdefault(score, ConfusionMatrix(self.num_classes))
            matrix.update(torch.tensor(other), torch.tensor(label))

    def criterion(self, score: float) -> float:
        """Mean of the two kappas."""
        return (kappa(self.heads[score]) + kappa(self.views[score])) / 2

    def choice(self) -> float:
        """The score with the largest criterion."""
        return max(self.heads, key=self.criterion)


def observe(
    bundle: Bundle, picture: WorkingPicture, tags: Sequence[str] | None, config: LabelConfig, agreement: Agreement
) -> None:
    """Count one picture's labels at every score, against the segmentation head and against a smaller view."""
    labels, segmentation = label_at_scores(bundle, picture, tags, config, SCORES)
    height, width = labels[0].shape
    smaller = max(1, round(height * VIEW_SCALE)), max(1, round(width * VIEW_SCALE))
    view = WorkingPicture(resized(picture.image, smaller), (height, width))
    # The same classes in both: a tag that one view predicts and the other does not says nothing about the score.
    names = tags if tags is not None else found_tags(bundle, picture, config)
    view_labels, _ = label_at_scores(bundle, view, names, dataclasses.replace(config, tags="auto"), SCORES)
    for score, label, view_label in zip(SCORES, labels, view_labels, strict=True):
        agreement.count(score, label, segmentation, to_full_size(view_label, (height, width)))


@dataclass
class MaskedScores:
    """Confusion of each score's labels with true masks, kept per picture."""

    num_classes: int
    pictures: dict[float, list[ConfusionMatrix]] = field(default_factory=dict)

    def count(self, score: float, label: Pixels, truth: Pixels) -> None:
        """One picture's label and mask, [H, W]."""
        matrix = ConfusionMatrix(self.num_classes)
        matrix.update(torch.tensor(truth), torch.tensor(label))
        self.pictures.setdefault(score, []).append(matrix)

    def miou(self, score: float) -> float:
        """Over all pictures."""
        return self._miou(score, np.ones(len(self.pictures[score])))

    def choice(self) -> float:
        """The score with the best mIoU."""
        return max(self.pictures, key=self.miou)

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of the best score."""
        generator = np.random.default_rng(seed)
        count = len(next(iter(self.pictures.values())))
        best = []
        for _ in range(RESAMPLES):
            times = np.bincount(generator.integers(0, count, count), minlength=count)
            best.append(max(self.pictures, key=lambda score: self._miou(score, times)))
        low, high = np.quantile(best, [0.025, 0.975])
        return float(low), float(high)

    def _miou(self, score: float, times: NDArray[np.generic]) -> float:
        matrix = ConfusionMatrix(self.num_classes)
        counts = torch.stack([picture.counts for picture in self.pictures[score]])
        matrix.counts = (counts * torch.from_numpy(times).long()[:, None, None]).sum(0)
        return matrix.miou()
