"""Any bytes become a task or are refused with words that tell where and what, never with the value."""

from __future__ import annotations

import json
import string
from datetime import timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dispatcher.errors import InvalidTask
from dispatcher.model import Delivery
from dispatcher.queue.wire import MAX_PROBLEMS, parse_delivery, parse_document
from dispatcher.task import Task

#: Told to whoever reads dead letters: bounded, whatever came in.
MAX_MESSAGE = 4_096
VALUE = "hunter2-hunter2"

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
#: Documents that are nearly tasks.
nearly = st.dictionaries(st.sampled_from(sorted(Task.model_fields)), anything, max_size=6).map(
    lambda fields: {"image": "busybox"} | fields
)


def refusal(document: bytes | str | dict[str, Any]) -> InvalidTask:
    if isinstance(document, dict):
        document = json.dumps(document)
    with pytest.raises(InvalidTask) as refused:
        parse_document(document.encode() if isinstance(document, str) else document)
    return refused.value


def told(document: bytes) -> tuple[Task | None, str]:
    """The task, or what is said instead."""
    try:
        return parse_document(document), ""
    except InvalidTask as refused:
        return None, str(refused)


def task_or_refusal(document: bytes) -> None:
    task, message = told(document)
    if task is None:
        assert 0 < len(message) <= MAX_MESSAGE
        return
    assert parse_document(task.document()) == task
    assert len(task.digest()) == 64


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xef\xbb\xbf{}")
@example(b"null")
@example(b"[" * 60_000)
@example(b'{"image":' * 10_000)
@example(b'{"image":"busybox","timeout":' + b"9" * 5_000 + b"}")
@example(b'{"image":"busybox","max_attempts":' + b"9" * 5_000 + b"}")
@example(b'{"image":"busybox","timeout":1e999}')
@example(b'{"image":"busybox","timeout":NaN}')
@example(b'{"image":"busybox","user":"\\ud800"}')
@example(b'{"image":"busybox","resources":{"memory":"' + b"9" * 5_000 + b'"}}')
@example(b'{"image":"busybox","not_before":"0001-01-01T00:00:00+23:59"}')
@example(b'{"image":"busybox","not_before":99999999999999999999}')
def test_any_bytes_are_a_task_or_refused(document: bytes) -> None:
    task_or_refusal(document)


@given(nearly)
def test_any_document_of_known_fields_is_a_task_or_refused(document: dict[str, Any]) -> None:
    task_or_refusal(json.dumps(document).encode())


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"task", b"ref", b"traceparent"]) | st.binary(max_size=9), st.binary(max_size=60)
        ),
        max_size=5,
    )
)
def test_any_entry_is_a_task_or_refused(fields: list[tuple[bytes, bytes]]) -> None:
    delivery = Delivery("t", "default", "a/1/1", 1, 1, b"", fields=tuple(fields))
    message = ""
    try:
        parse_delivery(delivery, max_bytes=1_000)
    except InvalidTask as refused:
        message = str(refused)
    assert len(message) <= MAX_MESSAGE


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
names = st.text(string.ascii_letters + "_", min_size=1, max_size=12).filter(
    lambda name: not name.startswith("DISPATCHER_")
)
#: RFC 3339 knows offsets of whole minutes.
zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
tasks = st.builds(
    Task,
    image=st.sampled_from(["busybox", "ghcr.io/acme/app:1.2", "a@sha256:" + "0" * 64]),
    command=st.none() | st.lists(texts, max_size=3),
    env=st.dictionaries(names, texts, max_size=3),
    labels=st.dictionaries(names, texts, max_size=3),
    timeout=st.none() | st.floats(min_value=0.001, max_value=1e6),
    max_attempts=st.integers(1, 1000),
    id=st.none() | st.from_regex(r"[A-Za-z0-9._-]{1,63}", fullmatch=True),
    delay=st.none() | st.floats(0, 1e6),
    expires_at=st.none() | st.datetimes(timezones=zones),
    queue=st.sampled_from(["default", "high"]),
)


