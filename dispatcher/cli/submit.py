"""``submit``: a task from options, a file or both; and what becomes of it, if one wants to see."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from dispatcher.cli import output
from dispatcher.cli.exits import Stopped, exit_code_of_task, tell
from dispatcher.cli.session import Session

if TYPE_CHECKING:
    from dispatcher.client import AsyncClient, Task, TaskStatus

app = typer.Typer()

_COMMAND = "dispatcher.command"


class _WithCommand(TyperCommand):
    """A command line whose part after ``--`` is another one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Set what follows the first ``--`` aside; none of it is an option of ours."""
        if "--" in args:
            at = args.index("--")
            args, ctx.meta[_COMMAND] = args[:at], args[at + 1 :]
        return super().parse_args(ctx, args)


def _option(*names: str, metavar: str, help: str) -> Any:  # noqa: A002 - typer's own name for it
    return typer.Option(*names, metavar=metavar, help=help, show_default=False)


@app.command(cls=_WithCommand, context_settings={"allow_extra_args": True})
def submit(
    context: typer.Context,
    *,
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE [-- CMD ...]", show_default=False, help="Image to run, and the command in it."
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        _option("--env", "-e", metavar="K=V", help="Environment variable; K alone takes it from here."),
    ] = None,
    entrypoint: Annotated[
        str | None, _option("--entrypoint", metavar="PROGRAM", help="Program instead of the image's own.")
    ] = None,
    workdir: Annotated[
        str | None, _option("--workdir", "-w", metavar="DIR", help="Working directory in the container.")
    ] = None,
    user: Annotated[
        str | None, _option("--user", "-u", metavar="USER", help="Name, uid or uid:gid to run as.")
    ] = None,
    cpus: Annotated[float | None, _option("--cpus", metavar="N", help="Processors, e.g. 0.5.")] = None,
    memory: Annotated[
        str | None, _option("--memory", "-m", metavar="SIZE", help="Memory limit, e.g. 256m.")
    ] = None,
    pids: Annotated[
        int | None, _option("--pids-limit", metavar="N", help="Limit on processes and threads.")
    ] = None,
    network: Annotated[
        str | None, _option("--network", metavar="NAME", help="none, or a network the operator allows.")
    ] = None,
    pull_policy: Annotated[
        str | None, _option("--pull-policy", "--pull", metavar="WHEN", help="missing, always or never.")
    ] = None,
    label: Annotated[
        list[str] | None, _option("--label", "-l", metavar="K=V", help="Label of the container.")
    ] = None,
    queue: Annotated[str | None, _option("--queue", "-q", metavar="Q", help="Queue to wait in.")] = None,
    timeout: Annotated[
        float | None, _option("--timeout", metavar="S", help="Seconds the container may run.")
    ] = None,
    grace_period: Annotated[
        float | None, _option("--grace-period", metavar="S", help="Seconds from SIGTERM to SIGKILL.")
    ] = None,
    max_attempts: Annotated[
        int | None, _option("--max-attempts", metavar="N", help="Attempts in all, if it fails.")
    ] = None,
    task_id: Annotated[str | None, _option("--id", metavar="ID", help="The task's id.")] = None,
    idempotency_key: Annotated[
        str | None, _option("--idempotency-key", metavar="K", help="The same key gives the same task.")
    ] = None,
    delay: Annotated[float | None, _option("--delay", metavar="S", help="Seconds to hold it back.")] = None,
    not_before: Annotated[
        str | None, _option("--not-before", metavar="TIME", help="RFC 3339 time to hold it back until.")
    ] = None,
    expires_at: Annotated[
        str | None, _option("--expires-at", metavar="TIME", help="RFC 3339 time to give it up at.")
    ] = None,
    file: Annotated[
        str | None, _option("--file", "-f", metavar="FILE", help="The task as JSON; - reads stdin.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait, and exit with its exit code.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="--wait, and write its output to stdout.")] = False,
) -> None:
    """Hand a task in; print its id.

    With --wait the exit code is the container's, or 125 if it never had one. With --follow stdout
    is the container's alone, and the id goes to stderr.
    """
    if context.args:
        raise typer.BadParameter(
            f"write the command after --, as in: dispatcher submit {image} -- {' '.join(context.args)}",
            param_hint="CMD",
        )
    resources = {"cpus": cpus, "memory": _size(memory), "pids": pids}
    given = {
        "image": image,
        "command": context.meta.get(_COMMAND),
        "entrypoint": None if entrypoint is None else [entrypoint] if entrypoint else [],
        "env": _environment(env or []),
        "workdir": workdir,
        "user": user,
        "resources": {name: value for name, value in resources.items() if value is not None},
        "network": network,
        "pull_policy": pull_policy,
        "labels": _pairs(label or [], "--label"),
        "queue": queue,
        "timeout": timeout,
        "grace_period": grace_period,
        "max_attempts": max_attempts,
        "id": task_id,
        "idempotency_key": idempotency_key,
        "delay": delay,
        "not_before": not_before,
        "expires_at": expires_at,
    }
    if image is None and file is None:
        raise typer.BadParameter("name an image, or a --file with a task", param_hint="IMAGE")
    task = _task(file, {name: value for name, value in given.items() if value not in (None, {})})
    session = Session.of(context)
    if not (wait or follow):
        output.line(session.ask(lambda client: _submitted(client, task)))
        return
    ended = _seen_through(session, task, follow=follow)
    if ended.state != "succeeded":
        reason = f" ({ended.reason}: {ended.message})" if ended.reason else f" ({ended.message})"
        tell(f"dispatcher: task {ended.id} {ended.state}{reason}")
    raise typer.Exit(exit_code_of_task(ended.state, ended.exit_code))


async def _submitted(client: AsyncClient, task: Task) -> str:
    return (await client.submit(task)).id


def _seen_through(session: Session, task: Task, *, follow: bool) -> TaskStatus:
    from dispatcher.cli.progress import watched

    accepted: list[str] = []

    async def work(client: AsyncClient) -> TaskStatus:
        task_id = await _submitted(client, task)
        accepted.append(task_id)
        if follow:
            tell(f"dispatcher: task {task_id}")
        else:
            output.line(task_id)
        return await watched(client, task_id, image=str(task.reference), follow=follow)

    try:
        return session.ask(work)
    except Stopped:
        if accepted:
            tell(f"dispatcher: task {accepted[0]} goes on; `dispatcher cancel {accepted[0]}` ends it")
        raise


# --- the document -----------------------------------------------------------------------


def _task(file: str | None, given: dict[str, Any]) -> Task:
    """The task of the file, with what the options say put over it. Raises InvalidTask."""
    from dispatcher.queue.wire import parse_document

    if file is None:
        return parse_document(_encoded(given))
    document = _read(file)
    if not given:
        return parse_document(document)
    try:
        base = json.loads(document)
    except ValueError:
        return parse_document(document)  # says what is wrong with it, as it does for every task
    if not isinstance(base, dict):
        return parse_document(document)
    for name in ("env", "labels", "resources"):
        if name in given and isinstance(base.get(name), dict):
            given[name] = {**base[name], **given[name]}
    return parse_document(_encoded({**base, **given}))


def _encoded(document: dict[str, Any]) -> bytes:
    # What is no Unicode on the command line is refused by who parses it, not by us.
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogateescape")


def _read(file: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"can't read {file}: {error.strerror}", param_hint="--file") from error


def _size(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else text


def _environment(given: list[str]) -> dict[str, str]:
    """K=V as it is; K alone with the value it has here, or left out if it has none."""
    found = [item if "=" in item else f"{item}={os.environ[item]}" for item in given
             if "=" in item or item in os.environ]  # fmt: skip
    return _pairs(found, "--env")


def _pairs(given: list[str], option: str) -> dict[str, str]:
    for item in given:
        if item.startswith("=") or not item:
            raise typer.BadParameter(f"write K=V, not {item!r}", param_hint=option)
    return {name: value for name, _, value in (item.partition("=") for item in given)}
