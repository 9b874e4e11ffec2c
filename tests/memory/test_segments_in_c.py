"""The allocator's C library, used from C by many threads: plainly, and watched by the compiler's sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from mball.memory.allocator.library import SEGMENTS
from tests.in_c import WARNINGS, compile_c, exported_of, flags_of, needs_a_compiler, run_watched
from tests.memory.driver import standin

PROGRAM = Path(__file__).with_name("segments_in_threads.c")
NUM_TURNS = {"": 2000, "thread": 400, "address,undefined": 1000}


@needs_a_compiler
@pytest.mark.parametrize("sanitizers", NUM_TURNS)
def test_many_threads(tmp_path: Path, sanitizers: str) -> None:
    flags = flags_of(sanitizers, tmp_path)
    shared = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(tmp_path / "libcuda.so.1")]
    compile_c(*flags, *shared, str(standin.SOURCE))
    linked = [f"-L{tmp_path}", "-l:libcuda.so.1", f"-Wl,-rpath,{tmp_path}"]
    program = tmp_path / "program"
    compile_c(*WARNINGS, *flags, "-o", str(program), str(PROGRAM), str(SEGMENTS.source), *linked)
    finished = run_watched(program, sanitizers, str(NUM_TURNS[sanitizers]))
    assert finished.returncode == 0, finished.stderr
    assert not finished.stderr
    made, failed, taken, lent, taken_back = map(int, finished.stdout.split())
    # It met with all that there is to meet.
    assert made > NUM_TURNS[sanitizers] // 4
    assert failed
    assert taken
    assert lent
    assert taken_back


@needs_a_compiler
def test_the_library_wants_nothing_but_the_c_library(tmp_path: Path) -> None:
    """No CUDA at link time and no Python, and it exports what is called from outside only."""
    exported = exported_of(SEGMENTS.source, tmp_path)
    assert {"mball_malloc", "mball_free"} < exported
    assert all(name.startswith("mball_") for name in exported)
