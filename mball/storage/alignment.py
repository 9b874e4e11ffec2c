"""What reads past the page cache have to be aligned to, as the kernel tells."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

# Enough for nearly every disk, where the kernel does not tell.
DIRECT_ALIGNMENT_BYTES = 4096
# What the largest pages and blocks in use ask for.
COARSE_ALIGNMENT_BYTES = 65536

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX = struct.Struct("I148xII96x")  # struct statx: stx_mask, and at 152 stx_dio_mem_align and stx_dio_offset_align


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """Both are 4096 or more, and powers of two.

    Attributes:
        offset_bytes: of offsets and lengths; a multiple of `address_bytes`.
        address_bytes: of the destination. Where it is the smaller one, addresses only have to have the same remainder
            by it as offsets.
    """

    offset_bytes: int = DIRECT_ALIGNMENT_BYTES
    address_bytes: int = DIRECT_ALIGNMENT_BYTES


def alignment_of(descriptor: int) -> Alignment | None:
    """Returns what direct reads of an open file have to be aligned to; None where the kernel does not tell."""
    told = _told(descriptor)
    if told is None:
        return None
    address_bytes = max(told[0], DIRECT_ALIGNMENT_BYTES)
    return Alignment(offset_bytes=max(told[1], address_bytes), address_bytes=address_bytes)


def _told(descriptor: int) -> tuple[int, int] | None:
    """Returns the alignments in bytes of addresses and of offsets, by statx (from Linux 6.1 on)."""
    buffer = ctypes.create_string_buffer(_STATX.size)
    try:
        statx = ctypes.CDLL(None).statx
    except AttributeError:  # an older C library
        return None
    if statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer):
        return None
    mask, address_bytes, offset_bytes = _STATX.unpack(buffer)
    return (address_bytes, offset_bytes) if mask & _STATX_DIOALIGN and address_bytes and offset_bytes else None
