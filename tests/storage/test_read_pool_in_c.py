"""The readers' C library, used from C by many threads: plainly, and watched by the compiler's sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from mball.storage.native import READ_POOL
from tests.in_c import SANITIZERS, WARNINGS, compile_c, exported_of, flags_of, needs_a_compiler, run_watched

PROGRAM = Path(__file__).with_name("read_pool_in_threads.c")
NUM_TURNS = 400


@needs_a_compiler
@pytest.mark.parametrize("sanitizers", SANITIZERS)
def test_many_threads(tmp_path: Path, sanitizers: str) -> None:
    flags = flags_of(sanitizers, tmp_path)
    program = tmp_path / "program"
    compile_c(*WARNINGS, *flags, f"-I{READ_POOL.source.parent}", "-o", str(program), str(PROGRAM))
    finished = run_watched(program, sanitizers, str(NUM_TURNS), str(tmp_path / "data"))
    assert finished.returncode == 0, finished.stderr
    assert not finished.stderr
    read, failed, refused, closed = map(int, finished.stdout.split())
    # It met with all that there is to meet.
    assert read > NUM_TURNS
    assert failed
    assert refused
    assert closed


@needs_a_compiler
def test_the_library_wants_nothing_but_the_c_library(tmp_path: Path) -> None:
    """No Python, and it exports what is called from outside only."""
    exported = exported_of(READ_POOL.source, tmp_path)
    assert "mball_pool_submit" in exported
    assert all(name.startswith("mball_") for name in exported)
