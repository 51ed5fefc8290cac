"""How well the training samples are shuffled: ``data.shuffle_block`` beside a true uniform shuffle.

    python tests/benchmarks/feed_order.py [--shards 128] [--samples 1000] [--global-batch 16]

The worst data there are: sorted by class, so that a shard holds one class or two. For every block size it prints

- ``rank correlation`` (Spearman) of a sample's place in the data and its place in the epoch: 0 if shuffled;
- ``shards a batch``: how many different shards a batch comes from;
- ``class distance``: total variation between the classes of all data and those of a batch, and of ten in a row;
- ``same neighbours``: of the pairs of shards that meet in a batch, the share that met in the batch before.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from afa_core.data.order import SampleOrder

CLASSES = 20
Integers = NDArray[np.int64]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=128)
    parser.add_argument("--samples", type=int, default=1000, help="of a shard")
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 64, 512, 4096])
    arguments = parser.parse_args()
    total = arguments.shards * arguments.samples
    print(f"{total} samples in {arguments.shards} shards, batches of {arguments.global_batch}")
    print("shuffle_block rank correlation shards a batch class distance in ten same neighbours")
    for block in arguments.blocks:
        print_row(str(block), epoch_of(arguments, block), arguments)
    print_row("uniform", np.random.default_rng(0).permutation(total), arguments)


def epoch_of(arguments: argparse.Namespace, block: int) -> Integers:
    """Numbers of the samples, as they lie in the data, in the order of the first epoch."""
    order = SampleOrder(
        [arguments.samples] * arguments.shards, seed=0, global_batch=arguments.global_batch, block=block
    )
    places = np.array([order.place(number) for number in range(order.epoch_samples)])
    return places[:, 0] * arguments.samples + places[:, 1]


def print_row(name: str, epoch: Integers, arguments: argparse.Namespace) -> None:
    """One line of the table."""
    whole = epoch[: len(epoch) // arguments.global_batch * arguments.global_batch]
    batches = whole.reshape(-1, arguments.global_batch)
    shards, classes = batches // arguments.samples, batches * CLASSES // len(epoch)
    correlation = np.corrcoef(epoch, np.arange(len(epoch)))[0, 1]
    distinct = np.mean([len(np.unique(row)) for row in shards])
    ten = classes[: len(classes) // 10 * 10].reshape(-1, 10 * arguments.global_batch)
    print(
        f"{name:>13} {correlation:>16.3f} {distinct:>14.2f} {distance(classes):>14.3f} {distance(ten):>6.3f}"
        f" {same_neighbours(shards):>15.3f}"
    )


def distance(classes: Integers) -> float:
    """Mean total variation between the classes of each row and the uniform ones of the data."""
    shares = np.stack([np.bincount(row, minlength=CLASSES) / len(row) for row in classes])
    return float(np.abs(shares - 1 / CLASSES).sum(1).mean() / 2)


def same_neighbours(shards: Integers) -> float:
    """Share of a batch's pairs of shards that the batch before had too."""
    pairs = [pairs_of(row) for row in shards]
    return float(np.mean([len(now & before) / max(1, len(now)) for before, now in pairwise(pairs)]))


def pairs_of(shards: Integers) -> set[tuple[int, int]]:
    """Unordered pairs of different shards in a batch."""
    values = sorted(set(shards.tolist()))
    return {(first, second) for at, first in enumerate(values) for second in values[at + 1 :]}


if __name__ == "__main__":
    main()