@given(tasks)
def test_a_task_reads_back_from_its_document(task: Task) -> None:
    again = parse_document(task.document())
    assert again == task
    assert again.digest() == task.digest()
    assert again.document() == task.document()


@pytest.mark.parametrize(
    "other",
    [
        '{"env":{"B":"2","A":"1"},"image":"busybox","max_attempts":3}',
        ' {\n"max_attempts" : 3, "image":"busybox", "env":{"A":"1","B":"2"} }\n',
        '{"image":"busybox","env":{"A":"1","B":"2"},"max_attempts":3,"queue":"default","command":null}',
        '{"image":"busybox","env":{"A":"1","B":"2"},"max_attempts":3,"backoff":{"initial":1,"jitter":true}}',
        '{"image":"busybox","env":{"A":"1","B":"2"},"max_attempts":3,"grace_period":10.0,"id":"mine"}',
        '{"image":"\\u0062usybox","env":{"A":"1","B":"2"},"max_attempts":3,"resources":{}}',
    ],
)
def test_the_digest_is_the_contents_and_not_its_spellings(other: str) -> None:
    one = parse_document(b'{"image":"busybox","env":{"A":"1","B":"2"},"max_attempts":3}')
    assert parse_document(other.encode()).digest() == one.digest()


@pytest.mark.parametrize(
    "change", [{"image": "alpine"}, {"env": {}}, {"queue": "high"}, {"idempotency_key": "k"}, {"delay": 1}]
)
def test_other_content_has_another_digest(change: dict[str, Any]) -> None:
    one = {"image": "busybox", "env": {"A": "1"}}
    digests = {parse_document(json.dumps(d).encode()).digest() for d in (one, one | change)}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"image": None}, "image", "valid string"),
        ({"image": f"UPPER/{VALUE}:"}, "image", "tag"),
        ({"image": f"{VALUE.upper()}/x y"}, "image", "name"),
        ({"image": f"-{VALUE}:5000/app"}, "image", "host name"),
        ({"image": f"app@{VALUE}"}, "image", "digest"),
        ({"command": VALUE}, "command", "valid array"),
        ({"command": ["sh", 7]}, "command.1", "valid string"),
        ({"command": [f"{VALUE}\0"]}, "command.0", "NUL"),
        ({"env": {"DISPATCHER_X": VALUE}}, "env.DISPATCHER_X", "set by the dispatcher"),
        ({"env": {"TRACEPARENT": VALUE}}, "env.TRACEPARENT", "set by the dispatcher"),
        ({"env": {"A=B": VALUE}}, "env.A=B", "'='"),
        ({"env": {"": VALUE}}, "env.", "not empty"),
        ({"env": {"A": 5}}, "env.A", "valid string"),
        ({"env": {"A": f"{VALUE}\0"}}, "env.A", "NUL"),
        ({"labels": {"dispatcher.x": VALUE}}, "labels.dispatcher.x", "set by the dispatcher"),
        ({"secrets": {"A": VALUE}}, "secrets", "not supported"),
        ({"concurrency_key": VALUE}, "concurrency_key", "not supported"),
        ({"concurrency_limit": 1}, "concurrency_limit", "not supported"),
        ({"resources": {"gpus": 1}}, "resources.gpus", "not supported"),
        ({"resources": {"memory": VALUE}}, "resources.memory", "256MiB"),
        ({"resources": {"memory": 0}}, "resources.memory", "greater than 0"),
        ({"resources": {"memory": True}}, "resources.memory", "valid integer"),
        ({"resources": {"cpus": 0}}, "resources.cpus", "greater than 0"),
        ({"resources": {"disk": VALUE}}, "resources.disk", "unknown field"),
        ({"timeout": 0}, "timeout", "greater than 0"),
        ({"timeout": "60"}, "timeout", "valid number"),
        ({"max_attempts": 0}, "max_attempts", "greater than or equal to 1"),
        ({"max_attempts": 1.5}, "max_attempts", "valid integer"),
        ({"retry_on": ["lost"]}, "retry_on.0", "'exit', 'oom' or 'timeout'"),
        ({"backoff": {"factor": 0.5}}, "backoff.factor", "greater than or equal to 1"),
        ({"queue": "results"}, "queue", "reserved"),
        ({"queue": f"Q {VALUE}"}, "queue", "pattern"),
        ({"id": f"{VALUE}/"}, "id", "pattern"),
        ({"id": "x" * 64}, "id", "pattern"),
        ({"id": "x\n"}, "id", "pattern"),
        ({"idempotency_key": ""}, "idempotency_key", "at least 1"),
        ({"idempotency_key": "x" * 256}, "idempotency_key", "at most 255"),
        ({"delay": -1}, "delay", "greater than or equal to 0"),
        ({"not_before": VALUE}, "not_before", "RFC 3339"),
        ({"not_before": "2030-01-01T00:00:00"}, "not_before", "offset"),
        ({"expires_at": 1e300}, "expires_at", "datetime"),
        ({"pull_policy": VALUE}, "pull_policy", "'missing', 'always' or 'never'"),
        ({"network": ""}, "network", "at least 1"),
        ({"privileged": VALUE}, "privileged", "unknown field; allowed: backoff, command"),
    ],
)
def test_a_refusal_names_the_field_and_not_the_value(fields: dict[str, Any], field: str, says: str) -> None:
    refused = refusal({"image": "busybox"} | fields)
    assert says in str(refused)
    assert str(refused).startswith(f"{field}: ")
    assert refused.field == field
    assert VALUE not in str(refused).lower()


