"""A real image registry for tests: Debian's ``docker-registry``, on a loopback port.

Engines take 127.0.0.0/8 for a place where plain HTTP will do, so nothing needs configuring.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.engine import EngineUnderTest, image_archive

#: Seconds for the registry to answer, and to end.
START_TIMEOUT = 20
END_TIMEOUT = 10


@dataclass
class RegistryUnderTest:
    """A registry that answers."""

    #: Address and port, as in a reference.
    host: str
    #: What it logs, a request a line.
    log: Path
    pushed: list[str] = field(default_factory=list)

    def push(self, engine: EngineUnderTest, name: str, *, payload: bytes = b"") -> str:
        """Make an image of its own content, and put it here alone: pulling it is a cold pull.

        ``payload`` makes it bigger, where a pull must take its time. Returns the reference.
        """
        repository = f"{self.host}/{name}"
        archive = image_archive({"etc/unique": uuid.uuid4().bytes, "etc/payload": payload})
        engine.client.import_image_from_data(archive, repository=repository, tag="1")
        reference = f"{repository}:1"
        for line in engine.client.push(repository, tag="1", stream=True, decode=True):
            if "error" in line:
                raise RuntimeError(line["error"])
        engine.client.remove_image(reference)
        self.pushed.append(reference)
        return reference

    def manifest_requests(self, name: str) -> int:
        """How often a client has asked for a manifest of ``name`` by GET: the pulls of it."""
        lines = self.log.read_text(errors="replace").splitlines()
        return sum(f'"GET /v2/{name}/manifests/' in line for line in lines)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryUnderTest]:
    """A registry, or a skip that says why there is none."""
    program = shutil.which("docker-registry") or shutil.which("registry")
    if program is None:
        pytest.skip("no registry on this machine (Debian: docker-registry)")
    home = tmp_path_factory.mktemp("registry")
    with socket.create_server(("127.0.0.1", 0)) as free:
        host = f"127.0.0.1:{free.getsockname()[1]}"
    config = home / "config.yml"
    config.write_text(
        "version: 0.1\n"
        "log: {level: warn}\n"
        f"storage: {{filesystem: {{rootdirectory: {home / 'data'}}}}}\n"
        f"http: {{addr: '{host}'}}\n"
    )
    log = home / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([program, "serve", str(config)], stdout=output, stderr=output)
    try:
        _wait_for_answer(host, process, log)
        yield RegistryUnderTest(host, log)
    finally:
        process.terminate()
        try:
            process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_answer(host: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{host}/v2/", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"the registry did not start: {log.read_text(errors='replace')[-500:]}")
