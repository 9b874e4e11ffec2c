"""Byte sizes: parsed once at the edge, printed one way everywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mball.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

# What homes, plans and swap are in whole multiples of. A machine may have larger pages: `mball.memory.libc` says.
PAGE_BYTES = 4 * KIB

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(size: int | str, *, what: str = "size") -> int:
    """Returns `size` in bytes.

    `size` is a positive number of bytes, or text such as ``"6GiB"``, ``"512 MiB"`` or ``"1.5GB"``
    (``GiB`` is 2**30, ``GB`` is 10**9). `what` names the value in the error.

    Raises:
        ConfigError: the text cannot be read, or the size is not positive.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ConfigError(f"{what} is {size!r} ({type(size).__name__}); give a number of bytes or text such as '6GiB'")
    if isinstance(size, int):
        num_bytes = size
    else:
        match = _SIZE.fullmatch(size)
        factor = _FACTORS.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise ConfigError(
                f"{what} {size!r} cannot be read as a size; give a number of bytes or text such as '6GiB' or '512MiB'"
            )
        num_bytes = int(float(match[1]) * factor)
    if num_bytes <= 0:
        raise ConfigError(f"{what} is {size!r}; it must be more than zero bytes")
    return num_bytes


def format_bytes(num_bytes: int) -> str:
    """Returns `num_bytes` for a person: exact below 1 KiB, else two decimals of a binary unit."""
    if abs(num_bytes) < KIB:
        return f"{num_bytes} B"
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    raise AssertionError("unreachable")


def format_names(names: Sequence[str], limit: int = 1) -> str:
    """Returns the first few of many names for a person, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" + {more} more" if more > 0 else "")


def round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def round_down(value: int, multiple: int) -> int:
    """Returns the largest multiple of `multiple` that is not above `value`."""
    return value // multiple * multiple
