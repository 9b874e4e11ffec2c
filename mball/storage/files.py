"""Open descriptors of the files that plans name, and whether each can be read past the page cache."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from enum import Enum
from typing import TYPE_CHECKING

from mball.config import Io
from mball.errors import StorageError
from mball.storage.alignment import COARSE_ALIGNMENT_BYTES, Alignment, alignment_of
from mball.storage.mounts import file_system_of, page_cache_reason

if TYPE_CHECKING:
    from mball.storage.swapfile import SwapFile

_logger = logging.getLogger(__name__)


class DirectIO(Enum):
    """Whether reads go past the page cache."""

    AUTO = "auto"
    """Wherever offset, length and address allow it, on file systems of disks: not over a network, not in memory."""

    UNCACHED = "uncached"
    """As AUTO, but for what is in the page cache already: that comes several times as fast, and takes so much processor
    time for copying that it is for loading, not for reading beside compute on the same processor.
    """

    ALWAYS = "always"
    """Wherever file system, offset, length and address allow it."""

    OFF = "off"
    """Never: for files that others read too, and that stay in the page cache."""

    @classmethod
    def of(cls, io: Io) -> DirectIO:
        """Returns what a user asks for by `io`."""
        modes = {Io.BUFFERED: cls.OFF, Io.DIRECT: cls.ALWAYS, Io.GDS: cls.ALWAYS, Io.CACHED: cls.UNCACHED}
        return modes.get(io, cls.AUTO)


class OpenFile:
    """One file: a buffered descriptor, and a direct one that is opened when first asked for.

    Descriptors are closed by `FileTable.close`, or when the last reference goes.
    """

    __slots__ = ("__weakref__", "_direct_tried", "_size_bytes", "_table", "device", "label")

    def __init__(self, table: _State, label: str, descriptor: int, size_bytes: int | None) -> None:
        self.label = label
        self.device = os.fstat(descriptor).st_dev
        self._table = table
        # A file that is still growing has no size of its own to hold reads against.
        self._size_bytes = size_bytes
        self._direct_tried = False
        table.own(self, descriptor)

    @property
    def buffered(self) -> int:
        """The descriptor that reads through the page cache.

        Raises:
            StorageError: the table is closed.
        """
        descriptors = self._table.descriptors.get(id(self))
        if not descriptors:
            raise StorageError(f"{self.label} is closed")
        return descriptors[0]

    def size_bytes(self) -> int:
        """Returns the size that reads are held against: that at `add_path`, or the present one of a descriptor."""
        return os.fstat(self.buffered).st_size if self._size_bytes is None else self._size_bytes

    def direct(self) -> int | None:
        """Returns the descriptor that reads past the page cache, None where the file system does not do that."""
        if self.device in self._table.reasons:
            return None
        descriptors = self._table.descriptors.get(id(self), [])
        if len(descriptors) == 1 and not self._direct_tried:
            with self._table.lock:
                self._direct_tried = True
                try:
                    # By the descriptor: an unlinked file has no path, and a path may name another file by now.
                    link = f"/proc/self/fd/{descriptors[0]}"
                    descriptors.append(os.open(link, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
                except OSError as error:
                    self._table.fall_back(self, error)
        return descriptors[1] if len(descriptors) > 1 else None

    def alignment(self) -> Alignment | None:
        """Returns what direct reads have to be aligned to, None where there are none."""
        if self.direct() is None:
            return None
        alignments = self._table.alignments
        if self.device not in alignments:
            with self._table.lock:
                told = alignment_of(self.buffered)
                alignments[self.device] = told or Alignment()
                if told is not None:
                    self._table.told.add(self.device)
        return alignments[self.device]

    def fall_back(self, error: OSError, alignment_bytes: int) -> None:
        """Notes that a direct read that was aligned to so much was refused.

        Where the kernel does not tell what is asked for, 64 KiB are tried before this file's file system is given up;
        one log line a file system says that.
        """
        table = self._table
        with table.lock:
            if alignment_bytes < COARSE_ALIGNMENT_BYTES and self.device not in table.told:
                table.alignments[self.device] = Alignment(offset_bytes=COARSE_ALIGNMENT_BYTES)
            else:
                table.fall_back(self, error)


class _State:
    """What outlives the table until the last file goes: descriptors by file, and by file system (that is, by device)
    why it is read through the page cache, or what direct reads are aligned to.
    """

    def __init__(self) -> None:
        # Reentrant: a garbage collection inside the lock may finalise a file.
        self.lock = threading.RLock()
        self.descriptors: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.alignments: dict[int, Alignment] = {}
        self.told: set[int] = set()  # whose alignment the kernel told
        self.devices: set[int] = set()

    def own(self, file: OpenFile, descriptor: int) -> None:
        self.descriptors[id(file)] = [descriptor]
        weakref.finalize(file, self.close, id(file)).atexit = False

    def close(self, key: int) -> None:
        with self.lock:
            for descriptor in self.descriptors.pop(key, ()):
                os.close(descriptor)

    def fall_back(self, file: OpenFile, error: OSError) -> None:
        if file.device not in self.reasons:
            self.reasons[file.device] = f"O_DIRECT refused: {error.strerror}"
            _logger.warning(
                "the file system of %s refuses O_DIRECT (%s): its files are read through the page cache",
                file.label,
                error.strerror,
            )


class FileTable:
    """From the file names of a plan to open descriptors. Owns them until `close`."""

    def __init__(self, *, direct: DirectIO = DirectIO.AUTO) -> None:
        self.mode = direct
        self._state = _State()
        self._files: dict[str, OpenFile] = {}
        self.swaps: dict[str, SwapFile] = {}

    def add_path(self, path: str | os.PathLike[str]) -> str:
        """Opens a file for reading and returns the name to use in a `Read`: `path` as text.

        Later truncation shows as an error of the read; a file put in its place is not looked at.

        Raises:
            StorageError: the file cannot be opened.
        """
        name = os.fspath(path)
        if name not in self._files:
            try:
                descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise StorageError(
                    f"{name} cannot be opened ({error.strerror}); check the path and its rights"
                ) from error
            self._add(name, descriptor, os.fstat(descriptor).st_size)
        return name

    def add_descriptor(self, name: str, descriptor: int) -> str:
        """Adds an open file, such as an unlinked swap file, under `name`; the caller keeps owning `descriptor`.

        Raises:
            StorageError: the descriptor is not open, or `name` is taken.
        """
        if name in self._files:
            raise StorageError(f"{name!r} is already in the file table; give each file its own name")
        try:
            own = os.dup(descriptor)
        except OSError as error:
            raise StorageError(f"{name}: descriptor {descriptor} cannot be used ({error.strerror})") from error
        self._add(name, own, None)
        return name

    def add_swap(self, swap: SwapFile) -> str:
        """Adds a swap file under its own name; the caller keeps owning it.

        Raises:
            StorageError: it is closed, or was added before.
        """
        self.swaps[self.add_descriptor(swap.name, swap.fd)] = swap
        return swap.name

    def __getitem__(self, name: str) -> OpenFile:
        """Raises StorageError when `name` was never added, or the table is closed."""
        try:
            return self._files[name]
        except KeyError:
            raise StorageError(f"{name!r} is not among the {len(self._files)} open files; add it first") from None

    def stat(self, name: str) -> os.stat_result:
        """Returns the facts of the file that is open under this name, or of the path if none is. Raises OSError."""
        file = self._files.get(name)
        return os.stat(name) if file is None else os.fstat(file.buffered)

    @property
    def names(self) -> tuple[str, ...]:
        """The names added, in order."""
        return tuple(self._files)

    @property
    def buffered_reasons(self) -> tuple[str, ...]:
        """Why files are read through the page cache; empty when none is."""
        if self.mode is DirectIO.OFF:
            return ("asked for",)
        return tuple(dict.fromkeys(self._state.reasons.values()))

    @property
    def any_direct(self) -> bool:
        """Whether some file may be read past the page cache."""
        return self.mode is not DirectIO.OFF and any(
            file.device not in self._state.reasons for file in self._files.values()
        )

    def is_direct(self, name: str) -> bool:
        """Returns whether aligned reads of this file go past the page cache, as far as is known."""
        return self.alignment(name) is not None

    def alignment(self, name: str) -> Alignment | None:
        """Returns what reads of this file past the page cache are aligned to; None where there are none."""
        return None if self.mode is DirectIO.OFF else self[name].alignment()

    def close(self) -> None:
        """Closes every descriptor; the readers on it must be closed before. May be called again."""
        self._files.clear()
        self.swaps.clear()
        with self._state.lock:
            for key in list(self._state.descriptors):
                self._state.close(key)

    def _add(self, name: str, descriptor: int, size_bytes: int | None) -> None:
        file = self._files[name] = OpenFile(self._state, name, descriptor, size_bytes)
        state = self._state
        if self.mode in (DirectIO.AUTO, DirectIO.UNCACHED) and file.device not in state.devices:
            state.devices.add(file.device)
            if reason := page_cache_reason(file_system_of(f"/proc/self/fd/{descriptor}").kind):
                state.reasons.setdefault(file.device, reason)
