"""Whether files come to a GPU straight, by GPUDirect Storage, or through pinned host memory; and why."""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from mball.compute import Compute
from mball.config import Config, Io, calibration_directory
from mball.errors import BudgetError, DeviceError, SchemaError, StorageError
from mball.memory.cufile import CuFileError
from mball.memory.gds_ring import GdsRing, StraightFile
from mball.memory.libc import PAGE_BYTES
from mball.schema.document import Document
from mball.storage import FileTable, measure_link
from mball.storage.calibration import place_of
from mball.storage.calibration_cache import why_stale
from mball.storage.watchdog import watched
from mball.whole_files import replace_file

_log = logging.getLogger(__name__)

# Without it cuFile opens in vain, and leaves a log in the working directory.
NVIDIA_FS = Path("/proc/driver/nvidia-fs/stats")
# Of a budget cuFile's buffers may take this part at most, where nobody asked for them.
_MOST_OF_BUDGET = 1 / 16
# So much faster it has to be: measurements of a disk differ by as much.
_FASTER = 1.1
_SPEEDS_VERSION = 1  # goes up when either way reads differently


@dataclass(frozen=True, slots=True, kw_only=True)
class StraightSpeeds(Document):
    """What one file system brings to one GPU, both ways, as it was measured.

    Attributes:
        host: name of the machine.
        place: the file system, as `mount` prints it.
        gpu: where the GPU is on its bus.
        measured_at: when, as ISO 8601 with its offset to UTC.
        straight_bytes_per_s: by cuFile, into buffers of the GPU.
        pinned_bytes_per_s: through pinned host memory: what the slower of disk and link brings.
    """

    host: str
    place: str
    gpu: str
    measured_at: str
    straight_bytes_per_s: float
    pinned_bytes_per_s: float
    version: int = _SPEEDS_VERSION

    @property
    def is_worth_it(self) -> bool:
        """Whether going straight is faster."""
        return self.straight_bytes_per_s > _FASTER * self.pinned_bytes_per_s

    def __str__(self) -> str:
        straight, pinned = self.straight_bytes_per_s / 1e9, self.pinned_bytes_per_s / 1e9
        return f"{straight:.2f} GB/s straight, {pinned:.2f} GB/s through pinned memory, on {self.measured_at[:10]}"

    def check(self) -> None:
        """Raises SchemaError when this cannot have been measured."""
        try:
            has_zone = datetime.fromisoformat(self.measured_at).tzinfo is not None
        except ValueError:
            has_zone = False
        if not has_zone or self.straight_bytes_per_s <= 0 or self.pinned_bytes_per_s <= 0:
            raise SchemaError(f"the speeds of {self.place!r} cannot have been measured: {self}")


def choose_way(
    compute: Compute,
    config: Config,
    files: FileTable,
    file: str,
    *,
    check_room: Callable[[int], None] = lambda staging_bytes: None,
) -> Compute:
    """Returns `compute`, whose device reads files straight from now on if that is asked for, or works and is faster.

    Args:
        compute: that nothing was copied with yet.
        config: the settings; `io` says which way.
        files: that it reads.
        file: of them, the one that most is read of. Where nobody asked, it is read for 0.2 s, once a file system.
        check_room: raises BudgetError where the budget has no room for so many bytes of buffers. Where nobody asked,
            there are none then.

    Raises:
        DeviceError: GPUDirect Storage is asked for, and does not work: it says why.
    """
    if compute.cuda is None or config.io not in (Io.AUTO, Io.GDS):
        return compute
    if config.io is Io.GDS:
        try:
            return _straight(compute, _opened(compute, files, file), "as asked for")
        except DeviceError as error:
            raise DeviceError(f"io='gds' cannot be had: {error}; or leave io out") from error
    if config.host_budget_bytes is not None or file in files.swaps:
        return compute
    if not NVIDIA_FS.exists():
        return _through_host(compute, "nvidia-fs is not loaded")
    if compute.cuda.gds_bytes > _MOST_OF_BUDGET * config.budget_bytes:
        return _through_host(compute, "its buffers would be a large part of the budget")
    try:
        check_room(compute.cuda.gds_bytes)
    except BudgetError:
        return _through_host(compute, "the budget has no room for its buffers beside the model")
    place = str(place_of(files[file].buffered))
    path = _path_of(place, compute.cuda.pci_address)
    speeds = None if path is None else _kept(path)
    if speeds is not None and not speeds.is_worth_it:
        return _through_host(compute, str(speeds))  # and cuFile, which takes a while to open, is left alone
    try:
        ring = _opened(compute, files, file)
    except DeviceError as error:
        return _through_host(compute, str(error))
    try:
        if speeds is None:
            speeds = _measured(compute, ring, files, file, place)
            _keep(path, speeds)
    except CuFileError as error:
        ring.close()
        return _through_host(compute, str(error))
    except BaseException:
        ring.close()
        raise
    if speeds.is_worth_it:
        return _straight(compute, ring, str(speeds))
    ring.close()
    return _through_host(compute, str(speeds))


