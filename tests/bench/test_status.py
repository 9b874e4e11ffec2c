"""The README's status table says what the result files say, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.results import RESULTS, Device, Topic, read_results, write_result
from bench.status import BEGIN, END, README, block_of, table, update, with_block
from mball.errors import SchemaError
from tests.bench.samples import result

ROOT = Path(__file__).parents[2]


def cell(text: str, row: str, column: str) -> str:
    header, _, *rows = [[part.strip() for part in line.strip("|").split(" | ")] for line in text.splitlines()]
    (found,) = [cells for cells in rows if cells[0] == row]
    return found[header.index(column)]


def test_readme_says_what_the_files_say() -> None:
    block = block_of(README.read_text(encoding="utf-8"))
    assert block == table(read_results()), "run `make status`; the table is not written by hand"


def test_links_of_the_readme_lead_to_files() -> None:
    for found in read_results(RESULTS):
        assert (ROOT / "bench" / "results" / found.file_name()).is_file()


def test_nothing_is_claimed_without_a_file() -> None:
    empty = table([])
    assert len(empty.splitlines()) == 2 + len(Topic)
    assert empty.count("not measured") == len(Topic) * len(Device)


def test_a_new_file_changes_its_cell_and_no_other(tmp_path: Path) -> None:
    before = table(read_results(tmp_path))
    write_result(result(), tmp_path)
    after = table(read_results(tmp_path))
    assert cell(after, "cost of noticing writes", "CPU") == (
        "[2026-01-31, 8 cores: 0.25 % of a pass](bench/results/2026-01-31-8-cores-toy.json)"
    )
    assert cell(after, "cost of noticing writes", "CUDA") == "not measured"
    changed = [a for a, b in zip(after.splitlines(), before.splitlines(), strict=True) if a != b]
    assert len(changed) == 1

    write_result(result(name="later", date="2026-02-01T09:30:00+00:00", share=0.75), tmp_path)
    write_result(result(name="a-day-before", date="2026-01-30T09:30:00+00:00", share=0.5), tmp_path)
    assert "2026-02-01, 8 cores: 0.75 %" in table(read_results(tmp_path))
    assert table(read_results(tmp_path)) == table(read_results(tmp_path)[::-1])

    write_result(result(topic="speed", device="cuda", gpu="NVIDIA H200"), tmp_path)
    speed = cell(table(read_results(tmp_path)), "speed against the roofline", "CUDA")
    assert speed.startswith("[2026-01-31, NVIDIA H200: 0.25 %")


def test_every_topic_and_device_has_a_cell() -> None:
    found = [
        replace(result(), topic=topic.value, device=device.value, machine=result(gpu="G").machine)
        for topic in Topic
        for device in Device
    ]
    assert "not measured" not in table(found)


def test_text_cannot_break_the_table() -> None:
    broken = replace(result(), headline="{share} | of\na pass")
    assert r"0.25 % \| of a pass" in table([broken])
    assert len(table([broken]).splitlines()) == len(table([]).splitlines())


def test_update_changes_the_block_only(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    write_result(result(), tmp_path)
    assert update(readme, tmp_path)
    text = readme.read_text()
    assert text == f"above\n{BEGIN}\n{table([result()])}\n{END}\nbelow\n"
    assert not update(readme, tmp_path)

    readme.write_text(text.replace("0.25 %", "0.01 %"))  # by hand
    assert block_of(readme.read_text()) != table([result()])
    assert update(readme, tmp_path)
    assert readme.read_text() == text


def test_a_malformed_file_leaves_the_readme_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\nold\n{END}\n")
    bad = tmp_path / "2026-01-31-8-cores-toy.json"
    bad.write_text("{}")
    with pytest.raises(SchemaError, match="2026-01-31-8-cores-toy"):
        update(readme, tmp_path)
    assert "old" in readme.read_text()


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}"])
def test_a_readme_without_its_marks_is_refused(text: str) -> None:
    with pytest.raises(SchemaError, match="status:begin"):
        with_block(text, "")
