"""Losses, phases and the training step: closed forms, degenerate batches, and a loss curve that stays."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from afa_core.affinity import PairAffinity
from afa_core.config import CamConfig, LossConfig, ModelConfig, OptimConfig, ParConfig
from afa_core.losses import Phase, affinity_loss, phase_at, segmentation_loss
from afa_core.model import AFANet
from afa_core.optim import apply_schedule, build_optimizer, lr_factor, parameter_groups
from afa_core.step import Batch, NonFiniteLossError, check_finite, training_step
from pipelines.benchmarks import plain_form

PHASES = LossConfig(classification_steps=2, affinity_label_step=4)
PAR = ParConfig(dilations=(1, 2), iterations=2)


def test_segmentation_loss_weighs_both_sides_equally() -> None:
    logits = torch.randn(1, 3, 4, 4)
    label = torch.tensor([[[0, 1, 2, 255]] * 4])
    entropy = F.cross_entropy(logits, label, reduction="none", ignore_index=255)
    expected = 0.5 * (entropy[label == 0].mean() + entropy[(label == 1) | (label == 2)].mean())
    torch.testing.assert_close(segmentation_loss(logits, label), expected)


@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_batch_of_one_side_only_gives_a_finite_loss_and_gradient(value: int) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((2, 8, 8), value))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    if value == 255:
        assert loss == 0


def test_affinity_loss_by_hand() -> None:
    affinity = torch.tensor([[[0.9, 0.2], [0.4, 0.6]]])
    label = torch.tensor([[[1, 0], [255, 1]]])
    loss, like, unlike = affinity_loss(affinity, label)
    assert (int(like), int(unlike)) == (3, 2)
    assert float(loss) == pytest.approx(0.5 * ((0.1 + 0.4) / 3 + 0.2 / 2))
    empty, _, _ = affinity_loss(affinity, torch.full_like(label, 255))
    assert empty == 0


def test_phases_follow_the_plan() -> None:
    phases = [phase_at(step, PHASES) for step in range(6)]
    assert phases == [Phase.CLASSIFICATION] * 2 + [Phase.REFINED_CAM] * 2 + [Phase.REFINED_AFFINITY] * 2


@given(st.integers(1, 10_000), st.integers(0, 5_000), st.floats(0, 1))
def test_learning_rate_stays_within_its_base(total: int, warmup: int, ratio: float) -> None:
    config = OptimConfig(total_steps=total, warmup_steps=warmup, warmup_ratio=ratio)
    for step in {0, warmup - 1, warmup, total // 2, total}:
        if step >= 0:
            assert -1e-12 <= lr_factor(step, config) <= 1 + 1e-12


def test_groups_hold_every_parameter_once_and_pretrained_norms_are_frozen() -> None:
    model = AFANet(ModelConfig(backbone="mit_b0"), 4)
    groups = parameter_groups(model)
    ids = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    build_optimizer(model, OptimConfig(), pretrained=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    build_optimizer(model, OptimConfig(), pretrained=True)
    assert not any(parameter.requires_grad for parameter in groups["backbone_norms"])
    assert all(parameter.requires_grad for parameter in groups["decoder"])


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, 64, 64, generator=generator)
    return Batch(image, torch.tensor([[1.0, 0, 1], [0, 1, 0]]), torch.tensor([[0, 64, 0, 64], [8, 64, 0, 40]]))


@pytest.mark.parametrize(("step", "terms"), [(0, {"cls"}), (2, {"cls", "seg", "aff"}), (4, {"cls", "seg", "aff"})])
def test_every_phase_gives_every_parameter_a_gradient(step: int, terms: set[str]) -> None:
    torch.manual_seed(0)
    model = AFANet(ModelConfig(backbone="mit_b0"), 3).train()
    result = training_step(model, batch(), step, CamConfig(), PAR, PHASES)
    result.loss.backward()
    assert set(result.terms) == terms
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(("step", "walked"), [(2, False), (4, True)])
def test_affinity_of_the_cam_is_made_in_the_phase_that_walks_along_it(
    step: int, walked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for = []
    make = PairAffinity.__call__

    def watched(pairs: PairAffinity, some: slice, others: slice) -> torch.Tensor:
        asked_for.append(others)
        return make(pairs, some, others)

    monkeypatch.setattr(PairAffinity, "__call__", watched)
    model = AFANet(ModelConfig(backbone="mit_tiny"), 3).eval()
    training_step(model, batch(), step, CamConfig(), PAR, PHASES)
    assert bool(asked_for) == walked


def test_total_is_the_weighted_sum() -> None:
    model = AFANet(ModelConfig(backbone="mit_b0"), 3).eval()
    result = training_step(model, batch(), 5, CamConfig(), PAR, PHASES)
    terms = {name: float(value.detach()) for name, value in result.terms.items()}
    assert float(result.loss.detach()) == pytest.approx(
        terms["cls"] + 0.1 * terms["seg"] + 0.1 * terms["aff"], rel=1e-5
    )


def test_a_step_that_trains_is_its_plain_form() -> None:
    """With dropout and stochastic depth: the loss and every gradient (golden cases are in evaluation mode)."""
    torch.manual_seed(0)
    model = AFANet(ModelConfig(backbone="mit_tiny", decoder_dropout=0.5, drop_path_rate=0.3), 3).train()
    results = []
    for plain in (True, False):
        model.zero_grad()
        torch.manual_seed(1)
        configs = CamConfig(), PAR, PHASES
        if plain:
            loss = plain_form.training_loss(model, batch(), *configs)
        else:
            loss = training_step(model, batch(), 4, *configs).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for expected, here in zip(*results, strict=True):
        torch.testing.assert_close(here, expected, atol=1e-5, rtol=1e-3)


def test_a_non_finite_term_is_named_with_its_step() -> None:
    with pytest.raises(NonFiniteLossError, match=r"step 17: seg = nan"):
        check_finite({"cls": torch.tensor(1.0), "seg": torch.tensor(math.nan)}, 17)
    check_finite({"cls": torch.tensor(1.0)}, 17)


def test_the_loss_curve_of_a_fixed_seed_falls_and_repeats() -> None:
    """Six steps through all phases, twice: the same numbers; a change of them is a numerical change."""

    def curve() -> list[float]:
        torch.manual_seed(3)
        model = AFANet(ModelConfig(backbone="mit_b0", drop_path_rate=0.1), 3).train()
        optimizer = build_optimizer(model, OptimConfig(lr=1e-4, warmup_steps=0, total_steps=6), pretrained=False)
        losses = []
        for step in range(6):
            apply_schedule(optimizer, step, OptimConfig(lr=1e-4, warmup_steps=0, total_steps=6))
            result = training_step(model, batch(), step, CamConfig(), PAR, PHASES)
            optimizer.zero_grad()
            result.loss.backward()
            optimizer.step()
            losses.append(float(result.terms["cls"].detach()))
        return losses

    first = curve()
    assert first == pytest.approx(curve(), rel=1e-6)
    assert first[-1] < first[0]
