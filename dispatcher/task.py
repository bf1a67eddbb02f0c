"""The task document: what a user writes, as JSON or in Python, parsed strictly.

Times are seconds, sizes bytes. A field whose feature is not built is refused, never ignored.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from dispatcher.reference import ImageReference

ID_PATTERN = r"^[A-Za-z0-9._-]{1,63}$"
QUEUE_PATTERN = r"^[a-z0-9-]{1,24}$"
#: Names that keys of our own use beside the queues' streams.
RESERVED_QUEUES = frozenset({"results", "dead", "events", "ready", "inbox"})
DEFAULT_QUEUE = "default"
#: Linux passes no longer argument or variable (MAX_ARG_STRLEN, 128 KiB with its NUL and a
#: variable's name); some versions of runc hang for ever on one and take the engine's locks along.
MAX_STRING_BYTES = 126_976

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    **{f"{p}{s}": 1024**n for n, p in enumerate("kmgt", 1) for s in ("", "b", "ib")},
}
_SIZE = re.compile(r"(\d{1,15})\s*([a-z]{0,3})", re.IGNORECASE | re.ASCII)


def parse_size(value: Any) -> Any:
    """``"256MiB"``, ``"256m"`` or a number of bytes, as bytes. Units are powers of 1024."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError('write bytes as a number, or with a unit as in "256MiB" (k, m, g, t)')
    return int(match[1]) * unit


#: What pydantic says of wrong input, where people would not say it so.
_PLAIN_WORDS = {
    "int_parsing": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "model_type": "must be a JSON object",
    "datetime_parsing": "must be an RFC 3339 time with an offset, such as 2030-01-31T09:00:00Z",
    "datetime_from_date_parsing": "must be an RFC 3339 time with an offset, such as 2030-01-31T09:00:00Z",
    "timezone_aware": "must have an offset from UTC, such as 2030-01-31T09:00:00Z",
}


def in_plain_words(kind: str, message: str) -> str:
    """A validator's message by its kind, for people."""
    message = message.removeprefix("Value error, ").replace("Input should be", "must be")
    return _PLAIN_WORDS.get(kind, message)


def _passable(value: str) -> str:
    if "\0" in value:
        raise ValueError("a NUL character can't be passed to a program")
    if len(value.encode()) > MAX_STRING_BYTES:
        raise ValueError(f"at most {MAX_STRING_BYTES} bytes can be passed to a program in one string")
    return value


def _image(value: str) -> str:
    ImageReference.parse(value)
    return value


def _env_name(value: str) -> str:
    if not value or "=" in value or "\0" in value:
        raise ValueError("a variable's name is not empty and has neither '=' nor NUL")
    if value.startswith("DISPATCHER_") or value in {"TRACEPARENT", "TRACESTATE"}:
        raise ValueError("DISPATCHER_*, TRACEPARENT and TRACESTATE are set by the dispatcher")
    return value


def _label_key(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("a label's key is not empty and has no NUL")
    if value.startswith("dispatcher."):
        raise ValueError("labels that begin with 'dispatcher.' are set by the dispatcher")
    return value


def _queue(value: str) -> str:
    if value in RESERVED_QUEUES:
        raise ValueError(f"reserved names: {', '.join(sorted(RESERVED_QUEUES))}")
    return value


def _unsupported(value: Any) -> Any:
    if value is not None:
        raise ValueError("not supported yet")
    return value


Text = Annotated[str, AfterValidator(_passable)]
Size = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | str), Field(gt=0, le=2**53)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]
#: A field of the contract whose feature is not built: refused, never silently ignored.
NotBuilt = AfterValidator(_unsupported)
EnvName = Annotated[str, AfterValidator(_env_name)]
LabelKey = Annotated[str, AfterValidator(_label_key)]
QueueName = Annotated[str, StringConstraints(pattern=QUEUE_PATTERN), AfterValidator(_queue)]
TaskId = Annotated[str, StringConstraints(pattern=ID_PATTERN)]


class _Document(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, validate_default=False
    )


class Resources(_Document):
    """Limits of one container."""

    cpus: Annotated[float, Field(gt=0, le=4096, allow_inf_nan=False)] | None = None
    """Processors' worth of time, e.g. 0.5."""
    memory: Size | None = None
    """Bytes, or a string such as "256MiB"."""
    gpus: Annotated[int | None, NotBuilt] = None
    """Number of GPUs. Not supported yet."""
    pids: Annotated[int, Field(gt=0, le=4_194_304)] | None = None
    """Processes and threads."""


