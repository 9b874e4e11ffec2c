"""The allocator's C library, used from C by many threads: plainly, and watched by the compiler's sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mball.memory.allocator.library import SEGMENTS
from tests.memory.driver import standin

needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")

PROGRAM = Path(__file__).with_name("segments_in_threads.c")
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
NUM_TURNS = {"": 2000, "thread": 400, "address,undefined": 1000}


def compile_c(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["cc", "-std=gnu11", "-O1", "-g", *arguments, "-ldl", "-lpthread"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_a_compiler
@pytest.mark.parametrize("sanitizers", NUM_TURNS)
def test_many_threads(tmp_path: Path, sanitizers: str) -> None:
    flags = [f"-fsanitize={sanitizers}"] if sanitizers else []
    # A kernel may place memory where the thread sanitizer does not look for it, once in a while.
    at_fixed_places = ["setarch", "-R"] if sanitizers == "thread" and shutil.which("setarch") else []
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    compiled = compile_c(*flags, "-o", str(tmp_path / "probe"), str(probe))
    if sanitizers and (
        compiled.returncode
        or subprocess.run([*at_fixed_places, tmp_path / "probe"], capture_output=True, check=False).returncode
    ):
        pytest.skip(f"the compiler's sanitizers {sanitizers} do not work on this machine")
    shared = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(tmp_path / "libcuda.so.1")]
    compiled = compile_c(*flags, *shared, str(standin.SOURCE))
    assert compiled.returncode == 0, compiled.stderr
    linked = [f"-L{tmp_path}", "-l:libcuda.so.1", f"-Wl,-rpath,{tmp_path}"]
    program = tmp_path / "program"
    compiled = compile_c(*WARNINGS, *flags, "-o", str(program), str(PROGRAM), str(SEGMENTS.source), *linked)
    assert compiled.returncode == 0, compiled.stderr
    finished = subprocess.run(
        [*at_fixed_places, program, str(NUM_TURNS[sanitizers])],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
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
    library = tmp_path / "segments.so"
    strict = ["-std=c11", "-pedantic", "-Wshadow", "-fvisibility=hidden", "-shared", "-fPIC"]
    compiled = compile_c(*strict, *WARNINGS, "-o", str(library), str(SEGMENTS.source))
    assert compiled.returncode == 0, compiled.stderr
    try:
        listed = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("needs nm")
    symbols = [line.split()[-2:] for line in listed.splitlines()]
    assert not [name for kind, name in symbols if kind == "U" and name.startswith(("cu", "Py", "_Py"))]
    exported = [name for kind, name in symbols if kind == "T"]
    assert {"mball_malloc", "mball_free"} < set(exported)
    assert all(name.startswith("mball_") for name in exported)
