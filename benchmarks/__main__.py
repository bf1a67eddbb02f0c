"""``python -m benchmarks [NAME …] [--json PATH] [--rounds N]``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from benchmarks import report
from benchmarks.ground import Ground
from benchmarks.measure import MEASURES, Finding
from dispatcher.cli.logging import configure

#: Files with measures, in the order they are run.
TOPICS = ("images", "registries", "starts")
LATEST = Path(__file__).parent / "results" / "latest.json"


def main() -> int:
    """Measure, print the table and write the JSON. A goal that was missed is told, and no failure."""
    for topic in TOPICS:
        importlib.import_module(f"benchmarks.{topic}")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(MEASURES)}; all by default")
    parser.add_argument(
        "--json", type=Path, default=LATEST, metavar="PATH", help="what to write (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each measure (%(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs have it")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in MEASURES]:
        parser.error(f"no such measure: {', '.join(unknown)}; there are {', '.join(MEASURES)}")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    # What is measured within this process says nothing of itself.
    configure("error", "json")
    findings: list[Finding] = []
    with Ground(rounds=arguments.rounds) as ground:
        for name in arguments.names or MEASURES:
            began = time.monotonic()
            print(f"{name} …", end=" ", file=sys.stderr, flush=True)
            findings += MEASURES[name](ground)
            print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
        engine = ground.client.version()
    if arguments.markdown:
        print(report.markdown(findings))
    else:
        report.show(findings)
    report.write(arguments.json, findings, rounds=arguments.rounds, engine=engine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
