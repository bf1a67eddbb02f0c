"""``demo``: the main job on a bare machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dispatcher.cli import output
from dispatcher.cli.exits import DONE, FAILED, tell
from dispatcher.cli.session import Session
from dispatcher.cli.tasks import Json

if TYPE_CHECKING:
    from dispatcher.cli.demo_run import Report

app = typer.Typer()

#: Small, and has all the programs the tasks need.
DEFAULT_IMAGE = "busybox"


@app.command()
def demo(
    context: typer.Context,
    json: Json = False,
    keep: Annotated[bool, typer.Option("--keep", help="Stay up afterwards, until Ctrl-C.")] = False,
    image: Annotated[
        str, typer.Option(metavar="IMAGE", help="Image of the tasks; it needs sh, echo and sleep.")
    ] = DEFAULT_IMAGE,
) -> None:
    """Show what it does, on this machine, in a minute.

    Starts a Redis and a dispatcher of its own, submits tasks that succeed, fail, retry, time out and
    more, and exits with 0 when each ended as it should. Uses Docker if it has the image or can get
    it, else child processes of this host.
    """
    settings = Session.of(context).load().settings
    import anyio

    from dispatcher.cli.demo_run import Demo
    from dispatcher.cli.logging import configure

    # Tasks that fail are meant to here; what the dispatcher logs of them would bury the show.
    configure("error", settings.log_format)
    reports: list[Report] = []

    def show(report: Report) -> None:
        reports.append(report)
        _json(report) if json else _table(report)
        wrong = [result.name for result in report.results if not result.ok]
        if wrong:
            tell(f"dispatcher: {len(wrong)} tasks did not end as they should: {', '.join(wrong)}")
        else:
            tell(f"dispatcher: all {len(report.results)} tasks ended as they should")

    anyio.run(Demo(settings, image, keep=keep, show=show).run)
    raise typer.Exit(DONE if reports and all(result.ok for result in reports[0].results) else FAILED)


def _json(report: Report) -> None:
    output.json_document(
        {
            "ok": all(result.ok for result in report.results),
            "backend": report.backend,
            "backend_reason": report.why,
            "image": report.image,
            "pulls": report.pulls,
            "seconds": round(report.seconds, 3),
            "tasks": report.results,
        }
    )


def _table(report: Report) -> None:
    output.table(
        ("TASK", "EXPECTED", "GOT", "ATTEMPTS", "EXIT", "SECONDS", "LAST LINE OF OUTPUT"),
        [
            (r.name, r.expected, r.got, r.attempts, r.exit_code, f"{r.seconds or 0:.1f}", r.output)
            for r in report.results
        ],
    )
