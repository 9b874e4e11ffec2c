"""Where the allocator's C library comes from, and what is said where there is none."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mball.errors import DeviceError
from mball.memory.allocator import library
from mball.memory.allocator.library import SOURCE, built, load_library, source_digest

needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")


@pytest.fixture(autouse=True)
def a_plain_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The source alone, whatever lies beside it here; returns a cache that is not there yet."""
    source = tmp_path / "package" / SOURCE.name
    source.parent.mkdir()
    shutil.copy(SOURCE, source)
    monkeypatch.setattr(library, "SOURCE", source)
    return tmp_path / "cache"


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SOURCE.parents[3])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@needs_a_compiler
def test_it_is_compiled_once_into_the_cache(a_plain_checkout: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = a_plain_checkout
    with caplog.at_level(logging.INFO):
        load_library(cache)
    path = only(cache / "native")
    assert source_digest() in path.name
    assert caplog.messages[-1].startswith(f"compiled the allocator's C library into {path} in ")
    before = path.stat()
    caplog.clear()
    assert load_library(cache).mball_source() == source_digest().encode()
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert not caplog.messages
    assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777 == 0o700


@needs_a_compiler
def test_another_source_is_another_library(a_plain_checkout: Path) -> None:
    load_library(a_plain_checkout)
    with library.SOURCE.open("a") as source:
        source.write("// changed\n")
    load_library(a_plain_checkout)
    assert len(list((a_plain_checkout / "native").iterdir())) == 2


@needs_a_compiler
def test_what_the_build_left_is_used_if_it_is_of_this_source(
    a_plain_checkout: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_library(a_plain_checkout)
    packaged = library.SOURCE.with_name(f"_segments{library.EXTENSION_SUFFIXES[0]}")
    shutil.copy(only(a_plain_checkout / "native"), packaged)
    assert built() == [packaged]
    assert load_library()._name == str(packaged)
    with library.SOURCE.open("a") as source:
        source.write("// changed\n")
    with pytest.raises(DeviceError, match="built without a C compiler, or from other sources"):
        load_library()
    foreign = library.SOURCE.with_name(f"_segments{library.EXTENSION_SUFFIXES[-1]}")
    foreign.write_bytes(b"of another machine")
    with caplog.at_level(logging.INFO):
        load_library(a_plain_checkout)
    assert f"{foreign} is not used: " in caplog.text


def test_without_a_compiler_one_line_says_so(a_plain_checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DeviceError, match="the allocator's C library is not there: this package was built without"
    ) as one:
        load_library()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DeviceError, match=r"no C compiler to build it \(cc, gcc, clang\); install one") as two:
        load_library(a_plain_checkout)
    assert "\n" not in f"{one.value}{two.value}"
    assert not a_plain_checkout.exists()


def test_a_compiler_that_fails_says_why(
    a_plain_checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'no headers' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent))
    with pytest.raises(DeviceError, match=f"{compiler} cannot build the allocator's C library: no headers"):
        load_library(a_plain_checkout)
    assert not list((a_plain_checkout / "native").iterdir())


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.shutil, "which", lambda name: f"/bin/{name}")
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(DeviceError, match=f"cannot be built in '{taken}/native': "):
        load_library(taken)


@needs_a_compiler
def test_nothing_is_loaded_that_others_could_have_put_there(a_plain_checkout: Path) -> None:
    load_library(a_plain_checkout)
    folder = a_plain_checkout / "native"
    for path in (only(folder), folder):
        path.chmod(0o777)
    with pytest.raises(DeviceError, match=f"others may write to '{folder}', so no library is loaded from there"):
        load_library(a_plain_checkout)


@needs_a_compiler
def test_loading_starts_no_cuda_and_no_torch(a_plain_checkout: Path) -> None:
    load_library(a_plain_checkout)
    code = (
        "import sys; from pathlib import Path; from mball.memory import SegmentAllocator, load_library\n"
        f"load_library(Path({str(a_plain_checkout)!r}))\n"
        "assert 'libcuda' not in Path('/proc/self/maps').read_text()\n"
        "assert 'torch' not in sys.modules"
    )
    finished = run(code)
    assert finished.returncode == 0, finished.stderr


@needs_a_compiler
def test_without_a_driver_an_allocator_is_refused(a_plain_checkout: Path) -> None:
    load_library(a_plain_checkout)
    code = (
        "import ctypes; from pathlib import Path; from mball.memory import SegmentAllocator, load_library\n"
        "try: ctypes.CDLL('libcuda.so.1'); print('there is a driver')\n"
        "except OSError:\n"
        f"    library = load_library(Path({str(a_plain_checkout)!r}))\n"
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
