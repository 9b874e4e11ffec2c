"""The demo's checkpoint: made once, whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mball.cli import smollm2
from mball.errors import CheckpointError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a GGUF file that must not be imported."""
    folder = tmp_path / "site" / "carries_a_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(smollm2, "PACKAGE", folder.name)
    return folder


def test_gguf_is_found_without_importing(package: Path) -> None:
    assert smollm2.find_gguf() == package / "model.gguf"
    assert package.name not in sys.modules


def test_conversion_appears_whole(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    code = (
        "import os, sys, pathlib\n"
        "folder, file, target = sys.argv[1:]\n"
        "assert os.path.exists(os.path.join(folder, file))\n"
        f"assert not os.path.exists({str(cache / smollm2.NAME)!r})\n"
        "pathlib.Path(target, 'config.json').write_text('{}')"
    )
    monkeypatch.setattr(smollm2, "_CONVERT", code)
    assert smollm2.converted_checkpoint(cache) is None
    made = smollm2.convert(cache)
    assert smollm2.converted_checkpoint(cache) == made
    assert [path.name for path in cache.iterdir()] == [made.name]
    # Somebody who converted at the same time loses the race without harm.
    monkeypatch.setattr(smollm2, "_CONVERT", "import sys, pathlib\npathlib.Path(sys.argv[3], 'config.json').touch()")
    assert smollm2.convert(cache) == made
    assert (made / "config.json").read_text() == "{}"
    assert [path.name for path in cache.iterdir()] == [made.name]


def test_failed_conversion_leaves_nothing(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    code = "import sys, pathlib\npathlib.Path(sys.argv[3], 'half').touch()\nraise SystemExit('broken')"
    monkeypatch.setattr(smollm2, "_CONVERT", code)
    with pytest.raises(CheckpointError, match="broken"):
        smollm2.convert(cache)
    assert list(cache.iterdir()) == []


def test_unwritable_cache_is_named(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="XDG_CACHE_HOME"):
        smollm2.convert(tmp_path / "file" / "cache")
