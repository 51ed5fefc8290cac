"""The random numbers of a sample: they follow from (seed, number), and are spread evenly."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from afa_core.data.draws import Draws

SEEDS = st.integers(-(2**40), 2**40)


@given(SEEDS, SEEDS, st.integers(1, 10_000))
def test_draws_are_the_same_again_and_within_their_bounds(seed: int, number: int, bound: int) -> None:
    def draw() -> tuple[float, float, int, float]:
        draws = Draws(seed, number)
        return draws.random(), draws.uniform(-1, 3), draws.below(bound), draws.generator().random()

    unit, uniform, below, more = draw()
    assert (unit, uniform, below, more) == draw()
    assert (0 <= unit < 1, -1 <= uniform <= 3, 0 <= below < bound) == (True, True, True)
    assert unit != Draws(seed + 1, number).random()
    assert unit != Draws(seed, number + 1).random()


def test_draws_of_neighbouring_samples_are_spread_evenly_and_know_nothing_of_each_other() -> None:
    rows = [[draws.random() for _ in range(8)] for draws in (Draws(0, number) for number in range(20_000))]
    values = np.array(rows)
    counts = np.stack([np.histogram(column, bins=20, range=(0, 1))[0] for column in values.T])
    chi_squared = ((counts - 1000) ** 2 / 1000).sum(1)  # 19 degrees of freedom: 43.8 is passed once in a thousand
    assert chi_squared.max() < 43.8
    neighbours = np.concatenate([values[:-1], values[1:]], axis=1)
    correlation = np.corrcoef(neighbours, rowvar=False) - np.eye(16)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(neighbours))
