"""What all benches share: where their measurements go."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest

from bench.findings import Findings, Heading
from bench.gpu.keep import Book, keep
from bench.gpu.limit import Limit
from bench.results import RESULTS, Measurement, record


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds where results go; without the option nothing is written."""
    group = parser.getgroup("mball benches")
    group.addoption("--save-results", action="store_true", help="write a result file of each bench that ran whole")
    group.addoption("--results-dir", default=str(RESULTS), help="where to write them")
    group.addoption(
        "--prefill-rounds", type=int, default=3, help="rounds of the long prefill in the speed bench, 0 for none"
    )
    group.addoption(
        "--before", default="", help="another checkout of mball to run beside this one, in the bench of plans"
    )
    group.addoption("--model-dir", default="", help="where the benches of a GPU write their model of 16 GB, once")
    group.addoption(
        "--gpu-seconds",
        type=float,
        default=540.0,
        help="what all of a GPU take together; the last are left out",
    )
    group.addoption("--note", default="", help="what a reader of the results has to know about this run")


_PARTIAL = pytest.StashKey[set[Path]]()
_SAID = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Prepares what is noted during the run: modules that did not run whole, and what became of the results."""
    config.stash[_PARTIAL] = set()
    config.stash[_SAID] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says which results were written."""
    for line in config.stash[_SAID]:
        terminalreporter.write_line(line)


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Notes the modules that were not asked for whole."""
    for item in items:
        item.config.stash[_PARTIAL].add(item.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notes the modules of which something failed or was skipped."""
    report = yield
    if not report.passed:
        item.config.stash[_PARTIAL].add(item.path)
    return report


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Shows a line at once: a bench may run for minutes."""
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.write_line(f"  {text}")

    return line


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> Iterator[Findings]:
    """Takes the module's measurements; with `--save-results` they become a result file when all of it passed."""
    collected = Findings()
    yield collected
    config = request.config
    if not config.getoption("--save-results"):
        return
    heading: Heading = request.module.HEADING
    # The last test's teardown runs this, and its call was reported before.
    if request.path in config.stash[_PARTIAL]:
        config.stash[_SAID].append(f"{heading.name}: not all of it ran and passed, so no result was written")
        return
    path = record(
        name=heading.name,
        topic=heading.topic,
        device=heading.device,
        headline=heading.headline,
        measurements=collected.measurements,
        note=config.getoption("--note"),
        directory=Path(config.getoption("--results-dir")),
    )
    config.stash[_SAID].append(f"{heading.name}: {path}")


@pytest.fixture
def kept(request: pytest.FixtureRequest, say: Callable[[str], None]) -> Callable[[Book, Sequence[Measurement]], None]:
    """Takes measurements of a part of a result; with `--save-results` they are written at once."""
    config = request.config

    def take(book: Book, measurements: Sequence[Measurement]) -> None:
        for measurement in measurements:
            measurement.check()
        if config.getoption("--save-results"):
            directory = Path(config.getoption("--results-dir"))
            path = keep(book, measurements, note=config.getoption("--note"), directory=directory)
            say(f"{book.name}: {len(measurements)} figures written to {path}")

    return take


@pytest.fixture(scope="session")
def gpu_time(request: pytest.FixtureRequest) -> Callable[[float], Limit]:
    """Returns what gives a part its time, and skips it where all parts together have no more."""
    whole = Limit(request.config.getoption("--gpu-seconds"))

    def allot(seconds: float) -> Limit:
        left_s = whole.left_s()
        if left_s < seconds / 2:
            pytest.skip(f"{left_s:.0f} s are left of --gpu-seconds, and this takes up to {seconds:.0f} s: run it alone")
        return Limit(min(seconds, left_s))

    return allot
