"""Every setting, documented where it stands.

Order: flag, environment, ``--config`` file (TOML), default. ``NAME_FILE=/path`` reads a
secret from a file. Only ``load`` looks at the environment, and only the command line calls it.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from dispatcher import redis_url
from dispatcher.errors import ConfigurationError
from dispatcher.task import QUEUE_PATTERN, RESERVED_QUEUES, in_plain_words, parse_size

_QUEUE = re.compile(QUEUE_PATTERN)
_PLATFORM_PART = re.compile(r"[a-z0-9._-]{1,32}", re.ASCII)
#: What the kernel calls them, and engines.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def _redis_url(value: SecretStr) -> SecretStr:
    redis_url.check(value.get_secret_value())
    return value


def _platform(value: str) -> str:
    """As engines name it: ``linux/x86_64`` is their ``linux/amd64``."""
    system, slash, rest = value.lower().partition("/")
    architecture, _, variant = rest.partition("/")
    named = [_ARCHITECTURES.get(architecture, architecture), *([variant] if variant else [])]
    if not slash or not all(_PLATFORM_PART.fullmatch(part) for part in (system, *named)):
        raise ValueError("must be os/arch or os/arch/variant, as in linux/amd64 or linux/arm64/v8")
    return "/".join([system, *named])


def _stream_name(value: str) -> str:
    if "{" in value or "}" in value or any(c.isspace() or not c.isprintable() for c in value):
        raise ValueError("must have no braces (they choose the hash slot), white space or control characters")
    return value


def _queues(value: Any) -> Any:
    """``high:6,default:3,low`` as a mapping; a queue without a weight weighs 1."""
    if not isinstance(value, str):
        return value
    weights: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in value.split(","))):
        name, _, weight = part.partition(":")
        if name in weights:
            raise ValueError(f"queue {name!r} is named twice")
        if weight and not (weight.isascii() and weight.isdigit()):
            raise ValueError(f"the weight of {name!r} must be a whole number from 0")
        weights[name] = int(weight or 1)
    return weights


def _known_queue_names(value: dict[str, int]) -> dict[str, int]:
    if not value:
        raise ValueError("name at least one queue, as in high:6,default:3,low:1")
    for name, weight in value.items():
        if not _QUEUE.fullmatch(name):
            raise ValueError(f"queue {name!r} must match [a-z0-9-]{{1,24}}")
        if name in RESERVED_QUEUES:
            raise ValueError(f"queue {name!r} is a reserved name ({', '.join(sorted(RESERVED_QUEUES))})")
        if not 0 <= weight <= 1_000:
            raise ValueError(f"the weight of {name!r} must be from 0 to 1000")
    return value


def _names(value: Any) -> Any:
    return tuple(filter(None, (p.strip() for p in value.split(",")))) if isinstance(value, str) else value


def _default_instance_id() -> str:
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64]
    return f"{host}-{secrets.token_hex(3)}"


def _default_process_directory() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "dispatcher" / "process"


RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
Size = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | str), Field(ge=0)]
Positive = Annotated[float, Field(gt=0, le=31_622_400, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65_535)]


class Settings(BaseSettings):
    """All settings of a dispatcher, checked."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_ignore_empty=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )
    #: The TOML file of the call to ``load`` under way: pydantic-settings asks the class for it.
    toml_path: ClassVar[Path | None] = None

    redis_url: RedisUrl = SecretStr("redis://localhost:6379/0")
    """Queue and task truth: redis://, rediss://, unix:// or redis+sentinel://."""
    state_redis_url: RedisUrl | None = None
    """A second Redis for what may be lost: log tails. Default: REDIS_URL."""
    queue_source: Literal["redis-stream", "redis-list"] = "redis-stream"
    """Where tasks come from: redis-stream (XADD) or redis-list (LPUSH)."""
    queue_stream_name: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_stream_name)] = (
        "dispatcher:tasks"
    )
    """The stream of queue "default"; a further queue Q is {<name>}:Q."""
    queue_consumer_group: Annotated[str, Field(pattern=r"^[!-~]{1,100}$")] = "dispatchers"
    """The group every instance joins."""
    queues: Annotated[
        dict[str, int], NoDecode, BeforeValidator(_queues), AfterValidator(_known_queue_names)
    ] = {
        "high": 6,
        "default": 3,
        "low": 1,
    }
    """Queues this instance serves and their weights; 0 means: only when all others are empty."""
    num_consumers: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Containers this instance runs at the same time."""
    max_concurrent_pulls: Annotated[int, Field(ge=1, le=100)] = 4
    """Image pulls this instance runs at the same time."""
    max_concurrent_pulls_per_registry: Annotated[int, Field(ge=1, le=100)] | None = None
    """The same, for one registry. Default: MAX_CONCURRENT_PULLS."""
    max_waiting_pulls: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Tasks that may wait for an image without holding a consumer."""
    pull_stall_timeout: Positive = 120.0
    """Seconds without progress until a pull is given up."""
    look_ahead: Annotated[int, Field(ge=0, le=1_000)] = 10
    """Waiting tasks of each queue whose images are pulled while all consumers are busy; 0: none."""
    image_disk_high: Annotated[Size, Field(gt=0)] | None = None
    """When images take more, those that we pulled and no open task uses are removed. Default: never."""
    image_disk_low: Size | None = None
    """Until they take no more than this. Default: 80 % of IMAGE_DISK_HIGH."""
    backend: Literal["docker", "process"] = "docker"
    """Where containers run: docker or process."""
    allow_process_backend: bool = False
    """Let `serve` use the process backend, which isolates nothing."""
    process_directory: Path = Field(default_factory=_default_process_directory)
    """Where the process backend keeps its tasks' directories."""
    allow_failpoints: bool = False
    """Let `serve` obey DISPATCHER_FAILPOINT, which makes it fail on purpose. For tests."""
    health_port: Port | None = None
    """/healthz, /readyz and /metrics on this port of all interfaces. Default: off."""
    instance_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")] = Field(
        default_factory=_default_instance_id
    )
    """Name of this consumer in the group. Default: host name and something random."""
    lease_seconds: Annotated[float, Field(ge=0.5, le=3_600)] = 30.0
    """After so long without a renewal, others take an instance's tasks over."""
    lost_after: Positive = 300.0
    """Seconds without any instance on a container's daemon until its attempt counts as lost."""
    max_deliveries: Annotated[int, Field(ge=1, le=10_000)] = 5
    """How often a task may bring its dispatcher down before it is dead-lettered as poison."""
    drain_timeout: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """Seconds given to running tasks at SIGTERM, before DRAIN_MODE applies."""
    drain_mode: Literal["wait", "detach", "stop"] = "wait"
    """What becomes of running tasks then: wait (left running after DRAIN_TIMEOUT), detach, stop."""
    task_default_timeout: Positive = 3_600.0
    """Seconds a task may run that says nothing of it."""
    task_max_timeout: Positive = 86_400.0
    """Seconds a task may ask for at most."""
    task_retention: Positive = 86_400.0
    """Seconds a finished task's record is kept."""
    task_max_bytes: Annotated[Size, Field(ge=256, le=1_048_576)] = 65_536
    """Size of one task document."""
    queue_max_length: Annotated[int, Field(ge=0)] = 0
    """When so many tasks wait, submissions are refused; 0: no limit. Nothing is ever trimmed."""
    log_tail_bytes: Size = 65_536
    """How much of a task's output is kept: its end."""
    log_tail_total_bytes: Size = 268_435_456
    """How much of all tasks' output together; the oldest goes first."""
    results_max_length: Annotated[int, Field(ge=1)] = 100_000
    """About so many entries stay in the results stream."""
    infra_max_attempts: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Attempts that infrastructure failures may use up."""
    reconcile_grace: Positive = 60.0
    """Seconds a container must have been left over until it is stopped and removed."""
    security_profile: Literal["baseline", "restricted"] = "baseline"
    """How tightly containers are held."""
    default_network: Annotated[str, Field(min_length=1, max_length=128)] = "bridge"
    """Network of a task that names none."""
    allowed_networks: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)] = ("none", "bridge")
    """Networks a task may ask for."""
    task_max_cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The most processors a task may ask for."""
    task_max_memory: Size | None = None
    """The most memory a task may ask for."""
    task_default_memory: Size | None = None
    """Memory limit of a task that names none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: JSON when stderr is no terminal."""
    docker_host: str | None = None
    """The engine's address, as Docker's own tools read it."""
    docker_default_platform: Annotated[str, AfterValidator(_platform)] | None = None
    """Platform of the images that are run, such as linux/amd64. Default: the engine's own."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, secret files, TOML."""
        toml = TomlConfigSettingsSource(settings_cls, cls.toml_path)
        return init_settings, env_settings, SecretFileSource(settings_cls), toml

    @property
    def queue_redis(self) -> str:
        """REDIS_URL as a connection needs it."""
        return self.redis_url.get_secret_value()

    @property
    def state_redis(self) -> str:
        """STATE_REDIS_URL as a connection needs it."""
        return (self.state_redis_url or self.redis_url).get_secret_value()

    @property
    def image_disk_goal(self) -> int:
        """IMAGE_DISK_LOW or its default, in bytes; 0 without IMAGE_DISK_HIGH."""
        return (self.image_disk_high or 0) * 4 // 5 if self.image_disk_low is None else self.image_disk_low


