"""What an attempt looks like to a Docker engine, and what an engine's answer says. No I/O.

Shapes are those of the Engine API: https://docs.docker.com/reference/api/engine/
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from dispatcher.errors import BackendError, ForeignContainer, LaunchRejected
from dispatcher.model import Attempt, Exit, Handle, Phase
from dispatcher.reference import ImageReference

#: Any container that bears it is some dispatcher's; its value says which one's.
NAMESPACE_LABEL = "dispatcher.namespace"
#: Ids of the containers of its name, separated by commas, that were removed for it unstarted. On
#: the container itself, so that they are known also if its creator dies before it records it.
REPLACES_LABEL = "dispatcher.replaces"
#: Processes and threads of a task that names no number: room for any honest program, and a
#: small part of a host's usual 32768.
DEFAULT_PIDS = 4096
#: The rotated log file beside the current one.
LOG_FILES = 2
#: "nobody" wherever user ids mean anything; used when an image would run as root.
UNPRIVILEGED = "65534:65534"
#: Bytes of /tmp under a read-only root. They count as memory, hence modest.
TMPFS_BYTES = 64 * 1024 * 1024

_TMP = "/tmp"  # noqa: S108 - a path in the container
#: Linux' MAX_ARG_STRLEN and, with the usual stack limit, the room for all arguments and
#: variables together. More can't be executed, and makes some engines hang in the start.
_ARGUMENT_BYTES = 128 * 1024
_ARGUMENTS_BYTES = 2 * 1024 * 1024
#: The exit code of a program ended by SIGKILL.
_KILLED = 137
_NANO = 1_000_000_000
#: A numeric user that is not root, with or without a numeric group. Names are not taken:
#: an image's own /etc/passwd can call user 0 anything.
_PLAIN_USER = re.compile(r"[1-9][0-9]{0,9}(?::[0-9]{1,10})?", re.ASCII)
#: The variants that images of an architecture are for which name none.
_USUAL_VARIANTS = {"arm64": "v8", "arm": "v7", "amd64": "v1"}
_PHASES = {
    "created": Phase.CREATED,
    "running": Phase.RUNNING,
    "paused": Phase.RUNNING,
    "restarting": Phase.RUNNING,
    "exited": Phase.EXITED,
    "dead": Phase.EXITED,
}


def engine_name(image: str) -> str:
    """The reference an engine is asked for: by digest alone if there is one, else by tag."""
    repository, tag_or_digest = pull_arguments(image)
    return f"{repository}{'@' if ':' in tag_or_digest else ':'}{tag_or_digest}"


def pull_arguments(image: str) -> tuple[str, str]:
    """Repository with its registry, and the digest or else the tag."""
    reference = ImageReference.parse(image)
    return f"{reference.registry}/{reference.repository}", reference.digest or reference.tag or "latest"


def needs_image_user(attempt: Attempt) -> bool:
    """Whether ``container_config`` depends on the user that the image names."""
    return attempt.security_profile == "restricted" and attempt.user is None


def container_config(
    attempt: Attempt, *, log_max_bytes: int, image_user: str = "", replaces: Collection[str] = ()
) -> dict[str, Any]:
    """The body of ``POST /containers/create``.

    ``image_user`` is the image's ``Config.User``; see ``needs_image_user``. ``replaces`` are ids, as
    in ``Handle.replaces``. Raises LaunchRejected for what the security profile forbids.
    """
    if attempt.network.startswith("container:"):
        raise LaunchRejected("a task can't join another container's network")
    environment = [f"{name}={value}" for name, value in attempt.env.items()]
    _check_sizes([*(attempt.entrypoint or ()), *(attempt.command or ()), *environment])
    host: dict[str, Any] = {
        "NetworkMode": attempt.network,
        # Whatever the default: an unbounded driver fills the host, and json-file writes each byte
        # that is not UTF-8 as U+FFFD.
        "LogConfig": {
            "Type": "local",
            "Config": {"max-size": str(log_max_bytes), "max-file": str(LOG_FILES)},
        },
        # An engine that restarts or removes on its own takes the outcome away from us.
        "RestartPolicy": {"Name": "no"},
        "AutoRemove": False,
        "Privileged": False,
        "IpcMode": "private",
        "PidsLimit": attempt.pids or DEFAULT_PIDS,
        "CapDrop": ["NET_RAW"],
        "SecurityOpt": ["no-new-privileges:true"],
    }
    if attempt.cpus is not None:
        host["NanoCpus"] = round(attempt.cpus * _NANO)
    if attempt.memory is not None:
        # Equal to Memory means: no swap on top of it.
        host["Memory"] = host["MemorySwap"] = attempt.memory
    user = attempt.user
    if attempt.security_profile == "restricted":
        user = _restricted_user(attempt.user, image_user)
        host["CapDrop"] = ["ALL"]
        host["ReadonlyRootfs"] = True
        host["Tmpfs"] = {_TMP: f"rw,noexec,nosuid,nodev,size={TMPFS_BYTES},mode=1777"}
    config: dict[str, Any] = {
        "Image": engine_name(attempt.image),
        "Entrypoint": _listed(attempt.entrypoint),
        "Cmd": _listed(attempt.command),
        "Env": environment,
        "WorkingDir": attempt.workdir,
        "User": user,
        # Ours last: a task's label never replaces one that containers are found by.
        "Labels": {
            **attempt.labels,
            **attempt.own_labels,
            **({REPLACES_LABEL: ",".join(sorted(replaces))} if replaces else {}),
        },
        "HostConfig": host,
    }
    return {key: value for key, value in config.items() if value is not None}


def _listed(words: tuple[str, ...] | None) -> list[str] | None:
    return None if words is None else list(words)


def _check_sizes(words: list[str]) -> None:
    # Each ends with a NUL and is pointed to.
    sizes = [len(word.encode()) + 1 for word in words]
    if max(sizes, default=0) > _ARGUMENT_BYTES:
        raise LaunchRejected(f"an argument or variable is longer than {_ARGUMENT_BYTES - 1} bytes")
    if sum(sizes) + 8 * len(sizes) > _ARGUMENTS_BYTES:
        raise LaunchRejected(f"arguments and variables together exceed {_ARGUMENTS_BYTES} bytes")


def _restricted_user(asked: str | None, image_user: str) -> str:
    if asked is not None:
        if not _PLAIN_USER.fullmatch(asked):
            raise LaunchRejected(
                f"the restricted profile takes a numeric user other than 0, such as 1000:1000, not {asked!r}"
            )
        return asked
    return image_user if _PLAIN_USER.fullmatch(image_user) else UNPRIVILEGED


# --- answers ----------------------------------------------------------------------------


def fits_platform(inspected: Mapping[str, Any], wanted: str | None) -> bool:
    """Whether an inspected image is for the platform ``os/arch[/variant]``; None: any will do."""
    if wanted is None:
        return True
    system, architecture, *variant = wanted.split("/")
    if (inspected["Os"], inspected["Architecture"]) != (system, architecture):
        return False
    usual = _USUAL_VARIANTS.get(architecture, "")
    return not variant or (inspected.get("Variant") or usual) == variant[0]


def layers_size(usage: Mapping[str, Any]) -> int:
    """Bytes of all images' layers, each counted once, from the answer of ``GET /system/df``."""
    # What it is called in the API 1.52 and since.
    since_29 = (usage.get("ImageUsage") or {}).get("TotalSize")
    size = usage.get("LayersSize", since_29)
    if size is None:
        raise BackendError("the Docker engine does not tell the size of its images")
    return int(size)


