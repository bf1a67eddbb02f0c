"""``dev``: one process for a developer's desk."""

from __future__ import annotations

import fcntl
import os
import shlex
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dispatcher.cli.exits import tell
from dispatcher.cli.session import Session

if TYPE_CHECKING:
    from dispatcher.backends.base import Backend
    from dispatcher.settings import Settings

app = typer.Typer()

#: Where the health endpoints are looked for first.
PREFERRED_PORT = 8080


@app.command()
def dev(
    context: typer.Context,
    port: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=65_535, help="Loopback port of /healthz, /readyz, /metrics."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where queue and results are kept from one run to the next."),
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Use this Redis instead of starting one.")
    ] = None,
) -> None:
    """Run everything in one process, to work with.

    That is a real Redis and a dispatcher. It uses Docker if it answers, else child processes of this
    host. Ctrl-C drains, twice forces.
    """
    session = Session.of(context)
    loaded = session.load(redis_url=redis_url)
    given = loaded.sources["redis_url"] == "flag"
    directory = (data_dir or _default_data_dir()).absolute()
    import anyio

    from dispatcher.cli.embedded import free_port
    from dispatcher.cli.engine import survey
    from dispatcher.cli.instance import Instance, attend
    from dispatcher.cli.logging import configure

    configure(loaded.settings.log_level, loaded.settings.log_format)

    async def developed() -> int:
        flags: dict[str, str] = {"process_directory": str(directory / "process")}
        if loaded.sources["backend"] != "default":
            flags["backend"] = loaded.settings.backend
        why = "" if "backend" in flags else (await survey(loaded.settings)).problem
        if why:
            flags["backend"] = "process"
        async with _queue(directory, loaded.settings.queue_redis if given else None) as url:
            if not given:  # nothing of a queue of our own lies elsewhere
                flags["state_redis_url"] = url
            settings = session.load(**flags, redis_url=url).settings
            health = ("127.0.0.1", port or settings.health_port or free_port(PREFERRED_PORT))
            instance = Instance(settings, lambda: _backend(settings))
            return await attend(
                instance,
                health=health,
                on_started=lambda: _welcome(settings, health, why),
                on_signal=lambda n: tell(_FAREWELLS[min(n, 3) - 1]),
            )

    with _locked(directory):
        raise typer.Exit(anyio.run(developed))


_FAREWELLS = (
    "dispatcher: draining: running tasks have their time to end; once more to leave them behind",
    "dispatcher: leaving running tasks behind; the next start finds them again",
    "dispatcher: ending at once",
)


def _backend(settings: Settings) -> Backend:
    from dispatcher.backends import load_backend

    return load_backend(settings, allow_process=True)


@asynccontextmanager
async def _queue(directory: Path, url: str | None) -> AsyncGenerator[str]:
    """The Redis to use: ``url``, or one of our own on the usual port if that is free."""
    if url is not None:
        yield url
        return
    from dispatcher.cli.embedded import DEFAULT_PORT, embedded_redis, free_port

    files = directory / "redis"
    files.mkdir(parents=True, exist_ok=True)
    async with embedded_redis(files, port=free_port(DEFAULT_PORT)) as own:
        yield own


def _welcome(settings: Settings, health: tuple[str, int], why_no_docker: str) -> None:
    """What one needs to know to begin, on stderr."""
    from dispatcher.redis_url import masked

    url = settings.queue_redis
    if settings.backend == "process":
        backend = "process: tasks run as child processes of this host, with no isolation"
        task = ["any/image", "--", "sh", "-c", "echo hello"]
    else:
        backend, task = settings.backend, ["busybox", "--", "echo", "hello"]
    if why_no_docker:
        tell(f"dispatcher: {why_no_docker}; using the process backend")
    program = "dispatcher" if Path(sys.argv[0]).name == "dispatcher" else "python -m dispatcher"
    submit = f"{program} {shlex.join(['--redis-url', masked(url), 'submit', '--follow', *task])}"
    tell(
        f"  Redis    {masked(url)}\n"
        f"  backend  {backend}\n"
        f"  health   http://{health[0]}:{health[1]}/readyz\n"
        f"  try      {submit}\n"
        f"  Ctrl-C drains, twice forces."
    )


def _default_data_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "dispatcher" / "dev"


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep the directory to ourselves: two servers on one append-only file would ruin it.

    Raises ConfigurationError.
    """
    from dispatcher.errors import ConfigurationError

    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (directory / "lock").open("w")
    except OSError as error:
        raise ConfigurationError([f"--data-dir: can't use {directory}: {error.strerror}"]) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError([f"--data-dir: another `dispatcher dev` uses {directory}"]) from error
        yield
