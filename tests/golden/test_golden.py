"""The shipped golden cases, by the same checks that ``check.py`` runs from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from afa_core.config import ModelConfig, OptimConfig
from afa_core.metrics import ConfusionMatrix
from afa_core.model import AFANet
from afa_core.optim import apply_schedule, build_optimizer
from pipelines.benchmarks import plain_form

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
import check  # noqa: E402

CASES = sorted(FOLDER.glob("case-*.npz"))
SCALARS = json.loads((FOLDER / "scalars.json").read_text())


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_every_tensor_of_the_case_is_within_tolerance(path: Path) -> None:
    case = check.Case(path, radius=8, pooling="max", scales=(1.0, 0.5, 1.5))
    results = list(case.checks())
    assert len(results) >= 35
    assert [str(result) for result in results if not result.passed] == []


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_plain_form_that_benchmarks_measure_against_is_the_published_one(path: Path) -> None:
    case = check.Case(path, radius=8, pooling="max", scales=(1.0, 0.5, 1.5))
    image = check.normalise(torch.from_numpy(case.expected["image_uint8"]))
    labels, boxes = (torch.from_numpy(case.expected[name]) for name in ("labels", "boxes"))
    batch = check.Batch(image, labels, boxes)
    configs = (case.cam_config, case.par_config)
    refined_cam, refined_affinity = plain_form.pseudo_labels(case.model, batch, *configs)
    assert (refined_cam.numpy() != case.expected["refined_cam_label"]).mean() <= 1e-3
    assert (refined_affinity.numpy() != case.expected["refined_affinity_label"]).mean() <= 1e-3
    loss = plain_form.training_loss(case.model, batch, *configs, check.PAIRWISE)
    assert float(loss.detach()) == pytest.approx(float(case.expected["loss_total"]), rel=1e-4)


@pytest.mark.skipif("AFA_PUBLISHED_CODE" not in os.environ, reason="needs a clone of the published code")
@pytest.mark.parametrize("side", ["128", "320"])
def test_labels_losses_and_gradients_are_those_of_the_published_code(side: str) -> None:
    command = [sys.executable, str(FOLDER / "against_published.py"), os.environ["AFA_PUBLISHED_CODE"], "--side", side]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_check_fails_on_a_wrong_tensor(tmp_path: Path) -> None:
    values = dict(np.load(CASES[0]))
    values["affinity"] = values["affinity"] + 1e-3
    np.savez(tmp_path / CASES[0].name, **values)
    names = "names-mit_b0.json"
    (tmp_path / names).write_text((FOLDER / names).read_text())
    command = [sys.executable, str(FOLDER / "check.py"), str(tmp_path / CASES[0].name)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert [line.split()[1] for line in answer.stdout.splitlines() if "FAIL" in line] == ["affinity"]


def test_learning_rates_of_the_published_schedule() -> None:
    golden = SCALARS["lr_schedule"]
    config = OptimConfig(
        lr=golden["base_lr"][0],
        head_lr_factor=golden["base_lr"][1] / golden["base_lr"][0],
        total_steps=golden["max_iters"],
        warmup_steps=golden["warmup_iters"],
        warmup_ratio=golden["warmup_ratio"],
        power=golden["power"],
    )
    optimizer = build_optimizer(AFANet(ModelConfig(backbone="mit_b0"), 3), config, pretrained=True)
    for step, (backbone_lr, head_lr) in enumerate(golden["lr_used_at_step"]):
        apply_schedule(optimizer, step, config)
        backbone, heads, decoder = (group["lr"] for group in optimizer.param_groups)
        assert (backbone, heads, decoder) == pytest.approx((backbone_lr, head_lr, head_lr), rel=1e-9)


def test_segmentation_scores() -> None:
    golden = SCALARS["segmentation_scores"]
    matrix = ConfusionMatrix(golden["num_classes"])
    for truth, prediction in zip(golden["target"], golden["prediction"], strict=True):
        matrix.update(torch.tensor(truth), torch.tensor(prediction))
    expected = golden["scores"]
    assert matrix.pixel_accuracy() == pytest.approx(expected["pAcc"], abs=1e-12)
    assert matrix.mean_accuracy() == pytest.approx(expected["mAcc"], abs=1e-12)
    assert matrix.miou() == pytest.approx(expected["miou"], abs=1e-12)
    assert matrix.iou().tolist() == pytest.approx(list(expected["iou"].values()), abs=1e-12)
