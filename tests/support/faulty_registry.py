"""A registry of the tests' own, which fails as it is told to: ``Fault`` has the ways.

It speaks what an engine needs of the distribution API, version 2, on a loopback port. Its images
are made as they are added, run busybox, and share nothing: pulling one is a cold pull. A fault
belongs to one repository, is set and lifted at any time, and holds for answers under way as well.

    with FaultyRegistry(rate=40e6) as registry:
        reference = registry.add("app", layers=[8_000_000])
        registry.fault("app", Fault(status=429, retry_after="3"))
        ...
        registry.heal("app")
        assert registry.pulls("app") == 1
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import platform
import re
import tarfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any, Literal, Self

import pytest

from tests.support.breaking_http import Handler, Server
from tests.support.engine import image_archive

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar.gzip"
#: The name under which a fault holds for every repository that has none of its own.
EVERY = "*"
#: Bytes written at once, at most; less where they come slowly.
_CHUNK = 256 * 1024
#: Seconds between looks whether a fault is lifted or the client has hung up.
_LOOK = 0.02
_PATH = re.compile(r"/v2/(?P<name>[a-z0-9._/-]+)/(?P<kind>manifests|blobs)/(?P<key>[^/?]+)")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

Kind = Literal["manifests", "blobs", "layers"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What a repository does wrong. Several fields may be set; those of bytes are about layers."""

    #: Answered instead of what was asked for: a manifest, or with ``on`` any blob, or any layer.
    status: int = 0
    #: The connection is closed or reset instead of any answer.
    drop: Literal["", "close", "reset"] = ""
    on: Kind = "manifests"
    #: The header of such an answer: seconds or a date.
    retry_after: str = ""
    #: Its message, within the JSON that registries answer errors with.
    message: str = "told to fail"
    #: Its whole body instead.
    body: bytes | None = None
    #: Bytes after which nothing more comes, until the fault is lifted.
    stall_after: int | None = None
    #: Bytes after which the connection is reset, or closed as if that were all.
    reset_after: int | None = None
    close_after: int | None = None
    #: Bytes a second of each layer.
    drip: float | None = None
    #: The manifest's content is not that of its digest.
    wrong_manifest: bool = False
    #: The layers' contents are not those of their digests.
    wrong_layers: bool = False
    #: The manifest is no JSON.
    bad_json: bool = False
    #: What kind of thing the manifest says it is, and its configuration.
    manifest_type: str = MANIFEST_TYPE
    config_type: str = CONFIG_TYPE

    def __str__(self) -> str:
        """What differs from a registry without a fault, as a test's name shows it."""
        told = ((one.name, getattr(self, one.name)) for one in fields(self) if one.name != "message")
        default = Fault()
        return " ".join(f"{name}={value}" for name, value in told if value != getattr(default, name))


@dataclass
class _Image:
    config: dict[str, Any]
    layers: list[tuple[str, int]]

    def manifest(self, fault: Fault) -> bytes:
        """As it is pulled while ``fault`` holds."""
        if fault.bad_json:
            return b'{"schemaVersion": 2, '
        text = {
            "schemaVersion": 2,
            "mediaType": fault.manifest_type,
            "config": {"mediaType": fault.config_type, **self.config},
            "layers": [
                {"mediaType": LAYER_TYPE, "digest": digest, "size": size} for digest, size in self.layers
            ],
        }
        return json.dumps(text).encode()


@dataclass
class _Repository:
    images: dict[str, _Image] = field(default_factory=dict)
    fault: Fault | None = None
    requests: Counter[str] = field(default_factory=Counter)
    #: Layers that are being sent now.
    sending: int = 0


