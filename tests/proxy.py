"""A loopback HTTP proxy before an S3 server that spoils a share of the requests."""

from __future__ import annotations

import collections
import http.client
import random
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "503", "reset before", "reset after", "stall", "cut")
_ERROR = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>made up by the test proxy</Message></Error>'


class Proxy:
    """Forwards to 127.0.0.1:port; `share` of the requests meets a fault, at most `budget` of them."""

    def __init__(self, port: int, seed: int = 0):
        self.target = port
        self.share, self.budget, self.stall_seconds = 0.0, 0, 2.0
        self.counts: collections.Counter[str] = collections.Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def seed(self, seed: int) -> None:
        self._random.seed(seed)

    def choose(self) -> str | None:
        """The fault of the next request, or None."""
        with self._lock:
            if self.budget <= 0 or self._random.random() >= self.share:
                return None
            self.budget -= 1
            fault = self._random.choice(FAULTS)
            self.counts[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True  # or every answer waits 40 ms for an acknowledgement

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):  # clients that were killed
            self.close_connection = True

    def _serve(self) -> None:
        body = self._body()
        fault = self.proxy.choose()
        if fault in ("500", "503"):
            code = b"InternalError" if fault == "500" else b"SlowDown"
            self._answer(int(fault), [("Content-Type", "application/xml")], _ERROR % code)
            return
        if fault == "reset before":
            self._reset()
            return
        if fault == "stall":
            time.sleep(self.proxy.stall_seconds)
        try:
            status, headers, data = self._forward(body)
        except (OSError, http.client.HTTPException):
            self._reset()
            return
        if fault == "reset after":
            self._reset()
        elif fault == "cut":
            self._answer(status, headers, data, sent=len(data) // 2)
            self._reset()
        else:
            self._answer(status, headers, data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        skipped = ("connection", "expect", "transfer-encoding", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        headers["Content-Length"] = str(len(body))
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, sent: int | None = None) -> None:
        self.send_response_only(status)
        given = {name.lower(): value for name, value in headers}
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = given.get("content-length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])
        self.wfile.flush()

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
