"""How a job's workers share out what a cluster has, or will have."""

from __future__ import annotations

import pytest
import ray

from pipelines.config import TrainConfig
from pipelines.errors import UsageError
from pipelines.local_ray import processor_share
from pipelines.train import scaling


def cluster_of(patch: pytest.MonkeyPatch, *processors: int, gpus: int = 0) -> None:
    dead = {"Alive": False, "Resources": {"CPU": 64.0}}
    nodes = [{"Alive": True, "Resources": {"CPU": float(number)} if number else {}} for number in processors]
    patch.setattr(ray, "nodes", lambda: [dead, *nodes])
    patch.setattr(ray, "cluster_resources", lambda: {"CPU": float(sum(processors)), "GPU": float(gpus)})


@pytest.mark.parametrize(
    ("processors", "workers", "share"),
    [
        ((2,), 1, 2), ((2,), 2, 1), ((2,), 3, 0), ((0, 8), 2, 4), ((0,), 1, 0), ((), 1, 0),
        ((4, 4, 4), 2, 4),  # 12 // 2 = 6 fits no node: the job would wait for ever
        ((4, 4, 4), 4, 2), ((1, 7), 2, 3), ((1, 7), 8, 1),
    ],
)  # fmt: skip
def test_a_workers_share_fits_a_node(
    processors: tuple[int, ...], workers: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(monkeypatch, *processors)
    assert processor_share(workers) == share


def test_gpus_are_asked_for_where_they_are_and_where_they_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, 0, 8, gpus=2)
    assert scaling(TrainConfig(workers=2)).use_gpu
    assert scaling(TrainConfig(workers=4)).resources_per_worker == {"CPU": 2}
    assert scaling(TrainConfig(workers=2, use_gpu=False)).resources_per_worker == {"CPU": 4}
    cluster_of(monkeypatch, 0)  # the head of a cluster that starts nodes on demand
    assert scaling(TrainConfig(workers=2, use_gpu=True)).use_gpu
    with pytest.raises(UsageError, match=r"has 0 processors; wait for its nodes, or set train.use_gpu=true"):
        scaling(TrainConfig(workers=2))
