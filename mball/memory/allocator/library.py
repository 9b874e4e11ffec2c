"""Finds the C library, or compiles it where the package's build had no compiler."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from mball.errors import DeviceError
from mball.memory.allocator.records import EntryRecord, FailureRecord, SegmentRecord, StatisticsRecord

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("segments.c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=c11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
_LIBRARIES = ("-ldl", "-lpthread")
_COMPILING_S = 120


def load_library(cache: Path | None = None) -> ctypes.CDLL:
    """Returns the library, whose functions have their types: the package's own, else one that is compiled into `cache`.

    `cache` is a folder of mball's own (`mball.config.cache_directory()`), made where it is missing; in it the compiled
    library is kept. Without `cache` nothing is compiled. Does not start CUDA.

    Raises:
        DeviceError: there is none, and why, in one line.
    """
    digest = source_digest()
    for path in built():
        if (library := _opened(path, digest)) is not None:
            return _typed(library)
    if cache is None:
        raise DeviceError(
            "the allocator's C library is not there: this package was built without a C compiler, or from other "
            "sources; install one (cc) and mball anew"
        )
    path = cache / "native" / f"segments-{digest}-{platform.machine()}.so"
    if not _is_own(path):
        _compile(path, digest)
    library = _opened(path, digest)
    if library is None:
        raise DeviceError(f"the allocator's C library {str(path)!r} cannot be loaded; remove it, and try again")
    return _typed(library)


def source_digest() -> str:
    """Returns what tells the source from any other, in 16 hexadecimal digits; setup.py does the same."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]


def built() -> list[Path]:
    """Returns what the package's build left beside the source, of this Python or another."""
    own = [SOURCE.with_name(f"_segments{suffix}") for suffix in EXTENSION_SUFFIXES]
    return [path for path in own if path.is_file()]


def _opened(path: Path, digest: str) -> ctypes.CDLL | None:
    """Returns the library at `path`, or nothing if it is of other sources or another kind of machine."""
    try:
        library = ctypes.CDLL(str(path))
        library.mball_source.restype = ctypes.c_char_p
        is_current = library.mball_source() == digest.encode()
    except (OSError, AttributeError) as error:
        _log.info("%s is not used: %s", path, error)
        return None
    return library if is_current else None


def _is_own(path: Path) -> bool:
    """Whether there is a library that nobody but this user could have put there."""
    try:
        states = [path.parent.stat(), path.stat()]
    except OSError:
        return False
    others_may_write = stat.S_IWGRP | stat.S_IWOTH
    return all(state.st_uid == os.geteuid() and not state.st_mode & others_may_write for state in states)


def _compile(path: Path, digest: str) -> None:
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise DeviceError(
            f"the allocator's C library is not there, and no C compiler to build it ({', '.join(_COMPILERS)}); install "
            "one, and try again"
        )
    begin_s = time.perf_counter()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Beside it, then renamed: several processes may do so at one time.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            command = [compiler, *_FLAGS, f'-DSOURCE_DIGEST="{digest}"', "-o", str(unfinished), str(SOURCE)]
            finished = subprocess.run(
                [*command, *_LIBRARIES], capture_output=True, text=True, timeout=_COMPILING_S, check=False
            )
            if finished.returncode:
                raise DeviceError(f"{compiler} cannot build the allocator's C library: {finished.stderr.strip()}")
            unfinished.chmod(0o700)
            os.replace(unfinished, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"the allocator's C library cannot be built in {str(path.parent)!r}: {error}") from error
    if not _is_own(path):
        raise DeviceError(
            f"others may write to {str(path.parent)!r}, so no library is loaded from there; make it this user's own"
        )
    _log.info("compiled the allocator's C library into %s in %.1f s", path, time.perf_counter() - begin_s)


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """Gives every function its types: a size that is passed as an int loses its upper half."""
    number, address, size, code = ctypes.c_int, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int
    pointer = ctypes.POINTER
    for name, result, arguments in (
        ("malloc", ctypes.c_void_p, [ctypes.c_ssize_t, number, ctypes.c_void_p]),
        ("free", None, [ctypes.c_void_p, ctypes.c_ssize_t, number, ctypes.c_void_p]),
        ("open", code, [number, size, size]),
        ("close", code, [number]),
        ("set_limit", code, [number, size]),
        ("trim", code, [number, size, pointer(size)]),
        ("lend", code, [number, size, pointer(address), pointer(size)]),
        ("take_back", code, [number, size, size, pointer(address), pointer(size), pointer(size)]),
        ("owns", number, [number, address]),
        ("offer", code, [number, address, size, address, ctypes.c_void_p, pointer(address)]),
        ("withdraw", code, [number, address]),
        ("taken", size, [number, size, pointer(address)]),
        ("generation", ctypes.c_void_p, [number]),
        ("statistics", code, [number, pointer(StatisticsRecord)]),
        ("list", size, [number, size, pointer(SegmentRecord)]),
        ("history", size, [number, size, pointer(EntryRecord)]),
        ("failure", None, [number, pointer(FailureRecord)]),
    ):
        function = getattr(library, f"mball_{name}")
        function.restype, function.argtypes = result, arguments
    return library