class SecretFileSource(PydanticBaseSettingsSource):
    """``REDIS_URL_FILE=/run/secrets/x``: a secret setting from a file."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """The stripped content of the file, or None."""
        path = os.environ.get(f"{field_name.upper()}_FILE")
        if not path or not is_secret(field_name):
            return None, field_name, False
        try:
            return Path(path).read_text("utf-8").strip(), field_name, False
        except (OSError, UnicodeDecodeError):
            return None, field_name, False  # `load` tells it, with all else that is wrong

    def __call__(self) -> dict[str, Any]:
        """All values this source has."""
        values = {name: self.get_field_value(field, name)[0] for name, field in Settings.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings with where each value came from: flag, environment, file, TOML or default."""

    settings: Settings
    sources: Mapping[str, str]


def is_secret(name: str) -> bool:
    """Whether the setting's value may never be shown."""
    return "SecretStr" in str(Settings.model_fields[name].annotation)


def load(flags: Mapping[str, Any] | None = None, config: Path | None = None) -> Loaded:
    """Read all settings.

    Raises ConfigurationError with one line for every wrong value, naming the variable, what
    is wrong with it and what is allowed.
    """
    given = {name.lower(): value for name, value in (flags or {}).items() if value is not None}
    if config is not None and not config.is_file():
        what = "is a directory" if config.is_dir() else "does not exist"
        raise ConfigurationError([f"--config: {config} {what}"])
    problems = _mutually_exclusive() + _unreadable()
    Settings.toml_path = config
    try:
        settings = Settings(**given)
    except ValidationError as error:
        problems += [_told(dict(problem), config) for problem in error.errors(include_url=False)]
        raise ConfigurationError(problems) from error
    except ValueError as error:  # the TOML itself is malformed
        raise ConfigurationError([*problems, f"--config: {config} is not valid TOML: {error}"]) from error
    finally:
        Settings.toml_path = None
    problems += _together(settings)
    if problems:
        raise ConfigurationError(problems)
    return Loaded(settings, _sources(given, settings))


