"""Slices as JSON lines that add up, and as the tables of docs/reliability.md."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos.slices import Slice

ROOT = Path(__file__).parents[2]
SLICES = ROOT / "docs" / "reliability" / "slices.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
#: What the tables stand between.
BEGIN = "<!-- chaos: begin; written by `make chaos` -->"
END = "<!-- chaos: end -->"

#: A record of a slice, as it is written.
Record = Mapping[str, Any]


def record_of(played: Slice) -> dict[str, Any]:
    """What is kept of a slice: enough to add it to others, and to find out what went wrong."""
    bad = played.findings.task_ids
    lost = {*played.findings.lost}
    duplicated = {task_id for task_id, _ in played.findings.duplicated}
    faults: dict[str, dict[str, Any]] = {}
    for mark in played.marks:
        row = faults.setdefault(
            mark.fault,
            {"times": 0, "tasks": 0, "lost": 0, "duplicated": 0, "adopted": 0, "unrecovered": 0, "s": []},
        )
        row["times"] += 1
        row["tasks"] += len(mark.touched)
        row["lost"] += len(mark.touched & lost)
        row["duplicated"] += len(mark.touched & duplicated)
        row["adopted"] += mark.adopted
        if mark.seconds is None:
            row["unrecovered"] += 1
        else:
            row["s"].append(round(mark.seconds, 2))
    return {
        "backend": played.backend,
        "version": _version(),
        **asdict(played.parameters),
        "lasted": round(played.seconds),
        "accepted": played.accepted,
        "maybe": played.maybe,
        "results": played.results,
        "cancelled": played.cancelled,
        "starts": played.starts,
        "lost": len(lost),
        "duplicated": len(duplicated),
        "wrong_tasks": len(bad),
        "left": len(played.findings.left),
        "problems": {name: str(what)[:2000] for name, what in played.problems.items()},
        "missed": len(played.missed),
        "faults": faults,
        "rss_kb": played.rss_kb and asdict(played.rss_kb),
        "descriptors": played.descriptors and asdict(played.descriptors),
        "complaints": played.complaints,
    }


def _version() -> str:
    """The commit it was played on; with a ``+`` where files were changed."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip()


def append(record: Record, slices: Path = SLICES) -> list[Record]:
    """Add a slice to the others; all of them."""
    slices.parent.mkdir(parents=True, exist_ok=True)
    with slices.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, sort_keys=True) + "\n")
    return [json.loads(line) for line in slices.read_text("utf-8").splitlines()]


def rewrite(records: Sequence[Record], page: Path = PAGE) -> None:
    """Put the tables of all slices between the marks of the page."""
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables(records)}\n{END}{after}", "utf-8")


def tables(records: Sequence[Record]) -> str:
    """Markdown: for each backend what was done, and what came of it."""
    return "\n".join(
        _of_backend(backend, [record for record in records if record["backend"] == backend])
        for backend in sorted({record["backend"] for record in records})
    )


def _of_backend(backend: str, records: Sequence[Record]) -> str:
    total = {
        name: sum(r[name] for r in records) for name in ("accepted", "starts", "lost", "duplicated", "lasted")
    }
    rows = added_up(records)
    times = sum(row["times"] for row in rows.values())
    told = (
        f"{len(records)} slices, {total['lasted'] / 60:.0f} minutes, {times:,} faults, "
        f"{total['accepted']:,} tasks accepted, {total['starts']:,} starts: "
        f"**{total['lost']} lost, {total['duplicated']} started twice**."
    )
    lines = [
        f"### Backend `{backend}`",
        "",
        told,
        "",
        "| fault | times | lost | duplicated | adopted | recovered in s: median | worst |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_line(name, row) for name, row in sorted(rows.items())),
        "",
        "| seed | version | faults | tasks | tasks/s | memory, MiB | descriptors | problems |",
        "|---:|---|---:|---:|---:|---|---|---|",
        *(_slice_line(record) for record in records),
        "",
        "Memory and descriptors: of the instance that is never killed, at first, at last, at most.",
        "",
    ]
    return "\n".join(lines)


def added_up(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """The rows of all slices, by fault."""
    rows: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"times": 0, "lost": 0, "duplicated": 0, "adopted": 0, "unrecovered": 0, "s": []}
    )
    for record in records:
        for name, counts in record["faults"].items():
            for key in rows[name]:
                rows[name][key] += counts[key]
    return dict(rows)


def _line(name: str, row: Mapping[str, Any]) -> str:
    seconds = row["s"]
    median, worst = (f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}") if seconds else ("–", "–")
    if row["unrecovered"]:
        worst = f"not in time: {row['unrecovered']}"
    return (
        f"| {name} | {row['times']} | {row['lost']} | {row['duplicated']} | {row['adopted']} "
        f"| {median} | {worst} |"
    )


def _slice_line(record: Record) -> str:
    faults = sum(row["times"] for row in record["faults"].values())
    memory = record["rss_kb"] or {}
    mib = ", ".join(f"{kb / 1024:.0f}" for kb in memory.values())
    descriptors = ", ".join(str(number) for number in (record["descriptors"] or {}).values())
    return (
        f"| {record['seed']} | {record['version']} | {faults} | {record['accepted']:,} "
        f"| {record['accepted'] / record['lasted']:.1f} | {mib} | {descriptors} "
        f"| {', '.join(record['problems']) or 'none'} |"
    )
