"""A proxy before an S3 server that spoils a share of the requests: 500, 503, a delay, a connection cut in the body."""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("500", "503", "slow", "cut")


class FaultProxy(ThreadingHTTPServer):
    """Spoils ``share`` of the requests; ``forbidden`` keys are answered 403; counts what it did."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str, share: float, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target).netloc
        self.share = share
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.forbidden: set[str] = set()
        self.write_delay_s = 0.0  # of every PUT
        self.closed_until = 0.0  # by the monotonic clock; before that every request is answered 503
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self) -> str | None:
        with self.lock:
            fault = self.random.choice(FAULTS) if self.random.random() < self.share else None
            if time.monotonic() < self.closed_until:
                fault = "503"
            self.counts[fault or "passed"] += 1
        return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.next_fault()
        if urlsplit(self.path).path.lstrip("/") in self.server.forbidden:
            self._refuse(403, "AccessDenied")
            return
        if fault in ("500", "503"):
            self._refuse(int(fault), "InternalError" if fault == "500" else "SlowDown")
            return
        if fault == "slow":
            time.sleep(1.0)
        if self.command == "PUT":
            time.sleep(self.server.write_delay_s)
        # The Host header stays the client's: it is part of what was signed.
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward

    def _refuse(self, status: int, code: str) -> None:
        data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>planted</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        """Quiet."""


@contextmanager
def fault_proxy(target: str, share: float) -> Iterator[FaultProxy]:
    """A running proxy before ``target``."""
    proxy = FaultProxy(target, share)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
