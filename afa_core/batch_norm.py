"""Batch normalisation whose statistics are those of all workers together, on any device.

As published, AFA's decoder normalises over the whole batch. torch's ``SyncBatchNorm`` exists on accelerators alone;
this does the same with two all-reduces of [C] vectors and autograd, so that a run on processors has the same
meaning.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverWorkers(torch.autograd.Function):
    """Sum over the process group; its gradient is the sum of the workers' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class WorkerBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the batches [B, C, H, W] of all workers while it trains."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, H, W]; under autocast, whose formats are too coarse for sums, in 32 bit."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        values = input.float()
        pixels = values.new_full((1,), input.numel() // input.shape[1])
        sums = _SumOverWorkers.apply(torch.cat([values.sum((0, 2, 3)), pixels]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = values - mean[:, None, None]
        variance = _SumOverWorkers.apply(centred.square().sum((0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        """Move the running statistics, as ``nn.BatchNorm2d`` does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased_variance, momentum)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Make every ``BatchNorm2d`` of a network normalise over all workers; weights and their names stay."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, _synchronised(child, device))


def _synchronised(norm: nn.BatchNorm2d, device: torch.device) -> nn.Module:
    kind = nn.SyncBatchNorm if device.type == "cuda" else WorkerBatchNorm2d
    synchronised = kind(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device=device
    )
    synchronised.load_state_dict(norm.state_dict())
    return synchronised
