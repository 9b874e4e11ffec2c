"""Writes files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mball.errors import StorageError


@contextmanager
def whole_file(target: Path, size_bytes: int, what: str) -> Iterator[int]:
    """Gives a descriptor to write a file through that becomes `target` when the block ends well, and on the disk.

    Nobody ever finds half a file there, whatever happens: what was there before stays until the new one is whole. Who
    has the old file open or mapped keeps it. Until then the new one has no name where the file system can do that, so
    that nothing is left of it, else it is hidden beside. It has the mode of the file it replaces, or of any new file.

    Args:
        target: where to; of a symbolic link, what it points to.
        size_bytes: how much will be written: it is reserved before.
        what: for the message of an error.

    Raises:
        StorageError: it cannot be written; it names `what`, where, how much and why.
    """
    try:
        place = Path(os.path.realpath(target))
        with _folder(place.parent) as folder, _hidden(place, size_bytes) as (descriptor, unfinished, has_name):
            yield descriptor
            os.fsync(descriptor)
            if not has_name:
                # With a folder's descriptor, since only then Python has the link followed.
                os.link(f"/proc/self/fd/{descriptor}", unfinished.name, dst_dir_fd=folder)
            os.replace(unfinished, place)
            _sync(folder)
    except OSError as error:
        raise StorageError(
            f"the {what} cannot be written to {str(target)!r} ({size_bytes} B): {error.strerror or error}. Give a "
            "file in a folder that exists, can be written and has room"
        ) from error


def replace_file(target: Path, content: bytes, what: str) -> None:
    """Writes all of `content` to `target`, or nothing; see `whole_file`. Raises StorageError."""
    with whole_file(target, len(content), what) as descriptor:
        write_all(descriptor, memoryview(content))


def write_all(descriptor: int, content: memoryview) -> None:
    """Writes all of `content`, as often as that takes. Raises OSError."""
    done = 0
    while done < len(content):
        with content[done : done + (64 << 20)] as part:
            done += os.write(descriptor, part)


@contextmanager
def _hidden(place: Path, size_bytes: int) -> Iterator[tuple[int, Path, bool]]:
    """Yields a descriptor, a name that nobody else has, on whatever machine, and whether the file has it already."""
    unfinished = place.with_name(f".{place.name}.{secrets.token_hex(8)}.unfinished")
    descriptor, has_name = -1, False
    try:
        try:
            descriptor = os.open(place.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            descriptor = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            has_name = True
        with contextlib.suppress(FileNotFoundError):
            os.fchmod(descriptor, os.stat(place).st_mode & 0o7777)
        if size_bytes:
            _reserve(descriptor, size_bytes)
        yield descriptor, unfinished, has_name
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        unfinished.unlink(missing_ok=True)


def _reserve(descriptor: int, size_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have nothing to do there
            raise