def straight_file(files: FileTable, file: str) -> StraightFile | None:
    """Returns what cuFile reads a file by, None where that is not past the page cache, or from swap.

    What comes from swap is checked in host memory.
    """
    descriptor = None if file in files.swaps else files[file].direct()
    return None if descriptor is None else StraightFile(descriptor=descriptor, size_bytes=files[file].size_bytes())


def kept_speeds(place: str) -> list[StraightSpeeds]:
    """Returns what was measured of a file system on this machine, for each GPU."""
    directory = calibration_directory()
    found = [_kept(path) for path in sorted(directory.glob("straight-*.json"))] if directory is not None else []
    return [each for each in found if each is not None and (each.host, each.place) == (platform.node(), place)]


def _opened(compute: Compute, files: FileTable, file: str) -> GdsRing:
    """Returns a ring that a page of the file came through. Raises DeviceError where none does."""
    assert compute.cuda is not None
    find = functools.partial(straight_file, files)
    if find(file) is None:
        raise DeviceError(f"{file} is not read past the page cache; it has to be on a file system with O_DIRECT")
    ring = compute.cuda.gds_ring(find, watched)
    try:
        if not ring.takes(file):
            raise DeviceError(f"cuFile does not take {file}: {ring.refused[file]}")
        try:
            ring.bytes_per_s(file, min(files[file].size_bytes(), PAGE_BYTES))
        except CuFileError as error:
            raise DeviceError(f"cuFile takes {file}, and does not read it: {error}") from error
    except BaseException:
        ring.close()
        raise
    return ring


def _straight(compute: Compute, ring: GdsRing, why: str) -> Compute:
    assert compute.cuda is not None
    compute.cuda.go_straight(ring)
    _log.info("files go straight to the GPU, by cuFile: %s", why)
    return replace(compute, gds_ring=ring, way=f"straight to the GPU, by cuFile ({why})")


def _through_host(compute: Compute, why: str) -> Compute:
    return replace(compute, way=f"through pinned memory to the GPU (GPUDirect Storage: {why})")


def _path_of(place: str, gpu: str) -> Path | None:
    """Returns where this machine's speeds of a file system and a GPU are kept, None where nothing is."""
    directory = calibration_directory()
    digest = hashlib.sha256(f"{platform.node()}\n{place}\n{gpu}".encode(errors="surrogateescape")).hexdigest()
    return None if directory is None else directory / f"straight-{digest[:16]}.json"


def _measured(compute: Compute, ring: GdsRing, files: FileTable, file: str, place: str) -> StraightSpeeds:
    assert compute.cuda is not None
    assert compute.link is not None
    straight = ring.bytes_per_s(file, files[file].size_bytes())
    disk = measure_link(files, file, choice=compute.choice, time_limit_s=0.1)  # as long as straight
    return StraightSpeeds(
        host=platform.node(),
        place=place,
        gpu=compute.cuda.pci_address,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        straight_bytes_per_s=straight,
        pinned_bytes_per_s=min(disk.bandwidth_bytes_per_s, compute.link.bandwidth_bytes_per_s),
    )


def _keep(path: Path | None, speeds: StraightSpeeds) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, speeds.to_json().encode(), "speed of GPUDirect Storage")
    except (OSError, StorageError) as error:
        _log.info("the speed of GPUDirect Storage is measured again by the next start: %s", error)


def _kept(path: Path) -> StraightSpeeds | None:
    try:
        speeds = StraightSpeeds.from_json(path.read_text(encoding="utf-8"))
        stale = why_stale(datetime.fromisoformat(speeds.measured_at))
    except FileNotFoundError:
        return None
    # SchemaError is a ValueError; it may hold anything.
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        _log.info("the speed of GPUDirect Storage in %s is measured again: %s", path, error)
        return None
    if stale:
        _log.info("the speed of GPUDirect Storage in %s is measured again: %s", path, stale)
    return None if stale else speeds
