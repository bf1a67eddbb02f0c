"""``/healthz``, ``/readyz`` and ``/metrics`` of one instance, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import anyio
import uvicorn
from anyio.abc import TaskStatus
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dispatcher.errors import ConfigurationError

#: Seconds between looks at whether the server has begun to listen.
_LOOK = 0.02
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
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)

    async def listening(scope: anyio.CancelScope) -> None:
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event to wait for
            await anyio.sleep(_LOOK)
        task_status.started()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(listening, group.cancel_scope, name="health listening")
            await server.serve()
            group.cancel_scope.cancel()
    except* SystemExit as exits:  # uvicorn's way to say that it could not bind
        raise ConfigurationError([f"HEALTH_PORT: can't listen on {host}:{port}"]) from exits
