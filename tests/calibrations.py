"""A calibration that says what a test wants, kept where mball looks for it."""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mball.config import calibration_directory, own_cache
from mball.schema import CalibratedLink, Calibration, Link, LinkSample
from mball.storage import FileTable, choose_reader, file_system_of, save_calibration
from mball.storage.calibration import reader_kind
from mball.units import MIB


def roomy_directory() -> str:
    """Returns a directory with room for a file to calibrate with; in memory, where containers leave room there."""
    usage = os.statvfs("/dev/shm")
    return "/dev/shm" if usage.f_bavail * usage.f_frsize > 256 * MIB else tempfile.gettempdir()


def keep_calibration(
    directory: Path, link: Link, monkeypatch: pytest.MonkeyPatch, *, num_threads: int = 8, chunk_bytes: int = 2 * MIB
) -> Calibration:
    """Has mball take `link` for that of the file system of `directory`, until the end of the test.

    It was read by so many requests of so many bytes at one time.
    """
    choice = replace(choose_reader(cache=own_cache()), num_threads=num_threads, chunk_bytes=chunk_bytes)
    cache = directory / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    probe = directory / "a file of this file system"
    probe.write_bytes(b"x")
    files = FileTable()
    direct = files.is_direct(files.add_path(probe))
    files.close()
    probe.unlink()
    sample = LinkSample(
        block_bytes=1 << 20,
        depth=4,
        bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
        latency_s=link.latency_s,
        spread=0.1,
    )
    calibration = Calibration(
        host=platform.node(),
        place=str(file_system_of(str(directory))),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        links=(
            CalibratedLink(
                link=link,
                reader=reader_kind(choice, direct=direct),
                num_threads=num_threads,
                chunk_bytes=chunk_bytes,
                file_bytes=1 << 30,
                num_rounds=5,
                spread=0.1,
                block_bytes=1 << 20,
                depth=4,
                samples=(sample,),
            ),
        ),
    )
    place = calibration_directory()
    assert place is not None
    save_calibration(place, calibration)
    return calibration