def _mutually_exclusive() -> list[str]:
    names = [name.upper() for name in Settings.model_fields if is_secret(name)]
    return [
        f"{name}: {name}_FILE is set as well; give one of them"
        for name in names
        if os.environ.get(name) and os.environ.get(f"{name}_FILE")
    ]


def _unreadable() -> list[str]:
    problems = []
    for name in filter(is_secret, Settings.model_fields):
        variable = f"{name.upper()}_FILE"
        if path := os.environ.get(variable):
            try:
                Path(path).read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"{variable}: can't read {path}: {error}")
    return problems


def _together(s: Settings) -> list[str]:
    """What is wrong only in combination."""
    problems = []
    if s.task_default_timeout > s.task_max_timeout:
        problems.append(
            f"TASK_DEFAULT_TIMEOUT: {s.task_default_timeout:g} is above"
            f" TASK_MAX_TIMEOUT={s.task_max_timeout:g}"
        )
    if s.task_max_memory and s.task_default_memory and s.task_default_memory > s.task_max_memory:
        problems.append(
            f"TASK_DEFAULT_MEMORY: {s.task_default_memory} is above TASK_MAX_MEMORY={s.task_max_memory}"
        )
    if s.image_disk_low is not None and s.image_disk_high is None:
        problems.append(f"IMAGE_DISK_LOW: {s.image_disk_low} means nothing without IMAGE_DISK_HIGH; set both")
    elif s.image_disk_high is not None and s.image_disk_goal > s.image_disk_high:
        problems.append(f"IMAGE_DISK_LOW: {s.image_disk_low} is above IMAGE_DISK_HIGH={s.image_disk_high}")
    if s.log_tail_bytes > s.log_tail_total_bytes:
        problems.append(
            f"LOG_TAIL_BYTES: {s.log_tail_bytes} is above LOG_TAIL_TOTAL_BYTES={s.log_tail_total_bytes}"
        )
    return problems


def _told(problem: dict[str, Any], config: Path | None) -> str:
    location = [str(part) for part in problem["loc"]]
    name = location[0] if location else ""
    if problem["type"] == "extra_forbidden":
        where = f" in {config}" if config else ""
        return f"{name}: unknown setting{where}; `dispatcher config` lists them all"
    message = in_plain_words(problem["type"], problem["msg"])
    path = ".".join([name.upper(), *location[1:]])
    if name in Settings.model_fields and is_secret(name):
        return f"{path}: {message}"
    return f"{path}: {problem['input']!r} is not allowed: {message}"


def _sources(flags: Mapping[str, Any], settings: Settings) -> dict[str, str]:
    def source(name: str) -> str:
        if name in flags:
            return "flag"
        if os.environ.get(name.upper()):
            return "environment"
        if os.environ.get(f"{name.upper()}_FILE") and is_secret(name):
            return "file"
        return "config" if name in settings.model_fields_set else "default"

    return {name: source(name) for name in Settings.model_fields}
