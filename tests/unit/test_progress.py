"""What stops a run, and what is said of its speed."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from afa_core.finite import NonFiniteStateError, check_finite_gradients, check_finite_state
from pipelines.bad_share import BadShare
from pipelines.progress import Progress
from pipelines.worker_group import StepFacts, WorkerGroup


def meet(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group = object.__new__(WorkerGroup)  # without Ray, which knows its rank
    group.rank, group.size, group.device = rank, 2, torch.device("cpu")
    own = (StepFacts(3, 1, 0.0, 2.5, False), StepFacts(4, 0, 0.75, 1.5, False))[rank]
    torch.save(tuple(group.meet(own)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_workers_know_the_longest_wait_and_the_most_memory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(meet, (folder,), nprocs=2, start_method="fork")  # importing Ray once is enough
        answers = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert answers[0] == answers[1] == (7.0, 1.0, 0.75, 2.5, 0.0)


def test_another_workers_wait_is_a_wait_for_data() -> None:
    progress = Progress("step", 10)
    for _ in range(5):
        time.sleep(0.02)  # in the all-gather, for the worker that waits
        progress.waited(0.02)
        progress.count(4)
    assert progress.bottleneck().startswith("data was the bottleneck")


def test_a_checkpoint_is_no_part_of_a_step() -> None:
    progress = Progress("step", 10)
    time.sleep(0.3)
    progress.leave_out(0.3)
    rates = progress.rates()
    assert rates["time.step_s"] < 0.2
    assert rates["time.checkpoint_s"] == 0.3
    progress.count(4)
    assert progress.rates()["time.checkpoint_s"] == 0.0


def test_a_share_of_all_samples_stops_a_run_once_it_means_something() -> None:
    share = BadShare(allowed=0.01)
    share.count(99, 5)
    assert share.problem() == ""
    share.count(1, 0)
    assert share.problem() == "5 of 100 training samples cannot be used (data.max_bad_share=0.01)"


def test_a_late_total_loss_is_not_diluted_by_what_was_good() -> None:
    share = BadShare(allowed=0.01)
    for _ in range(25_000):
        share.count(4, 0)
    steps = 0
    while not share.problem():
        share.count(4, 4)
        steps += 1
    assert steps == 126  # 504 samples, of which the share of all 100,500 is half a per cent
    assert share.problem().startswith("504 of the last 1000 training samples cannot be used")


def test_a_bad_shard_among_many_stops_nothing() -> None:
    share = BadShare(allowed=0.01)
    for step in range(2_000):
        share.count(64, 1 if step % 2 and step > 1_000 else 0)
        assert share.problem() == ""


def test_whoever_allows_any_share_is_not_stopped() -> None:
    share = BadShare(allowed=1.0)
    for _ in range(1_000):
        share.count(4, 4)
    assert share.problem() == ""


def test_what_is_not_finite_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm2d(3))
    check_finite_state(model.state_dict().items(), 5)
    model[1].running_mean[1] = float("nan")
    with pytest.raises(NonFiniteStateError, match=r"1.running_mean is not finite after 5 steps"):
        check_finite_state(model.state_dict().items(), 5)
    model[0](torch.tensor([[1.0, 2.0]])).sum().backward()
    check_finite_gradients(model, 5)
    model[0].weight.grad[0, 1] = float("inf")
    with pytest.raises(NonFiniteStateError, match="gradient norm is inf at step 5"):
        check_finite_gradients(model, 5)
