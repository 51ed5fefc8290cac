"""Training steps, labels, scores and crops on the pretended GPU against the processor's; run by test_gpu_paths.py."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from device import GPU, WAITS, GpuTensor, PretendedGpu, to_gpu  # isort: skip  (before torch)

import numpy as np
import torch
from torch import Tensor

from afa_core import par
from afa_core.checkpoint import Bundle, load_bundle, save_bundle
from afa_core.classes import SHAPES
from afa_core.config import CamConfig, DataConfig, LabelConfig, LossConfig, ModelConfig, ParConfig
from afa_core.data.draws import Draws
from afa_core.data.sample import Sample
from afa_core.data.train_samples import collate
from afa_core.data.transforms import TrainTransform, to_network_input
from afa_core.labelling import begin_labels, found_tags, label_at_scores, label_pictures, to_working_picture
from afa_core.model import build_model
from afa_core.step import Batch, training_step
from pipelines.scoring import Scores, score_samples

SIZES = ((90, 120), (90, 120), (300, 400), (200, 150), (40, 30))
TAGS = (("disc",), None, ("star", "ring"), (), ("disc", "square"))
MODES = (
    {}, {"crf": True}, {"head": "segmentation"}, {"head": "agreement"}, {"refine": "affinity"}, {"refine": "par"},
    {"ignore_band": True}, {"tags": "predicted"},
)  # fmt: skip
PHASES = {
    "classification": LossConfig(classification_steps=1),
    "refined_cam": LossConfig(classification_steps=0, affinity_label_step=1),
    "refined_affinity": LossConfig(classification_steps=0, affinity_label_step=0),
}
MODEL = ModelConfig(backbone="mit_tiny", decoder_channels=16)
SMALL_CAM, SMALL_PAR = CamConfig(affinity_radius=2), ParConfig(dilations=(1, 2), iterations=2)


def loss_and_gradients(batch: Batch, loss: LossConfig, *, on_gpu: bool, bfloat16: bool) -> tuple[float, list[Tensor]]:
    torch.manual_seed(0)
    model = build_model(MODEL, len(SHAPES))
    if on_gpu:
        to_gpu(model)
        batch = Batch(GpuTensor(batch.image), GpuTensor(batch.cls_label), batch.boxes)
    model.train()
    # Random numbers of stochastic depth and dropout are the processor's either way.
    torch.manual_seed(1)
    result = training_step(model, batch, 0, SMALL_CAM, SMALL_PAR, loss, bfloat16=bfloat16)
    result.loss.backward()
    gradients = [getattr(parameter.grad, "held", parameter.grad) for parameter in model.parameters()]
    return float(getattr(result.loss, "held", result.loss.detach())), gradients


def random_batch(side: int) -> Batch:
    torch.manual_seed(2)
    boxes = torch.tensor([[0, side, 0, side], [5, side - 6, 0, side - 26]])
    return Batch(torch.randn(2, 3, side, side), torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 0]]), boxes)


def train() -> None:
    """A step in every phase, in 32 bit and under the GPU's autocast, waits for the device once."""
    small, large = 96, 256  # of these one takes the exact way through the backbone, one the fast one
    with PretendedGpu():  # what never changes is sent once
        loss_and_gradients(random_batch(small), PHASES["refined_affinity"], on_gpu=True, bfloat16=False)
    for phase, side in [*((phase, small) for phase in PHASES), ("refined_affinity", large)]:
        batch, loss = random_batch(side), PHASES[phase]
        expected, slopes = loss_and_gradients(batch, loss, on_gpu=False, bfloat16=False)
        for bfloat16 in (False, True):
            with PretendedGpu():
                WAITS.clear()
                made, gradients = loss_and_gradients(batch, loss, on_gpu=True, bfloat16=bfloat16)
                assert WAITS.total() <= (phase != "classification"), WAITS
            assert abs(made - expected) < (0.02 if bfloat16 else 1e-5), (phase, bfloat16, made, expected)
            for slope, gradient in zip(slopes, gradients, strict=True):
                assert gradient.dtype == torch.float32
                assert bfloat16 or torch.allclose(slope, gradient, atol=1e-5), phase


def pictures() -> list[Sample]:
    noise = [np.random.default_rng(n).integers(0, 256, (*size, 3), dtype=np.uint8) for n, size in enumerate(SIZES)]
    return [Sample(str(n), image, ("disc",), image[:, :, 0] % 6) for n, image in enumerate(noise)]


def answers(bundle: Bundle) -> list[object]:
    """Everything that a model is asked."""
    samples = pictures()
    said: list[object] = []
    for mode in MODES:
        config = replace(bundle.label_config, **mode)
        said.append(label_pictures(bundle, [sample.image for sample in samples], TAGS, config))
    picture = to_working_picture(samples[2].image, 128)
    said.append(label_at_scores(bundle, picture, ("disc",), bundle.label_config, [0.1, 0.3]))
    said.append(found_tags(bundle, picture, bundle.label_config))
    scores = Scores(len(SHAPES))
    list(score_samples(bundle.model, samples, SHAPES, bundle.cam_config, bundle.par_config, scores))
    return [*said, scores.summary()]


def ask() -> None:
    """Labels of every mode, calibration's and the scores are the processor's."""
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    model, label_config = build_model(MODEL, len(SHAPES)), LabelConfig(max_side_px=128)
    save_bundle(folder, model, SHAPES, MODEL, SMALL_CAM, SMALL_PAR, label_config)
    bundle = load_bundle(folder)
    expected = answers(bundle)
    to_gpu(bundle.model)
    with PretendedGpu():
        made = answers(bundle)
        once = label_waits(bundle)
    with np.printoptions(threshold=sys.maxsize):
        for one, other in zip(expected, made, strict=True):
            assert repr(one) == repr(other), (one, other)
    assert once == 1, WAITS  # to know how many classes are looked for


def label_waits(bundle: Bundle) -> int:
    """How often the device is waited for until it has been asked for the labels of a batch."""
    WAITS.clear()
    picture = to_working_picture(pictures()[0].image, 128)
    begun = begin_labels(bundle, [picture] * 4, [("disc",), None, (), ("star", "ring")], bundle.label_config)
    asked = WAITS.total()
    assert len(begun.finish()) == 4
    return asked


def crops() -> None:
    """Crops that are made on the device are within a rounding of those of the processor, and wait for nothing."""
    transform = TrainTransform(DataConfig(crop_px=96), SHAPES)
    items = [transform(lambda _, sample=sample: sample, Draws(0, n)) for n, sample in enumerate(pictures())]
    batch = collate(items)
    expected = batch.crops(96, torch.device("cpu"))
    with PretendedGpu():
        to_network_input(batch.crops(96, GPU), GPU)  # what never changes is sent once
        WAITS.clear()
        made = batch.crops(96, GPU)
        assert to_network_input(made, GPU).device == GPU
        assert not WAITS, WAITS
    assert (made.held.int() - expected.int()).abs().max() <= 1


if __name__ == "__main__":
    # A processor has no Triton kernels; those have tests of their own.
    par._on_gpu = lambda maps: False
    {"train": train, "ask": ask, "crops": crops}[sys.argv[1]]()
