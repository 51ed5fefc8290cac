"""What feeds one training worker: its parts of every step, read, augmented and collated ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator

from afa_core.data.loading import load_batches
from afa_core.data.order import SampleOrder
from afa_core.data.shards import DatasetIndex
from afa_core.data.train_samples import TrainBatch, TrainSamples, WorkerBatches
from afa_core.data.transforms import TrainTransform
from pipelines.config import ExperimentConfig
from pipelines.shard_store import Prefetch, split_files

# Steps that the shards of a store are asked for in advance.
PREFETCH_STEPS = 256


def step_batches(
    dataset: str,
    index: DatasetIndex,
    experiment: ExperimentConfig,
    *,
    first_step: int,
    rank: int,
    world_size: int,
    pinned: bool,
) -> Iterator[list[TrainBatch]]:
    """The parts of every step from the first on, without end; pinned: in memory that a GPU copies from."""
    data, train = experiment.data, experiment.train
    files = split_files(dataset, index, "train", data.cache_gib)
    order = SampleOrder(
        [shard.samples for shard in files.shards],
        seed=train.seed,
        global_batch=train.global_batch,
        block=data.shuffle_block,
        sampling=data.sampling,
    )
    samples = TrainSamples(order, files, TrainTransform(data, index.classes), index.classes, data, train.seed)
    plan = WorkerBatches(first_step, train.global_batch, train.batch_size, rank, world_size)
    batches = load_batches(samples, plan, data.loader_workers, pinned=pinned)
    wanted = _wanted_shards(order, plan)
    with Prefetch(files) as prefetch:
        for shards in wanted:
            prefetch.want(shards)
            yield [next(batches) for _ in range(plan.parts)]


def _wanted_shards(order: SampleOrder, plan: WorkerBatches) -> Iterator[Iterator[int]]:
    """What each step should ask for: the first all that lies just ahead, every further one step more."""

    def shards(steps: range) -> Iterator[int]:
        return (order.place(number)[0] for step in steps for part in plan.numbers(step) for number in part)

    ahead = plan.first_step + PREFETCH_STEPS
    yield shards(range(plan.first_step, ahead))
    while True:
        yield shards(range(ahead, ahead + 1))
        ahead += 1
