"""That the benchmarks run; what they find is for a machine that has nothing else to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.ground import Ground, latency, warm
from benchmarks.images import present, shared_pull
from benchmarks.measure import Finding, percentile
from tests.support.engine import EngineUnderTest


@pytest.fixture(scope="module")
def ground(engine: EngineUnderTest) -> Iterator[Ground]:
    """What measures stand on, with the tests' own engine."""
    with Ground(rounds=1, base_url=engine.base_url) as ground:
        yield ground


def test_measures_of_images_find_what_holds_on_any_machine(ground: Ground, tmp_path: Path) -> None:
    findings = [*present(ground, checks=3), *shared_pull(ground, size=100_000)]
    *_, contacts, together, pulls = findings
    assert (contacts.ours, pulls.ours) == (0, 1)
    assert together.ratio is not None
    assert together.ratio < 20, "twenty callers took as long as twenty pulls"
    report.write(tmp_path / "new" / "latest.json", findings, rounds=1, engine=ground.client.version())
    written = json.loads((tmp_path / "new" / "latest.json").read_text())
    assert [each["what"] for each in written["findings"]] == [finding.what for finding in findings]


def test_a_dispatcher_under_measure_writes_each_launch_down(ground: Ground) -> None:
    with ground.instance(warm_up=0) as instance:
        (status,) = instance.run([warm()])
        (launch,) = instance.launches()
        assert launch > 0
        assert latency(status) > 0


def test_a_goal_is_about_the_ratio_or_our_own_figure_at_most_or_at_least() -> None:
    slow = Finding(what="w", batch="b", ours_rounds=[3], floor_rounds=[2], against="a", goal=1.4)
    assert (slow.ratio, slow.met) == (1.5, False)
    assert Finding(what="w", batch="b", ours_rounds=[3], floor_rounds=[2], goal=1.4, bound="least").met
    assert Finding(what="w", batch="b", ours_rounds=[3], goal=3, judged="ours").met
    assert not Finding(what="w", batch="b", ours_rounds=[3], goal=3).met, "no floor, no ratio"
    drifting = Finding(what="w", batch="b", ours_rounds=[2, 6, 9], floor_rounds=[2, 3, 9], goal=1)
    assert (drifting.ours, drifting.floor, drifting.ratio) == (6, 3, 1)
    assert report.row(slow)[-3:] == ["1.50", "≤ 1.4", "NO"]


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(n) for n in range(1, 21)]
    assert [percentile(values, part) for part in (0, 0.5, 0.95, 1)] == [1, 10, 19, 20]
