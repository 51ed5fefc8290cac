"""An actor of the labelling pool, as its driver knows it: torch and the model are there once it is made.

The model reaches it as the bytes of its bundle, which Ray brings to a machine once: only the driver's has the folder.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray

from afa_core.bundle import CONFIG, WEIGHTS
from afa_core.errors import InputError
from infra.errors import ServiceError
from pipelines.label_job import GOES_ON, LabelJob, UnitResult
from pipelines.unit_table import Unit

if TYPE_CHECKING:
    from pipelines.labeller import Labeller

# As arrays, of which Ray copies nothing for the processes of one machine.
BundleFiles = dict[str, NDArray[np.uint8]]


def bundle_files(folder: str) -> BundleFiles:
    """The bytes of a bundle."""
    return {name: np.fromfile(Path(folder) / name, np.uint8) for name in (CONFIG, WEIGHTS)}


class LabelWorker:
    """Takes units of work from Ray Data.

    What another attempt cannot mend is told, not raised: from here it would come with pages of Ray's own lines.
    """

    def __init__(self, job: LabelJob, model: ray.ObjectRef[BundleFiles]) -> None:
        from afa_core.checkpoint import load_bundle  # which, with torch, the driver of a job never needs
        from pipelines.labeller import Labeller

        self._labeller: Labeller | None = None
        self._refused = ""
        with tempfile.TemporaryDirectory(prefix="afa-model-") as scratch:
            for name, data in ray.get(model).items():
                (Path(scratch) / name).write_bytes(data.data)
            try:
                self._labeller = Labeller(job, load_bundle(scratch))
            except InputError as error:
                self._refused = str(error).replace(scratch, job.bundle_dir)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Label the units of the batch; gives back what became of each, as JSON."""
        return {"result": np.array([self._labelled(Unit(**json.loads(text))).to_json() for text in batch["unit"]])}

    def _labelled(self, unit: Unit) -> UnitResult:
        if self._labeller is None:
            return UnitResult(refused=self._refused)
        try:
            return self._labeller.label_unit(unit)
        except ServiceError as error:
            return UnitResult(error=f"{error}; {GOES_ON}")
