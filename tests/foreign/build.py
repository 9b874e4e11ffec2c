"""Compiles the foreign device once for each version of it, of the compiler and of torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("foreign.cpp")
# Found before tests are given a cache of their own, which is empty each time; processes that they start inherit it.
_CACHE_VARIABLE = "MBALL_TESTS_CACHE"
_CACHE = Path(
    os.environ.setdefault(
        _CACHE_VARIABLE, str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mball-tests")
    )
)
_COMPILER = "c++"
_OPTIONS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unused-parameter")


def missing() -> str:
    """Returns what keeps the foreign device from being built on this machine, or an empty string."""
    return "" if shutil.which(_COMPILER) else f"needs a C++ compiler, {_COMPILER}, for the foreign device"


def build(folder: Path = _CACHE) -> Path:
    """Returns the library, compiled by whoever comes first; others wait for it. It takes about 20 seconds."""
    import torch

    compiler = subprocess.run([_COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    seen = (SOURCE.read_text(), " ".join(_OPTIONS), compiler, torch.__version__, torch.__file__)
    library = _writable(folder) / f"foreign-{hashlib.sha256(repr(seen).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library, Path(torch.__file__).parent)
    return library


def _writable(folder: Path) -> Path:
    """Returns the folder, made where it is missing; another one for users whose home cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"mball-tests-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _compile(library: Path, torch_folder: Path) -> None:
    include, lib = torch_folder / "include", torch_folder / "lib"
    # What is under the final name is whole.
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [_COMPILER, *_OPTIONS, "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    command += [str(SOURCE), "-o", str(unfinished), f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    unfinished.rename(library)
