"""An engine for one test alone, to be ended, killed, hung and begun again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import docker
import docker.errors
import pytest
import requests.exceptions

from tests.support.engine import IMAGE, EngineUnderTest, image_archive

#: Seconds for it to answer, and to end. A container that ignores SIGTERM takes ten of them.
START_TIMEOUT = 60
END_TIMEOUT = 30


class OwnEngine:
    """A dockerd whose state outlives its process, as a host's does."""

    def __init__(self, home: Path, *, live_restore: bool = False, hasty: bool = False) -> None:
        """``home``: a directory with a short path. Its ``data`` may be a file system of its own."""
        self.home = home
        self.base_url = f"unix://{home}/engine.sock"
        self._began = time.time()
        self._before: Counter[str] = Counter()
        self._process: subprocess.Popen[bytes] | None = None
        self._client: docker.APIClient | None = None
        configuration = {
            "hosts": [self.base_url],
            "group": "root",
            "bridge": "none",
            "iptables": False,
            "live-restore": live_restore,
            "data-root": str(home / "data"),
            "exec-root": str(home / "exec"),
            "pidfile": str(home / "pid"),
        }
        if hasty:
            configuration |= {"max-download-attempts": 1, "max-concurrent-downloads": 20}
        (home / "daemon.json").write_text(json.dumps(configuration))

    @property
    def under_test(self) -> EngineUnderTest:
        """As tests know an engine, until its end."""
        assert self._process is not None
        return EngineUnderTest(self.base_url, self.client, IMAGE, "none", self._process.pid)

    @property
    def client(self) -> docker.APIClient:
        """A client of the process that runs now."""
        assert self._client is not None
        return self._client

    def start(self) -> None:
        """Begin, or begin again with what there was."""
        with (self.home / "log").open("ab") as output:
            self._process = subprocess.Popen(
                ["dockerd", "--config-file", str(self.home / "daemon.json")],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT
        while self._process.poll() is None and time.monotonic() < deadline:
            # The client library forgets to close a socket that nobody listens to.
            with socket.socket(socket.AF_UNIX) as knock:
                listening = knock.connect_ex(self.base_url.removeprefix("unix://")) == 0
            # It listens before it can serve, and may drop who came that early.
            with contextlib.suppress(docker.errors.DockerException):
                if listening:
                    self._client = docker.APIClient(self.base_url, timeout=START_TIMEOUT)
                    return
            time.sleep(0.05)
        lines = (self.home / "log").read_text(errors="replace").splitlines()
        raise RuntimeError(f"dockerd does not start: {lines[-1] if lines else 'it says nothing'}")

    def end(self, signum: signal.Signals = signal.SIGTERM) -> None:
        """End the process by this signal, and wait until it has."""
        assert self._process is not None
        # It remembers nothing of it when it is back.
        self._before = self.starts()
        self.client.close()
        self._process.send_signal(signum)
        self._process.wait(END_TIMEOUT)
        self._forget_containerd()

    def _forget_containerd(self) -> None:
        """It dies with its dockerd. Where nobody reaps it at once, a next dockerd would take what
        is left of it for alive, wait for it and give up."""
        pid_file = self.home / "exec/containerd/containerd.pid"
        if not pid_file.exists():
            return
        status = Path(f"/proc/{pid_file.read_text()}/status")
        deadline = time.monotonic() + END_TIMEOUT
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            while "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
        pid_file.unlink()

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """It does nothing while the context lasts."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """The disk with its data has no byte left while the context lasts; see ``own_engine``."""
        filler = self.home / "data" / "filler"
        begun, over = threading.Event(), threading.Event()

        def fill() -> None:
            # Again and again: what ends meanwhile leaves some room.
            with filler.open("wb", buffering=0) as file:
                while not over.wait(0.02):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(bytes(65_536))
                    begun.set()

        thread = threading.Thread(target=fill, name="fill the disk")
        thread.start()
        try:
            begun.wait(START_TIMEOUT)
            yield
        finally:
            over.set()
            thread.join()
            filler.unlink()

    def starts(self) -> Counter[str]:
        """How often each container was started, by the engine's own account, in all its lives.

        It remembers 256 events of each life: fewer than a hundred containers may be started.
        """
        return self._before + self.under_test.start_events("dispatcher-", self._began)

    def close(self) -> None:
        """End it with all its containers."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        if self._process.poll() is None:
            with contextlib.suppress(requests.exceptions.RequestException):
                for container in self.client.containers(all=True):
                    self.client.remove_container(container["Id"], force=True, v=True)
        self.client.close()
        self._process.terminate()
        try:
            self._process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            # With its containerd, which is in the same session.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextlib.contextmanager
def own_engine(
    *, live_restore: bool = False, data_bytes: int | None = None, hasty: bool = False
) -> Iterator[OwnEngine]:
    """An engine that answers and has the tests' image, or a skip that says why there is none.

    ``data_bytes``: it keeps all its data on a disk of so many bytes. ``hasty``: it tries a
    layer that breaks off once more only, which takes five seconds, and does so with many at a time.
    """
    if os.geteuid() or not shutil.which("dockerd"):
        pytest.skip(f"no engine to break: {'dockerd is not installed' if not os.geteuid() else 'not root'}")
    archive = image_archive()
    # Short: the path of a Unix socket holds 107 characters.
    home = Path(tempfile.mkdtemp(prefix="engine-"))
    try:
        if data_bytes is not None:
            (home / "data").mkdir()
            options = ["-t", "tmpfs", "-o", f"size={data_bytes}", "tmpfs"]
            subprocess.run(["mount", *options, home / "data"], check=True, capture_output=True)
        engine = OwnEngine(home, live_restore=live_restore, hasty=hasty)
        try:
            engine.start()
            repository, _, tag = IMAGE.partition(":")
            engine.client.import_image_from_data(archive, repository=repository, tag=tag)
            yield engine
        finally:
            engine.close()
    finally:
        _unmount_below(home)
        shutil.rmtree(home, ignore_errors=True)


def _unmount_below(directory: Path) -> None:
    """What a killed engine had mounted stays mounted, and would keep the directory."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{directory}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
