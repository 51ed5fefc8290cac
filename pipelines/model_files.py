"""From a model's name to its files."""

from __future__ import annotations

from pathlib import Path

from infra.registry import SCHEME, download, resolve
from infra.tracking import tracking_uri


def find_model(reference: str, configured_uri: str | None, scratch: Path) -> tuple[Path, str]:
    """The model's folder, and a name for it that will mean the same tomorrow: an alias is resolved once.

    Args:
        reference: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or the path of a bundle.
        configured_uri: of the tracking server; None: as the environment says.
        scratch: where a registered model's files are put.

    Raises:
        ServiceError: there is no such model in the registry.
    """
    if not reference.startswith(SCHEME):
        return Path(reference).absolute(), f"bundle:{Path(reference).name}"
    uri = tracking_uri(configured_uri)
    version = resolve(uri, reference)
    return download(uri, version, scratch), version.uri
