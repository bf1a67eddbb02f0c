"""What only the Docker backend does, on a real engine; the rest is in the conformance suite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread
import docker
import pytest
import requests.exceptions

from dispatcher.backends.docker import DockerBackend
from dispatcher.errors import (
    BackendUnreachable,
    ContainerGone,
    ForeignContainer,
    ImageNotFound,
    LaunchRejected,
    StartFailed,
)
from dispatcher.model import Handle
from tests.backends.conformance import agree, output, run_to_end, running
from tests.backends.docker_harness import DockerHarness
from tests.support.engine import EngineUnderTest

MIB = 1024 * 1024

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def harness(docker_harness: DockerHarness) -> DockerHarness:
    return docker_harness


@pytest.fixture
def backend(harness: DockerHarness) -> DockerBackend:
    return harness.backend()


# --- the end of a container -------------------------------------------------------------


async def test_out_of_memory_is_the_engines_word(
    harness: DockerHarness, engine: EngineUnderTest, backend: DockerBackend
) -> None:
    if not engine.client.info()["MemoryLimit"]:
        pytest.skip("the engine can't limit memory here")
    # Not at once: under cgroup v1 an engine listens for this only a moment after the start.
    attempt = harness.attempt("sleep 1; exec tail -c 100000000 /dev/zero", memory=16 * MIB)
    async with running(backend):
        _, end = await run_to_end(backend, attempt)
    assert (end.exit_code, end.oom) == (137, True)


async def test_137_alone_is_not_out_of_memory(harness: DockerHarness, backend: DockerBackend) -> None:
    async with running(backend):
        _, end = await run_to_end(backend, harness.attempt("exit 137"))
    assert (end.exit_code, end.oom) == (137, False)


async def test_killed_child_of_a_program_that_copes_is_not_out_of_memory(
    harness: DockerHarness, engine: EngineUnderTest, backend: DockerBackend
) -> None:
    if not engine.client.info()["MemoryLimit"]:
        pytest.skip("the engine can't limit memory here")
    script = "tail -c 100000000 /dev/zero; echo child: $?"
    async with running(backend):
        handle, end = await run_to_end(backend, harness.attempt(script, memory=16 * MIB))
        assert b"child: 137" in await output(backend, handle)
    assert (end.exit_code, end.oom) == (0, False)


async def test_end_never_lies_before_the_start(harness: DockerHarness, backend: DockerBackend) -> None:
    async with running(backend):
        ends = [(await run_to_end(backend, harness.attempt(":")))[1] for _ in range(5)]
    assert all(end.started_at <= end.finished_at for end in ends)


# --- programs that can't be started -----------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entrypoint": ("no-such-program",)}, "executable file not found"),
        ({"entrypoint": ("/etc/passwd/x",)}, "not a directory"),
        ({"entrypoint": ("/tmp",)}, "permission denied|no such file|is a directory"),
        ({"workdir": "/bin/sh"}, "not a directory"),
        ({"user": "stranger"}, "unable to find user"),
        ({"network": "no-such-network"}, "not found"),
        ({"entrypoint": None, "command": None}, "[Nn]o command specified"),
    ],
)
async def test_start_that_fails_is_told_in_a_line_and_leaves_nothing(
    harness: DockerHarness, backend: DockerBackend, fields: dict[str, Any], message: str
) -> None:
    attempt = harness.attempt(":", **fields)
    async with running(backend):
        # Twice: what the first leaves must not confuse the second.
        for _ in range(2):
            with pytest.raises(StartFailed, match=message) as failure:
                await backend.launch(attempt, agree)
            assert "\n" not in str(failure.value)
            assert harness.containers() == []
    assert await harness.starts(attempt) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": 1000}, "[Mm]inimum memory limit"),
        ({"workdir": "relative"}, "absolute path"),
        ({"network": "container:other"}, "another container's network"),
        ({"command": ("x" * 131_072,)}, "longer than 131071 bytes"),
        ({"env": {f"V{n}": "x" * 100_000 for n in range(30)}}, "together exceed"),
        ({"security_profile": "restricted", "user": "0"}, "numeric user other than 0"),
        ({"security_profile": "restricted", "user": "root"}, "numeric user other than 0"),
        ({"security_profile": "restricted", "user": "0:1000"}, "numeric user other than 0"),
    ],
)
async def test_configuration_that_is_refused(
    harness: DockerHarness, backend: DockerBackend, fields: dict[str, Any], message: str
) -> None:
    async with running(backend):
        with pytest.raises(LaunchRejected, match=message):
            await backend.launch(harness.attempt(":", **fields), agree)
    assert harness.containers() == []


async def test_image_that_is_not_there(harness: DockerHarness, backend: DockerBackend) -> None:
    async with running(backend):
        for profile in ("baseline", "restricted"):
            attempt = harness.attempt(":", image="dispatcher-test/absent:1", security_profile=profile)
            with pytest.raises(ImageNotFound):
                await backend.launch(attempt, agree)


# --- what a container looks like --------------------------------------------------------


async def test_labels_limits_and_log_as_the_engine_shows_them(
    harness: DockerHarness, engine: EngineUnderTest
) -> None:
    backend = harness.backend(log_max_bytes=3 * MIB)
    attempt = harness.attempt(
        "exit 0", labels={"team": "blue"}, cpus=0.5, memory=64 * MIB, pids=100, user="1000:1000"
    )
    async with running(backend):
        handle = await backend.launch(attempt, agree)
        found = harness.inspect(handle.container_id)
    assert found["Name"] == f"/{attempt.name}"
    assert {"team": "blue", **attempt.own_labels}.items() <= found["Config"]["Labels"].items()
    assert found["Config"]["User"] == "1000:1000"
    host = found["HostConfig"]
    assert (host["NanoCpus"], host["PidsLimit"]) == (500_000_000, 100)
    assert (host["Memory"], host["MemorySwap"]) == (64 * MIB, 64 * MIB)
    assert host["LogConfig"] == {
        "Type": "local",
        "Config": {"max-size": str(3 * MIB), "max-file": "2"},
    }
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["AutoRemove"] is False
    assert host["NetworkMode"] == engine.network


async def test_label_of_a_task_never_replaces_ours(harness: DockerHarness, backend: DockerBackend) -> None:
    attempt = harness.attempt("exit 0", labels={"dispatcher.namespace": "stolen"})
    async with running(backend):
        await backend.launch(attempt, agree)
        assert [one.task_id for one in await backend.find(harness.namespace)] == [attempt.task_id]


async def test_baseline_profile(harness: DockerHarness, backend: DockerBackend) -> None:
    async with running(backend):
        handle, _ = await run_to_end(
            backend, harness.attempt("grep -E 'NoNewPrivs|Seccomp:' /proc/self/status")
        )
        status = (await output(backend, handle)).decode().split()
        host = harness.inspect(handle.container_id)["HostConfig"]
    assert status == ["NoNewPrivs:", "1", "Seccomp:", "2"]
    assert host["CapDrop"] == ["NET_RAW"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["PidsLimit"] == 4096
    assert (host["Privileged"], host["ReadonlyRootfs"]) == (False, False)
    assert not host["Binds"]
    assert not host["Devices"]
    assert (host["IpcMode"], host["PidMode"], host["UTSMode"]) == ("private", "", "")


async def test_restricted_profile(harness: DockerHarness, backend: DockerBackend) -> None:
    script = (
        "id -u; grep CapBnd /proc/self/status; touch /x 2>/dev/null || echo read-only;"
        "echo : > /tmp/x && chmod 755 /tmp/x && (/tmp/x 2>/dev/null || echo noexec);"
        "dd if=/dev/zero of=/tmp/big bs=1M count=100 2>/dev/null || echo bounded"
    )
    async with running(backend):
        handle, _ = await run_to_end(backend, harness.attempt(script, security_profile="restricted"))
        told = (await output(backend, handle)).decode().split()
    assert told == ["65534", "CapBnd:", "0000000000000000", "read-only", "noexec", "bounded"]


async def test_restricted_profile_keeps_a_user_that_is_not_root(
    harness: DockerHarness, backend: DockerBackend
) -> None:
    attempt = harness.attempt("id -u", security_profile="restricted", user="1000:1000")
    async with running(backend):
        handle, _ = await run_to_end(backend, attempt)
        assert await output(backend, handle) == b"1000\n"


# --- the name is taken ------------------------------------------------------------------


async def test_created_by_another_and_not_started_is_made_anew(
    harness: DockerHarness, engine: EngineUnderTest, backend: DockerBackend
) -> None:
    attempt = harness.attempt("exit 4")
    theirs = engine.client.create_container(
        engine.image, "true", name=attempt.name, labels=attempt.own_labels
    )
    async with running(backend):
        handle, end = await run_to_end(backend, attempt)
    assert handle.container_id != theirs["Id"]
    assert (end.exit_code, handle.adopted) == (4, False)


async def test_container_without_our_labels_is_foreign(
    harness: DockerHarness, engine: EngineUnderTest, backend: DockerBackend
) -> None:
    attempt = harness.attempt("exit 4")
    theirs = engine.client.create_container(engine.image, "true", name=attempt.name)
    async with running(backend):
        with pytest.raises(ForeignContainer):
            await backend.launch(attempt, agree)
    assert harness.inspect(attempt.name)["Id"] == theirs["Id"]


async def test_container_of_another_namespace_is_foreign(
    harness: DockerHarness, backend: DockerBackend
) -> None:
    attempt = harness.attempt("exit 4")
    other = replace(attempt, namespace=f"{attempt.namespace[:8]}-another")
    async with running(backend):
        theirs, _ = await run_to_end(backend, attempt)
        with pytest.raises(ForeignContainer):
            await backend.launch(other, agree)
    assert harness.inspect(attempt.name)["Id"] == theirs.container_id


async def test_creator_whose_container_was_replaced_starts_nothing(
    harness: DockerHarness, engine: EngineUnderTest, backend: DockerBackend
) -> None:
    async def replaced(handle: Handle) -> None:
        await anyio.to_thread.run_sync(engine.client.remove_container, handle.container_id)

    attempt = harness.attempt("exit 0")
    async with running(backend):
        with pytest.raises(ContainerGone):
            await backend.launch(attempt, replaced)
    assert await harness.starts(attempt) == 0


async def test_refused_confirmation_removes_what_was_created(
    harness: DockerHarness, backend: DockerBackend
) -> None:
    class Refused(Exception):
        pass

    async def refuse(handle: Handle) -> None:
        raise Refused

    attempt = harness.attempt("exit 0")
    async with running(backend):
        with pytest.raises(Refused):
            await backend.launch(attempt, refuse)
    assert harness.containers() == []


async def test_start_whose_answer_is_lost(
    harness: DockerHarness, backend: DockerBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = docker.APIClient.start

    def lose_answer(client: docker.APIClient, container: str) -> None:
        start(client, container)
        raise requests.exceptions.ReadTimeout

    monkeypatch.setattr(docker.APIClient, "start", lose_answer)
    attempt = harness.attempt("exit 7")
    async with running(backend):
        handle, end = await run_to_end(backend, attempt)
    assert (end.exit_code, handle.adopted) == (7, False)
    assert await harness.starts(attempt) == 1


async def test_start_that_never_reached_the_engine(
    harness: DockerHarness, backend: DockerBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_request(client: docker.APIClient, container: str) -> None:
        raise requests.exceptions.ConnectionError

    attempt = harness.attempt("exit 7")
    async with running(backend):
        with monkeypatch.context() as patched:
            patched.setattr(docker.APIClient, "start", lose_request)
            with pytest.raises(BackendUnreachable):
                await backend.launch(attempt, agree)
        assert harness.containers() == []
        _, end = await run_to_end(backend, attempt)
    assert end.exit_code == 7
    assert await harness.starts(attempt) == 1


# --- output -----------------------------------------------------------------------------


async def test_output_beyond_the_limit_loses_its_beginning(harness: DockerHarness) -> None:
    backend = harness.backend(log_max_bytes=100_000)
    async with running(backend):
        handle, _ = await run_to_end(backend, harness.attempt("seq 200000"))
        told = await output(backend, handle)
    assert told.endswith(b"\n199999\n200000\n")
    assert len(told) < 2 * 200_000


async def test_endless_output_is_read_no_further_than_it_is_consumed(
    harness: DockerHarness, backend: DockerBackend
) -> None:
    async with running(backend):
        handle = await backend.launch(harness.attempt("yes abcdefgh"), agree)
        largest = pieces = 0
        async for piece in backend.logs(handle, follow=True):
            largest, pieces = max(largest, len(piece)), pieces + 1
            if pieces == 20:
                break
        await backend.stop(handle, 0)
    assert largest < 2 * MIB


async def test_reader_that_turns_away_frees_its_place(harness: DockerHarness) -> None:
    backend = harness.backend(log_readers=1)
    async with running(backend):
        handle = await backend.launch(harness.attempt("echo ready; while :; do sleep 1; done"), agree)
        for _ in range(5):
            async for piece in backend.logs(handle, follow=True):
                assert piece == b"ready\n"
                break
        await backend.stop(handle, 0)