class Backoff(_Document):
    """Pause before attempt n+1: ``min(max, initial * factor**(n-1))`` seconds, n from 1."""

    initial: Annotated[Seconds, Field(ge=0, le=86_400)] = 1.0
    """Seconds before the second attempt."""
    factor: Annotated[Seconds, Field(ge=1, le=100)] = 2.0
    """Growth from one attempt to the next."""
    max: Annotated[Seconds, Field(ge=0, le=604_800)] = 300.0
    """Seconds no pause exceeds."""
    jitter: bool = True
    """Draw each pause evenly between half of it and all of it."""


class Task(_Document):
    """One container to run: what a user writes, as JSON or in Python."""

    image: Annotated[Text, StringConstraints(max_length=512), AfterValidator(_image)]
    """Reference of the image: name, tag or digest."""
    command: list[Text] | None = None
    """Arguments, as Docker's Cmd."""
    entrypoint: list[Text] | None = None
    """Program, as Docker's Entrypoint."""
    env: dict[EnvName, Text] = Field(default_factory=dict)
    """Environment variables."""
    secrets: Annotated[dict[str, str] | None, NotBuilt] = None
    """Environment variables from secret references. Not supported yet."""
    workdir: Annotated[Text, StringConstraints(min_length=1)] | None = None
    """Working directory in the container."""
    user: Annotated[Text, StringConstraints(min_length=1)] | None = None
    """User (and group) the program runs as: name, uid or uid:gid."""
    resources: Resources = Resources()
    """Limits."""
    timeout: Annotated[Seconds, Field(gt=0)] | None = None
    """Seconds from the container's start; then SIGTERM, grace_period, SIGKILL."""
    grace_period: Annotated[Seconds, Field(ge=0, le=3_600)] = 10.0
    """Seconds between SIGTERM and SIGKILL."""
    max_attempts: Annotated[int, Field(ge=1, le=1_000)] = 1
    """Attempts, the first included, that application failures may use up."""
    retry_on: list[Literal["exit", "oom", "timeout"]] = ["exit", "oom", "timeout"]
    """Application failures that are tried again."""
    backoff: Backoff = Backoff()
    """Pauses between attempts."""
    queue: QueueName = DEFAULT_QUEUE
    """Queue it waits in."""
    id: TaskId | None = None
    """Name of this task; given by the dispatcher if absent."""
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=255)] | None = None
    """The same key gives the same task."""
    delay: Annotated[Seconds, Field(ge=0, le=31_622_400)] | None = None
    """Seconds to hold the task back."""
    not_before: AwareDatetime | None = None
    """RFC 3339 time before which it does not start."""
    expires_at: AwareDatetime | None = None
    """RFC 3339 time after which it is not started any more."""
    concurrency_key: Annotated[str | None, NotBuilt] = None
    """Tasks with the same key share a limit. Not supported yet."""
    concurrency_limit: Annotated[int | None, NotBuilt] = None
    """How many with this key run at once. Not supported yet."""
    pull_policy: Literal["missing", "always", "never"] = "missing"
    """When to ask the registry for the image."""
    network: Annotated[Text, StringConstraints(min_length=1, max_length=128)] | None = None
    """"none" or a network the operator allows."""
    labels: dict[LabelKey, Text] = Field(default_factory=dict)
    """Labels, on the container too."""

    @model_validator(mode="after")
    def _one_start_time(self) -> Self:
        if self.delay is not None and self.not_before is not None:
            raise ValueError("delay and not_before exclude each other: give one of them")
        return self

    def document(self) -> bytes:
        """The task as the shortest JSON that reads back as this task."""
        return _canonical(self.model_dump(mode="json", exclude_defaults=True))

    def digest(self) -> str:
        """Hex SHA-256 of the content, the id apart: equal for tasks that ask for the same."""
        content = self.model_dump(mode="json", exclude_defaults=True, exclude={"id"})
        return hashlib.sha256(_canonical(content)).hexdigest()

    @property
    def reference(self) -> ImageReference:
        """The image, parsed and normalised."""
        return ImageReference.parse(self.image)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
