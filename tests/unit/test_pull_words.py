"""A task that waits for its image, as people read it."""

from __future__ import annotations

import pytest

from dispatcher.cli.pulls import pull_in_words
from dispatcher.cli.queues import pull_progress
from dispatcher.client import PullStatus, State, TaskStatus

X = "registry/x:1"


@pytest.mark.parametrize(
    ("pull", "words"),
    [
        (None, f"waits for image {X}: no word of its pull yet"),
        (PullStatus("registry", False, 0), f"waits for image {X}: its pull comes next"),
        (PullStatus("registry", False, 1), f"waits for image {X}: 1 pull goes before it"),
        (PullStatus("registry", False, 2), f"waits for image {X}: 2 pulls go before it"),
        (
            PullStatus("registry", False, 2, cooling_seconds=12.3),
            f"waits for image {X}: registry registry is left alone for 12 s",
        ),
        (PullStatus("registry", True, 0), f"pulling {X}: begun"),
        (
            PullStatus("registry", True, 0, 12_300_000, 40_000_000, 3, 5),
            f"pulling {X}: 12.3 of 40.0 MB, 3 of 5 layers",
        ),
    ],
)
def test_a_pull_is_told_in_words(pull: PullStatus | None, words: str) -> None:
    assert pull_in_words(TaskStatus("one", State.PULLING, "default", image=X, pull=pull)) == words


def test_a_task_that_waits_for_no_image_has_no_such_words() -> None:
    assert pull_in_words(TaskStatus("one", State.RUNNING, "default", image=X)) == ""


def test_an_instance_tells_who_waits_for_a_pull() -> None:
    active = {"image": X, "active": True, "bytes_done": 1_200_000, "bytes_total": 3_400_000, "waiters": 2}
    assert pull_progress(active) == f"{X} 1.2/3.4 MB (2 wait)"
    waiting = {"image": X, "active": False, "ahead": True, "waiters": 0}
    assert pull_progress(waiting) == f"{X} waits for its turn (ahead)"
