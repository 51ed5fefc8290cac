"""What the workers of a training job are to each other: their number, and how they agree."""

from __future__ import annotations

from typing import Any, NamedTuple

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor


class StepFacts(NamedTuple):
    """What every worker tells all others before a step.

    Attributes:
        samples: usable ones of its share.
        bad: those that could not be used.
        waited_s: for its share.
        memory_gib: most that it has held so far.
        fenced: the run belongs to another group.
    """

    samples: float
    bad: float
    waited_s: float
    memory_gib: float
    fenced: float


class WorkerGroup:
    """This process among the workers.

    Attributes:
        rank: of this worker.
        size: number of workers.
        device: of this worker.
    """

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()

    def meet(self, facts: StepFacts) -> StepFacts:
        """The facts of all workers: samples added up, of the rest the largest. All get the same answer."""
        if self.size == 1:
            return facts
        row = torch.tensor(facts, dtype=torch.float64).to(self.device, non_blocking=True)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row)
        samples, bad, *largest = zip(*torch.stack(rows).tolist(), strict=True)  # where a GPU is waited for
        return StepFacts(sum(samples), sum(bad), *map(max, largest))

    def sum(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms summed over workers, on the CPU: all see a non-finite one and stop together.

        A GPU is waited for once, and not for each of them.
        """
        values = torch.stack(list(terms.values()))
        if self.size > 1:
            dist.all_reduce(values)
        return dict(zip(terms, values.cpu(), strict=True))

    def gather(self, value: Any) -> list[Any]:
        """The values of all workers, by rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered
