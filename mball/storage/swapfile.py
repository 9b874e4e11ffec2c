"""A private file for bytes that have no home on disk yet. It has no name, so nothing is ever left behind."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import tempfile
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mball.errors import StorageError
from mball.units import format_bytes, round_up

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

PAGE_BYTES = 4096

_logger = logging.getLogger(__name__)
_numbers = itertools.count()


class SwapFile:
    """An unlinked file (mode 0600) of preallocated extents.

    The descriptor is the only thing that keeps the bytes: `close`, or the end of the process however it
    comes, gives the disk space back. Not thread-safe for writers; readers may read extents already written.
    """

    def __init__(self, descriptor: int, directory: str) -> None:
        """Takes over `descriptor`; use `create`."""
        self._descriptor = descriptor
        self._directory = directory
        self._size_bytes = 0
        self._preallocates = True
        self._name = f"swap-{next(_numbers)}"

    @classmethod
    def create(cls, directory: str | os.PathLike[str]) -> Self:
        """Creates an empty swap file on the file system of `directory`, which must exist.

        Raises:
            StorageError: the directory does not exist or cannot be written to.
        """
        where = os.path.abspath(directory)
        try:
            return cls(_open_unlinked(where), where)
        except OSError as error:
            raise StorageError(
                f"no swap file can be made in {where} ({error.strerror}); choose a directory that exists and can be "
                "written to"
            ) from error

    @property
    def name(self) -> str:
        """``swap-<n>``, unique in this process; what `Extent.file` calls this file."""
        return self._name

    @property
    def fd(self) -> int:
        """The open descriptor; this object keeps owning it.

        Raises:
            StorageError: the file is closed.
        """
        if self._descriptor < 0:
            raise StorageError(f"{self._name} in {self._directory} is closed")
        return self._descriptor

    @property
    def size_bytes(self) -> int:
        """Bytes allocated, a multiple of 4096."""
        return self._size_bytes

    def allocate(self, size_bytes: int, *, congruent_to: int = 0) -> int:
        """Reserves an extent on disk and returns its file offset in bytes.

        The offset has the same remainder by 4096 as `congruent_to`; no two extents share a page.

        Raises:
            StorageError: the disk has too little room; the file is then as it was.
        """
        if size_bytes < 0:
            raise StorageError(f"{self._name}: an extent of {size_bytes} B cannot be allocated; give 0 or more bytes")
        lead = congruent_to % PAGE_BYTES
        start, length = self._size_bytes, round_up(lead + size_bytes, PAGE_BYTES)
        if length:
            try:
                self._preallocate(start, length)
            except OSError as error:
                # What was reserved before the failure goes back at once.
                os.ftruncate(self.fd, start)
                raise self._failure("allocating", size_bytes, error) from error
            self._size_bytes = start + length
        return start + lead

    def write(self, offset_bytes: int, buffer: Buffer | NDArray[Any]) -> None:
        """Writes all of `buffer` (C-contiguous) at `offset_bytes` of the file, within what is allocated.

        Raises:
            StorageError: the disk is full or fails, or the range was never allocated.
        """
        descriptor = self.fd
        # numpy says that its arrays are buffers only from Python 3.12 on.
        with memoryview(buffer).cast("B") as view:  # type: ignore[arg-type]
            if offset_bytes < 0 or offset_bytes + len(view) > self._size_bytes:
                raise StorageError(
                    f"{self._name}: write to [{offset_bytes}, {offset_bytes + len(view)}) B is outside the "
                    f"{self._size_bytes} B allocated; allocate the extent first"
                )
            done = 0
            while done < len(view):
                try:
                    with view[done:] as rest:
                        written = os.pwrite(descriptor, rest, offset_bytes + done)
                    if not written:
                        raise OSError(errno.EIO, "the file system wrote nothing")
                except OSError as error:
                    raise self._failure(f"writing at offset {offset_bytes}:", len(view), error) from error
                done += written

    def shrink(self, size_bytes: int) -> None:
        """Gives back every extent from file offset `size_bytes` (a multiple of 4096) on. Nothing may use them any more.

        Raises:
            StorageError: the file is closed.
        """
        os.ftruncate(self.fd, size_bytes)
        self._size_bytes = size_bytes

    def flush(self) -> None:
        """Writes everything to the disk and drops it from the page cache, so that no byte is held twice.

        Raises:
            StorageError: the disk is full or fails.
        """
        try:
            os.fdatasync(self.fd)
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except StorageError:
            raise
        except OSError as error:
            raise self._failure("flushing", self._size_bytes, error) from error

    def close(self) -> None:
        """Gives the disk space back, unless a reader still holds the file open. May be called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The constructor may have failed before the descriptor was taken over.
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def _preallocate(self, start: int, length: int) -> None:
        if self._preallocates:
            try:
                os.posix_fallocate(self.fd, start, length)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                self._preallocates = False
                _logger.warning(
                    "%s cannot preallocate (%s): a full disk will be noticed while writing",
                    self._directory,
                    error.strerror,
                )
        os.ftruncate(self.fd, start + length)

    def _failure(self, doing: str, size_bytes: int, error: OSError) -> StorageError:
        facts = os.fstatvfs(self.fd)
        free_bytes = facts.f_bavail * facts.f_frsize
        return StorageError(
            f"{doing} {format_bytes(size_bytes)} ({size_bytes} B) of swap in {self._directory} failed "
            f"({error.strerror}); {format_bytes(free_bytes)} ({free_bytes} B) are free there. Free disk space, or "
            "choose another swap directory"
        )


def _open_unlinked(directory: str) -> int:
    try:
        # O_EXCL: nobody can give the file a name later.
        return os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # File systems and kernels without O_TMPFILE answer with one of these.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    descriptor, path = tempfile.mkstemp(prefix=".mball-swap-", dir=directory)
    try:
        os.unlink(path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