def unix_time(text: str) -> float | None:
    """Unix seconds of the engine's RFC 3339 time; None for its "never" (year 1)."""
    moment = datetime.fromisoformat(text)
    return moment.timestamp() if moment.year > 1 else None


def phase_of(inspected: Mapping[str, Any]) -> Phase:
    """Where an inspected container is."""
    state = inspected["State"]
    known = _PHASES.get(state["Status"])
    if known is not None:
        return known
    # "removing" comes after either of two ends: it ran, or it never did.
    return Phase.CREATED if unix_time(state["StartedAt"]) is None else Phase.EXITED


def has_ended(inspected: Mapping[str, Any]) -> bool:
    """Whether the exit can be read and stands.

    Not while it is being removed: a removal by force has killed it, so the end was not the
    program's own. It is gone in a moment, or shows its exit when the removal failed.
    """
    return phase_of(inspected) is Phase.EXITED and inspected["State"]["Status"] != "removing"


def handle_of(inspected: Mapping[str, Any], daemon: str, *, adopted: bool = False) -> Handle:
    """An inspected container of ours.

    Raises ForeignContainer if it lacks the labels that ours bear.
    """
    return _handle(
        inspected,
        daemon=daemon,
        name=inspected["Name"],
        labels=inspected["Config"]["Labels"] or {},
        phase=phase_of(inspected),
        started_at=unix_time(inspected["State"]["StartedAt"]),
        adopted=adopted,
    )


