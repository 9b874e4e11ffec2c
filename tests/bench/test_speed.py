"""The harness of the speed bench: its statistics, its yardstick, its gate, and a session of a small model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from bench.results import Device, Topic, read_result, read_results, record
from bench.speed import fio
from bench.speed.contender import CHECKOUT, Contender, ContenderError
from bench.speed.field import Field
from bench.speed.gate import GateError, Logits, allowance, close, distance, same_bits
from bench.speed.model import SMALL, make_checkpoint, weight_bytes, weight_file
from bench.speed.plans import plans
from bench.speed.preadv import Setting, Span, Yardstick, huge_pages
from bench.speed.ratios import Target, ratio, ratio_measurements
from bench.speed.roofline import fits, roofline
from bench.speed.rounds import interleave
from bench.speed.scale import smoke
from bench.speed.swap import SMOKE, swap
from bench.speed.table import PAGE, table
from bench.speed.ways import Mode
from bench.speed.workload import Kind
from mball.memory.facts import transparent_huge_pages
from mball.units import MIB

PAGE_BYTES = 4096


def quiet(text: str) -> None:
    """Shows nothing."""


# -- statistics ----------------------------------------------------------------------------------------------------


def test_ratio_is_of_pairs() -> None:
    found = ratio([2.0, 9.0, 8.0], [1.0, 3.0, 4.0])
    assert found.samples == (2.0, 3.0, 2.0)
    assert found.median == 2.0
    # Not the ratio of the medians.
    assert ratio([1.0, 10.0, 3.0], [1.0, 1.0, 3.0]).median == 1.0


def test_interval_of_constant_ratios_is_a_point() -> None:
    found = ratio([1.1] * 5, [1.0] * 5)
    assert (found.low, found.median, found.high) == pytest.approx((1.1, 1.1, 1.1))


def test_interval_covers_the_true_median() -> None:
    generator = numpy.random.default_rng(3)
    covered = 0
    for _ in range(100):
        samples = generator.lognormal(mean=0.0, sigma=0.1, size=31).tolist()  # of median 1
        found = ratio(samples, [1.0] * 31)
        covered += found.low <= 1.0 <= found.high
    # 95 of 100 are promised; a bootstrap of few samples gives a little less.
    assert 88 <= covered <= 100


def test_interval_narrows_with_samples_and_is_always_the_same() -> None:
    generator = numpy.random.default_rng(5)
    many = generator.lognormal(sigma=0.2, size=400).tolist()
    wide, narrow = ratio(many[:20], [1.0] * 20), ratio(many, [1.0] * 400)
    assert narrow.high - narrow.low < (wide.high - wide.low) / 2
    assert ratio(many, [1.0] * 400) == narrow


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1.0], []), ([1.0, 2.0], [1.0])])
def test_samples_have_to_come_in_pairs(top: list[float], bottom: list[float]) -> None:
    with pytest.raises(ValueError, match="pairs"):
        ratio(top, bottom)


def test_verdicts() -> None:
    assert Target(limit=1.1).verdict(1.05) == "target ≤ 1.1×, met"
    assert Target(limit=1.1).verdict(1.3) == "target ≤ 1.1×, missed by 0.2×"
    assert Target(limit=3.5, at_least=True).verdict(3.0) == "target ≥ 3.5×, missed by 0.5×"
    assert Target(limit=3.5, at_least=True).met_by(4.0)


def test_a_target_is_held_against_the_upper_end() -> None:
    found = ratio([1.0, 1.0, 1.0, 1.2, 1.2], [1.0] * 5)
    middle, low, high = ratio_measurements("a", found, "a ratio", "b", Target(limit=1.02), by_high=True)
    assert middle.median == 1.0
    assert "target" not in (middle.compared_with or "")
    assert (low.name, high.name) == ("a_low", "a_high")
    assert "missed by 0.18×" in high.description


def test_rounds_interleave() -> None:
    order: list[str] = []

    def source(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = interleave({name: lambda name=name: source(name) for name in "abc"}, 20, quiet, "test")
    rounds = ["".join(order[number : number + 3]) for number in range(0, 60, 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    assert {name: [order[int(place) - 1] for place in places] for name, places in samples.items()} == {
        name: [name] * 20 for name in "abc"
    }


# -- yardstick -----------------------------------------------------------------------------------------------------


def huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))


@pytest.mark.skipif(transparent_huge_pages() in (None, "never"), reason="this kernel has no huge pages")
def test_yardstick_reads_into_huge_pages() -> None:
    before = huge_bytes()
    memory = huge_pages(16 * MIB)
    assert huge_bytes() - before >= 12 * MIB, "scattered pages are read into at a fraction of the disk's speed"
    assert numpy.frombuffer(memory, dtype=numpy.uint8).__array_interface__["data"][0] % (2 * MIB) == 0


def test_yardstick_reads_what_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    content = os.urandom(5 * PAGE_BYTES + 100)
    path.write_bytes(content)
    spans = [
        Span(path=str(path), offset_bytes=10, size_bytes=PAGE_BYTES),
        Span(path=str(path), offset_bytes=3 * PAGE_BYTES, size_bytes=2 * PAGE_BYTES + 100),
    ]
    memory = huge_pages(8 * PAGE_BYTES)
    try:
        yardstick = Yardstick(spans, memory)
    except OSError as error:
        pytest.skip(f"no direct reads from {tmp_path}: {error.strerror}")
    assert yardstick.size_bytes == 3 * PAGE_BYTES + 100
    assert yardstick.read(Setting(num_threads=2, chunk_bytes=PAGE_BYTES)) > 0
    # The first span is widened to two pages.
    assert bytes(memory[: 2 * PAGE_BYTES]) == content[: 2 * PAGE_BYTES]
    assert bytes(memory[2 * PAGE_BYTES : 4 * PAGE_BYTES + 100]) == content[3 * PAGE_BYTES :]
    yardstick.close()
    with pytest.raises(ValueError, match="does not fit"):
        Yardstick([Span(path=str(path), offset_bytes=0, size_bytes=4 * PAGE_BYTES)], memory[: 3 * PAGE_BYTES])


@pytest.mark.parametrize("outcome", ["fails", "is short"])
def test_yardstick_takes_no_failure_for_a_fast_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * PAGE_BYTES))
    memory = huge_pages(4 * PAGE_BYTES)
    try:
        yardstick = Yardstick([Span(path=str(path), offset_bytes=0, size_bytes=4 * PAGE_BYTES)], memory)
    except OSError as error:
        pytest.skip(f"no direct reads from {tmp_path}: {error.strerror}")
    read = os.preadv

    def third_disturbed(descriptor: int, views: list[memoryview], offset: int) -> int:
        if offset < 2 * PAGE_BYTES:
            return read(descriptor, views, offset)
        if outcome == "fails":
            raise OSError(f"{outcome} in a thread")
        return PAGE_BYTES // 2

    monkeypatch.setattr(os, "preadv", third_disturbed)
    with pytest.raises(OSError, match="in a thread" if outcome == "fails" else "read 2048 of 4096 B at"):
        yardstick.read(Setting(num_threads=2, chunk_bytes=PAGE_BYTES))
    yardstick.close()


# -- model, gate, session ------------------------------------------------------------------------------------------


def test_checkpoint_is_made_once_and_again_when_damaged(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(SMALL, tmp_path)
    weights = weight_file(checkpoint)
    assert weight_bytes(checkpoint) == pytest.approx(weights.stat().st_size, rel=0.01)
    before, content = weights.stat().st_mtime_ns, weights.read_bytes()
    assert make_checkpoint(SMALL, tmp_path) == checkpoint
    assert weights.stat().st_mtime_ns == before
    os.truncate(weights, weights.stat().st_size - 1)
    make_checkpoint(SMALL, tmp_path)
    assert weights.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


class Fixed:
    """A contender that computes the same whatever it is told."""

    name = "fixed"

    def __init__(self, values: list[float]) -> None:
        self._values = numpy.array([values], dtype=numpy.float32)

    def tell(self, do: str, kind: str, path: str) -> dict[str, str]:
        assert (do, kind) == ("logits", "decode")
        numpy.save(path, self._values)
        return {"sha256": self._values.tobytes().hex()}


def reference(values: list[float]) -> Logits:
    array = numpy.array([values], dtype=numpy.float32)
    return Logits(values=array, sha256=array.tobytes().hex())


@pytest.mark.parametrize("values", [[1.0, 2.001], [1.0, float("nan")], [1.0]])
def test_gate_wants_the_same_bits(values: list[float]) -> None:
    same_bits(Fixed([1.0, 2.0]), Kind.DECODE, reference([1.0, 2.0]), "itself")  # type: ignore[arg-type]
    with pytest.raises(GateError, match="same bits"):
        same_bits(Fixed(values), Kind.DECODE, reference([1.0, 2.0]), "it")  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [[1.0, 2.2], [1.0, float("nan")], [1.0]])
def test_gate_has_a_tolerance_for_compiled_steps(values: list[float]) -> None:
    close(Fixed([1.0, 2.05]), Kind.DECODE, reference([1.0, 2.0]), "it", 0.05)  # type: ignore[arg-type]
    with pytest.raises(GateError, match=r"allowed 0\.05"):
        close(Fixed(values), Kind.DECODE, reference([1.0, 2.0]), "it", 0.05)  # type: ignore[arg-type]


def test_tolerance_is_twice_what_torch_compile_is_off() -> None:
    # 0.1 in each of two logits of root mean square 3.5
    assert allowance(reference([3.1, 4.1]), reference([3.0, 4.0])) == pytest.approx(2 * 0.1 / 12.5**0.5)
    # Where it has the same bits, mball may still round the logits themselves.
    assert 0 < allowance(reference([3.0, 4.0]), reference([3.0, 4.0])) < 0.01
    for far in ([3.0, 5.0], [3.0, float("nan")], [3.0]):
        with pytest.raises(GateError, match="no measure"):
            allowance(reference(far), reference([3.0, 4.0]))


def test_the_worst_step_counts() -> None:
    steps = Logits(values=numpy.array([[3.0, 4.0]] * 9 + [[3.5, 4.5]], dtype=numpy.float32), sha256="")
    right = Logits(values=numpy.array([[3.0, 4.0]] * 10, dtype=numpy.float32), sha256="")
    assert distance(steps, right) == pytest.approx(0.5 / 12.5**0.5)


def test_a_contender_says_why_it_failed() -> None:
    with Contender("reader", module="bench.speed.disk_child") as disk:
        span = {"path": "/does/not/exist", "offset_bytes": 0, "size_bytes": 1}
        with pytest.raises(ContenderError, match=r"(?s)reader failed at .prepare.*No such file"):
            disk.tell("prepare", name="x", spans=[span])
        with pytest.raises(ContenderError, match="KeyError"):
            disk.tell("read", name="x")
    with Contender("nothing", module="bench.speed.missing") as missing, pytest.raises(ContenderError, match="died"):
        missing.tell("hello")


def test_a_session_of_a_small_model(tmp_path: Path) -> None:
    """All of the harness but its size: contenders, gate, rounds, result file, table."""
    scale = smoke(make_checkpoint(SMALL, tmp_path))
    with Field(scale, Mode.EAGER, quiet) as field:
        found = roofline(field, quiet)
        field.scale = replace(scale, pairs={Kind.DECODE: 3})
        pairs = fits(field, quiet)
    names = {measurement.name: measurement for measurement in found}
    assert len(names) == len(found)
    assert 0.1 < names["eager_decode_50"].median < 100
    assert names["eager_decode_50_bytes"].median > 0
    assert "target" in (names["eager_decode_50"].compared_with or "")
    # Where they are not asked for apart, the pairs are the rounds.
    assert {pair.name for pair in pairs} <= names.keys()
    assert {pair.num_samples for pair in pairs if pair.unit == "s"} == {3}
    # A model this small may need more beside its weights than a tenth of them, which depends on the CPU's kernels. Most
    # stays: in the two bursts that follow the first one, three steps each, less than half is read.
    assert names["eager_decode_fits_read"].median < 0.5 * weight_bytes(scale.checkpoint) * 2 * 3
    path = record(
        name="speed-roofline", topic=Topic.SPEED, device=Device.CPU, headline="{eager_decode_50}", measurements=found,
        directory=tmp_path / "results",
    )  # fmt: skip
    text = table([read_result(path)])
    assert names["eager_decode_50"].figure() in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_plans_of_a_small_model(tmp_path: Path) -> None:
    """The same of the bench of plans, with this checkout as the other version too."""
    scale = smoke(make_checkpoint(SMALL, tmp_path))
    found = plans(scale, quiet, CHECKOUT)
    names = {measurement.name: measurement for measurement in found}
    assert len(names) == len(found)
    assert names["smallest"].median == names["before_smallest"].median < weight_bytes(scale.checkpoint)
    assert names["smallest_bytes"].median > names["budget_50_bytes"].median > 0
    assert names["predicted_off"].num_samples == 2 * scale.rounds[Kind.DECODE]
    path = record(
        name="speed-plans", topic=Topic.SPEED, device=Device.CPU, headline="{smallest}", measurements=found,
        directory=tmp_path / "results",
    )  # fmt: skip
    text = table([read_result(path)])
    assert names["budget_50_s"].figure() in text
    assert "50 %, before" in text


def test_page_says_what_the_files_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(read_results()), "run `make status`; it is not written by hand"


# -- fio -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not fio.is_there(), reason="needs fio")
@pytest.mark.parametrize("job", fio.JOBS, ids=lambda job: f"{job.engine}-{job.block}-{job.depth}")
def test_fio_reads_a_file_that_ends_inside_a_page(job: fio.Job, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(48 * MIB + 1000))
    assert fio.read(path, 48 * MIB + 1000, job) > 0.0


# -- swap ----------------------------------------------------------------------------------------------------------


def test_a_small_session_of_swap(tmp_path: Path) -> None:
    found = swap(tmp_path, SMOKE, quiet)
    assert {"swap_write", "swap_unchecked", "swap_both", "swap_reads_beside"} <= {each.name for each in found}
    record(
        name="speed-swap", topic=Topic.SWAP, device=Device.CPU, headline="{swap_write}", measurements=found,
        directory=tmp_path,
    )  # fmt: skip
    page = table(read_results(tmp_path))
    assert "| writes, without checksums |" in page
    assert "| the same, and as many reads |" in page
    assert "For the checksums of a GB a core takes" in page
    assert not list(tmp_path.glob("written"))
