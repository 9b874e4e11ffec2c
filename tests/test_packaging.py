"""The repository as a package: the links, the names that must not be importable, the command, the Makefile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize("name", ["triton_kernels", "integrations"])
def test_links_are_relative_and_inside(name: str) -> None:
    link = ROOT / "mball" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


@pytest.mark.parametrize("name", ["triton_kernels", "integrations"])
def test_folder_answers_to_its_full_name_only(name: str) -> None:
    # From the repository root, where the bare folder is in reach.
    refused = run(sys.executable, "-c", f"import {name}")
    assert refused.returncode != 0
    assert f"import mball.{name}" in refused.stderr
    assert run(sys.executable, "-c", f"import mball.{name}").returncode == 0


def test_import_starts_no_thread_and_loads_no_torch() -> None:
    code = (
        "import sys, threading, mball, mball.units, mball.schema\n"
        "assert threading.active_count() == 1\n"
        "assert 'torch' not in sys.modules and 'rich' not in sys.modules"
    )
    finished = run(sys.executable, "-c", code)
    assert finished.returncode == 0, finished.stderr


WRAP = """
import sys
import pynvml, torch, mball
from safetensors.torch import save_file
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
save_file(model.state_dict(), sys.argv[1])
mball.wrap(model, budget="1MiB", weights=sys.argv[1], capture="operators")
with torch.no_grad():
    model(torch.zeros(1, 64))
assert mball.report(model).passes == 1
mball.unwrap(model)
assert pynvml.__file__ == sys.argv[2]
assert "mball.observe.nvml" not in sys.modules
"""


def test_models_are_wrapped_whatever_is_installed_as_pynvml(tmp_path: Path) -> None:
    foreign = tmp_path / "pynvml.py"
    foreign.write_text("")
    path = f"{tmp_path}:{ROOT}"
    finished = run(sys.executable, "-c", WRAP, str(tmp_path / "model.safetensors"), str(foreign), PYTHONPATH=path)
    assert finished.returncode == 0, finished.stderr


def test_every_requirement_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    wanted += re.search(r"^MODELS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    pinned = re.findall(r"^([a-z0-9-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {re.match(r"[a-z0-9-]+", name)[0] for name in wanted} <= set(pinned)
    assert len(pinned) == len(set(pinned))


def test_command_line_says_what_it_can() -> None:
    finished = run(sys.executable, "-m", "mball.cli", "--help", PYTHONPATH=str(ROOT))
    assert finished.returncode == 0, finished.stderr
    assert "demo" in finished.stdout
    assert "doctor" in finished.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["gpu", "gpu-bench"])
def test_gpu_targets_say_so_without_a_gpu(target: str) -> None:
    finished = run("make", target, f"GPU_PYTHON={sys.executable}", CUDA_VISIBLE_DEVICES="")
    assert finished.returncode == 0, finished.stderr
    assert "no NVIDIA GPU" in finished.stdout


# A Python that says that there is a GPU, and of pytest only notes what it is asked; it ends with FIRST, then SECOND.
PRETENDER = """#!/bin/sh
[ "$1" = -c ] && exit 0
echo "$@" >>"$NOTES"
[ "$(wc -l <"$NOTES")" = 1 ] && exit "$FIRST"
exit "$SECOND"
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("first", "second", "fails"), [("0", "0", False), ("5", "0", False), ("1", "0", True), ("0", "1", True)]
)
def test_gpu_runs_both_halves_whatever_becomes_of_them(first: str, second: str, fails: bool, tmp_path: Path) -> None:
    pretender, notes = tmp_path / "python", tmp_path / "notes"
    pretender.write_text(PRETENDER)
    pretender.chmod(0o755)
    finished = run("make", "gpu", f"GPU_PYTHON={pretender}", NOTES=str(notes), FIRST=first, SECOND=second)
    assert bool(finished.returncode) == fails, finished.stderr
    beside, alone = notes.read_text().splitlines()
    assert "not alone" in beside
    assert "-n 4" in beside
    assert "not alone" not in alone
    assert "-n" not in alone.split()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_gpu_bench_runs_the_benches_of_a_gpu_and_no_others(tmp_path: Path) -> None:
    pretender, notes = tmp_path / "python", tmp_path / "notes"
    pretender.write_text(PRETENDER)
    pretender.chmod(0o755)
    finished = run("make", "gpu-bench", f"GPU_PYTHON={pretender}", NOTES=str(notes), FIRST="0", SECOND="0")
    assert finished.returncode == 0, finished.stderr
    asked = notes.read_text()
    assert "--save-results" in asked
    named = {word for word in asked.split() if word.startswith("bench/")}
    assert named == {f"bench/{path.name}" for path in (ROOT / "bench").glob("test_gpu_*.py")}


