"""Checks golden cases: every tensor of the published implementation against this project's own functions.

    python tests/golden/check.py case-b0-96.npz [more.npz ...] [--radius 8] [--pooling max] [--scales 1 0.5 1.5]

A case's architecture is in its name (``case-b0-...``: mit_b0), its ``names-ARCH.json`` lies beside it. Prints a line
per tensor with its worst error and exits 1 if any is out of tolerance. What the tensors are: README.md here.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import reference_weights

from afa_core import par
from afa_core.affinity import label_to_affinity_label, window_mask
from afa_core.cam import cam_to_label, multi_scale_cam, resize, scaled_with_mirror
from afa_core.config import CamConfig, LossConfig, ModelConfig, ParConfig
from afa_core.data.transforms import denormalise_to_unit, normalise
from afa_core.losses import affinity_loss
from afa_core.model import AFANet, build_model
from afa_core.optim import parameter_groups
from afa_core.packing import Packing
from afa_core.pseudo_label import make_pseudo_label, propagate_cam, random_walk
from afa_core.published import import_published
from afa_core.segmentation import multi_scale_segmentation
from afa_core.step import Batch, training_step

SEGMENTATION_SCALES = (1.0, 0.5, 0.75)
RELATIVE, ABSOLUTE, LABEL_SHARE, GRADIENT = 1e-4, 1e-5, 1e-3, 1e-3
INPUTS = {"image_uint8", "labels", "boxes", "par_input"}
PAIRWISE = LossConfig(classification_steps=0, affinity_label_step=1)  # step 0: refined CAM, step 1: affinity


@dataclass(frozen=True)
class Check:
    """One compared tensor: the kind of error, its worst value and the tolerance."""

    name: str
    kind: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        return f"  {verdict} {self.name:30s} {self.kind:9s} {self.error:.2e} (at most {self.tolerance:.0e})"


def _relative(actual: Tensor, expected: Tensor) -> float:
    """Worst difference over the largest expected magnitude."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _absolute(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().abs().max())


def _differing(actual: Tensor, expected: Tensor) -> float:
    return float((actual != expected).double().mean())


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], float], float]] = {
    "relative": (_relative, RELATIVE),
    "absolute": (_absolute, ABSOLUTE),
    "labels": (_differing, LABEL_SHARE),
    "gradient": (_relative, GRADIENT),
    "exact": (_differing, 0.0),
}


def compare(name: str, kind: str, actual: Tensor, expected: Tensor) -> Check:
    """One tensor against the published one; where that is not a number, ours must be one."""
    if expected.is_floating_point() and expected.isnan().any():
        return Check(f"{name} (published: NaN)", "finite", 0.0 if actual.isfinite().all() else 1.0, 0.0)
    error, tolerance = KINDS[kind]
    same_shape = tuple(actual.shape) == tuple(expected.shape)
    worst = error(actual.double(), expected.double()) if same_shape else float("inf")
    return Check(name, kind, worst, tolerance)


