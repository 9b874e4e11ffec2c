"""Where a C library comes from, and what is said where there is none."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mball import c_library
from mball.c_library import CLibrary
from mball.errors import DeviceError
from mball.memory.allocator.library import SEGMENTS
from mball.storage.native import READ_POOL

needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")


@pytest.fixture(params=[SEGMENTS, READ_POOL], ids=lambda library: library.source.stem)
def library(request: pytest.FixtureRequest, tmp_path: Path) -> CLibrary:
    """The source alone, whatever lies beside it here."""
    source = tmp_path / "package" / request.param.source.name
    source.parent.mkdir()
    shutil.copy(request.param.source, source)
    return replace(request.param, source=source)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that is not there yet."""
    return tmp_path / "cache"


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@needs_a_compiler
def test_it_is_compiled_once_into_the_cache(library: CLibrary, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        library.load(cache)
    path = only(cache / "native")
    assert library.digest() in path.name
    assert caplog.messages[-1].startswith(f"compiled {library.title} into {path} in ")
    before = path.stat()
    caplog.clear()
    assert library.load(cache).mball_source() == library.digest().encode()
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert not caplog.messages
    assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777 == 0o700


@needs_a_compiler
def test_another_source_is_another_library(library: CLibrary, cache: Path) -> None:
    library.load(cache)
    with library.source.open("a") as source:
        source.write("// changed\n")
    library.load(cache)
    assert len(list((cache / "native").iterdir())) == 2


@needs_a_compiler
def test_what_the_build_left_is_used_if_it_is_of_this_source(
    library: CLibrary, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library.load(cache)
    packaged = library.source.with_name(f"_{library.source.stem}{c_library.EXTENSION_SUFFIXES[0]}")
    shutil.copy(only(cache / "native"), packaged)
    assert library.built() == [packaged]
    assert library.load(None)._name == str(packaged)
    with library.source.open("a") as source:
        source.write("// changed\n")
    with pytest.raises(DeviceError, match="built without a C compiler, or from other sources"):
        library.load(None)
    foreign = library.source.with_name(f"_{library.source.stem}{c_library.EXTENSION_SUFFIXES[-1]}")
    foreign.write_bytes(b"of another machine")
    with caplog.at_level(logging.INFO):
        library.load(cache)
    assert f"{foreign} is not used: " in caplog.text


def test_without_a_compiler_one_line_says_so(library: CLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=f"{library.title} is not there: this package was built without") as one:
        library.load(None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DeviceError, match=r"no C compiler to build it \(cc, gcc, clang\); install one") as two:
        library.load(cache)
    assert "\n" not in f"{one.value}{two.value}"
    assert not cache.exists()


def test_a_compiler_that_fails_says_why(
    library: CLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'no headers' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent))
    with pytest.raises(DeviceError, match=f"{compiler} cannot build {library.title}: no headers"):
        library.load(cache)
    assert not list((cache / "native").iterdir())


def test_a_cache_that_cannot_be_written_says_so(
    library: CLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(c_library.shutil, "which", lambda name: f"/bin/{name}")
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(DeviceError, match=f"cannot be built in '{taken}/native': "):
        library.load(taken)


@needs_a_compiler
def test_nothing_is_loaded_that_others_could_have_put_there(library: CLibrary, cache: Path) -> None:
    library.load(cache)
    folder = cache / "native"
    for path in (only(folder), folder):
        path.chmod(0o777)
    with pytest.raises(DeviceError, match=f"others may write to '{folder}', so no library is loaded from there"):
        library.load(cache)
