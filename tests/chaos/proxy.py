"""A wire that can be bad: a TCP proxy between one dispatcher and Redis.

with Proxy(world.server.under_test.port) as proxy:
    world.member("a", REDIS_URL=proxy.url)
    lost = proxy.lose(b"succeeded")      # the next such command is applied, its reply is lost
    lost.wait(10)
    proxy.cut()                          # every connection; new ones are let through
    proxy.refuse(); proxy.accept()       # new connections, at once closed
    proxy.hold("up"); proxy.let_go()     # one way only: what is held back arrives later
    proxy.latency, proxy.drip = 0.1, 16  # seconds a piece of data, and its bytes at most
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

#: Bytes read at once: any exchange of ours is one piece, or ``lose`` may not know it again.
PIECE = 1 << 20
#: Seconds between looks at whether what is held back may go on, and between two drops.
LOOK = 0.005

Way = Literal["up", "down"]


@dataclass
class _Loss:
    """An exchange whose reply is to be lost."""

    words: tuple[bytes, ...]
    reply: bytes
    happened: threading.Event = field(default_factory=threading.Event)


class Proxy:
    """Lets everything through, until it is told otherwise."""

    def __init__(self, port: int) -> None:
        """``port`` of the loopback interface, where Redis listens."""
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._losses: list[_Loss] = []
        self._held: set[Way] = set()
        self._lock = threading.Lock()
        self._refusing = self._closed = False
        #: Seconds each piece of data takes, one way; and its bytes at most, 0 for any.
        self.latency = 0.0
        self.drip = 0
        #: Connections that it was asked for.
        self.connections = 0

    @property
    def url(self) -> str:
        """Where a dispatcher finds Redis through this."""
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    # --- troubles -----------------------------------------------------------------------

    def lose(self, *words: bytes, reply: bytes = b"") -> threading.Event:
        """Lose the reply of the next command that has all ``words``, and whose reply has ``reply``;
        its connection is cut. The event tells when that has happened."""
        loss = _Loss(words, reply)
        self._losses.append(loss)
        return loss.happened

    def cut(self) -> None:
        """Cut every connection there is."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._close(pair)

    def refuse(self) -> None:
        """Cut every connection, and close each new one at once."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        """Let new connections through again."""
        self._refusing = False

    def hold(self, *ways: Way) -> None:
        """Hold back what goes ``up`` to Redis, or ``down`` from it; it is not lost."""
        self._held.update(ways)

    def let_go(self) -> None:
        """Let arrive what was held back."""
        self._held.clear()

    # --- work ---------------------------------------------------------------------------

    def __enter__(self) -> Self:
        threading.Thread(target=self._listen, name="proxy", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        # Closed while somebody accepts on it, it would go on listening until the next one comes.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _listen(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self._refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(self, near, far)
            with self._lock:
                self._pairs.add(connection.pair)
            threading.Thread(target=connection.up, name="proxy up", daemon=True).start()
            threading.Thread(target=connection.down, name="proxy down", daemon=True).start()

    def _close(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            if pair not in self._pairs:
                return
            self._pairs.remove(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes whoever reads from it
            end.close()

    def _loses(self, request: bytes, reply: bytes) -> bool:
        with self._lock:
            for loss in self._losses:
                if all(word in request for word in loss.words) and loss.reply in reply:
                    self._losses.remove(loss)
                    loss.happened.set()
                    return True
        return False


class _Connection:
    """One connection, with a thread for each way."""

    def __init__(self, proxy: Proxy, near: socket.socket, far: socket.socket) -> None:
        self.pair = (near, far)
        self._proxy = proxy
        self._near = near
        self._far = far
        self._asked = b""  # what Redis has not answered yet

    def up(self) -> None:
        """From the dispatcher to Redis."""
        with self._until_cut():
            while piece := self._near.recv(PIECE):
                self._asked += piece
                self._pass_on(piece, self._far, "up")

    def down(self) -> None:
        """From Redis to the dispatcher."""
        with self._until_cut():
            while piece := self._far.recv(PIECE):
                asked, self._asked = self._asked, b""
                if self._proxy._loses(asked, piece):
                    return
                self._pass_on(piece, self._near, "down")

    @contextlib.contextmanager
    def _until_cut(self) -> Iterator[None]:
        try:
            with contextlib.suppress(OSError):  # cut
                yield
        finally:
            self._proxy._close(self.pair)

    def _pass_on(self, piece: bytes, to: socket.socket, way: Way) -> None:
        while way in self._proxy._held:
            if to.fileno() < 0:
                raise OSError("it was cut meanwhile")
            time.sleep(LOOK)
        size = self._proxy.drip or len(piece)
        for start in range(0, len(piece), size):
            time.sleep(self._proxy.latency if start == 0 else LOOK)
            to.sendall(piece[start : start + size])
