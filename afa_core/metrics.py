"""Scores: a mergeable confusion matrix for masks, F1 and mean average precision for tags.

Counts are summed over processes, scores are computed once from the sum: a mean of mIoUs is not an mIoU.

Shapes: C classes with background; F foreground classes; n pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa_core.classes import IGNORE_INDEX


class ConfusionMatrix:
    """Pixel counts [C, C + 1]: rows are the truth, columns the prediction; the last one counts pixels of known
    truth that the prediction leaves ignored, which are misses."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)

    def update(self, truth: Tensor, prediction: Tensor) -> None:
        """Count label maps of equal shape; truth 255 is left out."""
        known = truth != IGNORE_INDEX
        truth, prediction = truth[known].long(), prediction[known].long()
        column = prediction.masked_fill(prediction == IGNORE_INDEX, self.num_classes)
        index = truth * (self.num_classes + 1) + column
        counts = torch.bincount(index, minlength=self.counts.numel())
        self.counts += counts.reshape(self.counts.shape).to(self.counts.device)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another one."""
        self.counts += other.counts

    def iou(self) -> Tensor:
        """Intersection over union per class, [C] float64; NaN where a class is in neither."""
        counts = self.counts.double()
        hit = counts.diagonal()
        return hit / (counts.sum(1) + counts[:, : self.num_classes].sum(0) - hit)

    def miou(self) -> float:
        """Mean of ``iou`` over the classes that occur."""
        return float(self.iou().nanmean())

    def pixel_accuracy(self) -> float:
        """Share of the pixels of known truth that are right."""
        return float(self.counts.diagonal().double().sum() / self.counts.sum())

    def mean_accuracy(self) -> float:
        """Mean over the classes that occur in the truth of their share of right pixels."""
        return float((self.counts.diagonal().double() / self.counts.double().sum(1)).nanmean())


@dataclass
class TagScores:
    """Probabilities and multi-hot labels of pictures, and how well they agree."""

    probabilities: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    def update(self, class_prob: Tensor, cls_label: Tensor) -> None:
        """Add a batch: [B, F] in 0..1 and [B, F] multi-hot."""
        self.probabilities.append(class_prob.detach().float().cpu())
        self.labels.append(cls_label.float().cpu())

    def f1(self, threshold: float = 0.5) -> float:
        """F1 of all (picture, class) decisions taken together."""
        predicted, labelled = torch.cat(self.probabilities) > threshold, torch.cat(self.labels) > 0.5
        hits = int((predicted & labelled).sum())
        total = int(predicted.sum()) + int(labelled.sum())
        return 2 * hits / total if total else 0.0

    def mean_average_precision(self) -> float:
        """Mean over the classes that occur of the area under precision over recall, by steps; NaN if none."""
        probabilities, labels = torch.cat(self.probabilities).numpy(), torch.cat(self.labels).numpy() > 0.5
        scores = [
            _average_precision(probabilities[:, index], labels[:, index])
            for index in range(labels.shape[1])
            if labels[:, index].any()
        ]
        return float(np.mean(scores)) if scores else float("nan")


def _average_precision(probability: NDArray[np.float32], label: NDArray[np.bool_]) -> float:
    """Sum over thresholds of (recall gained) x precision; equal probabilities share one threshold."""
    order = np.argsort(-probability, kind="stable")
    hits = np.cumsum(label[order])
    last_of_tie = np.append(np.flatnonzero(np.diff(probability[order])), len(order) - 1)
    hits_at = hits[last_of_tie]
    precision = hits_at / (last_of_tie + 1)
    return float(np.sum(np.diff(hits_at, prepend=0) * precision) / hits[-1])
