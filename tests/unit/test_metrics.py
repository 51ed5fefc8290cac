"""Scores against scikit-learn, and that counts merge."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, jaccard_score

from afa_core.metrics import ConfusionMatrix, TagScores


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(0, 2**31))
def test_iou_is_scikit_learns(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, prediction = rng.integers(0, classes, (2, 30, 20))
    truth[rng.random(truth.shape) < 0.2] = 255
    matrix = ConfusionMatrix(classes)
    matrix.update(torch.from_numpy(truth), torch.from_numpy(prediction))
    known = truth != 255
    labels = list(range(classes))
    expected = confusion_matrix(truth[known], prediction[known], labels=labels)
    assert np.array_equal(matrix.counts[:, :classes].numpy(), expected)
    present = sorted(set(truth[known]) | set(prediction[known]))
    scores = jaccard_score(truth[known], prediction[known], labels=present, average=None)
    np.testing.assert_allclose(matrix.iou()[present].numpy(), scores)
    np.testing.assert_allclose(matrix.miou(), scores.mean())


def test_an_ignored_prediction_is_a_miss() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([[1, 1, 0, 0]]), torch.tensor([[1, 255, 0, 0]]))
    assert matrix.iou().tolist() == [1.0, 0.5]
    assert matrix.pixel_accuracy() == 0.75


def test_counts_of_parts_add_up_to_the_whole() -> None:
    truth, prediction = torch.randint(0, 4, (2, 6, 8, 8))
    whole, one, two = ConfusionMatrix(4), ConfusionMatrix(4), ConfusionMatrix(4)
    whole.update(truth, prediction)
    one.update(truth[:2], prediction[:2])
    two.update(truth[2:], prediction[2:])
    one.merge(two)
    assert torch.equal(one.counts, whole.counts)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 2**31))
def test_tag_scores_are_scikit_learns(pictures: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probability = rng.random((pictures, classes)).round(1).astype(np.float32)  # rounded: ties
    label = (rng.random((pictures, classes)) < 0.4).astype(np.float32)
    scores = TagScores()
    for start in range(0, pictures, 7):
        scores.update(torch.from_numpy(probability[start : start + 7]), torch.from_numpy(label[start : start + 7]))
    expected = f1_score(label, probability > 0.5, average="micro", zero_division=0)
    np.testing.assert_allclose(scores.f1(), expected)
    occurring = [index for index in range(classes) if label[:, index].any()]
    if occurring:
        precisions = [average_precision_score(label[:, i], probability[:, i]) for i in occurring]
        np.testing.assert_allclose(scores.mean_average_precision(), np.mean(precisions), rtol=1e-6)
