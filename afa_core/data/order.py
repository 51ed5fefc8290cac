"""Which sample comes when: one endless sequence, a function of the seed alone.

Step s of a job trains on the G samples from number s G on, whoever computes them. In every epoch, N samples, each
sample comes exactly once. So a checkpoint's step says all about the position in the data, and a job that goes on with
another number of workers goes on with the same samples.

So that a worker reads few shards at a time, an epoch's permuted shards, end to end, are cut into G stretches of equal
length, one for every place in the batch. A stretch is read forward, shuffled in blocks. Neighbours in a batch are far
apart in the data; what a place holds in consecutive steps is near.

Source: the idea of a canonical order that does not depend on the workers is MosaicML Streaming's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Sampling = Literal["exact", "resampled"]
Integers = NDArray[np.int64]


class SampleOrder:
    """Places of the samples in the endless sequence."""

    def __init__(
        self, sizes: Sequence[int], *, seed: int, global_batch: int, block: int, sampling: Sampling = "exact"
    ) -> None:
        """See the class.

        Args:
            sizes: samples of each shard; at least one sample in all.
            seed: of the job.
            global_batch: samples a step, of all workers together.
            block: samples that are shuffled among each other; 1 keeps the order of the shards.
            sampling: ``exact``: every sample once an epoch; ``resampled``: shards drawn with replacement.
        """
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.epoch_samples = int(self.sizes.sum())
        self.seed, self.block, self.sampling = seed, block, sampling
        self.stretches = min(global_batch, self.epoch_samples)
        # Places of this worker's stretches, for the present epoch and the next.
        self._stretch = lru_cache(maxsize=2 * self.stretches)(self._shuffled_stretch)
        self._shards = lru_cache(maxsize=2)(self._permuted_shards)

    def place(self, number: int) -> tuple[int, int]:
        """(shard, sample in it) of a number in the sequence."""
        epoch, offset = divmod(number, self.epoch_samples)
        within, stretch = divmod(offset, self.stretches)
        shard, sample = self._stretch(epoch, stretch)[within]
        return int(shard), int(sample)

    def _shuffled_stretch(self, epoch: int, stretch: int) -> Integers:
        """Places [n, 2] of one stretch, in the order in which they are read."""
        start, stop = (self._bound(number) for number in (stretch, stretch + 1))
        rng = np.random.default_rng([self.seed, epoch, stretch])
        blocks = (np.arange(stop - start) + rng.integers(self.block)) // self.block
        numbers = start + np.lexsort((rng.random(stop - start), blocks))
        shards, ends = self._shards(epoch)
        at = np.searchsorted(ends, numbers, side="right")
        return np.stack([shards[at], numbers - (ends[at] - self.sizes[shards[at]])], axis=1)

    def _bound(self, stretch: int) -> int:
        """Where a stretch begins: number k holds the epoch's offsets k, k + G, k + 2 G ..."""
        whole, longer = divmod(self.epoch_samples, self.stretches)
        return stretch * whole + min(stretch, longer)

    def _permuted_shards(self, epoch: int) -> tuple[Integers, Integers]:
        """Shards in the epoch's order, and for each the number of samples up to its end."""
        rng = np.random.default_rng([self.seed, epoch])
        if self.sampling == "exact":
            shards = rng.permutation(len(self.sizes))
        else:
            shards = rng.integers(len(self.sizes), size=len(self.sizes))
            while self.sizes[shards].sum() < self.epoch_samples:
                shards = np.concatenate([shards, rng.integers(len(self.sizes), size=len(self.sizes))])
        return shards, np.cumsum(self.sizes[shards])


def micro_batches(step: int, global_batch: int, batch_size: int, rank: int, world_size: int) -> list[range]:
    """Numbers in the sequence that one worker trains on in a step, in parts of at most ``batch_size``.

    Every worker has the same number of parts, as layers that talk to other workers want it. With the greatest number
    of workers there is one; with fewer, gradients are accumulated over several. Parts differ by one sample at most,
    and one may be empty.
    """
    start, stop = rank * global_batch // world_size, (rank + 1) * global_batch // world_size
    parts = -(-global_batch // (world_size * batch_size))
    cuts = [step * global_batch + start + part * (stop - start) // parts for part in range(parts + 1)]
    return [range(*pair) for pair in pairwise(cuts)]
