"""Scores of a network on pictures with masks: every stage of the label, side by side.

    cam                CAM, thresholded
    refined_cam        CAM refined by PAR
    affinity_cam       CAM propagated along the affinity, thresholded
    refined_affinity   the same refined by PAR: what batch labelling writes
    segmentation       the decoder at one scale

All but the last are given the picture's tags and decide every pixel at ``cam.background_score``.

Shapes: B images, F foreground classes, C = F + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from afa_core.backbone import kernels
from afa_core.cam import cam_to_label, evaluation_mode, resize
from afa_core.checkpoint import load_bundle
from afa_core.classes import tags_to_cls_label
from afa_core.config import CamConfig, ParConfig
from afa_core.data.sample import Sample
from afa_core.data.shards import iterate_samples
from afa_core.data.transforms import denormalise_to_unit, to_network_input
from afa_core.errors import InputError
from afa_core.host_memory import return_free_memory_if_grown
from afa_core.labelling import pad_small
from afa_core.metrics import ConfusionMatrix, TagScores
from afa_core.model import AFANet
from afa_core.packing import strongest
from afa_core.pseudo_label import make_pseudo_label, propagate_cam
from pipelines.shard_store import load_shard_set, split_files

STAGES = ("cam", "refined_cam", "affinity_cam", "refined_affinity", "segmentation")
BATCH_SIZE = 8


@dataclass(frozen=True)
class ScoredBatch:
    """Pictures of one size with everything made of them; label maps are [B, H, W]."""

    image: Tensor
    cam: Tensor
    affinity_cam: Tensor
    truth: Tensor
    labels: dict[str, Tensor]


class Scores:
    """Confusion matrices of the stages and the tag scores, mergeable over processes."""

    def __init__(self, num_foreground: int) -> None:
        self.matrices = {stage: ConfusionMatrix(num_foreground + 1) for stage in STAGES}
        self.tags = TagScores()

    def all_reduce(self, device: torch.device) -> None:
        """Sum over the processes of the group, if there is one."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        for matrix in self.matrices.values():
            counts = matrix.counts.to(device)
            dist.all_reduce(counts)
            matrix.counts = counts.cpu()
        gathered: list[TagScores | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self.tags)
        self.tags = TagScores()
        for part in gathered:
            assert part is not None
            self.tags.probabilities += part.probabilities
            self.tags.labels += part.labels

    def summary(self) -> dict[str, float]:
        """``STAGE_miou`` of every stage, ``segmentation_pixel_accuracy``, ``tag_f1`` and ``tag_map``."""
        values = {f"{stage}_miou": matrix.miou() for stage, matrix in self.matrices.items()}
        values["segmentation_pixel_accuracy"] = self.matrices["segmentation"].pixel_accuracy()
        values["tag_f1"] = self.tags.f1()
        values["tag_map"] = self.tags.mean_average_precision()
        return values


def score_samples(
    model: AFANet,
    samples: Iterable[Sample],
    classes: tuple[str, ...],
    cam_config: CamConfig,
    par_config: ParConfig,
    scores: Scores,
) -> Iterator[ScoredBatch]:
    """Score samples with masks into ``scores``, handing out each batch when it is done."""
    for batch in _batches(samples):
        yield _score_batch(model, batch, classes, cam_config, par_config, scores)


def evaluation_samples(
    paths: Iterable[str | Path], classes: tuple[str, ...], *, rank: int, world_size: int, limit: int | None
) -> Iterator[Sample]:
    """The share of one rank of the samples of some shards: every ``world_size``-th of the first ``limit``."""
    samples = iterate_samples(paths, classes, with_seg=True)
    return islice(samples, rank, limit, world_size)


def score_bundle(bundle_dir: Path, dataset: str, split: str = "val") -> dict[str, float]:
    """Scores of a saved model on a split with masks.

    Raises:
        InputError: the model or the split is not usable, or the split has no masks.
    """
    bundle = load_bundle(bundle_dir, kernels.best_device())
    index = load_shard_set(dataset)
    if index.classes != bundle.classes:
        raise InputError(f"{dataset} has the classes {index.classes}, the model {bundle.classes}")
    samples = iterate_samples(split_files(dataset, index, split).paths(), index.classes, with_seg=True)
    scores = Scores(len(bundle.classes))
    count = sum(
        len(batch.image)
        for batch in score_samples(bundle.model, samples, bundle.classes, bundle.cam_config, bundle.par_config, scores)
    )
    if not count:
        raise InputError(f"split {split!r} of {dataset} has no picture with a mask (.seg.png)")
    return scores.summary()


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Neighbouring samples of one size, at most ``BATCH_SIZE``; those without mask or tags are left out."""
    batch: list[Sample] = []
    for sample in samples:
        if sample.seg_label is None or sample.tags is None:
            continue
        if batch and (batch[0].image.shape != sample.image.shape or len(batch) == BATCH_SIZE):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


@torch.no_grad()
def _score_batch(
    model: AFANet,
    batch: list[Sample],
    classes: tuple[str, ...],
    cam_config: CamConfig,
    par_config: ParConfig,
    scores: Scores,
) -> ScoredBatch:
    return_free_memory_if_grown()
    device = next(model.parameters()).device
    image = to_network_input(torch.from_numpy(np.stack([sample.image for sample in batch])), device)
    image = pad_small(image, cam_config.scales)
    cls_label = torch.stack([tags_to_cls_label(sample.tags or (), classes) for sample in batch]).to(device)
    truth = torch.stack([torch.tensor(sample.seg_label).long() for sample in batch]).to(device)
    height, width = truth.shape[1:]
    boxes = torch.tensor([[0, height, 0, width]]).expand(len(batch), 4)
    threshold = cam_config.background_score
    with evaluation_mode(model):
        features = model.backbone(image)
        class_logits, seg_logits = model.classify(features), model.segment(features)
    unit = denormalise_to_unit(image)
    made = make_pseudo_label(
        model, image, unit, cls_label, boxes, cam_config, par_config, background_scores=(threshold, threshold)
    )
    assert made.walk is not None
    assert made.refined_affinity is not None
    size = image.shape[2:]
    packing = made.cam.packing
    walked = propagate_cam(made.cam, [threshold], made.walk)
    affinity_cam = packing.unpack(resize(walked[:, 0], size))
    labels = {
        "cam": cam_to_label(made.cam.cam, packing, threshold),
        "refined_cam": made.refined_cam.label,
        "affinity_cam": strongest(affinity_cam),
        "refined_affinity": made.refined_affinity.label,
        "segmentation": strongest(resize(seg_logits, size)),
    }
    inside = (..., slice(0, height), slice(0, width))
    labels = {stage: label[inside] for stage, label in labels.items()}
    for stage, label in labels.items():
        scores.matrices[stage].update(truth, label)
    scores.tags.update(class_logits.sigmoid(), cls_label)
    cam = packing.unpack(made.cam.cam)
    return ScoredBatch(unit[inside], cam[inside], affinity_cam[:, 1:][inside], truth, labels)
