"""Starts: what a burst of them costs each, and whether the engine is kept busy."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from statistics import median

from benchmarks.ground import WARM, Ground, Instance, warm
from benchmarks.measure import Finding, measure

#: Containers of a burst, and of those one at a time.
BURST = 48
SINGLES = 7
CONSUMERS = 32
#: How many at once a raw client is tried with; the best of them is the floor.
WIDTHS = (2, 4, 8)
#: A gate so wide that it keeps no engine of a few cores waiting.
OPEN = 8


@measure
def start_burst(ground: Ground) -> Iterator[Finding]:
    """Many tasks at once, whose image is there, through the whole dispatcher."""
    single: list[float] = []
    burst: list[float] = []
    seconds: list[float] = []
    wide: list[float] = []
    raw: dict[int, list[float]] = defaultdict(list)
    for _ in range(ground.rounds):
        with ground.instance(NUM_CONSUMERS=str(CONSUMERS)) as instance:
            before = len(instance.launches())
            for _ in range(SINGLES):
                instance.run([warm()])
            between = len(instance.launches())
            seconds.append(_seconds_of_burst(instance))
            launches = instance.launches()
            single.append(median(launches[before:between]))
            burst.append(median(launches[between:]))
        with ground.instance(NUM_CONSUMERS=str(CONSUMERS), width=OPEN) as instance:
            wide.append(_seconds_of_burst(instance))
        for width in WIDTHS:
            raw[width].append(raw_burst(ground, BURST, width))
    batch = f"{BURST} tasks, {CONSUMERS} consumers, image present, network none, `true`"
    yield Finding(
        what="launch in a burst, from the start gate to started, p50",
        batch=batch,
        ours_rounds=burst,
        floor_rounds=single,
        against=f"one at a time, p50 of {SINGLES}",
        goal=2.2,
    )
    yield Finding(
        what="containers a second: what the start gate costs",
        batch=batch,
        ours_rounds=[BURST / each for each in seconds],
        floor_rounds=[BURST / each for each in wide],
        against=f"the same dispatcher, {OPEN} starts at once",
        unit="/s",
        goal=0.97,
        bound="least",
    )
    best = min(raw, key=lambda width: median(raw[width]))
    yield Finding(
        what="containers a second through the whole dispatcher",
        batch=batch,
        ours_rounds=[BURST / each for each in seconds],
        floor_rounds=[BURST / each for each in raw[best]],
        against=f"raw client, {best} at once, the best of {', '.join(map(str, WIDTHS))}",
        unit="/s",
        goal=0.97,
        bound="least",
    )


def _seconds_of_burst(instance: Instance) -> float:
    began = time.monotonic()
    instance.run([warm()] * BURST)
    return time.monotonic() - began


def raw_burst(ground: Ground, containers: int, width: int) -> float:
    """Seconds to create, start, wait for and remove so many, ``width`` at once, by the library alone."""
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(containers):
        left.put(number)
    errors: list[Exception] = []

    def work() -> None:
        client = ground.another_client()
        try:
            while not errors:
                left.get_nowait()
                host_config = client.create_host_config(network_mode=ground.network)
                made = client.create_container(WARM, ["true"], host_config=host_config)
                client.start(made)
                client.wait(made)
                client.remove_container(made)
        except queue.Empty:
            pass
        except Exception as error:  # noqa: BLE001 - told by the thread that waits for this one
            errors.append(error)
        finally:
            client.close()

    began = time.monotonic()
    threads = [threading.Thread(target=work, name=f"raw client {n}") for n in range(width)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.monotonic() - began
