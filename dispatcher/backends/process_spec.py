"""What the process backend's wrapper is to run, worked out from an attempt.

Blocking: names of users are looked up, which may ask a directory service.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import uuid
from pathlib import Path

from dispatcher.backends.process_wrapper import Specification
from dispatcher.errors import LaunchRejected
from dispatcher.model import Attempt

#: What a program's environment holds unless the task says otherwise; a shell's usual default.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_NAMESPACE = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,128}")


def specify(attempt: Attempt, scratch: Path, output_bytes: int) -> Specification:
    """What to run, under a new creation id, with ``scratch`` as its home. Raises LaunchRejected."""
    argv = [*(attempt.entrypoint or ()), *(attempt.command or ())]
    if not argv:
        raise LaunchRejected(
            "entrypoint or command must be given: the process backend does not read the image"
        )
    if not _NAMESPACE.fullmatch(attempt.namespace):
        raise LaunchRejected("the namespace can't be a directory's name")
    env = {"PATH": DEFAULT_PATH, "HOME": str(scratch.absolute())} | attempt.env
    try:
        "".join([*argv, *env.keys(), *env.values()]).encode()
    except UnicodeEncodeError as error:
        raise LaunchRejected(f"not valid Unicode: {error.reason}") from error
    return {
        "id": uuid.uuid4().hex,
        "argv": argv,
        "env": env,
        "workdir": attempt.workdir,
        "credentials": None if attempt.user is None else _credentials(attempt.user),
        "memory": attempt.memory,
        "output_bytes": output_bytes,
    }


def _credentials(user: str) -> tuple[int, int, list[int]] | None:
    """uid, gid and groups of ``user``; None if we are it. Raises LaunchRejected."""
    who, _, group = user.partition(":")
    try:
        known = pwd.getpwnam(who) if not who.isdecimal() else None
        uid = known.pw_uid if known is not None else int(who)
        if group:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        else:
            gid = known.pw_gid if known is not None else _primary_group(uid)
    except KeyError as error:
        raise LaunchRejected(f"user {user!r} is not known on this host") from error
    if (uid, gid) == (os.geteuid(), os.getegid()):
        return None
    if os.geteuid() != 0:
        raise LaunchRejected(f"user {user!r}: only a dispatcher that runs as root can start as another user")
    return uid, gid, [gid] if group or known is None else os.getgrouplist(known.pw_name, gid)


def _primary_group(uid: int) -> int:
    """The user's group; as in a container, a uid nobody has named belongs to group 0."""
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return 0