@given(nearly)
def test_no_refusal_contains_a_long_value(document: dict[str, Any]) -> None:
    marked = json.loads(json.dumps(document), object_hook=lambda d: {k: _marked(v) for k, v in d.items()})
    assert VALUE not in told(json.dumps(marked).encode())[1]


def _marked(value: Any) -> Any:
    if isinstance(value, str):
        return f"{VALUE}{value}"
    return [_marked(item) for item in value] if isinstance(value, list) else value


def test_a_missing_image_is_told() -> None:
    assert str(refusal({})) == "image: Field required"


def test_of_many_mistakes_some_are_told_and_the_rest_counted() -> None:
    refused = refusal({f"field{n}": 1 for n in range(20)} | {"image": "busybox"})
    assert str(refused).count("unknown field") == MAX_PROBLEMS
    assert str(refused).endswith("and 15 more")
    assert refused.field is None


@pytest.mark.parametrize(
    "document",
    [{"x" * 60_000: 1}, {"env": {"=" * 60_000: "x"}}, {f"{n}" + "x" * 10_000: 1 for n in range(6)}],
)
def test_long_names_make_no_long_messages(document: dict[str, Any]) -> None:
    refused = refusal({"image": "busybox"} | document)
    assert len(str(refused)) <= MAX_MESSAGE
    assert len(refused.field or "") <= MAX_MESSAGE


def test_a_long_entry_field_makes_no_long_message() -> None:
    delivery = Delivery("t", "default", "a/1/1", 1, 1, b"", fields=((b"\xff" * 60_000, b""),))
    with pytest.raises(InvalidTask) as refused:
        parse_delivery(delivery, max_bytes=100_000)
    assert len(str(refused.value)) <= MAX_MESSAGE


def test_two_start_times_are_one_too_many() -> None:
    refused = refusal({"image": "busybox", "delay": 1, "not_before": "2030-01-01T00:00:00Z"})
    assert str(refused) == "delay and not_before exclude each other: give one of them"


def test_what_is_no_utf_8_is_told_by_its_place() -> None:
    assert str(refusal(b'{"image":"\xff"}')) == "the document is not UTF-8: byte 10"


def test_a_field_given_twice_in_json_is_the_last() -> None:
    assert parse_document(b'{"image":"a","image":"b"}').image == "b"
