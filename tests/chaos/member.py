"""One place among the world's dispatchers, filled by one ``dispatcher serve`` process after another."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

from tests.cli.program import Program, Running, until

#: Seconds for an instance to say that it has started, and for one to end.
START_TIMEOUT = 60.0
END_TIMEOUT = 60.0


class Member:
    """A dispatcher that can be killed, stopped, continued, terminated and started again.

    Each life has an instance id of its own, ``<name>.<number>``: then who holds a task tells
    also which life of a member does, and a life need not wait for its predecessor's lease.
    Not thread-safe: one fault at a time has a member.
    """

    def __init__(self, name: str, program: Program, environment: dict[str, str]) -> None:
        self.name = name
        self._program = program
        self._environment = environment
        self._stack = ExitStack()
        self._running: Running | None = None
        self._number = 0
        #: Whether its end is wanted; one that ends unasked is a finding.
        self.expendable = True
        #: Stopped, or blocked as far as is known: it holds what it holds and does nothing.
        self.away = False
        #: Where each life has logged, by instance id.
        self.logs: dict[str, Path] = {}

    def start(self, *, failpoint: str = "", wait: bool = True, **environment: str) -> None:
        """Begin a life; with ``failpoint``, one that will fail there. Ends the one before."""
        self.close()
        self._number += 1
        more = {**self._environment, **environment, "INSTANCE_ID": self.instance}
        if failpoint:
            more |= {"ALLOW_FAILPOINTS": "true", "DISPATCHER_FAILPOINT": failpoint}
        self._running = self._stack.enter_context(self._program.started("serve", **more))
        self.logs[self.instance] = self._running.log
        self.expendable, self.away = bool(failpoint), False
        if wait:
            self.wait_started()

    def wait_started(self) -> None:
        """Return when it takes tasks. Raises TimeoutError; AssertionError if it has ended."""
        running = self._life
        until(
            lambda: '"instance.started"' in running.stderr or running.process.poll() is not None,
            START_TIMEOUT,
            what=f"{self.instance} does not start; it logs to {running.log}",
        )
        assert '"instance.started"' in running.stderr, running.stderr[-2000:]

    # --- what is seen -------------------------------------------------------------------

    @property
    def _life(self) -> Running:
        assert self._running is not None, f"{self.name} was never started"
        return self._running

    @property
    def instance(self) -> str:
        """The instance id of its present life, or of its last."""
        return f"{self.name}.{self._number}"

    @property
    def pid(self) -> int:
        """Of its present life."""
        return self._life.process.pid

    @property
    def alive(self) -> bool:
        """Whether its process is there; it may be stopped."""
        return self._running is not None and self._running.process.poll() is None

    @property
    def owns(self) -> bool:
        """Whether it can take care of a task now."""
        return self.alive and not self.away

    @property
    def stopped(self) -> bool:
        """Whether the kernel has it stopped, as after SIGSTOP."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text()
        except FileNotFoundError:
            return False
        return status.rpartition(")")[2].split()[0] == "T"

    @property
    def stderr(self) -> str:
        """What its present life has logged."""
        return self._life.stderr

    def says(self, word: str) -> None:
        """Wait until its present life has logged ``word``."""
        self._life.says(word)

    # --- what is done to it -------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL."""
        self.expendable = True
        self._life.ends(signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP."""
        self.away = True
        self._life.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._life.process.send_signal(signal.SIGCONT)
        self.away = False

    def terminate(self) -> None:
        """SIGTERM; ``ended`` waits for what follows."""
        self.expendable = True
        self._life.process.send_signal(signal.SIGTERM)

    def ended(self, timeout: float = END_TIMEOUT) -> int:
        """Wait for its end; the exit code, or the signal as a negative number."""
        return self._life.process.wait(timeout)

    def close(self) -> None:
        """Kill it if it runs, and let go of its pipes."""
        self.expendable = True
        self._stack.close()
