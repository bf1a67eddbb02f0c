"""Registries that are slow or refuse: what becomes of the tasks that need nothing from them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import chain

import docker
import docker.errors

from benchmarks.ground import WARM, Ground, Instance, ended, latency, warm
from benchmarks.images import raw_pull
from benchmarks.measure import Finding, measure, percentile
from dispatcher.client import Task, TaskStatus
from tests.support.faulty_registry import Fault, FaultyRegistry

#: The mixed burst: so many tasks of an image that is there, and as many over some that are not.
WARM_TASKS = 20
COLD_IMAGES = 5
#: Consumers of a dispatcher that is told nothing else.
CONSUMERS = 10
#: Bytes of a cold image, and what its registry sends a second over all connections.
COLD_BYTES = 64_000_000
RATE = 40e6
#: Beside a registry that refuses: tasks of each kind, images and bytes of the healthy one.
BESIDE = 10
HEALTHY_IMAGES = 2
HEALTHY_BYTES = 20_000_000
#: Seconds of the look-ahead's scene: what the running tasks take.
BUSY_SECONDS = 3


@measure
def mixed_burst(ground: Ground) -> Iterator[Finding]:
    """Tasks whose image is there, between tasks that wait for a slow registry."""
    mixed: list[float] = []
    naive: list[float] = []
    there: list[float] = []
    with FaultyRegistry(rate=RATE) as registry, ground.instance(NUM_CONSUMERS=str(CONSUMERS)) as instance:
        images = [registry.add(f"cold-{n}", layers=[COLD_BYTES]) for n in range(COLD_IMAGES)]
        colds = [images[n % COLD_IMAGES] for n in range(WARM_TASKS)]
        order = list(chain.from_iterable((WARM, cold) for cold in colds))
        tasks = [Task(image=image, command=["true"]) for image in order]
        try:
            for _ in range(ground.rounds):
                ground.remove(*images)
                mixed.append(_warm_p95(instance.run(tasks)))
                # They are all there now.
                there.append(_warm_p95(instance.run(tasks)))
                ground.remove(*images)
                naive.append(percentile(naive_burst(ground, order), 0.95))
        finally:
            ground.remove(*images)
    batch = (
        f"{WARM_TASKS} warm and {WARM_TASKS} cold tasks in turn, the cold ones over {COLD_IMAGES} images of "
        f"{COLD_BYTES / 1e6:g} MB at {RATE / 1e6:g} MB/s in all, {CONSUMERS} consumers"
    )
    yield Finding(
        what="mixed burst: warm tasks, submitted to ended, p95",
        batch=batch,
        ours_rounds=mixed,
        floor_rounds=naive,
        against="consumers that pull themselves",
        goal=0.4,
    )
    yield Finding(
        what="mixed burst: warm tasks, submitted to ended, p95",
        batch=batch,
        ours_rounds=mixed,
        floor_rounds=there,
        against="ours, all images present",
        goal=1.2,
    )


def _warm_p95(statuses: Sequence[TaskStatus]) -> float:
    # Every other one, beginning with the first, is warm.
    return percentile([latency(status) for status in statuses[::2]], 0.95)


def naive_burst(ground: Ground, order: Sequence[str]) -> list[float]:
    """Seconds of the warm tasks where each consumer takes the next task, pulls its image if that is
    missing, and runs it: the same tasks, engine and number of consumers."""
    left: queue.SimpleQueue[str] = queue.SimpleQueue()
    for image in order:
        left.put(image)
    took: list[float] = []
    errors: list[Exception] = []

    def consume() -> None:
        client = ground.another_client()
        try:
            while not errors:
                image = left.get_nowait()
                made = _created(client, ground.network, image)
                client.start(made)
                client.wait(made)
                if image == WARM:
                    # As for ours, the engine tells when that was.
                    state = client.inspect_container(made)["State"]
                    took.append(datetime.fromisoformat(state["FinishedAt"]).timestamp() - began)
                client.remove_container(made)
        except queue.Empty:
            pass
        except Exception as error:  # noqa: BLE001 - told by the thread that waits for this one
            errors.append(error)
        finally:
            client.close()

    began = time.time()
    threads = [threading.Thread(target=consume, name=f"naive consumer {n}") for n in range(CONSUMERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return took


def _created(client: docker.APIClient, network: str, image: str) -> str:
    try:
        client.inspect_image(image)
    except docker.errors.ImageNotFound:
        raw_pull(client, image)
    host_config = client.create_host_config(network_mode=network)
    return str(client.create_container(image, ["true"], host_config=host_config)["Id"])


@measure
def throttled_registry(ground: Ground) -> Iterator[Finding]:
    """Tasks that need nothing from a registry that answers 429, with and without it beside them."""
    alone: list[float] = []
    beside: list[float] = []
    with FaultyRegistry(rate=RATE) as healthy, ground.instance() as instance:
        images = [healthy.add(f"healthy-{n}", layers=[HEALTHY_BYTES]) for n in range(HEALTHY_IMAGES)]
        colds = [Task(image=images[n % HEALTHY_IMAGES], command=["true"]) for n in range(BESIDE)]
        others = list(chain.from_iterable((warm(), cold) for cold in colds))
        try:
            for _ in range(ground.rounds):
                ground.remove(*images)
                alone.append(max(latency(status) for status in instance.run(others)))
                ground.remove(*images)
                beside.append(_beside_throttled(instance, others))
        finally:
            ground.remove(*images)
    yield Finding(
        what="beside a registry that answers 429: tasks of others, until the last has ended",
        batch=(
            f"{BESIDE} tasks whose image is there and {BESIDE} over {HEALTHY_IMAGES} cold images of "
            f"{HEALTHY_BYTES / 1e6:g} MB, in turn, {CONSUMERS} consumers; {BESIDE} throttled before and "
            f"between them, Retry-After 5"
        ),
        ours_rounds=beside,
        floor_rounds=alone,
        against="without the throttled",
        goal=1.1,
    )


def _beside_throttled(instance: Instance, others: Sequence[Task]) -> float:
    # Another registry each time: the one before is still left alone.
    with FaultyRegistry() as registry:
        reference = registry.add("throttled")
        registry.fault("throttled", Fault(status=429, retry_after="5"))
        throttled = [Task(image=reference, command=["true"]) for _ in range(BESIDE)]
        ahead, between = throttled[: BESIDE // 2], iter(throttled[BESIDE // 2 :])
        mixed = []
        for number, other in enumerate(others):
            mixed += [other] if number % 4 else [next(between), other]
        handles = instance.submit([*ahead, *mixed])
        mine = [
            handle for handle, task in zip(handles, [*ahead, *mixed], strict=True) if task.image != reference
        ]
        try:
            return max(latency(status) for status in ended(mine))
        finally:
            for handle in handles:
                handle.cancel()
            for handle in handles:
                handle.wait(60)


@measure
def look_ahead(ground: Ground) -> Iterator[Finding]:
    """A task of a cold image behind consumers that are busy, with and without looking ahead."""
    waits: dict[str, list[float]] = {"10": [], "0": []}
    with FaultyRegistry(rate=RATE) as registry:
        image = registry.add("cold", layers=[2 * COLD_BYTES])
        try:
            for _ in range(ground.rounds):
                for setting, found in waits.items():
                    ground.remove(image)
                    with ground.instance(NUM_CONSUMERS="2", LOOK_AHEAD=setting) as instance:
                        found.append(_behind_busy(instance, image))
        finally:
            ground.remove(image)
    yield Finding(
        what="a cold task behind busy consumers, submitted to started",
        batch=(
            f"2 consumers busy for {BUSY_SECONDS} s, a cold image of {2 * COLD_BYTES / 1e6:g} MB at "
            f"{RATE / 1e6:g} MB/s"
        ),
        ours_rounds=waits["10"],
        floor_rounds=waits["0"],
        against="LOOK_AHEAD=0",
        goal=0.8,
    )


def _behind_busy(instance: Instance, image: str) -> float:
    busy = [Task(image=WARM, command=["sleep", str(BUSY_SECONDS)])] * 2
    handles = instance.submit([*busy, Task(image=image, command=["true"])])
    status = ended(handles)[-1]
    if status.accepted_at is None or status.started_at is None:
        raise RuntimeError(f"a task without its times: {status}")
    return (status.started_at - status.accepted_at).total_seconds()
