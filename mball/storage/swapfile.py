"""A private file for bytes that have no home on disk yet. It has no name, so nothing is ever left behind."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mball.config import SwapCheck
from mball.errors import DeviceError, StorageError
from mball.storage.extents import ExtentMap, SwapExtent, whole_pages
from mball.storage.files import DirectIO
from mball.storage.mounts import IN_MEMORY, file_system_of, page_cache_reason
from mball.storage.pending import PendingChunks
from mball.storage.reader import Read, ReadHandle
from mball.storage.swap_content import BlockSum, SwapContent
from mball.storage.write_queue import QueueLimits, WriteQueue
from mball.storage.writes import CHUNK_BYTES, Target, Write, WriteChunk, cut
from mball.units import PAGE_BYTES, format_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

# What `write_all` hands over at one time, so that a queue has room for it.
_PORTION_BYTES = 16 * CHUNK_BYTES

_logger = logging.getLogger(__name__)
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapSettings:
    """How much is swapped, and how. What each means to a user: `mball.Config`.

    Attributes:
        limit_bytes: the largest size of the file; None for as much as the disk takes.
        check: when what is read is held against its checksum.
        queue: how much may wait to be written, and how much of the disk that gets.
        direct: whether to write past the page cache.
    """

    limit_bytes: int | None = None
    check: SwapCheck = SwapCheck.FIRST
    queue: QueueLimits = field(default_factory=QueueLimits)
    direct: DirectIO = DirectIO.AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapStatistics:
    """Totals since the file was made.

    Attributes:
        used_bytes: in extents now; `size_bytes` is the file, holes included.
        written_bytes: written to the file, `direct_bytes` of them past the page cache, by `num_writes` requests.
        read_bytes: asked of the file by `num_reads` reads, `hit_bytes` of them still in memory, waiting to be written.
        checked_bytes: held against their checksums.
        queue_s: seconds that requests waited to be written, together.
        busy_s: seconds in which at least one was under way.
    """

    size_bytes: int
    used_bytes: int
    written_bytes: int
    direct_bytes: int
    num_writes: int
    read_bytes: int
    num_reads: int
    hit_bytes: int
    checked_bytes: int
    queue_s: float
    busy_s: float


class SwapFile:
    """An unlinked file (mode 0600) of preallocated extents.

    The descriptor is the only thing that keeps the bytes: `close`, or the end of the process however it
    comes, gives the disk space back. May be used by several threads; not in a forked child, which shares the file.

    What is written has a checksum for each 64 KiB, made right after that. Reads through a `CheckedReader` are held
    against it; mappings of the file are not, but by `verify`.
    """

    def __init__(self, descriptor: int, directory: str, settings: SwapSettings) -> None:
        """Takes over `descriptor`; use `create`."""
        self._directory = directory
        self._settings = settings
        self._preallocates = True
        self._kind = file_system_of(directory).kind
        self._is_memory_told = False
        self._name = f"swap-{next(_numbers)}"
        self._extents = ExtentMap()
        self._descriptors = [descriptor]
        is_cached = settings.direct is not DirectIO.ALWAYS and page_cache_reason(self._kind) is not None
        if settings.direct is not DirectIO.OFF and not is_cached:
            # Where the file system has no direct writes, its files are written through the page cache.
            with contextlib.suppress(OSError):
                flags = os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
                self._descriptors.append(os.open(f"/proc/self/fd/{descriptor}", flags))
        direct = self._descriptors[1] if len(self._descriptors) > 1 else None
        target = Target(
            f"{self._name} in {directory}", descriptor, direct, with_sums=settings.check is not SwapCheck.OFF
        )
        self._queue = WriteQueue(target, settings.queue)
        self._content = SwapContent(self._extents, self._queue, settings.check)
        self._closer = weakref.finalize(self, _close, self._queue, self._descriptors)

    @classmethod
    def create(cls, directory: str | os.PathLike[str], settings: SwapSettings | None = None) -> Self:
        """Creates an empty swap file on the file system of `directory`, which must exist.

        Raises:
            StorageError: the directory does not exist or cannot be written to.
        """
        where = os.path.abspath(directory)
        try:
            descriptor = _open_unlinked(where)
        except OSError as error:
            raise StorageError(
                f"no swap file can be made in {where} ({error.strerror}); choose a directory that exists and can be "
                "written to"
            ) from error
        try:
            return cls(descriptor, where, settings or SwapSettings())
        except BaseException:
            os.close(descriptor)
            raise

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
        if not self._descriptors:
            raise StorageError(f"{self._name} in {self._directory} is closed")
        return self._descriptors[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of the file, holes included: a multiple of 4096."""
        return self._extents.end

    @property
    def limit_bytes(self) -> int | None:
        """How large the file may become; None for as much as the disk takes."""
        return self._settings.limit_bytes

    @property
    def statistics(self) -> SwapStatistics:
        """What the file holds, and what was done so far."""
        queue = self._queue
        return SwapStatistics(
            size_bytes=self._extents.end,
            used_bytes=self._extents.used_bytes,
            written_bytes=queue.written_bytes,
            direct_bytes=queue.direct_bytes,
            num_writes=queue.num_requests,
            read_bytes=self._content.read_bytes,
            num_reads=self._content.num_reads,
            hit_bytes=self._content.hit_bytes,
            checked_bytes=self._content.checked_bytes,
            queue_s=queue.queue_s,
            busy_s=queue.busy_s,
        )

    # -- extents -------------------------------------------------------------------------------------------------

    def allocate(self, size_bytes: int, *, congruent_to: int = 0) -> int:
        """Reserves an extent on disk and returns its file offset in bytes.

        The offset has the same remainder by 4096 as `congruent_to`; no two extents share a page. The place of an
        extent that was freed is taken again before the file grows; until it is written its content is anything.

        Raises:
            StorageError: the limit, the quota or the disk has too little room; the file is then as it was.
            DeviceError: called in a forked child.
        """
        if size_bytes < 0:
            raise StorageError(f"{self._name}: an extent of {size_bytes} B cannot be allocated; give 0 or more bytes")
        self._check_process()
        self.fd  # noqa: B018 - raises when closed
        lead = congruent_to % PAGE_BYTES
        length = whole_pages(lead + size_bytes)
        with self._queue.lock:
            end, new_end = self._extents.end, self._extents.end_with(length)
            self._check_limit(size_bytes, new_end)
            if new_end > end:
                try:
                    self._preallocate(end, new_end - end)
                except OSError as error:
                    # What was reserved before the failure goes back at once.
                    os.ftruncate(self.fd, end)
                    raise self._failure("allocating", size_bytes, error) from error
            start = self._extents.allocate(length).start if length else end
        if length:
            self._warn_of_memory()
        return start + lead

    def _warn_of_memory(self) -> None:
        if self._kind in IN_MEMORY and not self._is_memory_told:
            self._is_memory_told = True
            _logger.warning(
                "swap goes to %s, which is memory (%s) and in no budget: choose a directory on a disk, by swap_dir or "
                "by the variable MBALL_SWAP_DIR",
                self._directory,
                self._kind,
            )

    def free(self, offset_bytes: int) -> None:
        """Gives back the extent that `allocate` returned this offset of. Nothing may use it any more.

        One of no bytes is none. What is still to be written to it is waited for. Its place on disk is kept for the next
        extent; see `trim`.

        Raises:
            StorageError: there is no such extent.
        """
        self._check_process()
        with self._queue.lock:
            start = offset_bytes - offset_bytes % PAGE_BYTES
            extent = self._extents.find(start)
            if extent is None or extent.start != start:
                raise StorageError(f"{self._name}: no extent begins at {offset_bytes} B; give what allocate returned")
            self._queue.settle(extent.start, extent.end)
            self._extents.free(extent)

    def trim(self) -> None:
        """Gives the disk back what is free at the end of the file."""
        self._check_process()
        with self._queue.lock:
            os.ftruncate(self.fd, self._extents.trim())

    # -- writes --------------------------------------------------------------------------------------------------

    def submit(self, writes: Sequence[Write]) -> PendingChunks:
        """Starts writing, within extents; blocks while too much waits already, or what is to be written over.

        The sources must stay as they are until the handle is done, and ranges do not overlap. From now on reads bring
        what is written here.

        Raises:
            StorageError: a range was never allocated, a block of it that is written in part is damaged, or the file
                is closed. Nothing is written then.
            DeviceError: called in a forked child.
        """
        self._check_process()
        self.fd  # noqa: B018 - raises when closed
        return self._hand_over(self._cut(writes))

    def write(self, offset_bytes: int, buffer: Buffer | NDArray[Any]) -> None:
        """Writes all of `buffer` (C-contiguous) at `offset_bytes` of the file, within an extent.

        Raises:
            StorageError: the disk is full or fails, or the range was never allocated.
        """
        # numpy says that its arrays are buffers only from Python 3.12 on.
        with memoryview(buffer).cast("B") as view:  # type: ignore[arg-type]
            self.write_all([Write(offset_bytes=offset_bytes, source=view)])

    def write_all(self, writes: Sequence[Write]) -> None:
        """Writes all of this, and returns when it is written. Raises as `submit` and `PendingChunks.wait`.

        After an error or an interrupt nothing of it is under way any more.
        """
        self._check_process()  # before locks, which a thread may have held at the fork
        self.fd  # noqa: B018 - raises when closed
        chunks = self._cut(writes)
        handles: list[PendingChunks] = []
        try:
            for portion in _portions(chunks, -(-self._settings.queue.depth // 2)):
                handle = self._hand_over(portion)
                handle.urgent = True  # it is waited for below, and while the queue is full
                handles.append(handle)
            for handle in handles:
                handle.wait()
        except BaseException:
            with self._queue.lock:
                self._settle(chunks)
            raise

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
            raise self._failure("flushing", self.size_bytes, error) from error

    def close(self) -> None:
        """Gives the disk space back, unless a reader still holds the file open. May be called again.

        What waits to be written is not written any more.
        """
        # Not through the finaliser, which runs only once: an interrupted close can be called again.
        _close(self._queue, self._descriptors)
        self._closer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- reads ---------------------------------------------------------------------------------------------------

    def give_way_to(self, handle: ReadHandle) -> None:
        """Has writes give way to these reads, of whatever file, until they are over."""
        self._queue.give_way_to(handle)

    def begin(self, read: Read) -> tuple[list[Read], list[BlockSum]]:
        """Brings what still waits to be written from memory; returns what is left to read, and what to check then."""
        self._check_process()
        return self._content.begin(read)

    def check(self, read: Read, sums: Sequence[BlockSum]) -> None:
        """Holds what a read brought against the sums of when it began. What was written since is not looked at.

        Raises:
            StorageError: something else was written; it names file, offset and both sums.
        """
        self._check_process()
        self._content.check(read, sums)

    def verify(self, offset_bytes: int, size_bytes: int, *, again: bool = True) -> None:
        """Reads these bytes and holds them against their sums, for who reads them by a mapping of the file.

        Args:
            again: whether also what was right when it was read before, where `SwapCheck` does not ask for that.

        Raises:
            StorageError: as `check`.
        """
        self._check_process()
        self._content.verify(offset_bytes, offset_bytes + size_bytes, again=again)

    # -- inside --------------------------------------------------------------------------------------------------

    def _hand_over(self, chunks: Sequence[WriteChunk]) -> PendingChunks:
        with self._queue.lock:
            self._queue.wait_for_room()
            self._settle(chunks)
            return self._content.hand_over(chunks)

    def _settle(self, chunks: Sequence[WriteChunk]) -> None:
        """Blocks until nothing that was queued before is to be written where these are; the lock is held, once."""
        if chunks and self._queue.overlapping(min(c.offset for c in chunks), max(c.end for c in chunks)):
            for chunk in chunks:
                self._queue.settle(chunk.offset, chunk.end)

    def _cut(self, writes: Sequence[Write]) -> list[WriteChunk]:
        placed = [self._placed(write) for write in writes if write.source.nbytes]
        return [
            chunk
            for extent, some in itertools.groupby(placed, key=lambda each: each[0])
            for chunk in cut(extent, (write for _, write in some))
        ]

    def _placed(self, write: Write) -> tuple[SwapExtent, Write]:
        """Returns the extent that a write is in, and its bytes. Raises StorageError where it is in none."""
        if not write.source.c_contiguous:
            raise StorageError(f"{self._name}: what is written must be C-contiguous bytes")
        view = write.source.cast("B")
        first, end = write.offset_bytes, write.offset_bytes + len(view)
        extent = self._extents.find(first) if first >= 0 else None
        if extent is None or end > extent.end:
            raise StorageError(
                f"{self._name}: write to [{first}, {end}) B is outside the {self._extents.used_bytes} B allocated; "
                "allocate the extent first"
            )
        return extent, Write(offset_bytes=first, source=view)

    def _check_process(self) -> None:
        if self._queue.pid != os.getpid():
            raise DeviceError(
                f"{self._name} belongs to process {self._queue.pid}, and this is its forked child {os.getpid()}: what "
                "one writes the other would read. Wrap the model in the child, or start the child with 'spawn'"
            )

    def _check_limit(self, size_bytes: int, new_end: int) -> None:
        limit = self._settings.limit_bytes
        if limit is not None and new_end > limit and new_end > self._extents.end:
            raise StorageError(
                f"allocating {format_bytes(size_bytes)} ({size_bytes} B) of swap would make it {format_bytes(new_end)} "
                f"({new_end} B), and swap_limit is {format_bytes(limit)} ({limit} B), of which "
                f"{format_bytes(self._extents.used_bytes)} are in use. Raise swap_limit, or read weights "
                "from a checkpoint in place (weights=)"
            )

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
        free = f"{format_bytes(free_bytes)} ({free_bytes} B) are free there"
        advice = {
            errno.EDQUOT: "raise the quota of this user, or choose another swap directory",
            errno.EFBIG: "raise `ulimit -f`, or choose another swap directory",
        }.get(error.errno or 0, "free disk space, or choose another swap directory")
        return StorageError(
            f"{doing} {format_bytes(size_bytes)} ({size_bytes} B) of swap in {self._directory} failed "
            f"({error.strerror}); {free}: {advice}"
        )


def _portions(chunks: Sequence[WriteChunk], most: int) -> Iterator[list[WriteChunk]]:
    """Yields `chunks` in portions of `most` at most, and of about `_PORTION_BYTES`."""
    portion: list[WriteChunk] = []
    size_bytes = 0
    for chunk in chunks:
        portion.append(chunk)
        size_bytes += chunk.size
        if size_bytes >= _PORTION_BYTES or len(portion) == most:
            yield portion
            portion, size_bytes = [], 0
    if portion:
        yield portion


def _close(queue: WriteQueue, descriptors: list[int]) -> None:
    queue.stop()
    while descriptors:
        os.close(descriptors.pop())


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
