"""What only a real GPU can show: kernels, steps and labels with the processor's numbers, and copies that arrive."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from afa_core import par
from afa_core.batch_norm import synchronise_batch_norm
from afa_core.checkpoint import load_bundle
from afa_core.config import CamConfig, LossConfig, ModelConfig, OptimConfig, ParConfig
from afa_core.labelling import begin_labels, to_working_picture
from afa_core.model import AFANet
from afa_core.optim import build_optimizer
from afa_core.step import Batch, training_step
from afa_core.transfer import Transfer

GPU = torch.device("cuda")
MODEL = ModelConfig(backbone="mit_tiny", drop_path_rate=0.0, decoder_dropout=0.0)
LABELS = LossConfig(classification_steps=0, affinity_label_step=0)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("size", [(64, 96), (37, 53)], ids=["divisible by 16", "odd"])
def test_pars_kernels_are_par(size: tuple[int, int]) -> None:
    assert par.kernels_run(GPU)
    torch.manual_seed(0)
    image, maps = torch.rand(2, 3, *size), torch.rand(2, 5, *size)
    refined = par.refine(image.to(GPU), maps.to(GPU), ParConfig()).cpu()
    torch.testing.assert_close(refined, par.refine(image, maps, ParConfig()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [96, 256])
def test_a_step_has_the_processors_losses_and_gradients(side: int) -> None:
    torch.manual_seed(0)
    model = AFANet(MODEL, 3).train()
    image, cls_label = torch.randn(2, 3, side, side), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    boxes = torch.tensor([[0, side, 0, side], [8, side, 0, side - 24]])
    results = []
    for device in (torch.device("cpu"), GPU):
        model.to(device).zero_grad()
        batch = Batch(image.to(device), cls_label.to(device), boxes)
        loss = training_step(model, batch, 0, CamConfig(), ParConfig(), LABELS).loss
        loss.backward()
        gradients = [weight.grad.cpu() for weight in model.parameters() if weight.grad is not None]
        results.append([loss.detach().cpu(), torch.stack([gradient.norm() for gradient in gradients])])
    for processors, gpus in zip(*results, strict=True):
        torch.testing.assert_close(gpus, processors, atol=1e-4, rtol=1e-2)


def test_labels_are_the_processors(bundle: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (90, 120, 3), dtype=torch.uint8, generator=generator).numpy()
    pictures, tags = [to_working_picture(pixels, 128)] * 3, [("disc",), None, ("star", "ring")]
    answers = []
    for device in (torch.device("cpu"), GPU):
        model = load_bundle(bundle, device)
        begun = begin_labels(model, pictures, tags, model.label_config)
        with ThreadPoolExecutor(1) as pool:  # another thread waits, as a worker's does
            answers.append(pool.submit(begun.finish).result())
    for processors, gpus in zip(*answers, strict=True):
        assert gpus.tags == processors.tags
        assert (gpus.label != processors.label).mean() < 0.01


def test_a_copy_holds_what_was_asked_before_it() -> None:
    value = torch.ones(2048, 2048, device=GPU)
    for _ in range(50):
        value = value @ value / 2048
    with ThreadPoolExecutor(1) as pool:
        (copy,) = pool.submit(Transfer(value).arrived).result()
    assert torch.equal(copy, torch.ones(2048, 2048))


def test_the_optimiser_of_several_gpus_goes_on_from_a_saved_state() -> None:
    model = AFANet(MODEL, 3).to(GPU)
    synchronise_batch_norm(model, GPU)
    states = []
    for _ in range(2):
        optimizer = build_optimizer(model, OptimConfig(), pretrained=False)
        if states:
            optimizer.load_state_dict(states[0])
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        states.append(optimizer.state_dict())
    assert all(weight.isfinite().all() for weight in model.parameters())