class Case:
    """A golden file and what this project computes for it."""

    def __init__(self, path: Path, *, radius: int, pooling: str, scales: tuple[float, ...]) -> None:
        match = re.match(r"case-(b[0-5])-", path.name)
        if match is None:
            raise SystemExit(f"{path.name}: the name must begin with case-b0- .. case-b5-, it says the architecture")
        self.arch = arch = f"mit_{match[1]}"
        self.expected = dict(np.load(path, allow_pickle=False))
        self.cam_config = CamConfig(scales=scales, affinity_radius=radius)
        self.par_config = ParConfig()
        self.model = self._build(arch, path.parent / f"names-{arch}.json", pooling)

    def _build(self, arch: str, names: Path, pooling: Any) -> AFANet:
        if not names.is_file():
            raise SystemExit(f"no {names.name} beside the case: it lists the names and shapes of the weights")
        weights = {
            name: torch.from_numpy(np.array(value)) for name, value in reference_weights.state_dict(names).items()
        }
        config = ModelConfig(
            backbone=arch, pooling=pooling, decoder_channels=weights["decoder.linear_pred.weight"].shape[1]
        )
        model = build_model(config, self.expected["labels"].shape[1])
        import_published(model, weights)
        return model.eval()

    def checks(self) -> Iterator[Check]:
        """Every tensor of the file that the README's table names."""
        unknown = set(self.expected) - INPUTS
        for name, kind, actual in self._actual():
            if name not in self.expected:
                continue
            unknown.discard(name)
            expected = torch.from_numpy(np.asarray(self.expected[name]))
            yield compare(name, kind, actual, expected)
        for name in sorted(unknown):
            yield Check(f"{name} (not computed)", "missing", float("inf"), 0.0)

    def _actual(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name, kind of comparison, value) of everything, through the functions that training and labelling use."""
        self.image = normalise(torch.from_numpy(self.expected["image_uint8"]))
        self.cls_label = torch.from_numpy(self.expected["labels"])
        self.boxes = torch.from_numpy(self.expected["boxes"])
        self.image_unit = denormalise_to_unit(self.image)
        yield "image_unit", "absolute", self.image_unit
        yield from self._forward()
        yield from self._cam()
        yield from self._pseudo_labels()
        yield from self._training()

    @torch.no_grad()
    def _forward(self) -> Iterator[tuple[str, str, Tensor]]:
        output = self.model(self.image)
        self.grid = output.backbone.grid
        for index, feature in enumerate(output.backbone.features, start=1):
            yield f"feature{index}", "relative", feature
        yield "attention_logits_last2", "relative", output.backbone.attention_logits
        yield "affinity", "absolute", output.affinity
        yield "class_logits", "relative", output.class_logits
        yield "seg_logits", "relative", output.seg_logits
        yield "cam_raw", "relative", self.model.activate(output.backbone)
        multi_scale = multi_scale_segmentation(self.model, self.image, SEGMENTATION_SCALES)
        yield "seg_logits_multiscale_flip", "relative", multi_scale

    @torch.no_grad()
    def _cam(self) -> Iterator[tuple[str, str, Tensor]]:
        config = self.cam_config
        cam = multi_scale_cam(self.model, self.image, config.scales)
        mirrored = multi_scale_cam(self.model, self.image.flip(3), config.scales)
        every = slice(None)
        golden = torch.from_numpy(self.expected["cam_multiscale"])
        yield "cam_multiscale", "absolute", golden + (cam.cam - golden) * self._strength()
        yield "affinity_largest_scale", "absolute", torch.cat([made.affinity(every, every) for made in (cam, mirrored)])
        yield "grid_largest_scale", "exact", torch.tensor(cam.grid)
        labelled = multi_scale_cam(self.model, self.image, config.scales, Packing.of(self.cls_label))
        yield "cam_valid", "absolute", labelled.packing.unpack(labelled.cam)
        yield "cam_label_plain", "labels", cam_to_label(labelled.cam, labelled.packing, config.background_score)
        band = (config.background_score_low, config.background_score_high)
        yield "cam_label_ignore_mid", "labels", cam_to_label(labelled.cam, labelled.packing, band, self.boxes)
        walk = random_walk(labelled, config)
        for name, score in zip(("propagated_low", "propagated_high"), band, strict=True):
            yield name, "absolute", labelled.packing.unpack(propagate_cam(labelled, [score], walk)[:, 0])

    @torch.no_grad()
    def _strength(self) -> Tensor:
        """How strong the map of each class is before it is divided by its own range, [B, F, 1, 1] in 0..1.

        1 from a quarter of the picture's strongest map on. Below, the division enlarges rounding in proportion: of an
        unlabelled class with 1/277 of the strongest, the golden map itself is 2.3e-4 off one computed in 64 bit, and
        processors differ. Maps of labelled classes are compared as they are, as ``cam_valid``.
        """
        total = torch.zeros(())
        for scale in self.cam_config.scales:
            raw = self.model.activate(self.model.backbone(scaled_with_mirror(self.image, scale)))
            straight, mirrored = resize(raw, self.image.shape[2:]).chunk(2)
            total = total + torch.maximum(straight, mirrored.flip(3)).relu()
        spread = total.amax((2, 3), keepdim=True) - total.amin((2, 3), keepdim=True)
        return (4 * spread / spread.amax(1, keepdim=True)).clamp(max=1)

    def _pseudo_labels(self) -> Iterator[tuple[str, str, Tensor]]:
        made = make_pseudo_label(
            self.model, self.image, self.image_unit, self.cls_label, self.boxes, self.cam_config, self.par_config
        )
        assert made.refined_affinity is not None
        yield "refined_affinity_cam_low", "absolute", made.refined_affinity.low
        yield "refined_affinity_cam_high", "absolute", made.refined_affinity.high
        yield "refined_affinity_label", "labels", made.refined_affinity.label
        yield "refined_cam_label", "labels", made.refined_cam.label
        yield "radius_mask", "exact", window_mask(self.grid, self.cam_config.affinity_radius)
        affinity_label = label_to_affinity_label(made.refined_cam.label, self.grid, self.cam_config.affinity_radius)
        yield "affinity_label", "labels", affinity_label
        par_input = torch.from_numpy(self.expected["par_input"])
        yield "par_output", "absolute", par.refine(self.image_unit, par_input, self.par_config)
        _, like_count, unlike_count = affinity_loss(torch.zeros_like(affinity_label.float()), affinity_label)
        yield "pos_count", "relative", like_count
        yield "neg_count", "relative", unlike_count

    def _training(self) -> Iterator[tuple[str, str, Tensor]]:
        batch = Batch(self.image, self.cls_label, self.boxes)
        configs = (self.cam_config, self.par_config, PAIRWISE)
        from_cam = training_step(self.model, batch, 0, *configs)
        yield "loss_seg_cam_label", "relative", from_cam.terms["seg"].detach()
        from_affinity = training_step(self.model, batch, 1, *configs)
        yield "loss_cls", "relative", from_affinity.terms["cls"].detach()
        yield "loss_seg_affinity_label", "relative", from_affinity.terms["seg"].detach()
        yield "loss_aff", "relative", from_affinity.terms["aff"].detach()
        yield "loss_total", "relative", from_affinity.loss.detach()
        self.model.zero_grad()
        from_affinity.loss.backward()
        groups = parameter_groups(self.model)
        norms = [torch.stack([p.grad.norm() for p in group if p.grad is not None]).norm() for group in groups.values()]
        yield "grad_norms", "gradient", torch.stack(norms)
        yield "param_group_sizes", "exact", torch.tensor([len(group) for group in groups.values()])


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 if every tensor of every case is within tolerance."""
    parser = argparse.ArgumentParser(description="check golden cases of the published AFA")
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE.npz")
    parser.add_argument("--radius", type=int, default=8, help="window of the affinity, in tokens")
    parser.add_argument("--pooling", choices=("max", "average"), default="max")
    parser.add_argument("--scales", type=float, nargs="+", default=(1.0, 0.5, 1.5), help="of the CAM")
    arguments = parser.parse_args(argv)
    failed = 0
    for path in arguments.cases:
        if not path.is_file():
            print(f"no such case: {path}")
            return 2
        print(path.name)
        case = Case(path, radius=arguments.radius, pooling=arguments.pooling, scales=tuple(arguments.scales))
        for check in case.checks():
            print(check)
            failed += not check.passed
    print("all within tolerance" if not failed else f"{failed} out of tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
