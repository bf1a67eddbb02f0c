"""``queues``, ``instances`` and ``dead``: what is seen of the whole system."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dispatcher.cli import output
from dispatcher.cli.exits import NOT_FOUND, exit_code_of, tell
from dispatcher.cli.session import Session
from dispatcher.cli.tasks import Json

if TYPE_CHECKING:
    from dispatcher.client import AsyncClient
    from dispatcher.errors import DispatcherError
    from dispatcher.queue.dead import DeadLetter

app = typer.Typer()
queues_app = typer.Typer(invoke_without_command=True, help="Show the queues; pause and resume them.")
dead_app = typer.Typer(no_args_is_help=True, help="The dead-letter queue.")
app.add_typer(queues_app, name="queues")
app.add_typer(dead_app, name="dead")

#: Pulls of one instance that a line shows; `--json` has them all.
MAX_PULLS = 3

DeadIds = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ID...]", show_default=False, help="Ids of tasks or of dead letters."),
]
EveryLetter = Annotated[bool, typer.Option("--all", help="All that are there now.")]
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
                "; ".join(_pulls(i.info)),
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


@dead_app.command(name="retry")
def dead_retry(
    context: typer.Context, ids: DeadIds = None, every: EveryLetter = False, json: Json = False
) -> None:
    """Make dead letters new tasks; print the new ids.

    The new task has an id of its own; idempotency key, delay and not_before of the original do not
    hold for it. What can't run as it is stays, is told on stderr and counts in the exit code.
    """
    _either(ids, every)
    asked: list[str] = []

    async def retry(client: AsyncClient) -> list[str | DispatcherError]:
        from dispatcher.client import AsyncHandle

        asked.extend(await client.dead_ids() if every else dict.fromkeys(ids or ()))
        answers = await client.retry_dead(asked)
        return [answer.id if isinstance(answer, AsyncHandle) else answer for answer in answers]

    answers = Session.of(context).ask(retry)
    made = {letter: answer for letter, answer in zip(asked, answers, strict=True) if isinstance(answer, str)}
    if json:
        output.json_document([{"dead": letter, "id": task_id} for letter, task_id in made.items()])
    else:
        output.text("".join(f"{task_id}\n" for task_id in made.values()))
    codes = [exit_code_of(answer) for answer in answers if not isinstance(answer, str)]
    if codes:
        raise typer.Exit(NOT_FOUND if NOT_FOUND in codes else codes[0])


@dead_app.command(name="drop")
def dead_drop(context: typer.Context, ids: DeadIds = None, every: EveryLetter = False) -> None:
    """Forget dead letters for good; print their ids."""
    _either(ids, every)
    asked: list[str] = []

    async def drop(client: AsyncClient) -> list[bool]:
        asked.extend(await client.dead_ids() if every else dict.fromkeys(ids or ()))
        return await client.drop_dead(asked)

    were_there = Session.of(context).ask(drop)
    output.text("".join(f"{letter}\n" for letter, there in zip(asked, were_there, strict=True) if there))
    missing = [letter for letter, there in zip(asked, were_there, strict=True) if not there]
    for letter in missing:
        tell(f"dispatcher: no dead letter {letter!r}")
    if missing:
        raise typer.Exit(NOT_FOUND)


def _either(ids: list[str] | None, every: bool) -> None:
    if bool(ids) == every:
        raise typer.BadParameter("name dead letters, or give --all", param_hint="ID")


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


def _pulls(info: dict[str, Any]) -> list[str]:
    """An instance's words on its pulls, and on the registries that it leaves alone."""
    pulls = info.get("pulls", [])
    found = [pull_progress(pull) for pull in pulls[:MAX_PULLS]]
    if len(pulls) > MAX_PULLS:
        found.append(f"{len(pulls) - MAX_PULLS} more")
    cooling = info.get("cooling", {})
    return [*found, *(f"{registry} is left alone for {_seconds(s)}" for registry, s in cooling.items())]


def pull_progress(pull: dict[str, Any]) -> str:
    """An instance's word on a pull, e.g. "busybox 1.2/3.4 MB (2 wait)"."""
    image, done, total = pull.get("image", "?"), pull.get("bytes_done", 0), pull.get("bytes_total", 0)
    if not pull.get("active", True):
        word = f"{image} waits for its turn"
    else:
        word = f"{image} {done / 1e6:.1f}/{total / 1e6:.1f} MB" if total else str(image)
    if pull.get("ahead"):
        return f"{word} (ahead)"
    return f"{word} ({pull['waiters']} wait)" if pull.get("waiters") else word


def _seconds(seconds: float | None) -> str:
    """A span as people say it."""
    if seconds is None:
        return ""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
