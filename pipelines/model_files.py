"""From a model's name to its files."""

from __future__ import annotations

from pathlib import Path

from afa_core.bundle import CONFIG, WEIGHTS
from infra.errors import ServiceError
from infra.object_store import S3, ObjectError, fetch_file, join

REGISTERED = "models:"  # what follows is for the registry to judge


def find_model(reference: str, configured_uri: str | None, scratch: Path) -> tuple[Path, str]:
    """The model's folder, and a name for it that will mean the same tomorrow: an alias is resolved once.

    Args:
        reference: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or path or ``s3://`` prefix of a bundle.
        configured_uri: of the tracking server; None: as the environment says.
        scratch: where a registered model's files are put.

    Raises:
        ServiceError: there is no such model in the registry or the store.
    """
    if not reference.startswith(REGISTERED):
        return fetch_bundle(reference, scratch), f"bundle:{Path(reference).name}"
    from infra import registry, tracking  # and MLflow with them, for which a bundle need not wait

    uri = tracking.tracking_uri(configured_uri)
    version = registry.resolve(uri, reference)
    return registry.download(uri, version, scratch), version.uri


def fetch_bundle(uri: str, scratch: Path) -> Path:
    """Folder of a bundle: itself where it is local, else a copy in ``scratch``.

    Raises:
        ServiceError: there is none in the store.
    """
    if not uri.startswith(S3):
        return Path(uri).absolute()
    try:
        for name in (CONFIG, WEIGHTS):
            fetch_file(join(uri, name), scratch)
    except ObjectError as error:
        raise ServiceError(f"{uri} holds no usable model ({CONFIG} and {WEIGHTS}): {error}") from error
    return scratch
