"""A real Redis server that wants a password and outlives the heads that keep their state in it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.core.generated.gcs_pb2 import JobTableData
from redis import Redis

from servers.s3 import free_port

PASSWORD = "password-of-the-redis"
NAMESPACE = "afa"


@dataclass(frozen=True)
class RedisServer:
    """Where it listens."""

    host: str
    port: int

    @property
    def head_words(self) -> list[str]:
        """For ``ray start --head``."""
        return [f"--redis-password={PASSWORD}"]

    @property
    def head_environment(self) -> dict[str, str]:
        """For ``ray start --head``."""
        return {"RAY_REDIS_ADDRESS": f"{self.host}:{self.port}", "RAY_external_storage_namespace": NAMESPACE}

    def record_death_of_jobs(self) -> None:
        """Write that every job has ended, as a head does a moment before it tells what follows from it."""
        table = Redis(self.host, self.port, password=PASSWORD)
        name = f"RAY{NAMESPACE}@JOB"
        jobs = table.hgetall(name)
        assert jobs
        for key, value in jobs.items():
            job = JobTableData.FromString(value)
            job.is_dead = True
            table.hset(name, key, job.SerializeToString())


@contextmanager
def redis_server(folder: Path, host: str) -> Iterator[RedisServer]:
    """A server on an address; skips the test where there is no Redis.

    Args:
        folder: for its log.
        host: the address it binds.
    """
    if shutil.which("redis-server") is None:
        pytest.skip("the head's restart was not tried: no redis-server (apt-get install redis-server)")
    port = free_port()
    command = ["redis-server", "--bind", host, "--port", str(port), "--requirepass", PASSWORD, "--save", "",
               "--appendonly", "no", "--dir", str(folder)]  # fmt: skip
    with (folder / "redis.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield RedisServer(host, port)
        finally:
            process.terminate()
