"""The parent of one attempt's program: starts it once, keeps its output, records its end.

Run as a script, ``python -I -S -X utf8 process_wrapper.py <directory> <creation id>``, by
the process backend and with nothing but the standard library, so that it starts fast and
does not depend on the installation that a running dispatcher is being upgraded in. It
outlives its dispatcher: everything anybody needs to know lies in the attempt's directory.

Files in that directory, each complete as soon as it can be seen:

``created-<creation id>``
    The attempt may still be started. The wrapper renames it to ``started``; whoever revokes
    the attempt renames it to ``removed``. One of them finds it gone, so a start that comes
    late starts nothing.
``lock-<creation id>``
    Locked exclusively as long as the wrapper lives, from before ``started``; holds its pid.
    A lock cannot be inherited by a process that is given the same pid later.
``attempt.json``
    What to run, see ``Specification``.
``running``, ``failed``, ``exit``
    JSON: the program was executed; could not be; has ended.
``output-<offset>``
    What the program wrote to both streams, from that offset on. At most two are kept.

Signals, as a container's engine gives them: SIGTERM is passed on to the program alone, and
SIGUSR1 kills its process group. When the program ends, all its descendants are killed: the
wrapper is their subreaper, so one that made itself a session of its own is found as well.

To the pipe on its standard output goes one line, ``started``, ``revoked`` or ``failed``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time
import warnings  # noqa: F401 - os.execvpe imports it, too late for a user who can't read our library
from typing import Any, NoReturn, TypedDict

CREATED = "created-"
LOCK = "lock-"
OUTPUT = "output-"
SPECIFICATION = "attempt.json"
STARTED = "started"
RUNNING = "running"
FAILED = "failed"
EXIT = "exit"
#: The program's working directory where the task names none.
SCRATCH = "scratch"

#: Bytes read from the program at once: what a pipe holds.
PIECE = 65_536
#: Characters of a reason that are kept: it names a file, and may quote the task's own words.
MESSAGE_MAX = 1_000
#: Digits of an offset in a file's name, so that names sort as numbers do.
OFFSET_DIGITS = 20
#: What a shell answers with for a program that a signal has ended, less the signal.
SIGNAL_EXIT = 128

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_FORWARDED = frozenset({signal.SIGTERM, signal.SIGUSR1})


class Specification(TypedDict):
    """What ``attempt.json`` holds."""

    id: str
    argv: list[str]
    env: dict[str, str]
    #: Directory to start in; None is the scratch directory.
    workdir: str | None
    #: uid, gid and further groups; None changes nothing.
    credentials: tuple[int, int, list[int]] | None
    #: Bytes of address space a process may have.
    memory: int | None
    #: Bytes in one output file; two are kept.
    output_bytes: int


class Output:
    """The program's output in files of bounded size, of which the latest two are kept."""

    def __init__(self, directory: int, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._previous: str | None = None
        self._begin(0)

    def _begin(self, offset: int) -> None:
        self._name = f"{OUTPUT}{offset:0{OFFSET_DIGITS}d}"
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._name, flags, 0o600, dir_fd=self._directory)
        self._offset, self._size = offset, 0

    def write(self, data: bytes) -> None:
        """Append ``data``; on a full disk it is dropped, for the program must go on."""
        view = memoryview(data)
        with contextlib.suppress(OSError):
            while view:
                if self._size >= self._limit:
                    self._rotate()
                written = os.write(self._file, view[: self._limit - self._size])
                self._size += written
                view = view[written:]

    def _rotate(self) -> None:
        oldest, finished = self._previous, self._file
        self._previous = self._name
        self._begin(self._offset + self._size)
        os.close(finished)
        if oldest is not None:
            os.unlink(oldest, dir_fd=self._directory)


class Program:
    """The attempt's main process, and through it all that descends from it."""

    def __init__(self, specification: Specification, directory: int) -> None:
        """Start it. Raises OSError or ValueError with what prevented that."""
        self.output, output_end = os.pipe()
        report, report_end = os.pipe()
        self.started_at = time.time()
        self.pid = os.fork()
        if self.pid == 0:
            _execute(specification, directory, output_end, report_end)
        os.close(output_end)
        os.close(report_end)
        with open(report, "rb") as reader:
            problem = reader.read()
        if problem:
            os.waitpid(self.pid, 0)
            raise ValueError(problem.decode(errors="replace"))

    def terminate(self) -> None:
        """Ask it to end. Its id is its own until ``finish`` has reaped it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def ended(self) -> bool:
        """Reap orphans that have ended; tell whether the program has, without reaping it."""
        while (child := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if child.si_pid == self.pid:
                return True
            os.waitpid(child.si_pid, 0)
        return False

    def finish(self) -> int:
        """Kill what is left of it, reap everything, return its exit code."""
        self.kill()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        while descendants := _children():
            try:
                for pid in descendants:
                    os.kill(pid, signal.SIGKILL)
            except PermissionError:
                break  # it runs as another user by a setuid file: not ours to wait for
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)
        return code if code >= 0 else SIGNAL_EXIT - code


def _children() -> list[int]:
    """Our children; every orphan below us has become one. Empty where /proc does not tell."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as listed:
            return [int(pid) for pid in listed.read().split()]
    except OSError:
        return []


