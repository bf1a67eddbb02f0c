"""The command line: the one place that reads the environment, installs signal handlers and exits.

Modules here import at their top only what is light; whatever talks to Redis, an engine or a
terminal is imported by the command that needs it, so that ``dispatcher --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command of ``sys.argv`` and exit with its code; see ``dispatcher.cli.exits``."""
    from dispatcher.cli.app import app
    from dispatcher.cli.exits import INTERRUPTED, exit_code_of

    # A name with odd bytes in it is no reason to die while telling of it.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _code(app(prog_name="dispatcher", standalone_mode=False))
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as end:
        code = _code(end.code)
    except BaseException as error:  # noqa: BLE001 - every error ends here, as a line and a code
        code = exit_code_of(error)
    _leave(code)


def _code(value: object) -> int:
    return value if isinstance(value, int) else 0


def _leave(code: int) -> NoReturn:
    """Exit; what can't be written any more, because nobody reads it, is dropped without a word."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # The interpreter flushes once more at its end, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
