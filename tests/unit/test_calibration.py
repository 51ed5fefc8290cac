"""Choosing the background score: kappa against scikit-learn, choices in cases where the answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import afa
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from afa_core.calibration import SCORES, Agreement, MaskedScores, kappa, observe
from afa_core.checkpoint import load_bundle
from afa_core.data.shapes import draw
from afa_core.labelling import label_at_scores, label_pictures, to_working_picture
from afa_core.metrics import ConfusionMatrix

LABELS = st.lists(st.integers(0, 2), min_size=12, max_size=12)


@given(LABELS, LABELS)
def test_kappa_is_scikit_learns(one: list[int], other: list[int]) -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor(one), torch.tensor(other))
    constant = len(set(one)) == len(set(other)) == 1 and one == other
    expected = 0.0 if constant else cohen_kappa_score(one, other)  # scikit-learn divides by zero there
    assert kappa(matrix) == pytest.approx(expected, abs=1e-9)


def test_agreement_prefers_labels_that_two_views_share_to_those_that_say_nothing() -> None:
    truth = np.zeros((8, 8), np.uint8)
    truth[2:6, 2:6] = 1
    agreement = Agreement(2)
    agreement.count(0.2, truth, truth, truth)
    agreement.count(0.1, np.ones_like(truth), truth, truth)
    agreement.count(0.9, np.zeros_like(truth), truth, np.zeros_like(truth))  # everything is background: no merit
    assert agreement.choice() == 0.2
    assert agreement.criterion(0.2) == 1
    assert agreement.criterion(0.9) == 0


def test_masks_choose_the_best_miou_and_say_how_sure_that_is() -> None:
    truth = np.zeros((4, 8), np.uint8)
    truth[:, 4:] = 1
    better, worse = truth.copy(), truth.copy()
    worse[:, 3] = 1
    same, mixed = MaskedScores(2), MaskedScores(2)
    for index in range(20):
        same.count(0.2, better, truth)
        same.count(0.3, worse, truth)
        mixed.count(0.2, better if index % 2 else worse, truth)
        mixed.count(0.3, worse if index % 2 else better, truth)
    assert same.choice() == 0.2
    assert same.miou(0.2) == 1
    assert same.miou(0.3) == pytest.approx((12 / 16 + 16 / 20) / 2)
    assert same.interval() == (0.2, 0.2)
    assert mixed.interval() == (0.2, 0.3)


def test_labels_at_several_scores_are_those_of_labelling(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    image = draw(4, 0, 64).image
    labels, _ = label_at_scores(loaded, to_working_picture(image, 128), ["disc"], loaded.label_config, [0.2, 0.45, 0.6])
    expected = label_pictures(loaded, [image], [["disc"]])[0].label
    assert loaded.cam_config.background_score == 0.45
    assert np.array_equal(labels[1], expected)
    assert [(label > 0).sum() for label in labels] == sorted([(label > 0).sum() for label in labels], reverse=True)
    agreement = Agreement(len(loaded.classes) + 1)
    observe(loaded, to_working_picture(image, 128), None, loaded.label_config, agreement)
    assert agreement.choice() in SCORES


def test_the_command_names_a_score_and_refuses_what_it_cannot_use(bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    for index in range(4):
        Image.fromarray(draw(4, index, 48).image).save(tmp_path / f"{index}.png")
    assert "finds no class" in afa("calibrate", "--model", bundle, "--input", tmp_path, status=2)
    afa("shards", "shapes", tmp_path / "set", "--train", 4, "--val", 4, "--size-px", 64, "--samples-per-shard", 4)
    printed = afa("calibrate", "--model", bundle, "--masked", tmp_path / "set", "--pictures", 3)
    assert "by mIoU (3 masked pictures): --background-score 0." in printed
    assert "give --input" in afa("calibrate", "--model", bundle, status=2)
    (tmp_path / "none").mkdir()
    said = afa("calibrate", "--model", bundle, "--input", tmp_path / "none", status=2)
    assert "holds no picture that can be read" in said