def copied(source: Path) -> Path:
    """Returns a copy to build from: building leaves a folder behind, whose stale files would be in the next wheel."""
    source.mkdir()
    for name in ("mball", "integrations", "triton_kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.mark.slow
@pytest.mark.parametrize("has_compiler", [True, False])
def test_wheel_holds_what_the_checkout_holds(tmp_path: Path, has_compiler: bool) -> None:
    if has_compiler and shutil.which("cc") is None:
        pytest.skip("needs a C compiler, cc")
    source = copied(tmp_path / "source")
    compiler = {} if has_compiler else {"CC": "there-is-no-compiler"}
    wanted = ["--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    finished = run(sys.executable, "-m", "pip", "wheel", *wanted, **compiler)
    assert finished.returncode == 0, finished.stderr
    (wheel,) = tmp_path.glob("mball-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("mball/")}
        assert all(name.startswith(("mball/", "mball-")) for name in archive.namelist())
    files = [path for folder in ("mball", "mball/integrations", "mball/triton_kernels")
             for path in (ROOT / folder).rglob("*.py")]  # fmt: skip
    expected = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    libraries = {name for name in held if name.endswith(".so")}
    assert held - libraries == expected | {"mball/py.typed", *SOURCES_IN_C}
    assert len(libraries) == has_compiler * len(SOURCES_IN_C)
    folder = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    loaded = run(sys.executable, "-c", LOAD, cwd=tmp_path, PYTHONPATH=str(folder))
    for line in loaded.stdout.splitlines():
        assert line.startswith(str(folder) if has_compiler else "DeviceError"), loaded.stdout + loaded.stderr
    assert len(loaded.stdout.splitlines()) == len(SOURCES_IN_C), loaded.stderr


SOURCES_IN_C = {"mball/memory/allocator/segments.c", "mball/storage/read_pool.c"}
LOAD = """
from mball.memory.allocator.library import SEGMENTS
from mball.storage.native import READ_POOL
for library in (SEGMENTS, READ_POOL):
    try:
        print(library.load(None)._name)
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")
def test_an_editable_install_has_the_c_libraries(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    wanted = ["--no-deps", "--target", str(tmp_path / "site"), "-e", str(source)]
    finished = run(sys.executable, "-m", "pip", "install", *wanted)
    assert finished.returncode == 0, finished.stderr
    loaded = run(sys.executable, "-c", LOAD, cwd=tmp_path, PYTHONPATH=str(source))
    stems = [str(source / path.replace(name, f"_{name}").removesuffix(".c"))
             for path in sorted(SOURCES_IN_C) for name in [path.rpartition("/")[2]]]  # fmt: skip
    for line, stem in zip(loaded.stdout.splitlines(), stems, strict=True):
        assert line.startswith(stem), loaded.stdout + loaded.stderr


@pytest.mark.slow
def test_the_source_distribution_holds_what_builds_it(tmp_path: Path) -> None:
    source = copied(tmp_path / "source")
    code = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    finished = run(sys.executable, "-c", code, str(tmp_path), cwd=source)
    if "No module named" in finished.stderr:
        pytest.skip("needs setuptools")
    assert finished.returncode == 0, finished.stderr
    (archive,) = tmp_path.glob("mball-*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert {"setup.py", "pyproject.toml", *SOURCES_IN_C} <= held
