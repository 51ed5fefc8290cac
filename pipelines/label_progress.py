"""How far labelling is: a bar on the terminal, and the same numbers as Ray metrics of the driver.

    afa_label_images_expected     pictures in all that this command will have done
    afa_label_images_done         pictures labelled or quarantined so far
    afa_label_images_quarantined  those of them that were quarantined
    afa_label_images_per_s        lately

A shard is one input of which nobody knows yet how many pictures it holds: those of the shards that are done say how
many to expect of the others. For a store of pictures the expected number is exact from the start.
"""

from __future__ import annotations

import sys
from typing import Self

from ray.util.metrics import Gauge
from tqdm import tqdm

from pipelines.label_job import UnitResult


class LabelProgress:
    """Shown while the ``with`` block runs."""

    def __init__(self, inputs: int) -> None:
        """See the class.

        Args:
            inputs: of the inventory, that are to be done.
        """
        self.inputs = inputs
        self._inputs_done = self._images = self._quarantined = 0
        interval_s = 0.5 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(total=inputs, unit="image", mininterval=interval_s)
        self._expected = Gauge("afa_label_images_expected", "Pictures that the labelling command will have done.")
        self._done = Gauge("afa_label_images_done", "Pictures labelled or quarantined so far.")
        self._bad = Gauge("afa_label_images_quarantined", "Pictures quarantined so far.")
        self._rate = Gauge("afa_label_images_per_s", "Pictures a second, lately.")

    def __enter__(self) -> Self:
        self._publish()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, result: UnitResult) -> None:
        """One more unit is committed."""
        self._inputs_done += result.inputs
        self._quarantined += result.counts.quarantined
        self._images += result.counts.images
        self._bar.total = expected_images(self.inputs, self._inputs_done, self._images)
        self._bar.set_postfix(quarantined=self._quarantined, refresh=False)
        self._bar.update(result.counts.images)
        self._publish()

    def _publish(self) -> None:
        self._expected.set(self._bar.total)
        self._done.set(self._images)
        self._bad.set(self._quarantined)
        self._rate.set(self._bar.format_dict["rate"] or 0.0)


def expected_images(inputs: int, inputs_done: int, images_done: int) -> int:
    """Pictures in all, if the inputs that are left hold as many as those that are done."""
    if not inputs_done:
        return inputs
    return images_done + round((inputs - inputs_done) * images_done / inputs_done)
