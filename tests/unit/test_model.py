"""The values: sizes, states, names."""

from __future__ import annotations

import contextlib
import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dispatcher.model import Attempt, Reason, State, container_name
from dispatcher.task import Task, parse_size

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("1", 1), ("512b", 512), ("1k", KIB), ("1K", KIB), ("1kb", KIB), ("1KiB", KIB),
        ("256m", 256 * MIB), ("256MiB", 256 * MIB), (" 256 MiB ", 256 * MIB), ("2g", 2 * GIB),
        ("2GB", 2 * GIB), ("1t", TIB), (7, 7), (1.5, 1.5), (None, None),
    ],
)  # fmt: skip
def test_sizes_are_powers_of_1024(text: object, size: object) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "m", "1.5g", "-1", "1x", "1mm", "1e3", "٣", "1 m b", "9" * 16, "1\n2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="256MiB"):
        parse_size(text)


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_size(text) >= 0


def test_three_states_are_ends() -> None:
    assert {state for state in State if state.terminal} == {"succeeded", "failed", "cancelled"}


def test_three_reasons_are_ours_and_four_answer_the_question() -> None:
    assert {r for r in Reason if r.infrastructure} == {"backend_error", "lost", "image_pull_failed"}
    assert {r for r in Reason if not r.dead_letter} == {"exit", "oom", "timeout", "expired"}


def test_a_task_says_what_the_contract_says_by_default() -> None:
    task = Task(image="busybox")
    assert (task.grace_period, task.max_attempts, task.queue, task.pull_policy) == (
        10,
        1,
        "default",
        "missing",
    )
    assert task.retry_on == ["exit", "oom", "timeout"]
    assert (task.backoff.initial, task.backoff.factor, task.backoff.max, task.backoff.jitter) == (
        1,
        2,
        300,
        True,
    )
    assert task.document() == b'{"image":"busybox"}'


def test_a_task_is_frozen_and_takes_no_unknown_field() -> None:
    with pytest.raises(ValidationError):
        Task(image="busybox").image = "alpine"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Task(image="busybox", privileged=True)  # type: ignore[call-arg]


def test_names_of_other_alphabets_stay_as_they_are() -> None:
    task = Task(image="busybox", env={"ИМЯ": "значение"})
    assert json.loads(task.document())["env"] == {"ИМЯ": "значение"}
    assert "значение".encode() in task.document()


def test_the_json_schema_allows_what_is_allowed() -> None:
    schema = Task.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = {"image": "busybox", "resources": {"memory": "256m", "cpus": 0.5}, "delay": 1, "env": {"A": "b"}}
    jsonschema.validate(valid, schema)
    for wrong in ({}, {"image": 1}, {"image": "x", "nope": 1}, {"image": "x", "max_attempts": 0}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_a_container_is_named_by_namespace_task_and_attempt() -> None:
    assert container_name("0123456789abcdef", "one", 2) == "dispatcher-01234567-one-2"
    attempt = Attempt("0123456789abcdef", "one", 2, 7, "a", "busybox")
    assert attempt.name == "dispatcher-01234567-one-2"
    assert attempt.own_labels == {
        "dispatcher.task-id": "one",
        "dispatcher.attempt": "2",
        "dispatcher.namespace": "0123456789abcdef",
        "dispatcher.instance": "a",
    }
