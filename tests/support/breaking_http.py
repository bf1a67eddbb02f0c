"""An HTTP server on a loopback port that may break its connections: ``FaultyRegistry`` is made of it."""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: Seconds that a connection may idle.
IDLE = 60.0
_CODES = {
    401: "UNAUTHORIZED",
    403: "DENIED",
    404: "MANIFEST_UNKNOWN",
    429: "TOOMANYREQUESTS",
}


class Handler(BaseHTTPRequestHandler):
    """One connection, and the request on it that is being answered."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = IDLE
    server: Server

    def do_GET(self) -> None:
        # An engine may hang up at any time.
        try:
            self.server.answer(self)
        except (OSError, ValueError):
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def head(self, status: int, size: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        every = {"Docker-Distribution-Api-Version": "registry/2.0", "Content-Type": kind, **headers}
        for name, value in every.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def reply(
        self, status: int, body: bytes, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        self.head(status, len(body), kind, headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(
        self,
        status: int,
        message: str,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
        *,
        code: str = "",
    ) -> None:
        told = {"errors": [{"code": code or _CODES.get(status, "UNKNOWN"), "message": message}]}
        self.reply(status, json.dumps(told).encode() if body is None else body, headers=headers)

    def drop(self, *, reset: bool) -> None:
        """End the connection after this request."""
        if reset:
            # Closed while it lingers for no time, a connection is reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def hung_up(self) -> bool:
        """Whether the other side has closed the connection."""
        if not select.select([self.connection], [], [], 0)[0]:
            return False
        return not self.connection.recv(1, socket.MSG_PEEK)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Listens on a loopback port, answers each connection in a thread of its own."""

    # Waited for at the end, so that nothing of it outlives the test.
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, answer: Callable[[Handler], None]) -> None:
        """``answer`` answers one request, in the thread of its connection."""
        self.answer = answer
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        # Without the orderly end of the base class, which would come before a reset.
        self._connections.discard(request)
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is what this is for; whatever else goes wrong, the engine tells."""

    def hang_up(self) -> None:
        """End all connections."""
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # its other side was quicker
