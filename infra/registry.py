"""The MLflow model registry: versions, aliases, look-up.

A version is a pyfunc model made of a data folder and the name of an importable loader module: nothing in it is pickled
and no code of it is executed. MLflow's stages are gone; aliases take their place. An alias is resolved once, to a
version that means the same tomorrow.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature

from infra.errors import ServiceError
from infra.tracking import TrackingFailure, quiet, safe_uri

# Nothing that this project loads needs pickle, so nothing may use it.
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

SCHEME = "models:/"
DATA = "data"  # where MLflow puts the data folder of a pyfunc model


@dataclass(frozen=True)
class RegisteredVersion:
    """A version as it stands in the registry."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    tags: Mapping[str, str]
    created_ms: int

    @property
    def uri(self) -> str:
        """The URI that will always mean this version."""
        return f"{SCHEME}{self.name}/{self.version}"


def register(
    uri: str,
    run_id: str,
    name: str,
    data: Path,
    *,
    loader_module: str,
    signature: ModelSignature,
    requirements: Sequence[str],
    tags: Mapping[str, str],
) -> RegisteredVersion:
    """Log a data folder as a pyfunc model to a run and make it a new version of ``name``.

    Raises:
        ServiceError: MLflow does not take it.
    """
    quiet()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        # Model logging exists in the fluent interface only, hence the active run for its length.
        with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
            # The signature is given, so there is nothing to infer from an example.
            warnings.filterwarnings("ignore", message=".*input example.*")
            logged = mlflow.pyfunc.log_model(
                name="model",
                loader_module=loader_module,
                data_path=str(data),
                signature=signature,
                pip_requirements=list(requirements),
            )
        client = MlflowClient(uri)
        _ensure_name(client, name)
        # A server refuses a logged model's address without its id; a database takes it.
        version = client.create_model_version(
            name, logged.model_uri, run_id=run_id, tags=dict(tags), model_id=logged.model_id
        )
    except TrackingFailure as error:
        raise ServiceError(f"MLflow at {safe_uri(uri)} cannot register {name!r}: {safe_uri(str(error))}") from error
    finally:
        mlflow.set_tracking_uri(before)
    return _from_mlflow(version)


def _ensure_name(client: MlflowClient, name: str) -> None:
    """Create the registered model unless there is one; asking first would race with another process."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def resolve(uri: str, reference: str) -> RegisteredVersion:
    """The version that ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` means now.

    Raises:
        ServiceError: there is none; the message says what there is.
    """
    path = reference.removeprefix(SCHEME)
    name, at, alias = path.partition("@")
    name, _, number = (name, "", "") if at else path.partition("/")
    if not name or not (alias or number.isdigit()):
        raise ServiceError(f"{reference!r} is no model: write models:/NAME@ALIAS or models:/NAME/VERSION")
    client = MlflowClient(uri)
    try:
        found = client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, number)
        return _from_mlflow(found, _aliases(client, name))
    except TrackingFailure as error:
        raise ServiceError(f"no model {reference} at {safe_uri(uri)}: {_what_exists(uri, name)}") from error


def download(uri: str, version: RegisteredVersion, target: Path) -> Path:
    """Fetch a version's files; the path of its data folder.

    Raises:
        ServiceError: its files cannot be had.
    """
    target.mkdir(parents=True, exist_ok=True)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=version.uri, dst_path=str(target)))
    except TrackingFailure as error:
        raise ServiceError(f"the files of {version.uri} cannot be had: {safe_uri(str(error))}") from error
    finally:
        mlflow.set_tracking_uri(before)
    inner = folder / DATA
    return next((path.parent for path in sorted(inner.rglob("config.json"))), inner)


def set_alias(uri: str, version: RegisteredVersion, alias: str) -> None:
    """Move an alias to a version."""
    MlflowClient(uri).set_registered_model_alias(version.name, alias, str(version.version))


def find_alias(uri: str, name: str, alias: str) -> RegisteredVersion | None:
    """The version that carries an alias, None where none does."""
    try:
        return _from_mlflow(MlflowClient(uri).get_model_version_by_alias(name, alias))
    except MlflowException:
        return None


def list_versions(uri: str, name: str | None = None) -> list[RegisteredVersion]:
    """Versions of one model, or of all, newest first within a name.

    Raises:
        ServiceError: there is no model of that name, or MLflow does not answer.
    """
    quiet()
    client = MlflowClient(uri)
    try:
        models = [model.name for model in _all(client.search_registered_models)]
        if name is not None and name not in models:
            raise ServiceError(f"no registered model {name!r} at {safe_uri(uri)}: {_names(models)}")
        versions = []
        for model in [name] if name else sorted(models):
            aliases = _aliases(client, model)
            filter_string = "name = '{}'".format(model.replace("'", "\\'"))
            found = _all(lambda text=filter_string, **paging: client.search_model_versions(text, **paging))
            versions += [_from_mlflow(version, aliases) for version in found]
    except TrackingFailure as error:
        raise ServiceError(f"MLflow at {safe_uri(uri)} does not answer: {safe_uri(str(error))}") from error
    return sorted(versions, key=lambda version: (version.name, -version.version))


def _all(search: Any) -> list[Any]:
    """Every page of a search."""
    items, token = [], None
    while True:
        page = search(page_token=token)
        items += list(page)
        token = page.token
        if not token:
            return items


def _from_mlflow(found: ModelVersion, aliases: Mapping[str, str] | None = None) -> RegisteredVersion:
    number = str(found.version)
    own = [alias for alias, version in aliases.items() if str(version) == number] if aliases else list(found.aliases)
    return RegisteredVersion(
        found.name, int(number), tuple(sorted(own)), found.run_id or "", dict(found.tags), found.creation_timestamp or 0
    )


def _aliases(client: MlflowClient, name: str) -> Mapping[str, str]:
    return dict(client.get_registered_model(name).aliases)


def _what_exists(uri: str, name: str) -> str:
    try:
        versions = list_versions(uri, name)
    except ServiceError as error:
        return str(error)
    listed = [f"{v.version}{''.join(' @' + alias for alias in v.aliases)}" for v in versions]
    return f"{name} has the versions {', '.join(listed) or 'none'}"


def _names(models: Sequence[str]) -> str:
    return f"there are {', '.join(sorted(models))}" if models else "none is registered yet"
