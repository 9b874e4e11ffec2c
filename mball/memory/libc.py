"""Memory calls of the C library that Python does not offer, or not at a chosen address."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform

from mball.units import MIB

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 * MIB

READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
MAP_PRIVATE = mmap.MAP_PRIVATE
MAP_ANONYMOUS = mmap.MAP_ANONYMOUS
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
DONTNEED = mmap.MADV_DONTNEED
NORMAL = mmap.MADV_NORMAL
RANDOM = mmap.MADV_RANDOM
WILLNEED = mmap.MADV_WILLNEED
HUGEPAGE = mmap.MADV_HUGEPAGE
NOHUGEPAGE = mmap.MADV_NOHUGEPAGE
POPULATE_READ = 22
POPULATE_WRITE = 23  # both Linux 5.14; not in every supported Python's mmap module

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long
_MBIND = {"x86_64": 237, "aarch64": 235}.get(platform.machine())  # the C library has no function for it
_PREFERRED = 1
_malloc_trim = getattr(_libc, "malloc_trim", None)  # glibc has it, musl has not
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_memory(address: int | None, size_bytes: int, flags: int, fd: int = -1, offset_bytes: int = 0) -> int:
    """Maps readable and writable memory and returns its address. Raises OSError."""
    result: int | None = _libc.mmap(address, size_bytes, READ_WRITE, flags, fd, offset_bytes)
    if result is None or result == _MAP_FAILED:
        raise _os_error()
    return result


def unmap(address: int, size_bytes: int) -> None:
    """Unmaps `[address, address + size_bytes)`. Raises OSError."""
    if _libc.munmap(address, size_bytes):
        raise _os_error()


def advise(address: int, size_bytes: int, advice: int) -> None:
    """Calls madvise; a range of no bytes is fine. Raises OSError."""
    if size_bytes and _libc.madvise(address, size_bytes, advice):
        raise _os_error()


def trim_heap() -> None:
    """Gives freed memory of the heap back to the kernel, where the C library can."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def prefer_node(address: int, size_bytes: int, node: int) -> None:
    """Has pages that come from now on come from NUMA node `node` while it has some. Raises OSError."""
    if _MBIND is None:
        raise OSError(errno.ENOSYS, f"the number of mbind is not known on {platform.machine()}")
    word_bits = 64
    words = (ctypes.c_uint64 * (node // word_bits + 1))()
    words[node // word_bits] = 1 << node % word_bits
    # The kernel takes the highest bit to be one less than it is told.
    num_bits = ctypes.c_ulong(len(words) * word_bits + 1)
    arguments = (ctypes.c_void_p(address), ctypes.c_ulong(size_bytes), ctypes.c_int(_PREFERRED), words, num_bits)
    if _libc.syscall(ctypes.c_long(_MBIND), *arguments, ctypes.c_uint(0)):
        raise _os_error()


def as_bytes(address: int, size_bytes: int) -> ctypes.Array[ctypes.c_char]:
    """Returns the bytes at `address` as a buffer, which does not keep them mapped."""
    return (ctypes.c_char * size_bytes).from_address(address)


def _os_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