class FaultyRegistry:
    """See the module. Every method may be called from any thread."""

    def __init__(self, rate: float | None = None, *, credentials: tuple[str, str] | None = None) -> None:
        """``rate``: bytes a second over all connections. ``credentials``: user and password it asks for."""
        self.rate = rate
        #: May be changed at any time; None: nobody is asked for any.
        self.credentials = credentials
        self._repositories: dict[str, _Repository] = {}
        self._blobs: dict[str, bytes] = {}
        self._every: Fault | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        #: When the bytes that were promised so far will have been sent at ``rate``.
        self._sent_by = 0.0
        self._server = Server(self._answer)
        #: Address and port, as in a reference.
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_LOOK,), name="registry")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    # --- images ---------------------------------------------------------------------------

    def add(
        self, name: str, *, layers: Sequence[int | bytes] = (), tag: str = "1", architecture: str = ""
    ) -> str:
        """An image that runs busybox; returns its reference.

        ``layers``: on top of the one with busybox (1 MB), one for each of these: a file of so many
        random bytes, or of this content. ``architecture``: what it says it is for, if not this host's.
        """
        base = image_archive({"etc/unique": uuid.uuid4().bytes})
        tars = [base, *(_layer(number, content) for number, content in enumerate(layers))]
        # What is random can't be made smaller, and takes its time where one tries.
        packed = [gzip.compress(tar, 1 if number == 0 else 0) for number, tar in enumerate(tars)]
        config = json.dumps(
            {
                "architecture": architecture or _ARCHITECTURES.get(platform.machine(), platform.machine()),
                "os": "linux",
                "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
                "rootfs": {"type": "layers", "diff_ids": [_digest(tar) for tar in tars]},
            }
        ).encode()
        image = _Image(
            {"digest": _digest(config), "size": len(config)}, [(_digest(blob), len(blob)) for blob in packed]
        )
        with self._lock:
            self._blobs.update({_digest(blob): blob for blob in (config, *packed)})
            self._repositories.setdefault(name, _Repository()).images[tag] = image
        return f"{self.host}/{name}:{tag}"

    def digest(self, name: str, tag: str = "1") -> str:
        """The digest of an image's manifest, as it is without a fault."""
        return _digest(self._repositories[name].images[tag].manifest(Fault()))

    # --- faults ---------------------------------------------------------------------------

    def fault(self, name: str, fault: Fault) -> None:
        """From now on ``name`` fails in this way alone; ``EVERY``: all that have no fault of their own."""
        with self._lock:
            if name == EVERY:
                self._every = fault
            else:
                self._repositories.setdefault(name, _Repository()).fault = fault

    def heal(self, name: str) -> None:
        """``name`` fails no more; a layer that stalls goes on."""
        with self._lock:
            if name == EVERY:
                self._every = None
            else:
                self._repositories[name].fault = None

    # --- what was asked for -------------------------------------------------------------------

    def requests(self, name: str) -> Counter[str]:
        """Requests so far, answered well or not: "HEAD manifests", "GET manifests", "GET blobs"."""
        with self._lock:
            return Counter(self._repositories[name].requests)

    def pulls(self, name: str) -> int:
        """How often the manifest was fetched: the pulls of ``name`` that came so far.

        An engine that still knows a manifest only asks whether it is the same, by HEAD.
        """
        return self.requests(name)["GET manifests"]

    def sending(self, name: str) -> int:
        """Layers of ``name`` that are being sent now, those that stall among them."""
        with self._lock:
            return self._repositories[name].sending

    # --- answers, in the connections' threads ---------------------------------------------------

    def _answer(self, handler: Handler) -> None:
        """Answer one request."""
        asked = _PATH.fullmatch(handler.path)
        repository, fault = self._note(handler.command, asked)
        hit = asked is not None and (
            fault.on == asked["kind"] or _is_layer(repository, fault.on, asked["key"])
        )
        if self.credentials is not None and handler.headers["Authorization"] != _basic(*self.credentials):
            handler.refuse(401, "authentication required", {"WWW-Authenticate": 'Basic realm="tests"'})
        elif asked is None:
            handler.reply(200, b"{}")
        elif fault.drop and hit:
            handler.drop(reset=fault.drop == "reset")
        elif fault.status and hit:
            headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            if fault.status == 401:
                headers["WWW-Authenticate"] = 'Basic realm="tests"'
            handler.refuse(fault.status, fault.message, headers, fault.body)
        elif repository is None:
            handler.refuse(404, "repository name not known to registry", code="NAME_UNKNOWN")
        elif asked["kind"] == "manifests":
            self._give_manifest(handler, repository, fault, asked["key"])
        else:
            self._give_blob(handler, repository, asked["key"])

    def _note(self, command: str, asked: re.Match[str] | None) -> tuple[_Repository | None, Fault]:
        with self._lock:
            repository = self._repositories.get(asked["name"]) if asked else None
            if repository is not None and asked is not None:
                repository.requests[f"{command} {asked['kind']}"] += 1
            return repository, self._fault_of(repository)

    def _fault_of(self, repository: _Repository | None) -> Fault:
        return (repository and repository.fault) or self._every or Fault()

    def _give_manifest(self, handler: Handler, repository: _Repository, fault: Fault, key: str) -> None:
        manifests = {tag: image.manifest(fault) for tag, image in repository.images.items()}
        well = {_digest(image.manifest(Fault())): manifests[tag] for tag, image in repository.images.items()}
        manifest = manifests.get(key) or {_digest(m): m for m in manifests.values()}.get(key) or well.get(key)
        if manifest is None:
            handler.refuse(404, "manifest unknown")
            return
        headers = {"Docker-Content-Digest": key if key.startswith("sha256:") else _digest(manifest)}
        handler.reply(200, manifest + b" " * fault.wrong_manifest, fault.manifest_type, headers)

    def _give_blob(self, handler: Handler, repository: _Repository, key: str) -> None:
        blob = self._blobs.get(key)
        if blob is None:
            handler.refuse(404, "blob unknown", code="BLOB_UNKNOWN")
            return
        # An engine goes on where a download broke off.
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"] or "")
        start = int(asked[1]) if asked else 0
        headers = {"Content-Range": f"bytes {start}-{len(blob) - 1}/{len(blob)}"} if asked else {}
        handler.head(206 if asked else 200, len(blob) - start, "application/octet-stream", headers)
        if handler.command == "HEAD":
            return
        if not _is_layer(repository, "layers", key):
            handler.wfile.write(blob[start:])
            return
        with self._lock:
            repository.sending += 1
        try:
            self._send(handler, repository, blob, start)
        finally:
            with self._lock:
                repository.sending -= 1

    def _send(self, handler: Handler, repository: _Repository, blob: bytes, start: int) -> None:
        """Send a layer from ``start`` on, as the faults of each moment allow."""
        at = start
        while at < len(blob):
            fault = self._fault_of(repository)
            limits = [fault.stall_after, fault.reset_after, fault.close_after]
            # Counted anew in each answer: a download that goes on fails again.
            left = min((limit - (at - start) for limit in limits if limit is not None), default=_CHUNK)
            if left <= 0 and self._stop_short(handler, fault):
                return
            if self._closing.is_set() or handler.hung_up():
                handler.close_connection = True
                return
            size = min(_CHUNK, len(blob) - at, max(left, 0))
            if fault.drip is not None:
                size = min(size, max(1, int(fault.drip * _LOOK)))
                self._closing.wait(size / fault.drip)
            self._keep_to_rate(size)
            piece = bytearray(blob[at : at + size])
            if fault.wrong_layers and piece and at + size == len(blob):
                piece[-1] ^= 0xFF
            handler.wfile.write(piece)
            at += size

    def _stop_short(self, handler: Handler, fault: Fault) -> bool:
        """Stall for a moment, or break off; whether that was all."""
        if fault.stall_after is not None:
            self._closing.wait(_LOOK)
            return False
        handler.drop(reset=fault.reset_after is not None)
        return True

    def _keep_to_rate(self, size: int) -> None:
        if self.rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._sent_by = max(self._sent_by, now) + size / self.rate
            pause = self._sent_by - now
        self._closing.wait(pause)


def _is_layer(repository: _Repository | None, wanted: Kind, key: str) -> bool:
    """Whether layers are ``wanted`` and ``key`` is one."""
    if repository is None or wanted != "layers":
        return False
    return any(key == digest for image in repository.images.values() for digest, _ in image.layers)


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _layer(number: int, content: int | bytes) -> bytes:
    data = os.urandom(content) if isinstance(content, int) else content
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo(f"layer-{number}-{uuid.uuid4().hex}")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    return archive.getvalue()


@pytest.fixture
def faulty_registry() -> Iterator[FaultyRegistry]:
    """A registry for one test alone, without faults at first."""
    with FaultyRegistry() as registry:
        yield registry
