"""Which reader is chosen, and what is said of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mball.errors import DeviceError
from mball.storage import NativeReader, ThreadedReader, Threads, choose_reader, native
from tests.in_c import needs_a_compiler
from tests.storage.reads import FILE_BYTES, memory, opened, read


@pytest.fixture
def only_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing was built yet; returns a cache that is not there."""
    source = tmp_path / "package" / native.READ_POOL.source.name
    source.parent.mkdir()
    shutil.copy(native.READ_POOL.source, source)
    monkeypatch.setattr(native, "READ_POOL", replace(native.READ_POOL, source=source))
    return tmp_path / "cache"


@needs_a_compiler
@pytest.mark.parametrize(
    ("threads", "kind", "said"),
    [
        (Threads.AUTO, NativeReader, "5 threads of C, 2.00 MiB a request (they go on while Python is busy)"),
        (Threads.C, NativeReader, "5 threads of C, 2.00 MiB a request (asked for)"),
        (Threads.PYTHON, ThreadedReader, "5 threads of Python, 2.00 MiB a request (asked for)"),
    ],
)
def test_a_reader_is_chosen_named_and_opened(
    threads: Threads, kind: type, said: str, only_the_source: Path, path: str, content: bytes
) -> None:
    choice = choose_reader(threads, num_threads=5, cache=only_the_source)
    assert f"{choice} ({choice.reason})" == said
    files = opened(path)
    reader = choice.open(files)
    assert isinstance(reader, kind)
    assert reader.window_bytes == 5 * 2 << 20
    destination = memory(FILE_BYTES)
    reader.submit([read(path, 0, FILE_BYTES, destination)]).wait()
    assert bytes(destination) == content
    reader.close()
    files.close()
    assert only_the_source.exists() == (kind is NativeReader), "threads of Python need no compiler"


def test_without_a_compiler_python_reads_and_says_why(only_the_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    choice = choose_reader(cache=only_the_source)
    assert str(choice).startswith("8 threads of Python")
    assert "no C compiler to build it" in choice.reason
    assert "\n" not in choice.reason
    with pytest.raises(DeviceError, match="the readers' C library is not there, and no C compiler to build it"):
        choose_reader(Threads.C, cache=only_the_source)
    # Nobody said where to keep it: nothing is compiled.
    assert "built without a C compiler" in choose_reader().reason
