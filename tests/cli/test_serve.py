"""``serve``: several instances, their beginning and their end."""

from __future__ import annotations

import signal
import socket
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from dispatcher.client import Handle, Task
from tests.cli.program import Program, until
from tests.support.redis_server import END_TIMEOUT, free_port, start

TASKS = 200


@pytest.mark.timeout(240)  # 600 processes, on few cores
def test_three_instances_start_each_of_200_tasks_once(program: Program, tmp_path: Path) -> None:
    started = tmp_path / "started"
    task = Task(image="busybox", command=["sh", "-c", f'echo "$DISPATCHER_TASK_ID" >> {started}'])
    with ExitStack() as stack, program.client() as client:
        instances = [stack.enter_context(program.serving("--num-consumers", "4")) for _ in range(3)]
        handles = [handle for handle in client.submit_many([task] * TASKS) if isinstance(handle, Handle)]
        assert len(handles) == TASKS
        assert {handle.wait(timeout=200).state for handle in handles} == {"succeeded"}
        # Each has had its part.
        assert all("task.finished" in instance.stderr for instance in instances)
        for instance in instances:
            instance.process.send_signal(signal.SIGTERM)
        assert [instance.ends() for instance in instances] == [0, 0, 0]
    counted = Counter(started.read_text().split())
    assert counted == Counter(handle.id for handle in handles)


def test_sigterm_drains(program: Program, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with program.serving() as instance:
        runs = program.submit(f"while ! test -e {go}; do sleep 0.02; done")
        program.until_running(runs)
        instance.process.send_signal(signal.SIGTERM)
        instance.says("instance.draining")
        waits = program.submit("true")
        go.touch()
        assert instance.ends() == 0
    with program.client() as client:
        assert client.status(runs).state == "succeeded"
        assert client.status(waits).state == "queued"
        assert client.instances() == []


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_leaves_what_runs_to_the_next_instance(
    program: Program, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    go, started = tmp_path / "go", tmp_path / "started"
    with program.serving() as instance:
        task_id = program.submit(f"echo once >> {started}; while ! test -e {go}; do sleep 0.02; done")
        program.until_running(task_id)
        instance.process.send_signal(signum)
        instance.says("instance.draining")
        assert instance.ends(signum) == code
        assert "Traceback" not in instance.stderr
    with program.serving():
        go.touch()
        assert program.ended(task_id).state == "succeeded"
    assert started.read_text() == "once\n"


def test_it_waits_for_redis_and_tells_the_cause_once(tmp_path: Path) -> None:
    port = free_port()
    program = Program(f"redis://127.0.0.1:{port}/0", tmp_path)
    with program.started("serve", "--health-port", str(health := free_port())) as instance:
        instance.says("instance.waits")
        assert _status(health, "healthz") == 200
        assert _status(health, "readyz") == 503
        # The options given last win.
        process, _ = start(tmp_path, "--port", str(port))
        try:
            instance.says("instance.started")
            until(lambda: _status(health, "readyz") == 200)
            assert _status(health, "metrics") == 200
            assert instance.stderr.count("instance.waits") == 1
            assert instance.ends(signal.SIGTERM) == 0
        finally:
            process.terminate()
            process.wait(END_TIMEOUT)


def test_a_signal_ends_the_waiting(tmp_path: Path) -> None:
    program = Program(f"redis://127.0.0.1:{free_port()}/0", tmp_path)
    with program.started("serve") as instance:
        instance.says("instance.waits")
        assert instance.ends(signal.SIGTERM) == 0


def test_it_waits_for_the_engine(program: Program, tmp_path: Path) -> None:
    with program.started("serve", "--backend", "docker", DOCKER_HOST=f"unix://{tmp_path}/none") as instance:
        instance.says("instance.waits")
        assert instance.ends(signal.SIGINT) == 0


def test_what_it_may_not_use_is_2(program: Program) -> None:
    done = program.run("serve", exit_code=2, ALLOW_PROCESS_BACKEND="false")
    assert done.stderr.startswith(b"BACKEND: 'process' isolates nothing")
    done = program.run("serve", "--backend", "abacus", exit_code=2)
    assert b"BACKEND: 'abacus' is not allowed" in done.stderr
    with _listener() as port:
        done = program.run("serve", "--health-port", str(port), exit_code=2)
        assert f"HEALTH_PORT: can't listen on 0.0.0.0:{port}" in done.stderr.decode()


def _status(port: int, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}") as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@contextmanager
def _listener() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        yield listener.getsockname()[1]
