"""The way to a Docker engine: its client library, in threads, with a bound on everything.

The library blocks, so each request runs in a worker thread under one of three limiters:
control calls, pulls and log readers can't starve each other. Control calls share clients,
one for each timeout. A stream (a pull, a log, the events) has a client of its own, because
the only way to end a blocked read is to shut its socket down from outside (``cut``). That
also ends the engine's side of it: a pull whose client has hung up is given up.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import docker
import docker.utils
import requests
import structlog
from anyio import CapacityLimiter, to_thread

from dispatcher.backends.docker_errors import LIBRARY_ERRORS, sort_error
from dispatcher.backends.docker_spec import unix_time
from dispatcher.errors import BackendError, BackendUnreachable

log = structlog.get_logger(__name__)

#: Seconds for the engine to accept a connection.
CONNECT_TIMEOUT = 5.0
#: Seconds for an answer to what an engine has at hand.
CONTROL_TIMEOUT = 30.0
#: Seconds for a create, start or remove: what kubelet gives its runtime for the same.
LAUNCH_TIMEOUT = 120.0
#: The last so many events are all that an engine remembers.
ENGINE_REMEMBERS = 256
#: Seconds between two attempts to end a stream, and until one is left to itself.
_CUT_INTERVAL = 0.01
_CUT_PATIENCE = 5.0

T = TypeVar("T")
#: Turns a library's error into one of ours.
Sorter = Callable[[BaseException], BackendError]


class Client(docker.APIClient):
    """The library's client, without the operator's credentials: see ``docker_credentials``.

    It would read them for every call, and fail in all of them when their file is malformed.
    """

    @property
    def _general_configs(self) -> dict[str, Any]:
        # The entry of no registry: of an empty section the library would go and look in files.
        return {"auths": {"-": {}}, **self._headers_of_operator}

    @_general_configs.setter
    def _general_configs(self, value: Any) -> None:
        headers = value.get("HttpHeaders") if isinstance(value, dict) else None
        self._headers_of_operator = {"HttpHeaders": headers} if isinstance(headers, dict) else {}


class CuttableSession(requests.Session):
    """A session for one answer, which another thread can cut off in any phase."""

    def __init__(self, *, silence: float | None, **kwargs: Any) -> None:
        """``silence``: seconds without a byte after which a read fails; None for no limit."""
        self._silence = silence
        self._cut = False
        self._connections: list[Any] = []
        self._responses: list[requests.Response] = []
        super().__init__(**kwargs)

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """As the library does, but remember what the request runs on."""
        # The library asks for streams without any timeout, which also lifts the connect's.
        kwargs["timeout"] = (CONNECT_TIMEOUT, self._silence)
        pool = self.get_adapter(request.url or "").get_connection_with_tls_context(  # type: ignore[attr-defined]
            request, kwargs.get("verify"), proxies=kwargs.get("proxies"), cert=kwargs.get("cert")
        )
        # The pool hands out last what came in last, so the request gets this connection. No
        # public way leads to it while the answer's head is awaited, which can take minutes.
        connection = pool._get_conn()
        self._connections.append(connection)
        pool._put_conn(connection)
        response = super().send(request, **kwargs)
        self._responses.append(response)
        if self._cut:
            self.cut()
        return response

    def cut(self) -> None:
        """End the answer: whoever reads it sees its end or an error. Any thread may call it."""
        self._cut = True
        for connection in list(self._connections):
            # None before the connect; an error if the other side was quicker.
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close every connection, also those an answer was not read from to its end."""
        for response in self._responses:
            response.close()
        super().close()


class StreamClient(CuttableSession, Client):
    """A client for one streamed answer."""


C = TypeVar("C", bound=CuttableSession)


async def in_cuttable_thread(
    make: Callable[[], C],
    work: Callable[[C], T],
    *,
    limiter: CapacityLimiter,
    sort: Sorter,
    patience: float = _CUT_PATIENCE,
) -> T:
    """Do ``work`` in a thread with a session that ``make`` makes; cancelling ends both.

    ``patience``: seconds for the thread to end then, before it is left to itself.
    Raises what ``sort`` makes of the library's errors.
    """
    running: list[C] = []
    begun, left, ended = threading.Event(), threading.Event(), threading.Event()

    def in_thread() -> T:
        begun.set()
        try:
            with make() as session:
                running.append(session)
                if left.is_set():
                    raise BackendUnreachable("the caller has left")
                return work(session)
        except LIBRARY_ERRORS as error:
            raise sort(error) from error
        finally:
            ended.set()

    try:
        return await to_thread.run_sync(in_thread, limiter=limiter, abandon_on_cancel=True)
    except anyio.get_cancelled_exc_class():
        left.set()
        with anyio.move_on_after(patience, shield=True):
            # More than once: it may just be about to connect.
            while begun.is_set() and not ended.is_set():
                for session in running:
                    session.cut()
                await anyio.sleep(_CUT_INTERVAL)
        raise


