"""The allocator's C library: what loading it starts, and what is said where there is no driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mball.memory.allocator.library import SEGMENTS, load_library

needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SEGMENTS.source.parents[3])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@needs_a_compiler
def test_loading_starts_no_cuda_and_no_torch(tmp_path: Path) -> None:
    load_library(tmp_path)
    code = (
        "import sys; from pathlib import Path; from mball.memory import SegmentAllocator, load_library\n"
        f"load_library(Path({str(tmp_path)!r}))\n"
        "assert 'libcuda' not in Path('/proc/self/maps').read_text()\n"
        "assert 'torch' not in sys.modules"
    )
    finished = run(code)
    assert finished.returncode == 0, finished.stderr


@needs_a_compiler
def test_without_a_driver_an_allocator_is_refused(tmp_path: Path) -> None:
    load_library(tmp_path)
    code = (
        "import ctypes; from pathlib import Path; from mball.memory import SegmentAllocator, load_library\n"
        "try: ctypes.CDLL('libcuda.so.1'); print('there is a driver')\n"
        "except OSError:\n"
        f"    library = load_library(Path({str(tmp_path)!r}))\n"
        "    try: SegmentAllocator(library, limit_bytes=1)\n"
        "    except Exception as error: print(type(error).__name__, error)"
    )
    finished = run(code)
    assert finished.returncode == 0, finished.stderr
    if "there is a driver" in finished.stdout:
        pytest.skip("needs a machine without a driver")
    assert (
        "DeviceError cannot open 1 B (1 bytes) on GPU 0: dlopen of libcuda.so.1 said MBALL_NO_DRIVER, "
        in finished.stdout
    )
