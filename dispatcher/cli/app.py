"""The root command: global options, and every other command put under it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dispatcher import __version__
from dispatcher.cli import configuration, demo, dev, queues, serve, submit, tasks
from dispatcher.cli.session import Session

app = typer.Typer(
    name="dispatcher",
    help="Runs containers from a Redis queue.",
    epilog="Settings come from flags, the environment, --config FILE and defaults, in this order: "
    "see `dispatcher config`.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dispatcher {__version__}")
        raise typer.Exit


def _flags(pairs: list[str]) -> dict[str, str]:
    flags = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"write NAME=VALUE, not {pair!r}", param_hint="--set")
        flags[name.lower()] = value
    return flags


@app.callback()
def root(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read settings from this TOML file.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Set any setting; may be repeated."),
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Redis with the queue: the setting REDIS_URL.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Runs containers from a Redis queue."""
    flags = _flags(assignments or [])
    if redis_url is not None:
        flags["redis_url"] = redis_url
    context.obj = Session(config, flags)


for commands in (demo, dev, serve, submit, tasks, queues, configuration):
    app.add_typer(commands.app)
