"""``queues``, ``instances`` and ``dead``: what is seen of the whole system."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dispatcher.cli import output
from dispatcher.cli.session import Session
from dispatcher.cli.tasks import Json

if TYPE_CHECKING:
    from dispatcher.client import AsyncClient
    from dispatcher.queue.views import DeadLetter

app = typer.Typer()
queues_app = typer.Typer(invoke_without_command=True, help="Show the queues; pause and resume them.")
dead_app = typer.Typer(no_args_is_help=True, help="The dead-letter queue.")
app.add_typer(queues_app, name="queues")
app.add_typer(dead_app, name="dead")

Queue = Annotated[str, typer.Argument(metavar="QUEUE", show_default=False, help="The queue's name.")]


@queues_app.callback()
def queues(context: typer.Context, json: Json = False) -> None:
    """Show the queues: what waits, how long, what runs; pause and resume them."""
    if context.invoked_subcommand is not None:
        return
    found = Session.of(context).ask(lambda client: client.queues())
    if json:
        output.json_document(found)
        return
    output.table(
        ("QUEUE", "WAITING", "IN FLIGHT", "OLDEST", "ENDED/MIN", "PAUSED"),
        [
            (q.name, q.depth, q.in_flight, _seconds(q.oldest_seconds), q.finished_last_minute, q.paused)
            for q in found
        ],
    )


@queues_app.command()
def pause(context: typer.Context, queue: Queue) -> None:
    """Let no instance take new tasks of a queue; what runs goes on."""
    Session.of(context).ask(lambda client: client.pause(queue))


@queues_app.command()
def resume(context: typer.Context, queue: Queue) -> None:
    """Let instances take tasks of a queue again."""
    Session.of(context).ask(lambda client: client.resume(queue))


@app.command()
def instances(context: typer.Context, json: Json = False) -> None:
    """Show the instances that are alive."""
    found = Session.of(context).ask(lambda client: client.instances())
    if json:
        output.json_document(found)
        return
    output.table(
        ("INSTANCE", "STATE", "BACKEND", "BUSY", "HELD", "PULLS", "SEEN"),
        [
            (
                i.id,
                i.info.get("state"),
                i.info.get("backend"),
                f"{i.info.get('busy', '?')}/{i.info.get('consumers', '?')}",
                i.info.get("held"),
                "; ".join(pull_progress(pull) for pull in i.info.get("pulls", [])),
                _seconds(i.seen_seconds),
            )
            for i in found
        ],
    )


@dead_app.command(name="list")
def dead_list(
    context: typer.Context,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="At most so many.")] = 100,
    json: Json = False,
) -> None:
    """List dead letters, the newest first: tasks that could not be run as they were written."""

    async def ask(client: AsyncClient) -> list[DeadLetter]:
        return await client.dead(limit=limit)

    found = Session.of(context).ask(ask)
    if json:
        output.json_document([_dead_letter(letter) for letter in found])
        return
    output.table(
        ("ID", "REASON", "QUEUE", "FINISHED", "BYTES", "MESSAGE"),
        [(d.id, d.reason, d.queue, d.finished_at, d.task_bytes, d.message) for d in found],
    )


def _dead_letter(letter: DeadLetter) -> dict[str, Any]:
    """As JSON: the original bytes as a string, or in base64 where they are no UTF-8."""
    from dataclasses import fields

    document = {field.name: getattr(letter, field.name) for field in fields(letter)}
    document["task_base64"] = None
    if letter.task is not None:
        try:
            document["task"] = letter.task.decode("utf-8")
        except UnicodeDecodeError:
            document["task"] = None
            document["task_base64"] = base64.b64encode(letter.task).decode("ascii")
    return document


def pull_progress(pull: dict[str, Any]) -> str:
    """An instance's word on a pull, e.g. "busybox 1.2/3.4 MB"."""
    image, done, total = pull.get("image", "?"), pull.get("bytes_done", 0), pull.get("bytes_total", 0)
    if not pull.get("active", True):
        return f"{image} waits for its turn"
    return f"{image} {done / 1e6:.1f}/{total / 1e6:.1f} MB" if total else str(image)


def _seconds(seconds: float | None) -> str:
    """A span as people say it."""
    if seconds is None:
        return ""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
