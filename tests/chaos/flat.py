"""Whether a dispatcher stays as small as it is: ``python -m tests.chaos.flat --tasks 100000``.

One instance, in a process of its own, with real Redis, runs tasks whose containers end at once:
an engine's limit of some containers a second would make so many a matter of hours. All of the
dispatcher is there but its backend. Memory and open descriptors are read from /proc as the tasks
go by; the first sample is taken when a tenth of them has ended, and everything has been used.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
from anyio.abc import TaskStatus

from dispatcher.backends.base import Capabilities, Confirm, OnProgress
from dispatcher.cli.logging import configure
from dispatcher.client import AsyncClient, Task
from dispatcher.model import Attempt, Exit, Handle, Health, Phase
from dispatcher.service import Dispatcher
from dispatcher.settings import load
from tests.chaos import report
from tests.support.redis_server import RedisUnderTest, start

#: Tasks handed in beyond those that have ended: enough for every consumer, and no great queue.
BACKLOG = 1_000
CONSUMERS = 50
#: Tasks between two lines of the table.
STEPS = 10
OUTPUT = b"a line of output\n" * 4
#: Seconds between looks, and for a program to end.
LOOK = 0.05
END_TIMEOUT = 30
#: Memory at the end, compared with that after the first part: caches fill, and pages are not given back.
ALLOWED_GROWTH = 1.1
#: Connections to Redis that a dispatcher keeps at most; it opens them as they are wanted.
POOL = 16
BEGIN = "<!-- flat: begin; written by `make chaos-flat` -->"
END = "<!-- flat: end -->"


@dataclass(frozen=True)
class Sample:
    """What was seen when so many tasks had ended."""

    tasks: int
    seconds: int
    rss_mib: float
    descriptors: int


class InstantBackend:
    """A backend whose containers have ended as soon as they are started."""

    name = "instant"
    capabilities = Capabilities(pulls=False, isolated=False)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """See ``Backend.run``."""
        task_status.started()
        await anyio.sleep_forever()

    async def probe(self) -> Health:
        """See ``Backend.probe``."""
        return Health(ok=True, daemon="instant")

    async def image_id(self, image: str) -> str:
        """See ``Backend.image_id``."""
        return "instant"

    async def image_obtainable(self, image: str) -> bool:
        """See ``Backend.image_obtainable``."""
        return True

    async def prepare(self, image: str, on_progress: OnProgress) -> bool:
        """See ``Backend.prepare``."""
        return False

    async def images_size(self) -> int:
        """See ``Backend.images_size``."""
        return 0

    async def remove_image(self, image: str, image_id: str) -> bool:
        """See ``Backend.remove_image``."""
        return False

    async def launch(self, attempt: Attempt, confirm: Confirm) -> Handle:
        """See ``Backend.launch``."""
        handle = Handle(
            container_id=attempt.name,
            name=attempt.name,
            namespace=attempt.namespace,
            task_id=attempt.task_id,
            attempt=attempt.number,
            daemon="instant",
            phase=Phase.EXITED,
            started_at=time.time(),
        )
        await confirm(handle)
        return handle

    async def wait(self, handle: Handle) -> Exit:
        """See ``Backend.wait``."""
        return Exit(0, handle.started_at or 0.0, time.time())

    async def logs(self, handle: Handle, *, follow: bool) -> AsyncIterator[bytes]:
        """See ``Backend.logs``."""
        yield OUTPUT

    async def stop(self, handle: Handle, grace: float) -> None:
        """See ``Backend.stop``."""

    async def remove(self, handle: Handle) -> None:
        """See ``Backend.remove``."""

    async def find(self, namespace: str) -> list[Handle]:
        """See ``Backend.find``."""
        return []


async def serve(url: str) -> None:
    """One instance, until it is told to end."""
    configure("error", "json")
    flags = {"redis_url": url, "num_consumers": CONSUMERS, "task_retention": 30, "results_max_length": 10**7}
    dispatcher = Dispatcher(load(flags).settings, InstantBackend())

    async def heed() -> None:
        async for _ in signals:
            dispatcher.drain()

    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with anyio.create_task_group() as group:
            group.start_soon(heed)
            await dispatcher.run()
            group.cancel_scope.cancel()


async def play(server: RedisUnderTest, pid: int, tasks: int) -> list[Sample]:
    """Hand ``tasks`` in and look at the instance as they end; one sample for each of STEPS parts."""
    samples = []
    accepted = ended = 0
    began = time.monotonic()
    with server.client() as redis:
        async with AsyncClient(server.url) as client:
            while ended < tasks:
                missing = min(tasks - accepted, BACKLOG - (accepted - ended))
                if missing > 0:
                    await client.submit_many([Task(image="busybox", command=["true"])] * missing)
                    accepted += missing
                before, ended = ended, int(redis.xlen("{dispatcher:tasks}:results"))
                if ended * STEPS // tasks > before * STEPS // tasks:
                    samples.append(Sample(ended, round(time.monotonic() - began), *vitals(pid)))
                    print(*asdict(samples[-1]).values(), sep="\t", flush=True)
                await anyio.sleep(LOOK)
    return samples


def vitals(pid: int) -> tuple[float, int]:
    """Memory in MiB and open descriptors of a process."""
    proc = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    rss = int(fields["VmRSS"].split()[0]) / 1024
    return round(rss, 1), len(list((proc / "fd").iterdir()))


def table(samples: Iterable[Sample]) -> str:
    """As docs/reliability.md has it."""
    rows = [f"| {s.tasks:,} | {s.seconds} | {s.rss_mib:.1f} | {s.descriptors} |" for s in samples]
    return "\n".join(["| tasks ended | s | memory, MiB | descriptors |", "|---:|---:|---:|---:|", *rows])


def main() -> int:
    """Play it, and put the table between its marks in docs/reliability.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.flat", description=__doc__)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--dry", action="store_true", help="write no report")
    parser.add_argument("--serve", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        anyio.run(serve, arguments.serve)
        return 0
    with tempfile.TemporaryDirectory(prefix="flat-") as home:
        process, server = start(Path(home), "--appendfsync", "no")
        command = [sys.executable, "-m", "tests.chaos.flat", "--serve", server.url]
        instance = subprocess.Popen(command)
        try:
            samples = anyio.run(play, server, instance.pid, arguments.tasks)
        finally:
            instance.terminate()
            code = instance.wait(END_TIMEOUT)
            process.terminate()
            process.wait(END_TIMEOUT)
    first, last = samples[0], samples[-1]
    flat = last.rss_mib <= first.rss_mib * ALLOWED_GROWTH and last.descriptors <= first.descriptors + POOL
    if not arguments.dry:
        text = report.PAGE.read_text("utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        report.PAGE.write_text(f"{before}{BEGIN}\n\n{table(samples)}\n\n{END}{after}", "utf-8")
    print("flat" if flat else "NOT FLAT", f"(exit code {code})")
    return 0 if flat and code == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
