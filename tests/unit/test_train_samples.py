"""Training samples: exact epochs for any number of workers, the same samples again, bad ones counted in their place."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_sets import write_set
from torch import Tensor

from afa_core.config import DataConfig
from afa_core.data.loading import PREFETCH, load_batches
from afa_core.data.order import SampleOrder, micro_batches
from afa_core.data.sample import BadSample
from afa_core.data.shard_reader import ShardReader
from afa_core.data.shards import DatasetIndex, iterate_shard, shard_paths
from afa_core.data.train_samples import FindShard, TrainBatch, TrainSamples, WorkerBatches, collate
from afa_core.data.transforms import TrainItem, TrainTransform
from infra.errors import ServiceError

CONFIG = DataConfig(crop_px=32)
SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 40), st.integers(1, 9), st.integers(0, 3))
def test_every_epoch_has_every_sample_once(sizes: list[int], global_batch: int, block: int, seed: int) -> None:
    order = SampleOrder(sizes, seed=seed, global_batch=global_batch, block=block)
    everything = {(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)}
    for epoch in range(3):
        numbers = range(epoch * sum(sizes), (epoch + 1) * sum(sizes))
        assert Counter(map(order.place, numbers)) == Counter(everything)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.data())
def test_any_number_of_workers_shares_a_step_evenly(most: int, batch_size: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, most))
    step, global_batch = data.draw(st.integers(0, 50)), most * batch_size
    parts = [micro_batches(step, global_batch, batch_size, rank, world_size) for rank in range(world_size)]
    numbers = [number for worker in parts for part in worker for number in part]
    assert numbers == list(range(step * global_batch, (step + 1) * global_batch))
    assert len({len(worker) for worker in parts}) == 1  # layers that talk to other workers count on it
    sizes = [len(part) for worker in parts for part in worker]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    if world_size == most:
        assert sizes == [batch_size] * most


def test_resampled_epochs_repeat_and_leave_out() -> None:
    order = SampleOrder([3] * 20, seed=0, global_batch=4, block=4, sampling="resampled")
    places = Counter(map(order.place, range(60)))
    assert places.total() == 60
    assert max(places.values()) > 1
    assert len(places) < 60


def test_a_worker_reads_few_shards_at_a_time_and_a_batch_mixes_many() -> None:
    order = SampleOrder([100] * 64, seed=0, global_batch=16, block=100)
    plan = WorkerBatches(0, 16, 8, rank=0, world_size=2)
    steps = [[order.place(number)[0] for part in plan.numbers(step) for number in part] for step in range(400)]
    assert np.mean([len(set(shards)) for shards in steps]) > 7  # of 8 samples
    for start in range(0, 300, 50):
        window = set(itertools.chain(*steps[start : start + 50]))
        assert len(window) <= 3 * 8  # each place in the batch: the shard that it reads and the neighbours in its block


def samples(folder: Path, index: DatasetIndex, *, global_batch: int = 4, seed: int = 1) -> TrainSamples:
    paths = shard_paths(folder, index, "train")
    sizes = [shard.samples for shard in index.splits["train"].shards]
    order = SampleOrder(sizes, seed=seed, global_batch=global_batch, block=4)
    return TrainSamples(order, paths.__getitem__, TrainTransform(CONFIG, index.classes), index.classes, CONFIG, seed)


def crops_of(batch: TrainBatch) -> Tensor:
    return batch.crops(CONFIG.crop_px, torch.device("cpu"))


def test_loading_threads_and_a_late_start_change_nothing(tmp_path: Path) -> None:
    """The batches of steps 3 to 9 are the same from the beginning or not, with or without loading threads."""
    index = write_set(tmp_path, shards=3, samples=5)
    runs = []
    for first_step, threads in ((0, 0), (3, 0), (3, 3)):
        plan = WorkerBatches(first_step, 4, 2, rank=1, world_size=2)
        batches = load_batches(samples(tmp_path, index), plan, threads)
        runs.append(list(itertools.islice(batches, 3 - first_step, 10 - first_step)))
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert one.keys == other.keys
            assert torch.equal(crops_of(one), crops_of(other))
            assert torch.equal(one.cls_label, other.cls_label)
            assert torch.equal(one.box, other.box)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=5))
def test_epochs_stay_exact_through_kills_and_other_numbers_of_workers(lives: list[tuple[int, int, int]]) -> None:
    """Each life of a job has some workers, does some steps, and loses the last few of them."""
    order = SampleOrder([5, 4, 7, 1], seed=3, global_batch=4, block=3)
    done: dict[int, list[tuple[int, int]]] = {}
    step = 0
    for workers, steps, lost in [*lives, (2, 9, 0)]:
        plans = [WorkerBatches(step, 4, 1, rank, workers) for rank in range(workers)]
        for at in range(step, step + steps):
            done[at] = [order.place(number) for plan in plans for part in plan.numbers(at) for number in part]
        step = max(step, step + steps - lost)
    drawn = [place for at in range(step) for place in done[at]]
    for epoch in range(len(drawn) // 17):
        assert len(set(drawn[17 * epoch : 17 * (epoch + 1)])) == 17


def test_batches_that_are_kept_are_not_overwritten_by_later_ones(tmp_path: Path) -> None:
    """Nor do skipped samples leave anything of theirs in a batch."""
    index = write_set(tmp_path, shards=3, samples=5, bad=1)
    data = samples(tmp_path, index, global_batch=3)
    plan = [list(range(start, start + 3)) for start in range(0, 90, 3)]
    kept = list(load_batches(data, plan, 2))
    assert len(kept) == len(plan)
    for numbers, batch in zip(plan, kept, strict=True):
        expected = collate([data[number] for number in numbers])
        assert batch.keys == expected.keys
        assert batch.skipped == expected.skipped
        assert torch.equal(crops_of(batch), crops_of(expected)) or not expected.keys


def test_threads_load_a_few_batches_ahead_and_no_more_once_nobody_asks(tmp_path: Path) -> None:
    data, begun = samples(tmp_path, write_set(tmp_path)), itertools.count()
    batches = load_batches(data, ([number] for number in begun), 2)
    assert isinstance(batches, Generator)
    for number, batch in enumerate(itertools.islice(batches, 50)):
        assert batch.keys == data.batch([number]).keys
    assert next(begun) == 50 + 2 * PREFETCH
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load") and not ended(thread)]


def ended(thread: threading.Thread) -> bool:
    thread.join(10)
    return not thread.is_alive()


def test_what_goes_wrong_in_a_thread_is_raised_where_its_batch_was_due(tmp_path: Path) -> None:
    index = write_set(tmp_path)
    data = samples(tmp_path, index)
    broken = TrainSamples(data.order, missing_after_two(data.find_shard), data.transform, index.classes, CONFIG, 1)
    batches = load_batches(broken, ([number] for number in range(9)), 2)
    with pytest.raises(ServiceError, match="no answer"):
        list(batches)


def missing_after_two(find_shard: FindShard) -> FindShard:
    asked = itertools.count()

    def find(number: int) -> Path:
        if next(asked) >= 2:
            raise ServiceError("no answer")
        return find_shard(number)

    return find


def test_augmentation_differs_from_epoch_to_epoch(tmp_path: Path) -> None:
    index = write_set(tmp_path, shards=1, samples=1)
    data = samples(tmp_path, index, global_batch=1)
    items = [item for item in map(data.__getitem__, range(3)) if isinstance(item, TrainItem)]
    assert len({item.key for item in items}) == 1
    assert len({item.box for item in items}) > 1


def test_bad_samples_keep_their_place_and_say_why(tmp_path: Path) -> None:
    index = write_set(tmp_path, shards=2, samples=4, bad=1)
    batches = [collate([samples(tmp_path, index)[number] for number in range(start, start + 4)]) for start in (0, 4)]
    assert sum(len(batch.keys) for batch in batches) == 6
    skipped = [(skip.key, skip.reason) for batch in batches for skip in batch.skipped]
    assert sorted(skipped) == [("s0-0", "undecodable_image"), ("s1-0", "undecodable_image")]
    nothing = collate([samples(tmp_path, write_set(tmp_path, shards=1, samples=1, bad=1))[0]])
    assert nothing.keys == ()


def test_a_damaged_shard_costs_only_what_lies_behind_the_damage(tmp_path: Path) -> None:
    index = write_set(tmp_path, shards=1, samples=6)
    path = tmp_path / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:5000])
    data = samples(tmp_path, index)
    good = [item for item in map(data.__getitem__, range(6)) if isinstance(item, TrainItem)]
    assert 0 < len(good) < 6
    path.unlink()
    assert collate([samples(tmp_path, index)[0]]).skipped[0].reason == "bad_shard"


def test_random_access_reads_what_reading_in_order_does(tmp_path: Path) -> None:
    write_set(tmp_path, shards=1, samples=5)
    path = tmp_path / "train-000000.tar"
    reader = ShardReader(path)
    in_order = [{key: value for key, value in raw.items() if key != "__url__"} for raw in iterate_shard(path)]
    for number in (4, 0, 2, 1, 3):
        raw = reader.read(number)
        raw.pop("__url__", None)
        assert raw == in_order[number]
    numbers = list(range(5)) * 400
    with ThreadPoolExecutor(8) as pool:  # threads share the open file
        for number, raw in zip(numbers, pool.map(reader.read, numbers), strict=True):
            assert raw["__key__"] == in_order[number]["__key__"]
            assert raw["json"] == in_order[number]["json"]
    with pytest.raises(BadSample, match="no sample 5"):
        reader.read(5)


def test_crops_come_with_the_box_of_the_picture(tmp_path: Path) -> None:
    index = write_set(tmp_path)
    data = samples(tmp_path, index)
    for number in range(40):
        batch = data.batch([number])
        [image], [[y0, y1, x0, x1]] = crops_of(batch), batch.box.tolist()
        assert image.shape == (32, 32, 3)
        assert 0 <= y0 < y1 <= 32
        assert 0 <= x0 < x1 <= 32
        outside = torch.ones(32, 32, dtype=torch.bool)
        outside[y0:y1, x0:x1] = False
        if outside.any():
            assert (image[outside] == torch.tensor([124, 116, 104])).all()  # padding is the mean colour
        assert batch.cls_label.tolist() == [[0.0, 1.0]]
