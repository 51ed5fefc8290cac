"""A real S3 server for tests: JuiceFS' gateway (MinIO's code) over a local folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import http_status, wait_until

ACCESS_KEY, SECRET_KEY = "afa-tests", "afa-tests-secret"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(folder: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """Endpoint of a server that keeps its objects below ``folder`` and listens on an address of this machine."""
    program = shutil.which("juicefs", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "juicefs is not installed: it comes with the dev extra"
    folder.mkdir(exist_ok=True)
    meta = f"sqlite3://{folder}/meta.db"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([program, "format", meta, "tests", "--storage", "file", "--bucket", f"{folder}/data/"],
                   check=True, **quiet)  # type: ignore[call-overload]  # fmt: skip
    address = f"{host}:{free_port()}"
    environment = {**os.environ, "MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
    command = [program, "gateway", meta, address, "--multi-buckets", "--no-usage-report",
               "--cache-dir", f"{folder}/cache", "--cache-size", "64"]  # fmt: skip
    with subprocess.Popen(command, env=environment, **quiet) as process:  # type: ignore[call-overload]
        try:
            wait_until(lambda: http_status(f"http://{address}/minio/health/live"), process, timeout_s=60)
            yield f"http://{address}"
        finally:
            process.terminate()
