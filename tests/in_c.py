"""C code of this package, compiled into programs of the tests: plainly, and watched by the compiler's sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SANITIZERS = ("", "thread", "address,undefined")
WARNINGS = ("-Wall", "-Wextra", "-Werror")

needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")


def compile_c(*arguments: str) -> None:
    command = ["cc", "-std=gnu11", "-O1", "-g", *arguments, "-ldl", "-lpthread"]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr


def flags_of(sanitizers: str, folder: Path) -> list[str]:
    """Returns the compiler's flags for them; skips the test where they do not work on this machine."""
    flags = [f"-fsanitize={sanitizers}"] if sanitizers else []
    source, program = folder / "probe.c", folder / "probe"
    source.write_text("int main(void) { return 0; }\n")
    compiled = subprocess.run(["cc", *flags, "-o", program, source], capture_output=True, check=False)
    if compiled.returncode or (sanitizers and run_watched(program, sanitizers).returncode):
        pytest.skip(f"the compiler's sanitizers {sanitizers} do not work on this machine")
    return flags


def run_watched(program: Path, sanitizers: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A kernel may place memory where the thread sanitizer does not look for it, once in a while.
    at_fixed_places = ["setarch", "-R"] if sanitizers == "thread" and shutil.which("setarch") else []
    command = [*at_fixed_places, str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def exported_of(source: Path, folder: Path) -> set[str]:
    """Returns what a library of `source` exports, having seen that it wants neither CUDA nor Python."""
    library = folder / f"{source.stem}.so"
    strict = ["-std=c11", "-pedantic", "-Wshadow", "-fvisibility=hidden", "-shared", "-fPIC"]
    compile_c(*strict, *WARNINGS, "-o", str(library), str(source))
    try:
        listed = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("needs nm")
    symbols = [line.split()[-2:] for line in listed.splitlines()]
    assert not [name for kind, name in symbols if kind == "U" and name.startswith(("cu", "Py", "_Py"))]
    return {name for kind, name in symbols if kind == "T"}
