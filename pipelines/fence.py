"""Only the newest group of workers of a living driver may write into a run.

    RUN/workers.json    the group that holds the run: written by rank 0 of every group as it starts

A group whose driver, head or network was lost may not know it, and trains on. It finds out here: another group has
taken the run, the driver's claim is gone (the next driver removed it), or the driver has been silent. Then it commits
and prunes nothing more, and stops. Two groups never share the name of a file, and what is deleted was listed *before*
the look at the fence: so nobody deletes what a later group is uploading, whoever is slow.
"""

from __future__ import annotations

import json
import threading
import uuid

from infra.errors import ServiceError
from infra.object_store import ObjectError, find_object, join, read_object, write_object
from pipelines.driver_lease import DEAD_AFTER_S, HEARTBEAT_S, alive_uri, claim_uri

OWNER = "workers.json"


class Fenced(RuntimeError):
    """This group of workers does not hold the run any more."""


class Fence:
    """Held by rank 0 of a group of workers.

    Attributes:
        group: name of this group, part of the names of what it uploads.
        lost: why the run is not held any more; empty while it is.
    """

    def __init__(self, run_uri: str, driver: str) -> None:
        """See the class.

        Args:
            run_uri: folder or prefix of the run.
            driver: name of the driver's claim on it.
        """
        self.run_uri, self.driver = run_uri, driver
        self.group = uuid.uuid4().hex[:8]
        self.lost = ""
        self._beat, self._silent_looks = 0.0, 0
        self._ended = threading.Event()

    def take(self) -> None:
        """Take the run from whatever group was there before, and watch over it from now on.

        Raises:
            Fenced: the driver does not hold the run any more.
            ServiceError: the store does not answer.
        """
        self._look_for_claim()
        if self.lost:
            raise Fenced(self.lost)
        owner = {"group": self.group, "driver": self.driver}
        write_object(join(self.run_uri, OWNER), json.dumps(owner).encode())
        threading.Thread(target=self._watch, name="fence", daemon=True).start()

    def release(self) -> None:
        """Watch no longer."""
        self._ended.set()

    def check(self) -> None:
        """Return if this group holds the run.

        Raises:
            Fenced: it does not; ``lost`` says why from now on.
            ServiceError: the store does not answer.
        """
        if not self.lost:
            self._look_for_owner()
        if not self.lost:
            self._look_for_claim()
        if self.lost:
            raise Fenced(self.lost)

    def _look_for_claim(self) -> None:
        if find_object(claim_uri(self.run_uri, self.driver)) is None:
            self.lost = f"the driver of these workers does not hold {self.run_uri} any more"

    def _look_for_owner(self) -> None:
        try:
            owner = json.loads(read_object(join(self.run_uri, OWNER))[0])["group"]
        except ObjectError as error:
            if error.reason != "unavailable":
                self.lost = f"{join(self.run_uri, OWNER)} cannot be read: {error}"
                return
            raise ServiceError(str(error)) from error
        if owner != self.group:
            self.lost = f"another group of workers has taken {self.run_uri}"

    def _watch(self) -> None:
        """Look again and again. Only what an answering store shows counts: an outage makes the driver silent, too."""
        while not self._ended.wait(HEARTBEAT_S):
            try:
                self.check()
                beat = find_object(alive_uri(self.run_uri, self.driver))
            except ServiceError:
                continue
            except Fenced:
                return
            moved = beat is not None and beat.modified != self._beat
            self._beat = beat.modified if beat else 0.0
            self._silent_looks = 0 if moved else self._silent_looks + 1
            if self._silent_looks * HEARTBEAT_S > DEAD_AFTER_S:
                self.lost = f"the driver of these workers was silent for more than {DEAD_AFTER_S:.0f} s"
