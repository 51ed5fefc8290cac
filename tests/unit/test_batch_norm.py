"""Batch normalisation over workers equals plain batch normalisation over their batches together."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from afa_core.batch_norm import WorkerBatchNorm2d, synchronise_batch_norm


def inputs() -> torch.Tensor:
    return torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1


def run(norm: nn.Module, part: torch.Tensor) -> torch.Tensor:
    part = part.clone().requires_grad_()
    weights = torch.arange(part[0].numel(), dtype=torch.float32).reshape(part.shape[1:]).sin()
    (norm(part) * weights).square().sum().backward()
    assert part.grad is not None
    return part.grad


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    norm = WorkerBatchNorm2d(3)
    gradient = run(norm, inputs()[:2] if rank == 0 else inputs()[2:])  # uneven on purpose
    coarse = run(WorkerBatchNorm2d(3), (inputs()[:2] if rank == 0 else inputs()[2:]).bfloat16())
    torch.save((gradient, norm.state_dict(), norm.weight.grad, norm.bias.grad, coarse), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_are_one_batch() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=2)
        first, second = (torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2))
    plain = nn.BatchNorm2d(3)
    gradient = run(plain, inputs())
    torch.testing.assert_close(torch.cat([first[0], second[0]]), gradient, rtol=1e-4, atol=1e-5)
    for state in (first[1], second[1]):
        torch.testing.assert_close(state, dict(plain.state_dict()), rtol=1e-5, atol=1e-6)
    assert plain.weight.grad is not None
    assert plain.bias.grad is not None
    torch.testing.assert_close(first[2] + second[2], plain.weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(first[3] + second[3], plain.bias.grad, rtol=1e-4, atol=1e-3)
    coarse = torch.cat([first[4], second[4]])
    assert coarse.dtype == torch.bfloat16
    assert (coarse.float() - gradient).norm() < 0.05 * gradient.norm()


def test_alone_it_is_plain_and_names_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3)))
    before = dict(model.state_dict())
    expected = model(inputs())
    model[1][0].reset_running_stats()
    synchronise_batch_norm(model, torch.device("cpu"))
    assert type(model[1][0]) is WorkerBatchNorm2d
    assert list(model.state_dict()) == list(before)
    assert torch.equal(model(inputs()), expected)


def test_it_lies_where_the_network_does() -> None:
    """An optimiser's state is loaded to where its parameters are, before the network is wrapped."""
    device = torch.device("meta")
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).to(device)
    synchronise_batch_norm(model, device)
    assert {tensor.device for tensor in model.state_dict().values()} == {device}
