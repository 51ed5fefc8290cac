"""Stochastic depth: whole residual branches left out at random.

Source: Huang et al., *Deep Networks with Stochastic Depth*, ECCV 2016, section 3. The same draws and numbers as timm's
``DropPath``; not taken from there, as timm and torchvision behind it cost every worker 120 MiB and seconds of start-up.
"""

from __future__ import annotations

from torch import Tensor, nn


class StochasticDepth(nn.Module):
    """In training leaves out a branch of a picture with probability ``rate``; those that stay are scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.keep = 1.0 - rate

    def forward(self, branch: Tensor) -> Tensor:
        """[B, ...] -> the same, or 0 for some of the B."""
        if self.keep == 1.0 or not self.training:
            return branch
        kept = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(self.keep)
        return branch * kept.div_(self.keep) if self.keep else branch * kept
