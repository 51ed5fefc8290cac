"""Batches loaded in threads, a few ahead of their use.

Threads, not processes: reading and decoding give Python's lock back, what is left under it is a tenth of a sample's
time, and nothing has to be sent from process to process (docs/decisions/picture-decoding.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import torch

from afa_core.data.train_samples import TrainBatch, TrainSamples

# Batches that are begun before the oldest of them is asked for, for every thread.
PREFETCH = 2


def load_batches(
    samples: TrainSamples, plan: Iterable[list[int]], threads: int, *, pinned: bool = False
) -> Iterator[TrainBatch]:
    """The batches of a plan, in order.

    Args:
        samples: by number.
        plan: the numbers of each batch; may be without end.
        threads: that load; 0 loads where the batches are asked for.
        pinned: hand out memory that a GPU can copy from by itself.
    """

    def load(numbers: list[int]) -> TrainBatch:
        batch = samples.batch(numbers)
        return batch.pin_memory() if pinned else batch

    return _in_threads(load, plan, threads, pinned) if threads else map(load, plan)


def _in_threads(
    load: Callable[[list[int]], TrainBatch], plan: Iterable[list[int]], threads: int, pinned: bool
) -> Iterator[TrainBatch]:
    numbers = iter(plan)
    # Memory is pinned for the GPU of the thread that pins it.
    choose_gpu = partial(torch.cuda.set_device, torch.cuda.current_device()) if pinned else None
    pool = ThreadPoolExecutor(threads, thread_name_prefix="load", initializer=choose_gpu)
    try:
        begun = deque(pool.submit(load, part) for part in islice(numbers, threads * PREFETCH))
        while begun:
            batch = begun.popleft().result()
            begun.extend(pool.submit(load, part) for part in islice(numbers, 1))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
