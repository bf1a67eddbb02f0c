"""Slices add up, and the page says what they say."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.checker import Account, check
from tests.chaos.report import BEGIN, END, append, record_of, rewrite
from tests.chaos.slices import Parameters, Slice
from tests.chaos.storm import Mark
from tests.chaos.truth import Result
from tests.chaos.vitals import Range


def played(*marks: Mark, account: Account) -> Slice:
    return Slice(
        parameters=Parameters(7, seconds=60, backlog=1, pace=1),
        backend="process",
        seconds=60,
        accepted=len(account.accepted),
        maybe=0,
        results=len(account.results),
        cancelled=0,
        starts=sum(account.starts.values()),
        marks=marks,
        missed=(),
        broken=(),
        findings=check(account),
        complaints={},
        rss_kb=Range(1024, 2048, 4096),
        descriptors=Range(1, 2, 3),
    )


def test_slices_add_up(tmp_path: Path) -> None:
    result = Result("a", "succeeded", "", "0", 1)
    fine = Account(accepted={"a"}, results=[result], starts={("a", 1): 1})
    bad = Account(accepted={"a", "b"}, results=[result], starts={("a", 1): 2})
    page, slices = tmp_path / "page.md", tmp_path / "below" / "slices.jsonl"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    append(record_of(played(Mark("kill", 1.0, frozenset({"a"}), 1), account=fine)), slices)
    marks = (Mark("kill", 2.0, frozenset({"a", "b"}), 2), Mark("stop", None, frozenset({"b"}), 0))
    rewrite(append(record_of(played(*marks, account=bad)), slices), page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{END}\n\nafter\n") and "old" not in text  # noqa: PT018
    assert "2 slices, 2 minutes, 3 faults, 3 tasks accepted, 3 starts: **1 lost, 1 started twice**" in text
    assert "| kill | 2 | 1 | 1 | 3 | 1.5 | 2.0 |" in text
    assert "| stop | 1 | 1 | 0 | 0 | – | not in time: 1 |" in text
    assert "duplicated, lost, unrecovered |" in text
