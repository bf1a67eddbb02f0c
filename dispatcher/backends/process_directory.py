"""The directories in which the process backend keeps its attempts. Blocking; no event loop here.

``<root>/attempts/<namespace>/<task id>.<number>/`` is one attempt: a directory of that name
can exist only once, which is what makes a launch happen once. It is prepared under
``<root>/new/`` and renamed, so it is complete as soon as it can be seen. What lies in it is
told in ``process_wrapper``; besides, ``removed`` is what ``created-…`` or ``exit`` becomes by
a rename when the attempt is given up: from then on it counts as absent, whatever is left of
it, and anybody may clear it away.

A path may come to name another attempt's directory between two system calls. So a
directory is opened once and worked on through its descriptor, and its creation id is
compared; only ``rmdir`` goes by the path, and that fails for a directory with content.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.backends import process_wrapper as wrapper
from dispatcher.errors import ContainerGone
from dispatcher.model import Exit, Phase

REMOVED = "removed"
#: Seconds after which a directory under ``new/`` has no creator any more: it lives for milliseconds.
ABANDONED_AFTER = 3_600
#: Others may search a directory and list nothing: a task with a user of its own needs its scratch.
_DIRECTORY_MODE = 0o711


@dataclass(frozen=True, slots=True)
class Name:
    """What an attempt's directory is found by."""

    namespace: str
    task_id: str
    number: int


@dataclass(frozen=True, slots=True)
class Record:
    """What an attempt's directory told at one moment."""

    name: Name
    creation_id: str
    phase: Phase
    #: Unix seconds; None until the program was executed.
    started_at: float | None = None
    #: None before the end, and for ever if the wrapper was killed.
    exit: Exit | None = None
    #: Why the program could not be executed.
    failure: str | None = None


