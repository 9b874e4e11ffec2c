"""Which file system a file lies on, as the kernel tells."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """A mounted file system. As text it is what `mount` prints: ``/dev/nvme0n1p2 on / type ext4``.

    Attributes:
        device: what is mounted: a device, ``server:/export``, or the type again where there is no more to say.
        mount_point: where.
        kind: its type, such as ``ext4``. Each of the three is ``?`` where the kernel does not say.
    """

    device: str
    mount_point: str
    kind: str

    def __str__(self) -> str:
        return f"{self.device} on {self.mount_point} type {self.kind}"


def file_system_of(path: str) -> FileSystem:
    """Returns the file system that `path` is on; ``/proc/self/fd/<n>`` for an open file, which may be unlinked."""
    unknown = FileSystem(device="?", mount_point="?", kind="?")
    try:
        # Names may hold any byte, also those that end a line for Unicode.
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError:
        return unknown
    real = os.path.realpath(path)
    best = unknown
    for line in filter(None, lines):
        device, point, kind, *_ = (_unescaped(word) for word in line.split(" "))
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        # A later mount hides an earlier one on the same point.
        if inside and (best is unknown or len(point) >= len(best.mount_point)):
            best = FileSystem(device=device, mount_point=point, kind=kind)
    return best


# Their clients read ahead and keep what was read, in the page cache; past it each read is a round trip.
_OF_A_NETWORK = frozenset({"9p", "afs", "ceph", "cifs", "ncpfs", "nfs", "nfs4", "smb3", "smbfs"})
# They have no page cache to read past: what is in them is in memory.
IN_MEMORY = frozenset({"ramfs", "tmpfs"})


def page_cache_reason(kind: str) -> str | None:
    """Returns why files of this type of file system are better read through the page cache; None if they are not."""
    if kind in IN_MEMORY:
        return f"{kind} is memory"
    if kind in _OF_A_NETWORK:
        return f"{kind} is a network's"
    if kind.partition(".")[0] in ("fuse", "fuseblk"):
        return f"{kind} is another program's"
    return None


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)
