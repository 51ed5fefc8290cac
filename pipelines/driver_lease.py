"""One driver at a time on a run, of labelling or of training, on any store, without conditional writes.

    drivers/ID.json     the claim, written once: who, where
    drivers/ID.alive    written again and again while the driver lives

A driver writes its claim, waits longer than the store's clock is coarse, and lists: the earliest living claim wins,
by the store's own times. Should a driver be taken for dead that is not, nothing breaks: units are committed under
names made of their content, and one marker decides.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from infra.errors import ServiceError
from infra.object_store import (
    PARTIAL,
    S3,
    ObjectError,
    StoredObject,
    delete_object,
    find_object,
    join,
    list_folders,
    list_objects,
    read_object,
    write_object,
)
from pipelines.errors import UsageError

DRIVERS = "drivers"
HEARTBEAT_S = 10.0
DEAD_AFTER_S = 60.0


def claim_uri(run_uri: str, name: str) -> str:
    """The claim of a driver."""
    return join(join(run_uri, DRIVERS), f"{name}.json")


def alive_uri(run_uri: str, name: str) -> str:
    """What a driver writes again and again."""
    return join(join(run_uri, DRIVERS), f"{name}.alive")


class DriverLease:
    """Held while the ``with`` block runs."""

    def __init__(self, run_uri: str) -> None:
        self.folder = join(run_uri, DRIVERS)
        self.run_uri = run_uri
        self.name = uuid.uuid4().hex[:12]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> DriverLease:
        """Claim the run.

        Raises:
            UsageError: another driver is at work.
        """
        claim = {"host": _host(), "pid": os.getpid(), "started": time.time()}
        write_object(claim_uri(self.run_uri, self.name), json.dumps(claim).encode())
        write_object(alive_uri(self.run_uri, self.name), b"")
        time.sleep(2.5 if self.folder.startswith(S3) else 0.2)
        try:
            self._yield_to_earlier()
        except BaseException:
            self._remove(self.name)
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the run free. A store that refuses is no failure of the job: the claim lapses by itself."""
        self._ended.set()
        self._thread.join()
        try:
            self._remove(self.name)
        except ServiceError as refusal:
            print(f"the claim on {self.run_uri} stays for {DEAD_AFTER_S:.0f} s: {refusal}", file=sys.stderr)

    def _yield_to_earlier(self) -> None:
        found = {item.uri.rsplit("/", 1)[1]: item for item in list_objects(self.folder)}
        own = found[f"{self.name}.json"]
        for file_name, item in sorted(found.items()):
            name, _, suffix = file_name.rpartition(".")
            if suffix != "json" and f"{name}.json" not in found and own.modified - item.modified > DEAD_AFTER_S:
                delete_object(item.uri)
            if suffix != "json" or name == self.name:
                continue
            claim = _read_claim(item)
            beat = find_object(alive_uri(self.run_uri, name)) or item
            now = find_object(alive_uri(self.run_uri, self.name)) or own  # the store's clock
            silent_s = max(0.0, now.modified - beat.modified)
            if claim is None:
                continue
            if silent_s > DEAD_AFTER_S or _is_dead_here(claim):
                self._remove(name)
            elif (item.modified, name) < (own.modified, self.name):
                raise UsageError(
                    f"another driver is at work on {self.run_uri} (process {claim.get('pid')} on {claim.get('host')}):"
                    f" let it finish; if it is gone, try again in {DEAD_AFTER_S - silent_s + HEARTBEAT_S:.0f} s"
                )

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                write_object(alive_uri(self.run_uri, self.name), b"")
            except ServiceError:
                continue  # the store will be back, or the job will fail of it

    def _remove(self, name: str) -> None:
        for suffix in ("alive", "json"):
            delete_object(join(self.folder, f"{name}.{suffix}"))


def left_behind(run_uri: str) -> Iterator[str]:
    """URIs in a run's folder of drivers that are of no driver at work, by this machine's clock."""
    folder = join(run_uri, DRIVERS)
    if folder not in list_folders(run_uri):
        return
    found = {item.uri.rsplit("/", 1)[1]: item for item in list_objects(folder)}
    for file_name, item in sorted(found.items()):
        name, _, suffix = file_name.rpartition(".")
        claim = _read_claim(found[f"{name}.json"]) if f"{name}.json" in found else {}
        silent_s = time.time() - found.get(f"{name}.alive", item).modified
        foreign = f".{suffix}" not in (".json", ".alive", PARTIAL)
        if foreign or (claim is not None and (silent_s > DEAD_AFTER_S or _is_dead_here(claim))):
            yield item.uri


def _read_claim(item: StoredObject) -> dict[str, Any] | None:
    try:
        claim = json.loads(read_object(item.uri)[0])
    except (ObjectError, ValueError):
        return None  # just given up
    return claim if isinstance(claim, dict) else None


def _host() -> str:
    """This machine since it was last started, or this container on it: process numbers mean nothing elsewhere."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists():
        return socket.gethostname()
    return f"{socket.gethostname()}/{boot.read_text().strip()[:8]}/{processes.readlink()}"


def _is_dead_here(claim: dict[str, Any]) -> bool:
    if claim.get("host") != _host():
        return False
    try:
        os.kill(int(claim["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError):
        return False
    return False
