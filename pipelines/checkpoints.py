"""Checkpoints of a run, in a folder or under an ``s3://`` prefix.

    PREFIX/step-00000400-GROUP/...      files of the checkpoint; GROUP made them (see ``fence``)
    PREFIX/step-00000400-GROUP.json     marker, written last: step, scores, and size and SHA-256 of every file

A checkpoint without its marker, or without one of its files, does not exist. The last few and the best few are kept.
They are uploaded while training goes on, one at a time: saving waits until the one before is there.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from afa_core.data.shards import file_sha256
from infra.errors import ServiceError
from infra.object_store import (
    S3,
    ObjectError,
    StoredObject,
    delete_object,
    fetch_file,
    join,
    list_objects,
    read_object,
    remove_folder,
    write_file,
    write_object,
)
from pipelines.fence import Fence
from pipelines.patience import LostForGood, patiently

MARKER_SUFFIX = ".json"


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
            LostForGood: a file is gone, or is not what was saved.
            ServiceError: the store does not answer.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        for name, saved in self.files.items():
            try:
                path, _ = fetch_file(join(self.uri, name), scratch)
            except ObjectError as error:
                kind = ServiceError if error.reason == "unavailable" else LostForGood
                raise kind(f"checkpoint {self.uri} cannot be read: {error}") from error
            if file_sha256(path) != saved.sha256:
                raise LostForGood(f"checkpoint {self.uri} is damaged: {name} is not what was saved")
            if path.parent != scratch:
                shutil.copyfile(path, scratch / name)
        return scratch


class CheckpointStore:
    """Saves, lists and prunes the checkpoints of one run.

    Attributes:
        safe_step: of the newest state that is there for sure; whoever resumes says so.
    """

    def __init__(
        self, prefix: str, fence: Fence | None = None, *, keep_last: int = 1, keep_best: int = 1, metric: str = ""
    ) -> None:
        """See the module.

        Args:
            prefix: folder or ``s3://`` prefix.
            fence: who saves has it checked before anything is committed or deleted.
            keep_last: newest checkpoints that are kept.
            keep_best: best ones by ``metric`` that are kept besides.
            metric: name of a score, higher is better.
        """
        self.prefix, self.keep_last, self.keep_best, self.metric = prefix, keep_last, keep_best, metric
        self.safe_step = 0
        self._fence = fence
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[None] | None = None

    def save(self, step: int, folder: Path, scores: Mapping[str, float]) -> None:
        """Upload the files of ``folder``, which is deleted afterwards, while the caller goes on.

        Raises:
            ServiceError: the one before could not be uploaded.
            Fenced: the run belongs to another group of workers.
        """
        self.wait()
        self._upload = self._pool.submit(self._commit, step, folder, dict(scores))

    def wait(self) -> None:
        """Return when what was saved is there.

        Raises:
            ServiceError: it could not be uploaded.
            Fenced: the run belongs to another group of workers.
        """
        if self._upload is not None:
            self._upload.result()
            self._upload = None

    def load_all(self) -> list[SavedCheckpoint]:
        """Every checkpoint that is there, oldest first; a marker that cannot be read is said and left out.

        Raises:
            ServiceError: the store cannot be read.
        """
        return self._whole(self._list())

    def fetch_newest(self, scratch: Path) -> SavedCheckpoint | None:
        """The newest one that is whole, fetched into ``scratch``; None if there is none.

        Raises:
            ServiceError: the store cannot be read, for as long as one is patient.
        """
        for saved in reversed(patiently(self.load_all)):
            try:
                patiently(partial(saved.fetch, scratch))
            except LostForGood as error:
                print(f"{error}; taking the one before", file=sys.stderr)
            else:
                return saved
        return None

    def best(self) -> SavedCheckpoint | None:
        """The one with the highest score; the newest of equals; None if none has a score.

        Raises:
            ServiceError: the store cannot be read.
        """
        return next(iter(self._best_first(self.load_all())), None)

    def _commit(self, step: int, folder: Path, scores: dict[str, float]) -> None:
        uri = join(self.prefix, f"step-{step:08d}" + (f"-{self._fence.group}" if self._fence else ""))
        files = {path.name: StoredFile(path.stat().st_size, file_sha256(path)) for path in sorted(folder.iterdir())}
        for name in files:
            patiently(partial(write_file, join(uri, name), folder / name))
        marker = {"step": step, "scores": scores, "files": {name: asdict(facts) for name, facts in files.items()}}
        patiently(self._check_fence)
        patiently(partial(write_object, uri + MARKER_SUFFIX, json.dumps(marker, indent=2).encode()))
        self.safe_step = step
        shutil.rmtree(folder)
        patiently(self._prune)

    def _check_fence(self) -> None:
        if self._fence:
            self._fence.check()

    def _prune(self) -> None:
        """Delete what is neither new nor good, marker first, and files that no marker names.

        Listed before the fence is looked at: what a later group uploads cannot be among it.
        """
        there = self._list()
        self._check_fence()
        saved = self._whole(there)
        kept = {one.uri for one in saved[-self.keep_last :]} | {
            one.uri for one in self._best_first(saved)[: self.keep_best]
        }
        for marker in self._markers(there):
            if marker.removesuffix(MARKER_SUFFIX) not in kept:
                delete_object(marker)
        for folder in {uri.rsplit("/", 1)[0] for uri in there} - {self.prefix} - kept:
            remove_folder(folder)

    def _best_first(self, saved: list[SavedCheckpoint]) -> list[SavedCheckpoint]:
        scored = [one for one in saved if math.isfinite(one.scores.get(self.metric, math.nan))]
        return sorted(scored, key=lambda one: (one.scores[self.metric], one.step), reverse=True)

    def _list(self) -> dict[str, StoredObject]:
        if not self.prefix.startswith(S3) and not Path(self.prefix).is_dir():
            return {}
        return {found.uri: found for found in list_objects(self.prefix)}

    def _markers(self, there: Mapping[str, StoredObject]) -> list[str]:
        return [uri for uri in there if uri.endswith(MARKER_SUFFIX) and uri.rsplit("/", 1)[0] == self.prefix]

    def _whole(self, there: Mapping[str, StoredObject]) -> list[SavedCheckpoint]:
        """The checkpoints of a listing that have a marker and all files, oldest first."""
        found = [(there[marker].modified, self._load(marker)) for marker in self._markers(there)]
        whole = [
            (one.step, modified, one)
            for modified, one in found
            if one and all(join(one.uri, name) in there for name in one.files)
        ]
        return [one for *_, one in sorted(whole, key=lambda entry: entry[:2])]

    def _load(self, marker: str) -> SavedCheckpoint | None:
        try:
            values = json.loads(read_object(marker)[0])
            files = {name: StoredFile(**facts) for name, facts in values["files"].items()}
            return SavedCheckpoint(marker.removesuffix(MARKER_SUFFIX), int(values["step"]), values["scores"], files)
        except (ObjectError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ObjectError) and error.reason == "unavailable":
                raise ServiceError(f"{marker} cannot be read: {error}") from error
            print(f"{marker} is no checkpoint's marker: {error}", file=sys.stderr)
            return None