class AttemptDirectories:
    """All attempts below one root."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._new = root / "new"
        self._attempts = root / "attempts"

    def open(self) -> str:
        """Make the root if need be, clear away what crashes left; return the daemon's identity."""
        for directory in (self._root, self._new, self._attempts):
            directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        self._sweep()
        identity = self._root / "daemon"
        if not identity.exists():
            proposal = self._new / f"daemon-{uuid.uuid4().hex}"
            proposal.write_text(f"process-{uuid.uuid4().hex}", encoding="ascii")
            with contextlib.suppress(FileExistsError):  # of several, the first to link has named it
                identity.hardlink_to(proposal)
            proposal.unlink()
        return self.identity()

    def identity(self) -> str:
        """The daemon's identity; raises FileNotFoundError if the root is gone."""
        return (self._root / "daemon").read_text(encoding="ascii")

    def path(self, name: Name) -> Path:
        """Where the attempt of this name lies, or would."""
        return self._attempts / name.namespace / f"{name.task_id}.{name.number}"

    def create(self, name: Name, specification: wrapper.Specification) -> bool:
        """Make the attempt's directory; False if the name is taken."""
        creation_id = specification["id"]
        draft, path = self._new / creation_id, self.path(name)
        draft.mkdir(mode=_DIRECTORY_MODE)
        try:
            scratch = draft / wrapper.SCRATCH
            scratch.mkdir(mode=0o700)
            if specification["credentials"] is not None:
                os.chown(scratch, *specification["credentials"][:2])
            (draft / f"{wrapper.LOCK}{creation_id}").touch(mode=0o600)
            (draft / f"{wrapper.CREATED}{creation_id}").touch(mode=0o600)
            document = draft / wrapper.SPECIFICATION
            document.touch(mode=0o600)  # before the content, which may hold secrets
            document.write_text(json.dumps(specification), encoding="utf-8")
            path.parent.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
            draft.rename(path)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            self._clear_abandoned(path)
            return False
        return True

    def look(self, name: Name) -> Record | None:
        """The attempt of this name; None if there is none."""
        try:
            with _opened(self.path(name)) as directory:
                return _record(name, directory)
        except FileNotFoundError:
            return None

    def find(self, namespace: str) -> list[Record]:
        """Every attempt of this namespace."""
        records = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.listdir(self._attempts / namespace):
                task_id, _, number = entry.rpartition(".")
                if task_id and number.isdecimal():
                    record = self.look(Name(namespace, task_id, int(number)))
                    records += [record] if record is not None else []
        return records

    def open_wrapper(self, name: Name, creation_id: str) -> int | None:
        """A pidfd of the attempt's wrapper, for the caller to close; None if it has ended."""
        try:
            with _opened(self.path(name)) as directory:
                pid = _wrapper_pid(directory, creation_id)
                if pid is None:
                    return None
                pidfd = os.pidfd_open(pid)
                # The pid may have been given to another process before it was opened; while
                # the lock is held, it has not.
                if _wrapper_pid(directory, creation_id) == pid:
                    return pidfd
                os.close(pidfd)
        except (FileNotFoundError, ProcessLookupError):
            pass
        return None

    def revoke(self, name: Name, creation_id: str) -> bool:
        """Give up an attempt that was not started; False if it was, or is not there any more."""
        try:
            with _opened(self.path(name)) as directory:
                _rename(directory, f"{wrapper.CREATED}{creation_id}", REMOVED)
                _clear(directory)
        except FileNotFoundError:
            return False
        self._drop(name)
        return True

    def remove(self, name: Name, creation_id: str) -> bool:
        """Remove an attempt that does not run; False if it does. Fine if it is gone."""
        try:
            with _opened(self.path(name)) as directory:
                record = _record(name, directory)
                if record is not None and record.creation_id != creation_id:
                    return True
                if record is not None and not _give_up(directory, record):
                    return False
                _clear(directory)
        except FileNotFoundError:
            return True
        self._drop(name)
        return True

    def read_output(self, name: Name, creation_id: str, position: int) -> tuple[int, bytes]:
        """Output from ``position`` on, at most one piece, and the offset of its first byte.

        The offset is larger than ``position`` where the output between was dropped. Empty if
        there is no more now. Raises ContainerGone.
        """
        with self._output_of(name, creation_id) as directory:
            while starts := _output_starts(directory):
                # Files join without a gap, so a position lies in the last that begins before it.
                begin = max((start for start in starts if start <= position), default=starts[0])
                with contextlib.suppress(FileNotFoundError):  # rotated away meanwhile: look again
                    file = os.open(_output_name(begin), os.O_RDONLY, dir_fd=directory)
                    position = max(position, begin)
                    try:
                        return position, os.pread(file, wrapper.PIECE, position - begin)
                    finally:
                        os.close(file)
            return position, b""

    def output_end(self, name: Name, creation_id: str) -> int:
        """The offset behind the last byte of output there is now. Raises ContainerGone."""
        with self._output_of(name, creation_id) as directory:
            while starts := _output_starts(directory):
                with contextlib.suppress(FileNotFoundError):  # rotated away meanwhile: look again
                    latest = os.stat(_output_name(starts[-1]), dir_fd=directory)
                    return starts[-1] + latest.st_size
            return 0

    @contextlib.contextmanager
    def _output_of(self, name: Name, creation_id: str) -> Iterator[int]:
        try:
            with _opened(self.path(name)) as directory:
                os.stat(f"{wrapper.LOCK}{creation_id}", dir_fd=directory)
                yield directory
        except FileNotFoundError:
            raise ContainerGone from None

    def _drop(self, name: Name) -> None:
        # Another attempt's by now, and then not empty; or cleared away by somebody else.
        with contextlib.suppress(OSError):
            self.path(name).rmdir()

    def _sweep(self) -> None:
        """Clear away what creators and removers that crashed have left."""
        for draft in self._new.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if draft.stat().st_mtime < time.time() - ABANDONED_AFTER:
                    shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
        for path in self._attempts.glob("*/*"):
            self._clear_abandoned(path)

    def _clear_abandoned(self, path: Path) -> None:
        """Finish a removal that stopped half-way; leave any other attempt alone."""
        with contextlib.suppress(OSError):  # what stays is met again by the next creator or start
            with _opened(path) as directory:
                if _abandoned(os.listdir(directory)):
                    _clear(directory)
            path.rmdir()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield directory
    finally:
        os.close(directory)


