"""What ``speed.compile`` does, through torch's own compiler."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from afa_core.backbone import build_backbone
from afa_core.errors import InputError
from pipelines.config import ExperimentConfig
from pipelines.speed import SpeedConfig, apply_speed, uncompiled
from pipelines.training import WorkerSettings, train_worker

COMPILED = SpeedConfig(compile=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_compiled_backbone_gives_the_same_features_and_gradients() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("mit_tiny", drop_path_rate=0.0)
    image = torch.randn(2, 3, 64, 64)
    results = []
    for config in (SpeedConfig(), COMPILED):
        apply_speed(config, backbone)
        backbone.zero_grad()
        features = backbone(image)
        (features.features[-1].square().mean() + features.keys[-1].square().mean()).backward()
        gradients = [weight.grad for weight in backbone.parameters() if weight.grad is not None]
        results.append([*(feature.detach() for feature in features.features), *gradients])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)


def test_compiling_without_a_compiler_is_a_mistake_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/g++",))
    with pytest.raises(InputError, match="no C\\+\\+ compiler here; install g\\+\\+"):
        apply_speed(COMPILED, build_backbone("mit_tiny", drop_path_rate=0.0))
    for name in ("TIMEOUT", "MAX_RETRIES"):  # which a worker would set for good
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")
    experiment = dataclasses.asdict(ExperimentConfig(speed=COMPILED))
    outcome = train_worker(dataclasses.asdict(WorkerSettings(experiment, "", "", "", "", "")))
    assert outcome["users"]
    assert "no C++ compiler here" in outcome["error"]


def test_a_backbone_that_cannot_run_its_blocks_again_is_not_told_to() -> None:
    backbone = build_backbone("pvt_v2_b0")
    apply_speed(SpeedConfig(), backbone)
    with pytest.raises(InputError, match="this backbone has none"):
        apply_speed(SpeedConfig(gradient_checkpointing=True), backbone)


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value + value


def test_what_is_scored_is_not_compiled() -> None:
    """Validation pictures are of ever new sizes, and there is room for eight."""
    compiled: list[Any] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(inputs)
        return graph.forward

    layer = Doubled()
    layer.compile(backend=backend, dynamic=False)
    with uncompiled(COMPILED):
        layer(torch.ones(2, 3))
    assert not compiled
    layer(torch.ones(2, 3))
    assert len(compiled) == 1
