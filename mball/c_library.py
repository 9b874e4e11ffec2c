"""A small C library that goes with the package: what the package's build left, or compiled on first use."""

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
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from mball.errors import DeviceError

_log = logging.getLogger(__name__)

_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=c11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
_LIBRARIES = ("-ldl", "-lpthread")
_COMPILING_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class CLibrary:
    """One file of C11, whose function `mball_source` tells which source it was compiled from.

    Attributes:
        source: the file. Beside it the package's build leaves the library, under its name with an underscore.
        title: the library in words, for errors.
    """

    source: Path
    title: str

    def load(self, cache: Path | None) -> ctypes.CDLL:
        """Returns the library: what the package's build left, else one that is compiled into `cache`.

        `cache` is a folder of mball's own (`mball.config.cache_directory()`), made where it is missing; in it the
        compiled library is kept. Without `cache` nothing is compiled.

        Raises:
            DeviceError: there is none, and why, in one line.
        """
        digest = self.digest()
        for path in self.built():
            if (library := _opened(path, digest)) is not None:
                return library
        if cache is None:
            raise DeviceError(
                f"{self.title} is not there: this package was built without a C compiler, or from other sources; "
                "install one (cc) and mball anew"
            )
        path = cache / "native" / f"{self.source.stem}-{digest}-{platform.machine()}.so"
        if not _is_own(path):
            self._compile(path, digest)
        library = _opened(path, digest)
        if library is None:
            raise DeviceError(f"{self.title} {str(path)!r} cannot be loaded; remove it, and try again")
        return library

    def digest(self) -> str:
        """Returns what tells the source from any other, in 16 hexadecimal digits; setup.py does the same."""
        return hashlib.sha256(self.source.read_bytes()).hexdigest()[:16]

    def built(self) -> list[Path]:
        """Returns what the package's build left beside the source, of this Python or another."""
        own = [self.source.with_name(f"_{self.source.stem}{suffix}") for suffix in EXTENSION_SUFFIXES]
        return [path for path in own if path.is_file()]

    def _compile(self, path: Path, digest: str) -> None:
        compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
        if compiler is None:
            raise DeviceError(
                f"{self.title} is not there, and no C compiler to build it ({', '.join(_COMPILERS)}); install one, and "
                "try again"
            )
        begin_s = time.perf_counter()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Beside it, then renamed: several processes may do so at one time.
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                unfinished = Path(folder) / path.name
                command = [compiler, *_FLAGS, f'-DSOURCE_DIGEST="{digest}"', "-o", str(unfinished), str(self.source)]
                finished = subprocess.run(
                    [*command, *_LIBRARIES], capture_output=True, text=True, timeout=_COMPILING_S, check=False
                )
                if finished.returncode:
                    raise DeviceError(f"{compiler} cannot build {self.title}: {finished.stderr.strip()}")
                unfinished.chmod(0o700)
                os.replace(unfinished, path)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeviceError(f"{self.title} cannot be built in {str(path.parent)!r}: {error}") from error
        if not _is_own(path):
            raise DeviceError(
                f"others may write to {str(path.parent)!r}, so no library is loaded from there; make it this user's own"
            )
        _log.info("compiled %s into %s in %.1f s", self.title, path, time.perf_counter() - begin_s)


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
