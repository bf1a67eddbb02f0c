"""``serve``: one dispatcher instance, for production."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from dispatcher.cli.session import Session
from dispatcher.errors import ConfigurationError

app = typer.Typer()


@app.command()
def serve(
    context: typer.Context,
    num_consumers: Annotated[
        str | None, typer.Option(metavar="N", help="Containers it runs at once: NUM_CONSUMERS.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where containers run: BACKEND.")
    ] = None,
    health_port: Annotated[
        str | None, typer.Option(metavar="PORT", help="/healthz, /readyz, /metrics: HEALTH_PORT.")
    ] = None,
) -> None:
    """Run one dispatcher instance; any number may share a queue.

    Waits for Redis and the backend until they are there. SIGTERM and SIGINT drain it, and it exits
    with 0; a second signal leaves running containers to other instances at once.
    """
    settings = Session.of(context).settings(
        num_consumers=num_consumers, backend=backend, health_port=health_port
    )
    import anyio

    from dispatcher import failpoints
    from dispatcher.backends import load_backend
    from dispatcher.cli.instance import Instance, attend

    if specification := os.environ.get("DISPATCHER_FAILPOINT"):
        if not settings.allow_failpoints:
            raise ConfigurationError(["DISPATCHER_FAILPOINT: is for tests; it needs ALLOW_FAILPOINTS=true"])
        failpoints.arm(specification)

    async def served() -> int:
        instance = Instance(settings, lambda: load_backend(settings, allow_process=False))
        # All interfaces: whoever probes and scrapes is another host as a rule.
        health = ("0.0.0.0", settings.health_port) if settings.health_port else None  # noqa: S104
        return await attend(instance, health=health)

    raise typer.Exit(anyio.run(served))
