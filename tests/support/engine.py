"""A real container engine for tests.

In this order: the engine ``TEST_DOCKER_HOST`` names; a private dockerd, if we may start one;
the engine Docker's own environment names, if it answers; else the tests are skipped. A
private one has no bridge and touches no firewall, so containers use the network ``none``.
Each xdist worker has its own: nothing is shared, hence nothing is coordinated.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import docker.errors
import docker.utils
import pytest
import requests.exceptions

IMAGE = "dispatcher-test/busybox:1"
#: Seconds for a private dockerd to answer, and to end.
START_TIMEOUT = 60
END_TIMEOUT = 20
APPLETS = """
    cat chmod dd echo env false grep head id kill ls mkdir nproc printf ps pwd rm seq sh sleep
    sort tail touch tr true wc yes
"""


@dataclass(frozen=True)
class EngineUnderTest:
    """An engine that answers, with the image the tests run."""

    base_url: str
    client: docker.APIClient
    #: Reference of an image with busybox.
    image: str
    #: A network that containers can be started in here.
    network: str
    #: The process, of an engine of our own; it may be stopped and continued.
    pid: int | None = None

    def start_events(self, name_prefix: str, since: float) -> Counter[str]:
        """How often each container of such a name was started, by the engine's own account.

        ``since``: Unix seconds. The engine remembers 256 events of all kinds; for more tasks
        than a few there is ``counting_starts``.
        """
        events: Any = self.client.events(
            since=int(since),
            # An end makes the engine answer what it has and close.
            until=int(time.time()) + 1,
            filters={"type": "container", "event": "start"},
            decode=True,
        )
        names = (event["Actor"]["Attributes"]["name"] for event in events)
        return Counter(name for name in names if name.startswith(name_prefix))

    @contextlib.contextmanager
    def counting_starts(self, name_prefix: str) -> Iterator[Counter[str]]:
        """The same, of what is started while the context lasts, however much that is."""
        starts: Counter[str] = Counter()
        with contextlib.closing(docker.APIClient(self.base_url)) as client:
            events: Any = client.events(filters={"type": "container", "event": "start"}, decode=True)

            def listen() -> None:
                for event in events:
                    name = event["Actor"]["Attributes"]["name"]
                    if name.startswith(name_prefix):
                        starts[name] += 1

            listener = threading.Thread(target=listen, name="start events", daemon=True)
            listener.start()
            try:
                yield starts
            finally:
                events.close()
                listener.join(END_TIMEOUT)


def image_archive(extra: dict[str, bytes] | None = None) -> bytes:
    """A root file system with busybox, and ``extra`` files by path, as a tar archive."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("no busybox on this machine to make a test image from (Debian: busybox-static)")
    program = Path(busybox).read_bytes()
    # A dynamically linked one asks for an interpreter, and there is none in the image.
    if b"/ld-linux" in program or b"/ld-musl" in program:
        pytest.skip(f"{busybox} is not statically linked (Debian: busybox-static)")
    files = {
        "bin/busybox": program,
        "etc/passwd": b"root:x:0:0:root:/:/bin/sh\nguest:x:1000:1000:guest:/tmp:/bin/sh\n",
        "etc/group": b"root:x:0:\nguest:x:1000:\n",
        **(extra or {}),
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for directory, mode in (("tmp", 0o1777), ("bin", 0o755), ("etc", 0o755)):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
        for applet in APPLETS.split():
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    return archive.getvalue()


@pytest.fixture(scope="session")
def engine() -> Iterator[EngineUnderTest]:
    """A container engine, or a skip that says why there is none."""
    archive = image_archive()
    with _any_engine() as (client, base_url, network, pid):
        client.import_image_from_data(
            archive, repository=IMAGE.partition(":")[0], tag=IMAGE.partition(":")[2]
        )
        yield EngineUnderTest(base_url, client, IMAGE, network, pid)


@contextlib.contextmanager
def _any_engine() -> Iterator[tuple[docker.APIClient, str, str, int | None]]:
    named = os.environ.get("TEST_DOCKER_HOST")
    if named:
        with contextlib.closing(docker.APIClient(named)) as client:
            yield client, named, "none", None
    elif os.geteuid() == 0 and shutil.which("dockerd"):
        with private_engine() as (client, base_url, pid):
            yield client, base_url, "none", pid
    else:
        arguments: dict[str, Any] = {**docker.utils.kwargs_from_env()}
        base_url = arguments.setdefault("base_url", "unix:///var/run/docker.sock")
        try:
            _knock(base_url)
            client = docker.APIClient(**arguments)
        except (docker.errors.DockerException, OSError) as error:
            pytest.skip(
                f"no container engine: TEST_DOCKER_HOST is not set, dockerd can't be started "
                f"({_why_none()}), and {base_url} does not answer: {error}"
            )
        with contextlib.closing(client):
            yield client, base_url, "none", None


def _knock(base_url: str) -> None:
    """Raises OSError if nobody listens at a socket file: there docker-py leaks its socket, and
    the warning of that would fail a run whose tests were only skipped."""
    if base_url.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as knock:
            knock.connect(base_url.removeprefix("unix://"))


def _why_none() -> str:
    return "not root" if os.geteuid() else "not installed"


@contextlib.contextmanager
def private_engine() -> Iterator[tuple[docker.APIClient, str, int]]:
    """A dockerd of our own, with everything it writes in a directory that goes with it."""
    # Short: the path of a Unix socket holds 107 characters.
    home = Path(tempfile.mkdtemp(prefix="engine-"))
    base_url = f"unix://{home}/engine.sock"
    (home / "daemon.json").write_text(
        json.dumps(
            {
                "hosts": [base_url],
                "group": "root",
                "bridge": "none",
                "iptables": False,
                "data-root": str(home / "data"),
                "exec-root": str(home / "exec"),
                "pidfile": str(home / "pid"),
            }
        )
    )
    with (home / "log").open("wb") as output:
        process = subprocess.Popen(
            ["dockerd", "--config-file", str(home / "daemon.json")],
            stdout=output,
            stderr=output,
            # A terminal's Ctrl-C is for the tests; the engine ends after them.
            start_new_session=True,
        )
    try:
        client = _answering(base_url, process, home / "log")
        try:
            yield client, base_url, process.pid
        finally:
            _remove_containers(client)
            client.close()
    finally:
        _end(process)
        _unmount_below(home)
        shutil.rmtree(home, ignore_errors=True)


def _answering(base_url: str, process: subprocess.Popen[bytes], output: Path) -> docker.APIClient:
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        # The client library forgets to close a socket that nobody listens to.
        with socket.socket(socket.AF_UNIX) as knock:
            if knock.connect_ex(base_url.removeprefix("unix://")) == 0:
                return docker.APIClient(base_url, timeout=START_TIMEOUT)
        time.sleep(0.05)
    lines = output.read_text(errors="replace").splitlines()
    pytest.skip(f"dockerd does not start here: {lines[-1] if lines else 'it says nothing'}")


def _remove_containers(client: docker.APIClient) -> None:
    # A test may have taken the engine away.
    with contextlib.suppress(requests.exceptions.RequestException):
        for container in client.containers(all=True):
            client.remove_container(container["Id"], force=True, v=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    # A test that failed may have left it stopped.
    process.send_signal(signal.SIGCONT)
    process.terminate()
    try:
        process.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:
        # With its containerd, which is in the same session.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _unmount_below(directory: Path) -> None:
    """Containers' mounts stay if an engine was killed, and would keep the directory."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{directory}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
