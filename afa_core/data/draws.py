"""The few random numbers of one sample, which follow from (seed, number).

They are words of a hash: to seed Python's own generator takes fifteen times as long, a fifth of what a sample costs
beside its decoding (docs/performance.md).
"""

from __future__ import annotations

from hashlib import blake2b
from random import Random
from struct import Struct

_WORDS = Struct("<8Q")


class Draws:
    """At most eight draws.

    Args:
        seed: of the run.
        number: of the sample.
    """

    def __init__(self, seed: int, number: int) -> None:
        self._words = iter(_WORDS.unpack(blake2b(b"%d %d" % (seed, number)).digest()))

    def random(self) -> float:
        """From [0, 1)."""
        return (next(self._words) >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """From low to high."""
        return low + (high - low) * self.random()

    def below(self, bound: int) -> int:
        """From 0 .. bound - 1; a bound is far below 2^64, so that none of them is favoured."""
        return next(self._words) % bound

    def generator(self) -> Random:
        """Of as many draws as are wanted."""
        return Random(next(self._words))
