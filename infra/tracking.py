"""MLflow runs: opened by the driver, written to by whoever holds the run's id.

Everything goes through ``MlflowClient``: no active run, no global state. Opening a run fails loudly; once a job runs,
a tracking server that goes away must not take the job with it, so logging swallows MLflow's errors, counts them and
warns once of each kind.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from infra.errors import ServiceError

# At a run's end MLflow prints its address, with the user name and password that the tracking URI may hold.
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"

# mlflow reports unreachable servers as MlflowException, databases and disks through their own errors.
TrackingFailure = (MlflowException, OSError)
MAX_PARAM_CHARACTERS = 6000
BATCH = 90
METRICS_BATCH = 900  # MLflow takes at most 1000 at once
# The end of a run is told to a server that is away again for so long.
CLOSING_S = 60.0
RETRY_S = 5.0

_log = logging.getLogger(__name__)


def tracking_uri(configured: str | None) -> str:
    """URI of the tracking server or database: as configured, else MLFLOW_TRACKING_URI, else ``runs/mlflow.db``.

    Raises:
        ServiceError: it is a folder, which MLflow no longer supports.
    """
    quiet()
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        uri = f"sqlite:///{Path('runs').absolute() / 'mlflow.db'}"
    if urlsplit(uri).scheme in ("", "file"):
        raise ServiceError(f"MLflow keeps no runs in a folder ({uri}): use sqlite:///FILE.db or an http(s) server")
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return uri


def answer_soon() -> None:
    """Do not wait minutes for a server that is away, as mlflow would at every request; the environment goes first."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


def safe_uri(uri: str) -> str:
    """The URI without user name and password, fit for a log."""
    return re.sub(r"//[^/\s]*@", "//", uri)


def quiet() -> None:
    """Keep MLflow's and Alembic's migration notes off the user's terminal."""
    for name in ("alembic", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)


class RunLogger:
    """Writes to one MLflow run. Holds only names, so it can be handed to another process."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self.failures: dict[str, int] = {}

    @classmethod
    def attach(cls, uri: str, run_id: str) -> RunLogger:
        """Logger of a run that is open already."""
        quiet()
        return cls(uri, run_id)

    def log_points(self, points: Sequence[Metric]) -> bool:
        """Record numbers, at most ``METRICS_BATCH``; whether they were taken."""
        return self._try("log_batch", self.run_id, metrics=points)

    def last_step(self, metric: str) -> int | None:
        """The last step at which a metric was recorded, -1 if it never was; None if nobody can tell."""
        try:
            return max(
                (point.step for point in MlflowClient(self.uri).get_metric_history(self.run_id, metric)), default=-1
            )
        except TrackingFailure as error:
            self._note("get_metric_history", error)
            return None

    def log_file(self, data: bytes, artifact_path: str) -> bool:
        """Store a file under ``artifact_path`` of the run; whether it was taken."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(artifact_path).name
            path.write_bytes(data)
            return self._try("log_artifact", self.run_id, str(path), str(Path(artifact_path).parent))

    def set_tags(self, tags: Mapping[str, str]) -> bool:
        """Set run tags; whether they were taken."""
        return self._try("log_batch", self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def reopen(self) -> None:
        """Mark a run that goes on as running."""
        self._try("update_run", self.run_id, "RUNNING")

    def finish(
        self, status: str, tags: Mapping[str, str], *, step: int = 0, metrics: Mapping[str, float] | None = None,
        patience_s: float = CLOSING_S,
    ) -> bool:  # fmt: skip
        """Close the run as ``FINISHED``, ``FAILED`` or ``KILLED`` with its last words.

        Returns:
            Whether the server took it, which is asked again for ``patience_s``.
        """
        now = int(time.time() * 1000)  # a point that is sent again is the same point
        points = [Metric(key, float(value), now, step) for key, value in (metrics or {}).items()]
        deadline = time.monotonic() + patience_s
        while not (
            (not points or self.log_points(points))
            and self.set_tags(tags)
            and self._try("set_terminated", self.run_id, status)
        ):
            if time.monotonic() > deadline:
                return False
            time.sleep(min(RETRY_S, patience_s))
        return True

    def _try(self, method: str, *arguments: Any, **keywords: Any) -> bool:
        try:
            getattr(MlflowClient(self.uri), method)(*arguments, **keywords)
        except TrackingFailure as error:
            self._note(method, error)
            return False
        return True

    def _note(self, method: str, error: Exception) -> None:
        kind = type(error).__name__
        self.failures[kind] = self.failures.get(kind, 0) + 1
        if self.failures[kind] == 1:
            _log.warning("MLflow %s failed (%s), the job goes on: %s", method, kind, safe_uri(str(error))[:300])


def open_run(uri: str, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> RunLogger:
    """Create a run with its parameters and tags.

    Args:
        uri: of the tracking server.
        experiment: made if it does not exist; its artifacts lie beside a SQLite database.
        name: of the run.
        params: nested values become dotted keys.
        tags: of the run.

    Raises:
        ServiceError: the tracking server does not take it.
    """
    try:
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else client.create_experiment(experiment, _artifacts(uri))
        run = client.create_run(experiment_id, run_name=name, tags=dict(tags))
        flat = [Param(key, str(value)[:MAX_PARAM_CHARACTERS]) for key, value in _flat(params).items()]
        for start in range(0, len(flat), BATCH):
            client.log_batch(run.info.run_id, params=flat[start : start + BATCH])
    except TrackingFailure as error:
        raise ServiceError(f"MLflow at {safe_uri(uri)} cannot open a run: {safe_uri(str(error))}") from error
    return RunLogger(uri, run.info.run_id)


def find_run(uri: str, run_id: str) -> Run:
    """The run of an id.

    Raises:
        ServiceError: there is none, or the server does not answer.
    """
    try:
        return MlflowClient(uri).get_run(run_id)
    except TrackingFailure as error:
        raise ServiceError(f"no run {run_id!r} in MLflow at {safe_uri(uri)}") from error


def _artifacts(uri: str) -> str | None:
    """Beside a SQLite database; a server knows its own place."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").absolute().as_uri()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