def _rename(directory: int, old: str, new: str) -> None:
    os.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)


def _read(directory: int, name: str) -> Any:
    """The JSON in a file; None if it is not there, or is not whole after the host crashed."""
    try:
        with open(os.open(name, os.O_RDONLY, dir_fd=directory), encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, ValueError):
        return None


def _record(name: Name, directory: int) -> Record | None:
    """What this directory tells; None for one that is being removed."""
    entries = os.listdir(directory)
    if _abandoned(entries):
        return None
    creation_id = next(e.removeprefix(wrapper.LOCK) for e in entries if e.startswith(wrapper.LOCK))
    if f"{wrapper.CREATED}{creation_id}" in entries:
        return Record(name, creation_id, Phase.CREATED)
    # Before the files: what the wrapper leaves is complete when its lock is free.
    alive = _wrapper_pid(directory, creation_id) is not None
    if (failed := _read(directory, wrapper.FAILED)) is not None:
        return Record(name, creation_id, Phase.EXITED, failure=failed["message"])
    if (ended := _read(directory, wrapper.EXIT)) is not None:
        return Record(name, creation_id, Phase.EXITED, ended["started_at"], Exit(**ended))
    running = _read(directory, wrapper.RUNNING)
    started_at = running["started_at"] if running is not None else None
    if alive:
        return Record(name, creation_id, Phase.RUNNING, started_at)
    with contextlib.suppress(FileNotFoundError):
        # The wrapper was killed: there will be no exit, and the claim is what is known of the start.
        claimed_at = os.stat(wrapper.STARTED, dir_fd=directory).st_ctime
        return Record(name, creation_id, Phase.EXITED, started_at or claimed_at)
    return None


def _abandoned(entries: list[str]) -> bool:
    """Whether an attempt was given up: it is marked so, or has lost files it was created with."""
    return REMOVED in entries or not any(entry.startswith(wrapper.LOCK) for entry in entries)


def _wrapper_pid(directory: int, creation_id: str) -> int | None:
    """The pid of the living wrapper of a started attempt; None if it has ended."""
    try:
        os.stat(wrapper.STARTED, dir_fd=directory)  # before it, our lock could stand in the wrapper's way
        lock = os.open(f"{wrapper.LOCK}{creation_id}", os.O_RDONLY, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.read(lock, 32))
    else:
        return None
    finally:
        os.close(lock)


def _give_up(directory: int, record: Record) -> bool:
    """Turn what tells the attempt's end into ``removed``; False if the attempt runs."""
    if record.phase is Phase.RUNNING:
        return False
    if record.phase is Phase.CREATED:
        last = f"{wrapper.CREATED}{record.creation_id}"
    elif record.failure is not None:
        last = wrapper.FAILED
    else:
        last = wrapper.EXIT if record.exit is not None else wrapper.STARTED
    try:
        _rename(directory, last, REMOVED)
    except FileNotFoundError:
        # Somebody else has removed it, or it was started just now.
        return REMOVED in os.listdir(directory)
    return True


def _clear(directory: int) -> None:
    """Delete what an attempt that was given up has left, its mark last."""
    for entry in sorted(os.listdir(directory), key=REMOVED.__eq__):
        with contextlib.suppress(FileNotFoundError):  # somebody else clears as well
            if stat.S_ISDIR(os.lstat(entry, dir_fd=directory).st_mode):
                shutil.rmtree(entry, dir_fd=directory)
            else:
                os.unlink(entry, dir_fd=directory)


def _output_name(start: int) -> str:
    return f"{wrapper.OUTPUT}{start:0{wrapper.OFFSET_DIGITS}d}"


def _output_starts(directory: int) -> list[int]:
    """The offsets that the files of output begin at, in order; empty before the start."""
    names = (name for name in os.listdir(directory) if name.startswith(wrapper.OUTPUT))
    return sorted(int(name.removeprefix(wrapper.OUTPUT)) for name in names)
