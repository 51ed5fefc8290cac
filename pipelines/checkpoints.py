"""Checkpoints of a run, in a folder or under an ``s3://`` prefix.

    PREFIX/step-00000400/...      files of the checkpoint
    PREFIX/step-00000400.json     marker, written last: step, scores, and size and SHA-256 of every file

A checkpoint without its marker does not exist. The last few and the best few are kept. They are uploaded while training
goes on, one at a time: saving waits until the one before is there, so that no more than one interval can be lost.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from afa_core.data.shards import file_sha256
from infra.errors import ServiceError
from infra.object_store import (
    S3,
    ObjectError,
    delete_object,
    fetch_file,
    join,
    list_objects,
    read_object,
    remove_folder,
    write_file,
    write_object,
)

MARKER_SUFFIX = ".json"
# A store that refuses is asked again for so long; then the run fails.
PATIENCE_S = 600.0
RETRY_S = 5.0


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is there.

    Attributes:
        uri: of its folder.
        step: optimiser steps done.
        scores: of the evaluation at this step; empty if there was none.
        files: by name.
    """

    uri: str
    step: int
    scores: Mapping[str, float]
    files: Mapping[str, StoredFile]

    def fetch(self, scratch: Path) -> Path:
        """Folder with its files, in ``scratch``.

        Raises:
            ServiceError: a file is gone, or is not what was saved.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        for name, saved in self.files.items():
            try:
                path, _ = fetch_file(join(self.uri, name), scratch)
            except ObjectError as error:
                raise ServiceError(f"checkpoint {self.uri} cannot be read: {error}") from error
            if file_sha256(path) != saved.sha256:
                raise ServiceError(f"checkpoint {self.uri} is damaged: {name} is not what was saved")
            if path.parent != scratch:
                shutil.copyfile(path, scratch / name)
        return scratch


class CheckpointStore:
    """Saves, lists and prunes the checkpoints of one run."""

    def __init__(self, prefix: str, *, keep_last: int = 1, keep_best: int = 1, metric: str = "") -> None:
        """See the module.

        Args:
            prefix: folder or ``s3://`` prefix.
            keep_last: newest checkpoints that are kept.
            keep_best: best ones by ``metric`` that are kept besides.
            metric: name of a score, higher is better.
        """
        self.prefix, self.keep_last, self.keep_best, self.metric = prefix, keep_last, keep_best, metric
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[None] | None = None

    def save(self, step: int, folder: Path, scores: Mapping[str, float]) -> None:
        """Upload the files of ``folder``, which is deleted afterwards, while the caller goes on.

        Raises:
            ServiceError: the one before could not be uploaded.
        """
        self.wait()
        self._upload = self._pool.submit(self._commit, step, folder, dict(scores))

    def wait(self) -> None:
        """Return when what was saved is there.

        Raises:
            ServiceError: it could not be uploaded.
        """
        if self._upload is not None:
            self._upload.result()
            self._upload = None

    def load_all(self) -> list[SavedCheckpoint]:
        """Every checkpoint that is there, oldest first.

        Raises:
            ServiceError: the store cannot be read.
        """
        markers = [uri for uri in self._list() if uri.endswith(MARKER_SUFFIX) and uri.rsplit("/", 1)[0] == self.prefix]
        return sorted(map(self._load, markers), key=lambda saved: saved.step)

    def best(self) -> SavedCheckpoint | None:
        """The one with the highest score; the newest of equals; None if none has a score."""
        return next(iter(self._best_first(self.load_all())), None)

    def _commit(self, step: int, folder: Path, scores: dict[str, float]) -> None:
        uri = join(self.prefix, f"step-{step:08d}")
        files = {path.name: StoredFile(path.stat().st_size, file_sha256(path)) for path in sorted(folder.iterdir())}
        for name in files:
            patiently(partial(write_file, join(uri, name), folder / name))
        marker = {"step": step, "scores": scores, "files": {name: asdict(facts) for name, facts in files.items()}}
        patiently(partial(write_object, uri + MARKER_SUFFIX, json.dumps(marker, indent=2).encode()))
        shutil.rmtree(folder)
        patiently(self._prune)

    def _prune(self) -> None:
        """Delete what is neither new nor good, marker first, and files that no marker names."""
        saved = self.load_all()
        kept = {one.uri for one in saved[-self.keep_last :]} | {
            one.uri for one in self._best_first(saved)[: self.keep_best]
        }
        for one in saved:
            if one.uri not in kept:
                delete_object(one.uri + MARKER_SUFFIX)
        for folder in {uri.rsplit("/", 1)[0] for uri in self._list()} - {self.prefix} - kept:
            remove_folder(folder)

    def _best_first(self, saved: list[SavedCheckpoint]) -> list[SavedCheckpoint]:
        scored = [one for one in saved if math.isfinite(one.scores.get(self.metric, math.nan))]
        return sorted(scored, key=lambda one: (one.scores[self.metric], one.step), reverse=True)

    def _list(self) -> list[str]:
        if not self.prefix.startswith(S3) and not Path(self.prefix).is_dir():
            return []
        return [found.uri for found in list_objects(self.prefix)]

    def _load(self, marker: str) -> SavedCheckpoint:
        try:
            values = json.loads(read_object(marker)[0])
            files = {name: StoredFile(**facts) for name, facts in values["files"].items()}
            return SavedCheckpoint(marker.removesuffix(MARKER_SUFFIX), values["step"], values["scores"], files)
        except (ObjectError, ValueError, KeyError, TypeError) as error:
            raise ServiceError(f"{marker} is no checkpoint's marker: {error}") from error


def patiently(action: Callable[[], None]) -> None:
    """Do it; while the store refuses, again, for ``PATIENCE_S``.

    Raises:
        ServiceError: the store's last answer.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return action()
        except ServiceError:
            if time.monotonic() > deadline:
                raise
        time.sleep(RETRY_S)
