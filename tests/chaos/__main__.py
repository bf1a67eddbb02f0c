"""The long form: ``python -m tests.chaos --seed 7 --minutes 20 [--backend docker]``.

Plays one slice, prints its seed and a table, adds it to docs/reliability/slices.jsonl and
writes the tables of docs/reliability.md anew from all slices. Exits with 1 if the invariant
did not hold; what the world was made of is kept then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import docker

from tests.chaos import report
from tests.chaos.ground import DockerGround, Ground, ProcessGround
from tests.chaos.slices import Parameters, Slice, play
from tests.support.engine import IMAGE, EngineUnderTest, image_archive, private_engine

#: A slice is at most so long: whoever looks at it finds it in one log.
MOST_MINUTES = 20.0
#: Tasks kept open and seconds between faults, by backend: what two cores bear. More open tasks
#: only wait longer; faults that come faster leave the machine to starting dispatchers.
PARAMETERS = {"process": (60, 1.2), "docker": (24, 2.5)}


def main() -> int:
    """Play a slice."""
    arguments = _arguments()
    backlog, pace = PARAMETERS[arguments.backend]
    parameters = Parameters(
        arguments.seed, arguments.minutes * 60, arguments.backlog or backlog, arguments.pace or pace
    )
    print(f"seed {parameters.seed}, backend {arguments.backend}, {arguments.minutes:g} minutes", flush=True)
    # Short: the path of a Unix socket holds 107 characters.
    home = Path(tempfile.mkdtemp(prefix="chaos-"))
    with _ground(arguments.backend, home) as ground:
        played = play(ground, home, parameters)
    record = report.record_of(played)
    print(report.tables([record]))
    _tell(played)
    if not arguments.dry:
        report.rewrite(report.append(record))
    if played.problems or arguments.keep:
        print(f"kept: {home}")
    else:
        shutil.rmtree(home)
    return 1 if played.problems else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="default: any")
    parser.add_argument("--minutes", type=float, default=MOST_MINUTES, help=f"at most {MOST_MINUTES:g}")
    parser.add_argument("--backend", choices=PARAMETERS, default="process")
    parser.add_argument("--backlog", type=int, help="tasks kept open")
    parser.add_argument("--pace", type=float, help="seconds between faults, on average")
    parser.add_argument("--keep", action="store_true", help="keep what the world was made of")
    parser.add_argument("--dry", action="store_true", help="add it to no report")
    arguments = parser.parse_args()
    if not 0 < arguments.minutes <= MOST_MINUTES:
        parser.error(f"--minutes: at most {MOST_MINUTES:g}; slices add up")
    return arguments


@contextlib.contextmanager
def _ground(backend: str, home: Path) -> Iterator[Ground]:
    if backend == "process":
        yield ProcessGround(home)
        return
    with contextlib.ExitStack() as stack:
        base_url = os.environ.get("TEST_DOCKER_HOST")
        if base_url:
            client = stack.enter_context(contextlib.closing(docker.APIClient(base_url)))
        else:
            client, base_url, _ = stack.enter_context(private_engine())
        repository, _, tag = IMAGE.partition(":")
        client.import_image_from_data(image_archive(), repository=repository, tag=tag)
        yield DockerGround(EngineUnderTest(base_url, client, IMAGE, "none"))


def _tell(played: Slice) -> None:
    for name, what in played.problems.items():
        print(f"PROBLEM {name}: {what}")
    print(f"left behind: {len(played.findings.left)} {played.findings.left[:5]}")
    print(f"faults that did not come about: {len(played.missed)} {played.missed[:5]}")
    print(f"logged: {json.dumps(dict(sorted(played.complaints.items())), indent=2)}")


if __name__ == "__main__":
    raise SystemExit(main())
