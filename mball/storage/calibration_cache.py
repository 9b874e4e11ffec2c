"""Calibrations on disk: one file a machine and file system, written whole, believed only where it fits."""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mball.errors import StorageError
from mball.schema import Calibration, Link, Tier
from mball.storage.calibration import place_of, reader_kind
from mball.storage.choice import ReaderChoice
from mball.storage.files import FileTable
from mball.storage.mounts import FileSystem
from mball.whole_files import replace_file

# Kernels, disks and what else runs on the machine change.
_MOST_AGE = timedelta(days=180)
# Clocks of machines that share a cache differ a little.
_CLOCKS_DIFFER = timedelta(days=1)

_logger = logging.getLogger(__name__)


def calibration_path(directory: Path, place: str) -> Path:
    """Returns the file under `directory` for this machine's calibration of `place`."""
    digest = hashlib.sha256(f"{platform.node()}\n{place}".encode(errors="surrogateescape")).hexdigest()
    return directory / f"{digest[:16]}.json"


def save_calibration(directory: Path, calibration: Calibration) -> Path:
    """Writes the calibration in place of an earlier one, and returns its file.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"no calibration can be kept in {directory} ({error.strerror}); set XDG_CACHE_HOME to a writable place"
        ) from error
    path = calibration_path(directory, calibration.place)
    replace_file(path, calibration.to_json().encode(), "calibration")
    return path


def load_calibration(directory: Path | None, place: FileSystem) -> Calibration | None:
    """Returns this machine's calibration of a file system, None if there is none.

    One that cannot be read, comes from another mball, another machine or another file system, or is older than 180
    days is none either; one log line a process says so.
    """
    if directory is None:
        return None
    path = calibration_path(directory, str(place))
    try:
        calibration = Calibration.from_json(path.read_text(encoding="utf-8"))
        stale = why_stale(calibration.time)
    except FileNotFoundError:
        return None
    # SchemaError is a ValueError; nesting without end and numbers without end are not, and it may hold anything.
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        _ignore(path, str(error))
        return None
    if (calibration.host, calibration.place) != (platform.node(), str(place)):
        _ignore(path, f"it is of {calibration.place} of the machine {calibration.host}")
    elif stale:
        _ignore(path, stale)
    else:
        return calibration
    return None


def why_stale(measured_at: datetime) -> str:
    """Returns why what was measured then says nothing of today; an empty string where it does."""
    age = datetime.now(UTC) - measured_at
    if age > _MOST_AGE:
        return f"it is {age.days} days old, more than {_MOST_AGE.days}"
    if age < -_CLOCKS_DIFFER:
        return f"it says that it was measured on {measured_at:%Y-%m-%d}, which is still to come"
    return ""


def find_calibrated_link(
    directory: Path | None, files: FileTable, name: str, choice: ReaderChoice
) -> tuple[Link, str] | None:
    """Returns the calibrated link from a file of the table to memory, and the day it was measured.

    None without a calibration of its file system, and where it was measured with another reader than that of `choice`,
    or another way past or through the page cache than it would take.
    """
    calibration = load_calibration(directory, place_of(files[name].buffered))
    found = None if calibration is None else calibration.find_link(Tier.DISK, Tier.DEVICE)
    if calibration is None or found is None:
        return None
    kind = reader_kind(choice, direct=files.is_direct(name))
    if found.reader != kind:
        _say_once(logging.INFO, f"the calibration of {calibration.place} is not used: {found.reader}; here {kind}")
        return None
    return found.link, calibration.day


def calibrated_choice(directory: Path | None, files: FileTable, choice: ReaderChoice) -> ReaderChoice:
    """Returns `choice` with the requests that were calibrated to be fastest where the largest file of the table lies.

    As it is without a calibration, or with one of another kind of reader.
    """
    sizes = {name: files[name].size_bytes() for name in files.names}
    if not sizes:
        return choice
    largest = max(sizes, key=lambda name: sizes[name])
    calibration = load_calibration(directory, place_of(files[largest].buffered))
    return fitted_choice(calibration, choice, (files.is_direct(largest),))


def fitted_choice(calibration: Calibration | None, choice: ReaderChoice, directs: Sequence[bool]) -> ReaderChoice:
    """Returns `choice` with the requests of a calibration, if that is of its kind of reader and a way in `directs`.

    Ways are past the page cache (True) and through it.
    """
    found = None if calibration is None else calibration.find_link(Tier.DISK, Tier.DEVICE)
    if calibration is None or found is None:
        return choice
    reason = f"{choice.reason}; requests as calibrated on {calibration.day}"
    fitted = replace(choice, num_threads=found.num_threads, chunk_bytes=found.chunk_bytes, reason=reason)
    return fitted if found.reader in [reader_kind(fitted, direct=direct) for direct in directs] else choice


def _ignore(path: Path, why: str) -> None:
    _say_once(
        logging.WARNING,
        f"the calibration in {path} is not used: {why}. `mball doctor --calibrate DIRECTORY` replaces it",
    )


@functools.lru_cache(maxsize=64)
def _say_once(level: int, message: str) -> None:
    _logger.log(level, "%s", message)
