"""A base image made of this machine's Python, for where no registry is to be had.

What is in it: the interpreter that runs the tests, its standard library, the shared libraries
these need, a static busybox as the shell, certificates, and how pip reaches an index here.
"""

from __future__ import annotations

import io
import os
import re
import ssl
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pydantic_core
import pytest

from tests.support.engine import image_archive

#: Parts of the standard library that nothing in an image asks for; most of its size.
_LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "tkinter",
}
#: What pip must know to reach an index from another root directory, by its name in pip's settings.
_PIP_SETTINGS = {"cert", "index-url", "extra-index-url", "proxy", "trusted-host"}


def python_archive() -> bytes:
    """The root file system, as a tar archive."""
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    if not python.exists():
        pytest.skip(f"{python} is not there: this Python can't be put into an image")
    library = [path for path in _library() if not path.is_dir()]
    compiled = [path for path in library if path.suffix == ".so"]
    # It stands for the wheels that pip will install: they need the compiler's library besides.
    wheel = Path(str(pydantic_core._pydantic_core.__file__))
    files = {*library, python.resolve(), *_shared_libraries([python.resolve(), *compiled, wheel])}
    archive = io.BytesIO(image_archive())
    with tarfile.open(fileobj=archive, mode="a") as tar:
        for path in sorted(files):
            tar.add(path.resolve(), arcname=str(path).lstrip("/"))
        for path in _certificates():
            tar.add(path.resolve(), arcname=str(path).lstrip("/"))
        for name in {python.name, "python3"}:
            link = tarfile.TarInfo(f"usr/local/bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, str(python.resolve())
            tar.addfile(link)
        settings = _pip_settings().encode()
        entry = tarfile.TarInfo("etc/pip.conf")
        entry.size, entry.mode = len(settings), 0o644
        tar.addfile(entry, io.BytesIO(settings))
    return archive.getvalue()


def _library() -> Iterator[Path]:
    paths = sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_prefix})
    roots = {Path(paths["stdlib"]), Path(paths["platstdlib"])}
    # Debian's ensurepip takes pip from here.
    roots.add(Path("/usr/share/python-wheels"))
    for root in roots:
        for directory, below, files in os.walk(root):
            below[:] = [name for name in below if name not in _LEFT_OUT and not name.startswith("config-")]
            yield from (Path(directory, file) for file in files if not file.endswith(".a"))


def _shared_libraries(programs: list[Path]) -> Iterator[Path]:
    """The libraries, and the loader, under the names they are looked for by."""
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    yield from (Path(name) for name in re.findall(r"(?:=> |\t)(/\S+) \(0x", listed))


def _certificates() -> set[Path]:
    verify = ssl.get_default_verify_paths()
    named = (verify.openssl_cafile, "/etc/ssl/certs/ca-certificates.crt")
    return {Path(name) for name in named if Path(name).is_file()}


def _pip_settings() -> str:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE)
    settings = {
        # Directories of this machine are not in the image.
        name: " ".join(value for value in values.split() if not value.startswith("file:"))
        for name, values in found
        if name in _PIP_SETTINGS
    }
    return "".join(["[global]\n", *(f"{name} = {value}\n" for name, value in settings.items() if value)])
