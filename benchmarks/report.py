"""A table for people, JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Finding

_SIGNS = {"most": "≤", "least": "≥"}


def row(finding: Finding) -> list[str]:
    """A finding as the table has it."""
    floor = "" if finding.floor is None else f"{finding.floor:.3g} {finding.unit} ({finding.against})"
    goal = f"{_SIGNS[finding.bound]} {finding.goal:g}"
    return [
        f"{finding.what} [{finding.batch}]",
        f"{finding.ours:.3g} {finding.unit}",
        floor,
        "" if finding.ratio is None else f"{finding.ratio:.2f}",
        goal if finding.judged == "ratio" else f"{goal} {finding.unit}",
        "yes" if finding.met else "NO",
    ]


HEADINGS = ["measure", "ours", "floor or peer", "ratio", "goal", "met"]


def show(findings: Iterable[Finding]) -> None:
    """Print the table."""
    table = Table(*HEADINGS, show_lines=True)
    for finding in findings:
        table.add_row(*row(finding))
    Console(markup=False).print(table)


def markdown(findings: Iterable[Finding]) -> str:
    """The table as docs/performance.md has it."""
    rows = [HEADINGS, ["---"] * len(HEADINGS), *map(row, findings)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def write(path: Path, findings: Sequence[Finding], *, rounds: int, engine: dict[str, Any]) -> None:
    """Write all that is known of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "processors": os.cpu_count(),
        "load_at_end": os.getloadavg()[0],
        "engine": engine.get("Version", ""),
        "rounds": rounds,
        "findings": [
            {**asdict(f), "ours": f.ours, "floor": f.floor, "ratio": f.ratio, "met": f.met} for f in findings
        ],
    }
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