def new_handle_of(attempt: Attempt, container_id: str, daemon: str, replaces: Collection[str] = ()) -> Handle:
    """What was created for ``attempt`` just now."""
    return Handle(
        container_id=container_id,
        name=attempt.name,
        namespace=attempt.namespace,
        task_id=attempt.task_id,
        attempt=attempt.number,
        daemon=daemon,
        phase=Phase.CREATED,
        replaces=frozenset(replaces),
    )


def created_handle_of(listed: Mapping[str, Any], daemon: str) -> Handle | None:
    """A listed container of ours, if it was never started; a list doesn't say when others were.

    Raises ForeignContainer if it lacks the labels that ours bear.
    """
    if listed["State"] != "created":
        return None
    return _handle(
        listed, daemon=daemon, name=listed["Names"][0], labels=listed["Labels"], phase=Phase.CREATED
    )


def _handle(
    answer: Mapping[str, Any],
    *,
    daemon: str,
    name: str,
    labels: Mapping[str, str],
    phase: Phase,
    started_at: float | None = None,
    adopted: bool = False,
) -> Handle:
    try:
        return Handle(
            container_id=answer["Id"],
            name=name.lstrip("/"),
            namespace=labels[NAMESPACE_LABEL],
            task_id=labels["dispatcher.task-id"],
            attempt=int(labels["dispatcher.attempt"]),
            daemon=daemon,
            phase=phase,
            started_at=started_at,
            adopted=adopted,
            replaces=frozenset(labels.get(REPLACES_LABEL, "").split(",")) - {""},
        )
    except (KeyError, ValueError):
        raise ForeignContainer(f"container {name} does not bear a dispatcher's labels") from None


def oom_may_follow(inspected: Mapping[str, Any]) -> bool:
    """Whether a container that has ended may yet turn out to be killed for want of memory."""
    state = inspected["State"]
    return (
        state["ExitCode"] == _KILLED
        and not state["OOMKilled"]
        and inspected["HostConfig"].get("Memory", 0) > 0
    )


def exit_of(inspected: Mapping[str, Any]) -> Exit:
    """How an inspected container, which must have ended, did so."""
    state = inspected["State"]
    finished = unix_time(state["FinishedAt"]) or 0.0
    started = unix_time(state["StartedAt"]) or finished
    code = int(state["ExitCode"])
    return Exit(
        exit_code=code,
        started_at=started,
        # The two are noted by different hands: a program that ends at once ends "before".
        finished_at=max(started, finished),
        # The engine also sets its mark when only a child was killed; a program that coped
        # and ended well was not.
        oom=bool(state["OOMKilled"]) and code != 0,
    )
