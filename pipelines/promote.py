"""``afa register`` and ``afa models``: from a finished run to a version, an alias, and the list of both.

The alias moves to a new version only when its score beats that of the version that carries it, on the same validation
shards. Where the two were scored on different shards, the present one is scored anew on the new one's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path

from afa_core.bundle import bundle_digest
from afa_core.checkpoint import load_bundle
from infra.errors import ServiceError
from infra.registry import RegisteredVersion, download, find_alias, list_versions, register, set_alias
from infra.tracking import find_run, tracking_uri
from pipelines.cli import stage_main
from pipelines.errors import UsageError
from pipelines.model_files import fetch_bundle
from pipelines.pyfunc import LOADER_MODULE, model_signature
from pipelines.scoring import score_bundle

SCORE_TAG = "score."
REQUIREMENTS = ("torch", "timm", "safetensors", "webdataset", "mlflow", "pandas", "pillow")


def add_register_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa register``."""
    parser.add_argument("run", metavar="RUN_ID", help="MLflow run of a finished training")
    parser.add_argument("--name", required=True, help="name in the registry, e.g. afa-shapes")
    parser.add_argument("--alias", default="champion", help="alias to compete for (default: champion)")
    parser.add_argument("--score", default="refined_affinity_miou", help="score that decides (default: %(default)s)")
    parser.add_argument("--tracking-uri", help="MLflow server (default: MLFLOW_TRACKING_URI, then runs/mlflow.db)")


def run_register(arguments: argparse.Namespace) -> int:
    """Register; prints the version and what became of the alias."""
    uri = tracking_uri(arguments.tracking_uri)
    if any(character in arguments.name for character in "/:@"):
        raise UsageError(f"--name {arguments.name!r}: a name may not hold / : or @")
    with tempfile.TemporaryDirectory(prefix="afa-model-") as scratch:
        return register_run(uri, arguments, finished_run(uri, arguments.run, Path(scratch)))


def register_run(uri: str, arguments: argparse.Namespace, candidate: Candidate) -> int:
    """Make the candidate a version, unless it is one, and let it compete for the alias."""
    if arguments.score not in candidate.scores:
        raise UsageError(f"--score {arguments.score}: the run has {', '.join(sorted(candidate.scores)) or 'no scores'}")
    present = find_alias(uri, arguments.name, arguments.alias)
    version = registered_before(uri, arguments.name, arguments.run)
    if version is None:
        version = register(
            uri,
            arguments.run,
            arguments.name,
            candidate.bundle,
            loader_module=LOADER_MODULE,
            signature=model_signature(),
            requirements=[f"{package}=={installed_version(package)}" for package in REQUIREMENTS],
            tags=candidate.version_tags(),
        )
        print(f"registered {version.uri} from run {arguments.run}")
    else:
        print(f"run {arguments.run} is {version.uri} already")
    print(compete(uri, version, present, candidate, arguments.alias, arguments.score))
    return 0


class Candidate:
    """A finished run: its best checkpoint, as a folder, and scores."""

    def __init__(self, run_id: str, tags: Mapping[str, str], scores: Mapping[str, float], bundle: Path) -> None:
        self.run_id, self.tags, self.scores, self.bundle = run_id, tags, scores, bundle

    def version_tags(self) -> dict[str, str]:
        """What a version says of itself."""
        kept = ("afa.dataset_digest", "afa.git_commit", "afa.val_shards", "afa.val_data", "afa.classes")
        return {
            **{f"{SCORE_TAG}{name}": f"{value:.6f}" for name, value in self.scores.items()},
            **{name: self.tags[name] for name in kept if name in self.tags},
            "afa.model_digest": bundle_digest(self.bundle),
        }


def finished_run(uri: str, run_id: str, scratch: Path) -> Candidate:
    """The run, if it can be registered; a checkpoint in a store is fetched into ``scratch``.

    Raises:
        ServiceError: no such run, not finished, or its checkpoint is gone.
    """
    run = find_run(uri, run_id)
    tags = run.data.tags
    if tags.get("afa.status") != "finished" or "afa.best_checkpoint" not in tags:
        status = tags.get("afa.status", run.info.status.lower())
        raise ServiceError(f"run {run_id} is no finished training (its status: {status})")
    scores = {name.removeprefix("best."): value for name, value in run.data.metrics.items() if name.startswith("best.")}
    candidate = Candidate(run_id, tags, scores, fetch_bundle(tags["afa.best_checkpoint"], scratch))
    load_bundle(candidate.bundle)  # one that cannot be loaded must not get into the registry
    return candidate


def registered_before(uri: str, name: str, run_id: str) -> RegisteredVersion | None:
    """The version that this run already is, if any."""
    try:
        versions = list_versions(uri, name)
    except ServiceError:
        return None
    return next((version for version in versions if version.run_id == run_id), None)


def compete(
    uri: str,
    version: RegisteredVersion,
    present: RegisteredVersion | None,
    candidate: Candidate,
    alias: str,
    score: str,
) -> str:
    """Move the alias if the new version is better; a line that says what happened."""
    new = candidate.scores[score]
    if present is None:
        set_alias(uri, version, alias)
        return f"{alias} is now version {version.version} ({score} {new:.4f}), the first one"
    if present.version == version.version:
        return f"{alias} is version {version.version} already ({score} {new:.4f})"
    old = present_score(uri, present, candidate, score)
    if not new > old:
        return f"{alias} stays version {present.version}: {score} {old:.4f}, the new one has {new:.4f}"
    set_alias(uri, version, alias)
    return f"{alias} moved from version {present.version} ({score} {old:.4f}) to {version.version} ({new:.4f})"


def present_score(uri: str, present: RegisteredVersion, candidate: Candidate, score: str) -> float:
    """Score of the present version on the candidate's validation shards."""
    stored = present.tags.get(SCORE_TAG + score)
    if stored is not None and present.tags.get("afa.val_shards") == candidate.tags.get("afa.val_shards"):
        return float(stored)
    print(f"version {present.version} was scored on other shards: scoring it on {candidate.tags['afa.val_data']}")
    with tempfile.TemporaryDirectory(prefix="afa-model-") as scratch:
        folder = download(uri, present, Path(scratch))
        return score_bundle(folder, candidate.tags["afa.val_data"])[score]


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa models``."""
    parser.add_argument("name", nargs="?", help="only this model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--tracking-uri", help="MLflow server (default: MLFLOW_TRACKING_URI, then runs/mlflow.db)")


def run_models(arguments: argparse.Namespace) -> int:
    """List versions, aliases and scores."""
    versions = list_versions(tracking_uri(arguments.tracking_uri), arguments.name)
    rows = [
        {
            "name": version.name,
            "version": version.version,
            "aliases": list(version.aliases),
            "scores": {
                tag.removeprefix(SCORE_TAG): float(value)
                for tag, value in sorted(version.tags.items())
                if tag.startswith(SCORE_TAG)
            },
            "run_id": version.run_id,
            "created": datetime.fromtimestamp(version.created_ms / 1000, UTC).isoformat(timespec="seconds"),
        }
        for version in versions
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row, version in zip(rows, versions, strict=True):
        aliases = " ".join("@" + alias for alias in version.aliases)
        print(f"{version.uri}  {aliases}  run {version.run_id}  {row['created']}")
        for name, value in dict(row["scores"]).items():  # type: ignore[call-overload]
            print(f"    {name:28s} {value:.4f}")
    if not rows:
        print("no models are registered yet: afa register RUN_ID --name NAME")
    return 0


if __name__ == "__main__":
    sys.exit(stage_main(add_register_arguments, run_register))
