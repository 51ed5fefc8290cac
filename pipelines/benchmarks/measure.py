"""How benchmarks measure: repetitions in a process of their own, so that the peak of memory is theirs alone.

Compared cases run in turns within one call: the speed of a machine drifts, ratios within a run hold.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch

from pipelines.errors import UsageError
from pipelines.progress import peak_memory_gib


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured case.

    Attributes:
        name: of the case, unique within a benchmark.
        seconds: of every counted repetition.
        images: pictures a repetition works on; 0 where there are none.
        peak_mib: most resident memory of the process (of the GPU where it works on one); None if not measured.
        moved_bytes: least memory traffic of a repetition, 0 if not modelled.
        operations: floating-point operations of a repetition, 0 if not modelled.
        facts: whatever else is worth knowing.
    """

    name: str
    seconds: tuple[float, ...]
    images: int = 0
    peak_mib: float | None = None
    moved_bytes: float = 0.0
    operations: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median_s(self) -> float:
        """Median of the repetitions."""
        return statistics.median(self.seconds)

    @property
    def images_per_s(self) -> float | None:
        """Pictures a second at the median."""
        return self.images / self.median_s if self.images else None


def repeat(function: Callable[[], Any], repetitions: int, warm_up: int = 1) -> tuple[float, ...]:
    """Seconds of each counted call; on a GPU until it has finished."""
    seconds = []
    for number in range(warm_up + repetitions):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= warm_up:
            seconds.append(time.perf_counter() - began)
    return tuple(seconds)


def peak_mib() -> float:
    """Most memory this process has held so far: on the GPU if there is one, else resident."""
    return peak_memory_gib(torch.device("cuda" if torch.cuda.is_available() else "cpu")) * 2**10


@dataclass(frozen=True)
class Case:
    """A case to be measured in turns with others.

    Attributes:
        name: of the case.
        function: importable; called with ``arguments`` it gives a ``Measurement`` of repetitions in its own process.
        arguments: picklable.
    """

    name: str
    function: Callable[..., Measurement]
    arguments: tuple[Any, ...]


def in_turns(cases: Sequence[Case], rounds: int) -> list[Measurement]:
    """Measure the cases A, B, C, A, B, C ...; repetitions of a case are put together, its peak is the highest."""
    made: dict[str, list[Measurement]] = {case.name: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            made[case.name].append(in_own_process(case.function, *case.arguments))
    return [
        dataclasses.replace(
            parts[-1],
            name=name,
            seconds=tuple(second for part in parts for second in part.seconds),
            peak_mib=max((part.peak_mib for part in parts if part.peak_mib is not None), default=None),
        )
        for name, parts in made.items()
    ]


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function(*arguments)`` gives in a fresh process; both must be importable or picklable.

    Raises:
        UsageError: the machine has not the memory for it.
    """
    try:
        # Not a multiprocessing.Pool, whose processes may not start any themselves.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise UsageError("the measured process was killed, perhaps for want of memory: ask for less") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UsageError("there is not the memory for this: ask for less") from error
        raise
