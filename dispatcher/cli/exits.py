"""Exit codes, and how an error becomes one: told in a line on stderr, and never with a trace
unless it is a mistake of ours.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator

from dispatcher.cli.output import OutputClosed, harmless

DONE = 0
FAILED = 1
USAGE = 2
NOT_FOUND = 3
UNREACHABLE = 4
TIMED_OUT = 124
#: With ``submit --wait``: the task failed and there is no exit code of its own.
NO_EXIT_CODE = 125
INTERRUPTED = 130
#: Nobody reads what we write any more; what a shell reports of a program that SIGPIPE ended.
BROKEN_PIPE = 141


class Stopped(Exception):
    """A signal ended the command."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"stopped by signal {signum}")


def tell(message: str) -> None:
    """A line for people, on stderr; harmless whatever is in it."""
    try:
        print(harmless(message), file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody listens


def tell_gap(missing: int) -> None:
    """Say that some of a task's output is not there."""
    tell(f"dispatcher: {missing} bytes before this were not kept (LOG_TAIL_BYTES)")


def exit_code_of(error: BaseException) -> int:
    """Tell of ``error`` on stderr; what to exit with."""
    causes = list(leaves(error))
    signal = next((cause for cause in causes if isinstance(cause, Stopped)), None)
    if signal is not None:
        return 128 + signal.signum
    # Of several at once the first is told: the others mostly follow from it.
    return _code_of(causes[0])


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors that groups of them are made of, in order."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from leaves(part)
    else:
        yield error


def _code_of(error: BaseException) -> int:
    if isinstance(error, OutputClosed | BrokenPipeError):
        return BROKEN_PIPE
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    # Typer's own errors about how it was called; it keeps their root to itself.
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        error.show()
        return int(error.exit_code)
    from dispatcher.errors import ConfigurationError, DispatcherError

    if isinstance(error, ConfigurationError):
        for problem in error.problems:
            tell(problem.replace("\n", " "))
        return USAGE
    if isinstance(error, DispatcherError):
        tell(f"dispatcher: {error}")
        return _code_of_ours(error)
    # Without locals: they would show secrets.
    tell("".join(traceback.format_exception(error)).rstrip())
    tell("dispatcher: this is a bug of the dispatcher; please report it with the lines above")
    return FAILED


def _code_of_ours(error: Exception) -> int:
    from dispatcher import errors

    match error:
        case errors.TaskRefused() | errors.TaskConflict():
            return USAGE
        case errors.TaskNotFound() | errors.UnknownQueue():
            return NOT_FOUND
        case errors.QueueUnavailable() | errors.BackendUnreachable():
            return UNREACHABLE
        case errors.WaitTimeout():
            return TIMED_OUT
        case _:
            return FAILED


def exit_code_of_task(state: str, exit_code: int | None) -> int:
    """What ``--wait`` exits with: the container's code; 125 if it never had one.

    A task that did not succeed never looks as if it had: a container that ends with 0 when it is
    told to stop counts as 1.
    """
    if state == "succeeded":
        return DONE
    if exit_code is None:
        return NO_EXIT_CODE
    return exit_code & 0xFF or FAILED
