"""What one call of the program was given, and how its commands run."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from dispatcher.client import AsyncClient
    from dispatcher.settings import Loaded, Settings

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """The global options."""

    config: Path | None = None
    flags: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, context: typer.Context) -> Session:
        """The one that the root command made."""
        session = context.find_root().obj
        assert isinstance(session, Session)
        return session

    def load(self, **flags: Any) -> Loaded:
        """All settings, those a command has flags of its own for among them.

        Raises ConfigurationError.
        """
        from dispatcher.settings import load

        given = {name: value for name, value in flags.items() if value is not None}
        return load({**self.flags, **given}, self.config)

    def settings(self, **flags: Any) -> Settings:
        """``load`` with logging set up as the settings say."""
        from dispatcher.cli.logging import configure

        settings = self.load(**flags).settings
        configure(settings.log_level, settings.log_format)
        return settings

    def ask(self, verb: Callable[[AsyncClient], Awaitable[T]]) -> T:
        """Do ``verb`` with a client of the queue; a signal ends it, see ``run``.

        Raises what the verb does, QueueUnavailable.
        """
        settings = self.load().settings

        async def asked() -> T:
            async with client_of(settings) as client:
                # Before anything that is repeated: who can't be reached is told at once.
                await client.ping()
                return await verb(client)

        return run(asked)


def client_of(settings: Settings) -> AsyncClient:
    """A client of the queue that ``settings`` name."""
    from dispatcher.client import AsyncClient

    return AsyncClient(
        settings.queue_redis, stream=settings.queue_stream_name, state_url=settings.state_redis
    )


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run ``work`` in an event loop. SIGINT and SIGTERM cancel it.

    Raises Stopped after a signal.
    """
    import anyio

    from dispatcher.cli.exits import Stopped

    async def guarded() -> T:
        caught = 0
        answer: list[T] = []

        async def watch() -> None:
            nonlocal caught
            async for signum in signals:
                caught = signum
                group.cancel_scope.cancel()
                return

        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with anyio.create_task_group() as group:
                group.start_soon(watch, name="signals")
                answer.append(await work())
                group.cancel_scope.cancel()
        if not answer:
            raise Stopped(caught)
        return answer[0]

    return anyio.run(guarded)
