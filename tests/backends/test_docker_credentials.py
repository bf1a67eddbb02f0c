"""The operator's credentials: where they are found, and what is said when they are not."""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from dispatcher.backends.base import PullProgress
from dispatcher.backends.docker_credentials import Credentials
from dispatcher.errors import BackendError, ImagePullFailed, ImageUnauthorized
from tests.backends.conformance import running
from tests.backends.docker_harness import DockerHarness
from tests.support.engine import EngineUnderTest
from tests.support.faulty_registry import FaultyRegistry
from tests.support.waiting import wait_until

SECRET = "hunter2"
HUB = "https://index.docker.io/v1/"

pytestmark = pytest.mark.timeout(60)


def ignore(progress: PullProgress) -> None:
    """Nobody asks where the pull is."""


def basic(user: str = "user", password: str = SECRET) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


class Operator:
    """Who has a DOCKER_CONFIG, and helpers on PATH."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def config(self, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (self.home / "config.json").write_text(text)

    def helper(self, name: str, script: str) -> None:
        """A helper that is this shell script; the server's address is in ``$server``."""
        program = self.home / f"docker-credential-{name}"
        program.write_text(f"#!/bin/sh\nread -r server\n{script}\n")
        program.chmod(0o755)

    def helper_says(self, name: str, user: str, secret: str, *, server: str) -> None:
        told = json.dumps({"ServerURL": server, "Username": user, "Secret": secret})
        self.helper(name, f"[ \"$1 $server\" = 'get {server}' ] && echo '{told}'")


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operator:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return Operator(tmp_path)


@pytest.fixture
def registry(engine: EngineUnderTest) -> Iterator[FaultyRegistry]:
    with FaultyRegistry(credentials=("user", SECRET)) as registry:
        yield registry
        for image in engine.client.images():
            for name in image["RepoTags"] or []:
                if name.startswith(registry.host):
                    engine.client.remove_image(name)


async def found(registry: str = "r.example", *, helper_timeout: float = 10) -> dict[str, str]:
    return await Credentials(at_once=1, helper_timeout=helper_timeout).of(registry)


async def failure(registry: str = "r.example", *, helper_timeout: float = 10) -> str:
    with pytest.raises(ImagePullFailed) as failed:
        await found(registry, helper_timeout=helper_timeout)
    error: BaseException | None = failed.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__
    return str(failed.value)


# --- where they are found ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["r.example", "https://r.example", "https://r.example/v1/", "http://r.example"]
)
async def test_written_down(operator: Operator, key: str) -> None:
    operator.config({"auths": {"other.example": basic("nobody"), key: basic()}})
    assert await found() == {"username": "user", "password": SECRET, "serveraddress": "r.example"}


@pytest.mark.parametrize("key", [HUB, "docker.io", "index.docker.io"])
async def test_written_down_for_docker_io(operator: Operator, key: str) -> None:
    operator.config({"auths": {key: basic()}})
    assert (await found("docker.io"))["password"] == SECRET


async def test_other_ways_to_write_them_down(operator: Operator) -> None:
    operator.config(
        {
            "auths": {
                "token.example": {"identitytoken": SECRET, **basic()},
                "plain.example": {"username": "user", "password": SECRET},
                "colon.example": basic(password=f"a:{SECRET}"),
                "empty.example": {},
                "null.example": None,
            }
        }
    )
    assert await found("token.example") == {"identitytoken": SECRET, "serveraddress": "token.example"}
    assert (await found("plain.example"))["password"] == SECRET
    assert (await found("colon.example"))["password"] == f"a:{SECRET}"
    assert await found("empty.example") == await found("null.example") == {}


@pytest.mark.parametrize("content", [None, "{}", '{"auths": null}', '{"credHelpers": {}, "credsStore": ""}'])
async def test_none(operator: Operator, content: str | None) -> None:
    if content is not None:
        operator.config(content)
    assert await found() == {}


async def test_none_without_a_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    assert await found() == {}


async def test_a_registrys_helper_comes_before_the_store_and_the_file(operator: Operator) -> None:
    operator.config(
        {
            "credHelpers": {"r.example": "own"},
            "credsStore": "all",
            "auths": {"r.example": basic("file"), "third.example": basic("file")},
        }
    )
    operator.helper_says("own", "helper", SECRET, server="r.example")
    operator.helper("all", 'echo "credentials not found in native keychain"; exit 1')
    assert await found() == {"username": "helper", "password": SECRET, "serveraddress": "r.example"}
    # What the store does not have may be in the file.
    assert (await found("third.example"))["username"] == "file"
    assert await found("unknown.example") == {}


async def test_store_of_docker_io_and_tokens(operator: Operator) -> None:
    operator.config({"credsStore": "all"})
    operator.helper_says("all", "<token>", SECRET, server=HUB)
    assert await found("docker.io") == {"identitytoken": SECRET, "serveraddress": HUB}
    operator.helper("all", """echo '{"Username": "", "Secret": ""}'""")
    assert await found("docker.io") == {}


# --- what is said when they are not -----------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"auths": {', "not JSON: Expecting property name enclosed in double quotes in line 1"),
        ("[]", "not a JSON object"),
        ('{"auths": []}', None),
        ('{"auths": ["hunter2"]}', "auths is not a JSON object"),
        ('{"credHelpers": "hunter2"}', "credHelpers is not a JSON object"),
        ('{"auths": {"r.example": "hunter2"}}', "the entry of r.example in auths"),
        ('{"auths": {"r.example": {"auth": "hunter2!"}}}', "the entry of r.example in auths"),
        ('{"auths": {"r.example": {"auth": 7}}}', "the entry of r.example in auths"),
        ('{"auths": {"r.example": {"auth": "aHVudGVyMg=="}}}', "the entry of r.example in auths"),
    ],
)
async def test_malformed_file(operator: Operator, content: str, said: str | None) -> None:
    operator.config(content)
    if said is None:
        assert await found() == {}
        return
    told = await failure()
    assert said in told
    assert str(operator.home / "config.json") in told


