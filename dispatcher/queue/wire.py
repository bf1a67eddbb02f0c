"""Bytes of an entry into a Task: the one place where foreign input is judged."""

from __future__ import annotations

from pydantic import ValidationError

from dispatcher.errors import InvalidTask
from dispatcher.model import Delivery
from dispatcher.task import Task, in_plain_words

#: Fields an entry of a stream may have.
ENTRY_FIELDS = ("task", "traceparent", "tracestate")
#: Of many mistakes in one document so many are told.
MAX_PROBLEMS = 5
#: A name that came in is told up to so many characters: a message is read, stored and logged.
MAX_NAME = 100


def parse_document(document: bytes) -> Task:
    """Parse a task's JSON strictly.

    Raises InvalidTask naming the field, what is wrong with it and what is allowed; never
    with the value itself, which may be a secret.
    """
    try:
        document.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidTask(f"the document is not UTF-8: byte {error.start}") from error
    try:
        return Task.model_validate_json(document)
    except ValidationError as error:
        raise _refusal(error) from error


def parse_delivery(delivery: Delivery, *, max_bytes: int) -> Task:
    """The task of a delivery, whichever way it came in.

    Raises InvalidTask.
    """
    if delivery.oversize:
        raise InvalidTask(f"{delivery.oversize} bytes; at most {max_bytes} are allowed (TASK_MAX_BYTES)")
    if delivery.fields is None:
        return parse_document(delivery.document)
    return parse_document(_document_of(delivery.fields))


def _document_of(fields: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """The value of ``task`` in an entry that somebody XADDed."""
    names = [name for name, _ in fields]
    for name in names:
        text = name.decode("utf-8", "backslashreplace")
        if name == b"ref":
            raise InvalidTask("the entry refers to a task whose record is gone, or that does not wait in it")
        if text not in ENTRY_FIELDS:
            raise InvalidTask(f"entry field {_short(text)!r} is unknown; allowed: {', '.join(ENTRY_FIELDS)}")
        if names.count(name) > 1:
            raise InvalidTask(f"entry field {text!r} is given more than once")
    documents = dict(fields)
    if not documents.get(b"task"):
        raise InvalidTask("the entry has no field 'task' with the task's JSON")
    return documents[b"task"]


def _refusal(error: ValidationError) -> InvalidTask:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    told = [_problem(p["type"], tuple(p["loc"]), p["msg"]) for p in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        told.append(f"and {len(problems) - MAX_PROBLEMS} more")
    refusal = InvalidTask("; ".join(told))
    refusal.field = (_path(tuple(problems[0]["loc"])) or None) if len(problems) == 1 else None
    return refusal


def _problem(kind: str, location: tuple[int | str, ...], message: str) -> str:
    path = _path(location)
    message = in_plain_words(kind, message)
    if kind == "extra_forbidden":
        message = "unknown field"
        if len(location) == 1:
            message += f"; allowed: {', '.join(sorted(Task.model_fields))}"
    return f"{path}: {message}" if path else message


def _path(location: tuple[int | str, ...]) -> str:
    return ".".join(_short(str(part)) for part in location if part != "[key]")


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…"
