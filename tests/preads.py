"""Puts another function in place of the operating system's `preadv`, for readers in Python and in C."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from mball.config import cache_directory
from mball.storage.native import READ_POOL, ReadPoolLibrary, load_read_pool

Preadv = Callable[[int, list[memoryview], int], int]
SetPreadv = Callable[[Preadv], object]


class _Memory(ctypes.Structure):
    _fields_ = (("address", ctypes.c_uint64), ("size_bytes", ctypes.c_size_t))


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.POINTER(_Memory), ctypes.c_int, ctypes.c_int64, use_errno=True
)
# A thread may be inside one when another takes its place.
_kept: list[object] = []


def read_pool() -> ReadPoolLibrary | None:
    """Returns the library that readers use by default; None where there is no compiler for it."""
    return load_read_pool(cache_directory()) if READ_POOL.built() or shutil.which("cc") else None


@contextmanager
def preadv_is(function: Preadv) -> Iterator[None]:
    """Reads are made by `function` meanwhile: as `os.preadv` it takes one buffer, and raises OSError."""

    def call(descriptor: int, memory: ctypes._Pointer[_Memory], _: int, offset: int) -> int:
        room = (ctypes.c_char * memory[0].size_bytes).from_address(memory[0].address)
        try:
            return function(descriptor, [memoryview(room).cast("B")], offset)
        except OSError as error:
            ctypes.set_errno(error.errno or errno.EIO)
            return -1

    library = read_pool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", function)
        if library is not None:
            callback = _Callback(call)
            _kept.append(callback)
            library.read_by(ctypes.cast(callback, ctypes.c_void_p))
        try:
            yield
        finally:
            if library is not None:
                library.read_by(None)
