"""``status``, ``list``, ``logs``, ``cancel`` and ``wait``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dispatcher.cli import output
from dispatcher.cli.exits import FAILED, NOT_FOUND, TIMED_OUT, tell, tell_gap
from dispatcher.cli.pulls import pull_in_words
from dispatcher.cli.session import Session

if TYPE_CHECKING:
    from dispatcher.client import AsyncClient, TaskStatus

app = typer.Typer()

TaskId = Annotated[str, typer.Argument(metavar="ID", show_default=False, help="The task's id.")]
TaskIds = Annotated[list[str], typer.Argument(metavar="ID...", show_default=False, help="Tasks' ids.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def status(context: typer.Context, task_id: TaskId, json: Json = False) -> None:
    """Show one task."""
    found = Session.of(context).ask(lambda client: client.status(task_id))
    if json:
        output.json_document(found)
        return
    from dataclasses import fields

    shown = {field.name: getattr(found, field.name) for field in fields(found)}
    shown["pull"] = pull_in_words(found)
    rows = [(name.replace("_", " "), output.cell(value)) for name, value in shown.items()]
    width = max(len(name) for name, _ in rows)
    output.text("".join(f"{name:<{width}}  {value}\n" for name, value in rows if value))


@app.command(name="list")
def list_tasks(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(metavar="S", help="Only tasks in this state.")] = None,
    queue: Annotated[str | None, typer.Option(metavar="Q", help="Only tasks of this queue.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="At most so many.")] = 100,
    json: Json = False,
) -> None:
    """List tasks, the newest first."""
    from dispatcher.model import State

    if state is not None and state not in list(State):
        raise typer.BadParameter(f"{state!r} is none of {', '.join(State)}", param_hint="--state")
    wanted = State(state) if state else None
    found = Session.of(context).ask(lambda client: client.tasks(state=wanted, queue=queue, limit=limit))
    if json:
        output.json_document(found)
        return
    output.table(
        ("ID", "STATE", "REASON", "QUEUE", "ATTEMPT", "EXIT", "ACCEPTED", "MESSAGE"),
        [
            (
                t.id,
                t.state,
                t.reason,
                t.queue,
                t.attempt,
                t.exit_code,
                t.accepted_at,
                pull_in_words(t) or t.message,
            )
            for t in found
        ],
    )


@app.command()
def logs(
    context: typer.Context,
    task_id: TaskId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the task has ended.")] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", "-n", metavar="N", min=0, help="Begin with the last N lines.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a task's output, both streams, to stdout."""
    if json and follow:
        raise typer.BadParameter("one JSON document has an end: leave out --follow", param_hint="--json")

    async def show(client: AsyncClient) -> None:
        written = output.ContainerOutput()
        if follow:
            async for piece in client.output(task_id, follow=True, lines=tail, on_gap=tell_gap):
                written.write(piece)
            return
        kept = await client.tail(task_id)
        if json:
            document = {"id": task_id, "attempt": None, "total_bytes": 0, "dropped_bytes": 0, "output": ""}
            if kept is not None:
                data = kept.data if tail is None else kept.last(tail)
                document |= {"attempt": kept.attempt, "total_bytes": kept.total}
                document |= {"dropped_bytes": kept.dropped, "output": data.decode("utf-8", "replace")}
            output.json_document(document)
        elif kept is not None:
            if kept.dropped and tail is None:
                tell_gap(kept.dropped)
            written.write(kept.data if tail is None else kept.last(tail))

    Session.of(context).ask(show)


@app.command()
def cancel(context: typer.Context, task_ids: TaskIds, json: Json = False) -> None:
    """Cancel tasks; print their ids.

    One that runs is stopped by its instance: `dispatcher wait ID` waits for that. One that has
    ended stays as it ended, and its id is not printed.
    """

    async def ask(client: AsyncClient) -> list[TaskStatus | None]:
        return [await _cancelled(client, task_id) for task_id in task_ids]

    answers = Session.of(context).ask(ask)
    found = [status for status in answers if status is not None]
    if json:
        output.json_document(found)
    for status in found:
        if status.state.terminal and status.state != "cancelled":
            tell(f"dispatcher: task {status.id} had ended before: {status.state}")
        elif not json:
            output.line(status.id)
    if len(found) < len(answers):
        raise typer.Exit(NOT_FOUND)


async def _cancelled(client: AsyncClient, task_id: str) -> TaskStatus | None:
    from dispatcher.errors import TaskNotFound

    try:
        return await client.cancel(task_id)
    except TaskNotFound as error:
        tell(f"dispatcher: {error}")
        return None


@app.command()
def wait(
    context: typer.Context,
    task_ids: TaskIds,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="At most so many seconds.")
    ] = None,
    json: Json = False,
) -> None:
    """Wait until tasks have ended.

    Prints id, state, reason and exit code of each as it ends. Exits with 0 if all succeeded, 1 if
    one did not, 3 if one is not known, 124 when the time is over.
    """
    import anyio

    ended: dict[str, TaskStatus] = {}
    unknown: list[str] = []

    async def one(client: AsyncClient, task_id: str) -> None:
        from dispatcher.errors import TaskNotFound

        try:
            status = await client.wait(task_id)
        except TaskNotFound as error:
            unknown.append(task_id)
            tell(f"dispatcher: {error}")
            return
        ended[task_id] = status
        if not json:
            code = "-" if status.exit_code is None else status.exit_code
            output.line(f"{task_id} {status.state} {status.reason or '-'} {code}")

    async def every(client: AsyncClient) -> None:
        with anyio.move_on_after(timeout):
            async with anyio.create_task_group() as group:
                for task_id in dict.fromkeys(task_ids):
                    group.start_soon(one, client, task_id, name=f"wait {task_id}")

    Session.of(context).ask(every)
    missing = [task_id for task_id in dict.fromkeys(task_ids) if task_id not in {*ended, *unknown}]
    if json:
        output.json_document([ended[task_id] for task_id in task_ids if task_id in ended])
    if unknown:
        raise typer.Exit(NOT_FOUND)
    if missing:
        tell(f"dispatcher: not ended within {timeout:g} s: {' '.join(missing)}")
        raise typer.Exit(TIMED_OUT)
    if any(status.state != "succeeded" for status in ended.values()):
        raise typer.Exit(FAILED)