async def test_unreadable_file(operator: Operator) -> None:
    (operator.home / "config.json").mkdir()
    assert (await failure()).endswith("can't be read: Is a directory")
    (operator.home / "config.json").rmdir()
    (operator.home / "config.json").write_bytes(b'{"auths": "\xff"}')
    assert (await failure()).endswith("is not JSON: it is not UTF-8")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (f"echo {SECRET}; echo {SECRET} >&2; exit 3", "docker-credential-own ended with exit code 3"),
        (f"echo {SECRET}", "docker-credential-own gave no Username and Secret in JSON"),
        (f"""echo '{{"Secret": "{SECRET}"}}'""", "gave no Username and Secret in JSON"),
        (f"""echo '["{SECRET}"]'""", "gave no Username and Secret in JSON"),
        ("kill -9 $$", "docker-credential-own ended with exit code -9"),
    ],
)
async def test_broken_helper(operator: Operator, script: str, said: str) -> None:
    operator.config({"credHelpers": {"r.example": "own"}})
    operator.helper("own", script)
    told = await failure()
    assert told.startswith("the credential helper failed: ")
    assert said in told


async def test_helper_that_is_not_there_or_no_program(operator: Operator) -> None:
    operator.config({"credHelpers": {"r.example": "own"}})
    assert await failure() == "the credential helper failed: docker-credential-own is not on PATH"
    operator.helper("own", "")
    (operator.home / "docker-credential-own").write_bytes(b"\x7fELF")
    assert await failure() == "the credential helper failed: docker-credential-own Exec format error"


def runs(pid_file: Path) -> bool:
    """Whether the process is there and has not ended."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{int(pid_file.read_text())}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def hanging(operator: Operator) -> Iterator[Path]:
    """A helper that hangs in a child of its own; the file holds the child's pid."""
    child = operator.home / "child"
    operator.config({"credHelpers": {"r.example": "own"}})
    operator.helper("own", f"sleep 600 & echo $! >{child}.new; mv {child}.new {child}; wait")
    yield child
    if runs(child):
        os.kill(int(child.read_text()), signal.SIGKILL)


async def test_a_helper_that_hangs_is_ended_with_all_it_has_started(hanging: Path) -> None:
    told = await failure(helper_timeout=0.5)
    assert told == "the credential helper failed: docker-credential-own took longer than 0.5 s"
    await wait_until(lambda: not runs(hanging))


async def test_cancelling_ends_a_helper_and_frees_its_place(operator: Operator, hanging: Path) -> None:
    credentials = Credentials(at_once=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(credentials.of, "r.example")
        await wait_until(hanging.exists)
        tasks.cancel_scope.cancel()
    await wait_until(lambda: not runs(hanging))
    with anyio.fail_after(5):
        assert await credentials.of("other.example") == {}


# --- pulls ------------------------------------------------------------------------------------


async def test_pulls_show_what_is_there_at_each(
    operator: Operator, engine: EngineUnderTest, registry: FaultyRegistry
) -> None:
    images = [registry.add(f"app-{number}") for number in range(3)]
    backend = DockerHarness(engine).backend(max_pulls=1)
    async with running(backend):
        for wrong in ({}, {"auths": {registry.host: basic(password="wrong")}}):
            operator.config(wrong)
            assert not await backend.image_obtainable(images[0])
            with pytest.raises(ImageUnauthorized):
                await backend.prepare(images[0], ignore)
        operator.config({"auths": {registry.host: basic()}})
        assert await backend.image_obtainable(images[0])
        await backend.prepare(images[0], ignore)
        # They are changed at both ends.
        registry.credentials = ("user", "new")
        assert not await backend.image_obtainable(images[1])
        with pytest.raises(ImageUnauthorized):
            await backend.prepare(images[1], ignore)
        operator.config({"auths": {registry.host: basic(password="new")}})
        assert await backend.image_obtainable(images[1])
        await backend.prepare(images[1], ignore)
        operator.helper_says("own", "user", "new", server=registry.host)
        operator.config({"credHelpers": {registry.host: "own"}})
        assert await backend.image_obtainable(images[2])
        await backend.prepare(images[2], ignore)


@pytest.mark.parametrize("content", ['{"auths": ', '{"auths": {"127.0.0.1": {"auth": "x"}, "b": "c"}}', "[]"])
async def test_a_malformed_file_breaks_nothing_but_pulls(
    operator: Operator, engine: EngineUnderTest, registry: FaultyRegistry, content: str
) -> None:
    operator.config(content)
    image = registry.add("app")
    backend = DockerHarness(engine).backend()
    async with running(backend):
        assert (await backend.probe()).ok
        assert await backend.image_id(engine.image)
        assert not await backend.image_obtainable(image)
        with pytest.raises(BackendError) as failed:
            await backend.prepare(image, ignore)
    # Where the file can be read, it only lacks what is wanted.
    kind = ImageUnauthorized if '"b"' in content else ImagePullFailed
    assert type(failed.value) is kind


async def test_a_pull_whose_helper_fails_names_it(
    operator: Operator, engine: EngineUnderTest, registry: FaultyRegistry
) -> None:
    image = registry.add("app")
    operator.config({"credsStore": "own"})
    backend = DockerHarness(engine).backend()
    async with running(backend):
        with pytest.raises(ImagePullFailed, match="docker-credential-own is not on PATH"):
            await backend.prepare(image, ignore)
    assert not registry.requests("app")
