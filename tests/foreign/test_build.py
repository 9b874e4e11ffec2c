"""The foreign device is compiled once, and its tests are skipped where it cannot be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.foreign import build

# Slow enough for others to come while it runs.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && { cat "$(dirname "$0")/version"; exit; }
echo started >> "$(dirname "$0")/log"
while [ "$1" != -o ]; do shift; done
echo half > "$2"
sleep 0.3
[ -e "$(dirname "$0")/broken" ] && { echo "no such header" >&2; exit 1; }
echo whole > "$2"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "c++").write_text(COMPILER)
    (folder / "c++").chmod(0o755)
    (folder / "version").write_text("1")
    (folder / "log").touch()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_whoever_comes_first_compiles_and_the_others_wait(compiler: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        built = list(threads.map(lambda _: build.build(tmp_path), range(4)))
    assert {path.read_text() for path in built} == {"whole\n"}
    assert len(set(built)) == 1
    assert (compiler / "log").read_text() == "started\n"


def test_another_compiler_compiles_anew(compiler: Path, tmp_path: Path) -> None:
    first = build.build(tmp_path)
    (compiler / "version").write_text("2")
    assert build.build(tmp_path) != first
    assert (compiler / "log").read_text() == "started\n" * 2


def test_what_does_not_compile_says_why_and_leaves_no_library(compiler: Path, tmp_path: Path) -> None:
    (compiler / "broken").touch()
    with pytest.raises(AssertionError, match="no such header"):
        build.build(tmp_path)
    assert not list(tmp_path.glob("*.so"))
    (compiler / "broken").unlink()
    assert build.build(tmp_path).read_text() == "whole\n"


def test_without_a_compiler_there_is_a_reason(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.missing() == ""
    (compiler / "c++").unlink()
    monkeypatch.setenv("PATH", str(compiler))
    assert "C++ compiler" in build.missing()


def test_a_home_that_cannot_be_written_to(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "home").write_text("no folder")
    library = build.build(tmp_path / "home" / "cache")
    assert library.parent.parent == tmp_path
    assert library.read_text() == "whole\n"
