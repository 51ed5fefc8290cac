"""An actor of the labelling pool, as its driver knows it: torch and the model are there once it is made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from afa_core.errors import InputError
from infra.errors import ServiceError
from pipelines.label_job import GOES_ON, LabelJob, UnitResult
from pipelines.sent_files import SentFiles, received
from pipelines.unit_table import Unit

if TYPE_CHECKING:
    from pipelines.labeller import Labeller


class LabelWorker:
    """Takes units of work from Ray Data.

    What another attempt cannot mend is told, not raised: from here it would come with pages of Ray's own lines.
    """

    def __init__(self, job: LabelJob, bundle: SentFiles) -> None:
        from afa_core.checkpoint import load_bundle  # which, with torch, the driver of a job never needs
        from pipelines.labeller import Labeller

        self._labeller: Labeller | None = None
        self._refused = ""
        with received(bundle) as folder:
            try:
                self._labeller = Labeller(job, load_bundle(folder))
            except InputError as error:
                self._refused = str(error).replace(str(folder), job.bundle_dir)

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