def _without_proxies(client: docker.APIClient) -> None:
    """Spare a socket on this host the look for proxies and ~/.netrc: a fifth of each call."""
    if client.base_url.startswith("http+docker:"):
        client.trust_env = False


class Engine:
    """One Docker engine. Safe to use from any task of one event loop."""

    def __init__(
        self, *, base_url: str | None, max_pulls: int, control_threads: int, log_readers: int
    ) -> None:
        """``base_url`` None: what DOCKER_HOST, DOCKER_TLS_VERIFY and DOCKER_CERT_PATH say."""
        self._base_url = base_url
        self._control = CapacityLimiter(control_threads)
        self.pulls = CapacityLimiter(max_pulls)
        self.log_readers = CapacityLimiter(log_readers)
        #: One for the events, which are followed once, and one to ask for those remembered.
        self.watching = CapacityLimiter(2)
        #: When the last request was sent that the engine answered, on the loop's clock.
        self.answered = time.monotonic()
        self._pool_size = control_threads
        self._clients: dict[float, docker.APIClient] = {}
        self._version: str | None = None
        self._lock = threading.Lock()

    def forget_version(self) -> None:
        """Agree on the API's version anew: the engine may be another one after a restart."""
        self._version = None

    def close(self) -> None:
        """Close the connections that idle; a later call opens new ones."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    async def call(
        self,
        work: Callable[[docker.APIClient], T],
        *,
        within: float = CONTROL_TIMEOUT,
        abandon: bool = True,
        sort: Sorter = sort_error,
    ) -> T:
        """Do ``work`` in a control thread, in at most ``within`` seconds.

        ``abandon``: whether a cancelled caller leaves at once, while the request may still
        take effect; otherwise it waits for the answer.
        Raises what ``sort`` makes of the library's errors; BackendUnreachable in time.
        """

        def in_thread() -> T:
            sent = time.monotonic()
            try:
                answer = work(self._client(within))
            except LIBRARY_ERRORS as error:
                raise sort(error) from error
            self.answered = max(self.answered, sent)
            return answer

        try:
            with anyio.fail_after(within):
                return await to_thread.run_sync(in_thread, limiter=self._control, abandon_on_cancel=abandon)
        except TimeoutError:
            raise BackendUnreachable(f"the Docker engine did not answer within {within:g} s") from None

    async def stream(
        self,
        work: Callable[[StreamClient], T],
        *,
        limiter: CapacityLimiter,
        silence: float | None = None,
        sort: Sorter = sort_error,
    ) -> T:
        """Do ``work`` in a thread with a client of its own; cancelling ends both.

        ``silence`` as of ``CuttableSession``. Raises what ``sort`` makes of the library's errors.
        """

        def client() -> StreamClient:
            return StreamClient(silence=silence, max_pool_size=1, **self._client_arguments())

        return await in_cuttable_thread(client, work, limiter=limiter, sort=sort)

    def _client(self, timeout: float) -> docker.APIClient:
        """The client all threads share for calls of this timeout; the library's are thread-safe."""
        with self._lock:
            client = self._clients.get(timeout)
        if client is not None and client.api_version == self._version:
            return client
        client = Client(timeout=math.ceil(timeout), max_pool_size=self._pool_size, **self._client_arguments())
        _without_proxies(client)
        with self._lock:
            outdated = self._clients.get(timeout)
            self._clients[timeout] = client
        if outdated is not None:
            outdated.close()
        return client

    def _client_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {**docker.utils.kwargs_from_env()}
        if self._base_url is not None:
            arguments["base_url"] = self._base_url
        if self._version is None:
            with Client(timeout=math.ceil(CONNECT_TIMEOUT), **arguments) as client:
                self._version = client.api_version
        return {**arguments, "version": self._version}


def engine_time(client: Any) -> float:
    """Unix seconds of the engine's clock."""
    return unix_time(client.info()["SystemTime"]) or 0.0


def events_between(client: Any, since: float, until: float) -> list[dict[str, Any]]:
    """The events that the engine still knows, of at most ENGINE_REMEMBERS; ``until`` must be past."""
    # As text: of a number or a datetime the library leaves whole seconds.
    return list(client.events(since=f"{since:.6f}", until=f"{until:.6f}", decode=True))
