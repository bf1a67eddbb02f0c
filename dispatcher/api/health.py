"""``/healthz``, ``/readyz`` and ``/metrics`` of one instance, and nothing else."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping

import anyio
import uvicorn
from anyio.abc import TaskStatus
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dispatcher.errors import ConfigurationError

#: Seconds for answers under way when the server ends.
_SHUTDOWN_TIMEOUT = 1
#: Connections at once; a prober and a scraper need two.
_MAX_CONNECTIONS = 64


def health_app(ready: Callable[[], Mapping[str, str]], metrics: Callable[[], bytes]) -> Starlette:
    """``ready`` tells what keeps the instance from work, by part; ``metrics`` Prometheus' text."""

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_: Request) -> Response:
        problems = dict(ready())
        if problems:
            return JSONResponse({"status": "unavailable", "problems": problems}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def exposition(_: Request) -> Response:
        return Response(metrics(), media_type="text/plain; version=0.0.4")

    return Starlette(
        routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", exposition)]
    )


class _Server(uvicorn.Server):
    """uvicorn within a program that handles signals itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    app: Starlette, *, host: str, port: int, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled; started when it listens.

    Raises ConfigurationError if the port can't be listened on.
    """
    try:
        listener = socket.create_server((host, port), backlog=_MAX_CONNECTIONS)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigurationError([f"HEALTH_PORT: can't listen on {host}:{port}: {why}"]) from error
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT,
    )
    server = _Server(config)
    # It listens already: who connects from now on is answered as soon as uvicorn runs.
    task_status.started()
    try:
        await server.serve(sockets=[listener])
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(2 * _SHUTDOWN_TIMEOUT):
            await server.shutdown(sockets=[listener])
        listener.close()
