"""Programs that want too much: held by their limits, told apart, and no burden to the dispatcher."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from dispatcher.backends.docker import LOG_MAX_BYTES
from dispatcher.client import Client, Reason, State, Task
from dispatcher.task import Resources
from tests.cli.program import Program, until
from tests.support.engine import EngineUnderTest
from tests.support.redis_server import RedisUnderTest
from tests.support.system import DockerSystem
from tests.support.waiting import wait_until

TIMEOUT = 30
MIB = 1024 * 1024
#: Bytes by which a dispatcher may grow while it handles output of any length. What it reads ahead
#: of a reader that is slow is 1 MiB, what it keeps of a task's end 64 KiB.
GROWTH = 32 * MIB

pytestmark = pytest.mark.timeout(120)


def container_of(engine: EngineUnderTest, task_id: str) -> str:
    """Id of the task's one container."""
    [found] = engine.client.containers(all=True, filters={"label": f"dispatcher.task-id={task_id}"})
    return str(found["Id"])


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        # Not at once: under cgroup v1 an engine listens for this only a moment after the start.
        ("sleep 1; exec tail -c 100000000 /dev/zero", Reason.OOM),
        ("exit 137", Reason.EXIT),
        ("kill -9 $$; exec sh -c 'kill -9 $PPID; exit 137'", Reason.EXIT),
    ],
)
async def test_want_of_memory_is_told_apart_from_a_mere_137(
    docker_system: DockerSystem, engine: EngineUnderTest, script: str, reason: Reason
) -> None:
    if not engine.client.info()["MemoryLimit"]:
        pytest.skip("the engine can't limit memory here")
    async with docker_system.running() as client:
        handle = await client.submit(docker_system.task(script, resources=Resources(memory=16 * MIB)))
        status = await handle.wait(TIMEOUT)
    assert (status.state, status.reason, status.exit_code) == (State.FAILED, reason, 137)


async def test_a_fork_bomb_is_held_by_its_limit_and_ends_with_its_task(
    docker_system: DockerSystem, engine: EngineUnderTest
) -> None:
    if not engine.client.info()["PidsLimit"]:
        pytest.skip("the engine can't limit processes here")
    limit = 24
    bomb = "sh -c 'while :; do sleep 600 & done'; exec sleep 600"
    async with docker_system.running() as client:
        handle = await client.submit(
            docker_system.task(bomb, resources=Resources(pids=limit), grace_period=0.1)
        )

        async def running() -> bool:
            return (await handle.status()).state is State.RUNNING

        await wait_until(running, TIMEOUT)
        container = container_of(engine, handle.id)

        def processes() -> int:
            stats: Any = engine.client.stats(container, stream=False, one_shot=True)
            return int(stats["pids_stats"]["current"])

        # The shell that was refused one more ends, the others stay.
        await wait_until(lambda: processes() == limit - 1, TIMEOUT)
        assert (await (await client.submit(docker_system.task("exit 0"))).wait(TIMEOUT)).exit_code == 0
        assert processes() == limit - 1
        await handle.cancel()
        assert (await handle.wait(TIMEOUT)).state is State.CANCELLED


@pytest.fixture
def program(redis_server: RedisUnderTest, tmp_path: Path, engine: EngineUnderTest) -> Program:
    """The program on a real engine."""
    more = {"BACKEND": "docker", "DOCKER_HOST": engine.base_url, "DEFAULT_NETWORK": engine.network}
    return Program(redis_server.url, tmp_path, more)


class Resident:
    """How much memory a process holds, and the most of it that was ever seen here."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self.most = 0
        self.first = self.look()

    def look(self) -> int:
        """Bytes now."""
        [line] = [x for x in self._status.read_text().splitlines() if x.startswith("VmRSS:")]
        now = int(line.split()[1]) * 1024
        self.most = max(now, self.most)
        return now


class LogOnDisk:
    """The files an engine of this host keeps a container's output in."""

    def __init__(self, engine: EngineUnderTest, container: str) -> None:
        root = Path(engine.client.info()["DockerRootDir"])
        if not root.exists():
            pytest.skip("the engine's files are not on this host")
        self._directory = root / "containers" / container / "local-logs"
        #: Bytes, the most that was seen here.
        self.most = 0
        #: Inode of each file that was ever seen: more than two mean that some are gone again.
        self.files: set[int] = set()

    def look(self) -> None:
        """Once more."""
        size = 0
        for file in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # rotated meanwhile
                size += file.stat().st_size
                self.files.add(file.stat().st_ino)
        self.most = max(self.most, size)


def follow(client: Client, task_id: str, seen: list[int]) -> None:
    """Read all output there is, and count its lines."""
    for _ in client.handle(task_id).logs(follow=True):
        seen[0] += 1


def test_endless_output_fills_neither_memory_nor_disk(program: Program, engine: EngineUnderTest) -> None:
    with program.serving() as serving, program.client() as client, program.client() as reader:
        # What is loaded with the first task is no growth.
        program.run("submit", engine.image, "--wait", "--follow", "--", "echo", "warm")
        resident = Resident(serving.process.pid)
        # Long lines: an engine spends its time on each of them, whatever its length.
        script = 'exec yes "$(head -c 4000 /dev/zero | tr "\\0" x)"'
        task = Task(image=engine.image, command=["sh", "-c", script], grace_period=0.1)
        handle = client.submit(task)
        program.until_running(handle.id)
        log, seen = LogOnDisk(engine, container_of(engine, handle.id)), [0]
        following = threading.Thread(target=follow, args=(reader, handle.id, seen), daemon=True)
        following.start()

        def enough() -> bool:
            resident.look()
            log.look()
            return len(log.files) > 4 and seen[0] > 5_000

        until(enough, 60)
        handle.cancel()
        until(lambda: resident.look() and handle.status().state.terminal, 60)
        following.join(TIMEOUT)
        assert not following.is_alive()
        assert handle.status().state is State.CANCELLED
    assert resident.most - resident.first < GROWTH
    # The current file, the one before it, and that one again while it is being compressed.
    assert log.most < 3 * LOG_MAX_BYTES + MIB