def _execute(specification: Specification, directory: int, output: int, report: int) -> NoReturn:
    """In the child: become the program, or say on ``report`` why not."""
    try:
        os.setpgid(0, 0)
        workdir = specification["workdir"]
        if workdir is None:
            os.fchdir(os.open(SCRATCH, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory))
        else:
            os.chdir(workdir)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if specification["credentials"] is not None:
            uid, gid, groups = specification["credentials"]
            os.setgroups(groups)
            os.setgid(gid)
            os.setuid(uid)
        # After setuid, which clears it: the program does not outlive a wrapper that is killed.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # A program would inherit what is ignored: two by Python, and whatever nohup or a shell's `&`
        # had the dispatcher ignore.
        for number in signal.valid_signals():
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if specification["memory"] is not None:
            resource.setrlimit(resource.RLIMIT_AS, (specification["memory"], specification["memory"]))
        argv = specification["argv"]
        os.execvpe(argv[0], argv, specification["env"])  # noqa: S606 - no shell is what is wanted
    except BaseException as error:  # noqa: BLE001 - a fork of the wrapper must not go on as one
        with contextlib.suppress(OSError):
            os.write(report, _problem(error).encode(errors="replace")[:PIECE])
    os._exit(127)


def _problem(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _publish(directory: int, name: str, content: dict[str, Any]) -> None:
    temporary = f".{name}"
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC
    with open(os.open(temporary, flags, 0o600, dir_fd=directory), "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


def _report(line: str) -> None:
    """Answer the dispatcher, which may be gone; then let go of its pipe."""
    with contextlib.suppress(OSError):
        os.write(1, line.encode(errors="replace") + b"\n")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _claim(directory: int, creation_id: str) -> bool:
    """Become the one wrapper of this attempt; False if it has been revoked."""
    try:
        lock = os.open(f"{LOCK}{creation_id}", os.O_RDWR | os.O_CLOEXEC, dir_fd=directory)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(lock, str(os.getpid()).encode())
        os.rename(f"{CREATED}{creation_id}", STARTED, src_dir_fd=directory, dst_dir_fd=directory)
    except FileNotFoundError:
        return False
    return True  # the lock's descriptor stays open until this process ends


def _supervise(program: Program, output: Output) -> None:
    """Pass on output and signals until the program has ended."""
    wakeup, wakeup_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: program.terminate())
    signal.signal(signal.SIGUSR1, lambda *_: program.kill())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    poller = select.poll()
    poller.register(wakeup, select.POLLIN)
    poller.register(program.output, select.POLLIN)
    while not program.ended():
        for ready, _ in poller.poll():
            data = os.read(ready, PIECE)
            if ready == wakeup:
                continue
            output.write(data)
            if not data:  # every process has closed its output, and may still work
                poller.unregister(program.output)
    # From here on the group's id is about to be free for others.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)


def _drain(program: Program, output: Output) -> None:
    """Keep what lies in the pipe. Not until its end: somebody may hold it that we can't kill."""
    os.set_blocking(program.output, False)
    with contextlib.suppress(BlockingIOError):
        while data := os.read(program.output, PIECE):
            output.write(data)


def main(path: str, creation_id: str) -> None:
    """Run the attempt in the directory ``path``, if it is still the one created so."""
    # Before the pid can be known to anybody: no signal is lost, none ends the wrapper.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        _report("revoked")
        return
    if not _claim(directory, creation_id):
        _report("revoked")
        return
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with open(os.open(SPECIFICATION, os.O_RDONLY, dir_fd=directory), encoding="utf-8") as file:
        specification: Specification = json.load(file)
    output = Output(directory, specification["output_bytes"])
    try:
        program = Program(specification, directory)
    except (OSError, ValueError) as error:
        message = " ".join(_problem(error).split())[:MESSAGE_MAX]
        _publish(directory, FAILED, {"message": message})
        _report(f"failed {message}")
        return
    _publish(directory, RUNNING, {"started_at": program.started_at})
    _report("started")
    _supervise(program, output)
    exit_code = program.finish()
    _drain(program, output)
    _publish(
        directory,
        EXIT,
        {"exit_code": exit_code, "started_at": program.started_at, "finished_at": time.time()},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
