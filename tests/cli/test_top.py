"""`mball top`: what it shows with GPUs and without, as tables and as JSON, once and live."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mball.cli import main
from mball.memory.ledger_page import LedgerPage, PublishedLedger
from mball.units import GIB, MIB
from tests.observe.nvml import standin

NO_NUMBER = 2**64 - 1
# A process that holds memory of a GPU is this one, so that it exists.
TWO_GPUS = (
    f"set num_gpus 0 2;set used 0 {10 * GIB};set busy 0 97;set pcie_received 0 25000000;set pcie_sent 0 1500000;"
    f"set nvlink_sent 0 1000;list compute 0 {os.getpid()} {6 * GIB};list compute 0 4242 {NO_NUMBER};"
    f"set used 1 {GIB};fail nvmlDeviceGetGraphicsRunningProcesses_v3 4"
)
NO_DRIVER = "fail nvmlInitWithFlags 9"
SHOW = b"\x1b[?1049h"  # the terminal's other screen, and back
LEAVE = b"\x1b[?1049l"
SHOW_CURSOR, HIDE_CURSOR = b"\x1b[?25h", b"\x1b[?25l"


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in for NVML, for processes that are started with it."""
    if reason := standin.missing():
        pytest.skip(reason)
    return standin.build(tmp_path_factory.mktemp("standin")).parent


@pytest.fixture
def running() -> Iterator[LedgerPage]:
    """This process runs a model under a budget, as far as others can see."""
    page = LedgerPage()
    page.write(PublishedLedger(budget_bytes=80 * MIB, peak_bytes=70 * MIB, kinds={"arena": 60 * MIB, "buffers": MIB}))
    yield page
    page.close()


def environment(nvml: Path, settings: str) -> dict[str, str]:
    libraries = ":".join(filter(None, (str(nvml), os.environ.get("LD_LIBRARY_PATH"))))
    return os.environ | {
        "LD_LIBRARY_PATH": libraries, standin.SETTINGS_VARIABLE: settings, "COLUMNS": "160", "LINES": "50",
        "TERM": "xterm-256color",
    }  # fmt: skip


def top(nvml: Path, settings: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mball.cli", "top", *arguments]
    return subprocess.run(
        command, env=environment(nvml, settings), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.usefixtures("running")
def test_tables_show_gpus_processes_and_what_is_not_told(nvml: Path) -> None:
    finished = top(nvml, TWO_GPUS, "--once")
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()

    def line_of(*words: str) -> str:
        (line,) = [line for line in lines if all(word in line for word in words)]
        return line

    cells = [cell.strip() for cell in line_of("│ 0 ", "stand-in").split("│")[1:-1]]
    assert cells == ["0", "stand-in", "10.00 GiB", "80.00 GiB", "69.50 GiB", "97 %", "25.00 / 1.50", "? / 0.00"]
    assert "machine" in line_of("machine", "GiB")
    assert "6.00 GiB" in line_of(f" {os.getpid()} │")
    # Not the first line of this process's where the collector has not found yet what a test before has run.
    assert line_of("61.00 MiB of 80.00 MiB: arena 60.00")
    assert "│          ? │" in line_of(" 4242 │")
    assert line_of("held by no process that is listed", "1.00 GiB").count("│ 1 ") or "   1 " in line_of(
        "held by no", "1.00"
    )
    assert "? GPU 0: graphics processes not told by this driver (Insufficient Permissions)" in lines
    assert "? GPU 0: NVLink not told by this driver (Not Supported)" in lines
    assert any(line.startswith("? GPU 0: what no listed process holds (not what process 4242 holds") for line in lines)


@pytest.mark.usefixtures("running")
def test_json_says_the_same_and_why_a_value_is_null(nvml: Path) -> None:
    finished = top(nvml, TWO_GPUS, "--json")
    assert finished.returncode == 0, finished.stderr
    document = json.loads(finished.stdout)
    first, second = document["gpus"]["gpus"]
    assert first["used_bytes"] == 10 * GIB
    assert first["pcie_received_bytes_per_s"] == 25_000_000_000
    assert first["nvlink_sent_bytes_per_s"] == 0, "two looks were taken"
    assert first["nvlink_received_bytes_per_s"] is None
    assert first["not_told"] == {
        "nvlink_received_bytes_per_s": "Not Supported", "graphics processes": "Insufficient Permissions",
    }  # fmt: skip
    by_pid = {process["pid"]: process for process in first["processes"]}
    assert by_pid[os.getpid()]["used_bytes"] == 6 * GIB
    assert by_pid[os.getpid()]["uses"] == ["compute"]
    assert by_pid[4242]["used_bytes"] is None
    assert set(by_pid[4242]["not_told"]) == {"used_bytes", "name"}
    assert second["busy_percent"] == 0
    assert second["processes"] == []
    (own,) = [process for process in document["mball"] if process["pid"] == os.getpid()]
    assert own["command"] == Path("/proc/self/cmdline").read_text().rstrip("\0").replace("\0", " ")
    assert own["rss_bytes"] > own["anonymous_bytes"] > 10 * MIB
    assert {"budget_bytes": 80 * MIB, "peak_bytes": 70 * MIB, "kinds": {"arena": 60 * MIB, "buffers": MIB}} in own[
        "ledgers"
    ]
    assert document["machine"]["total_bytes"] > document["machine"]["available_bytes"] > 0


@pytest.mark.usefixtures("running")
def test_without_a_gpu_one_line_says_so_and_the_host_is_shown(nvml: Path) -> None:
    finished = top(nvml, NO_DRIVER)  # no terminal: it looks once
    assert (finished.returncode, finished.stderr) == (0, "")
    (line,) = [line for line in finished.stdout.splitlines() if "no GPU" in line]
    assert "Driver Not Loaded" in line
    assert "modprobe nvidia" in line
    assert "61.00 MiB of 80.00 MiB" in finished.stdout
    finished = top(nvml, NO_DRIVER, "--json")
    document = json.loads(finished.stdout)
    assert document["gpus"] is None
    assert "Driver Not Loaded" in document["not_told"]["gpus"]


PUBLISH = """
import sys
from mball.memory.ledger_page import LedgerPage, PublishedLedger
page = LedgerPage()
page.write(PublishedLedger(budget_bytes=1, peak_bytes=1, kinds={"[bold]": 1}))
print("written", flush=True)
sys.stdin.read()
"""


def test_names_of_others_cannot_write_to_the_terminal(nvml: Path) -> None:
    command = [sys.executable, "-c", PUBLISH, "\x1b]0;owned\x07[red]"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        finished = top(nvml, NO_DRIVER, "--once")
        assert process.stdin is not None
        process.stdin.close()
    assert finished.returncode == 0, finished.stderr
    assert f" {process.pid} " in finished.stdout
    assert "[bold] 1 B" in finished.stdout
    assert "\x1b" not in finished.stdout
    assert "\x07" not in finished.stdout


def test_looking_needs_no_torch(nvml: Path) -> None:
    code = "import sys; from mball.cli import main; sys.exit(main(['top', '--once']) or 'torch' in sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment(nvml, TWO_GPUS), capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("interval", ["0", "-1", "soon", "nan", "1e9"])
def test_intervals_that_make_no_sense(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["top", "--interval", interval])
    assert refused.value.code == 2
    assert "--interval" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [["--once"], ["--json"], []])  # the last has no terminal
def test_an_interval_for_one_look_is_refused(mode: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--interval", "2", *mode]) == 2
    said = capsys.readouterr()
    assert "--interval 2 is for the live view" in said.err
    assert said.out == ""


# -- live, in a terminal --------------------------------------------------------------------------------


class Terminal:
    """A terminal of its own, in which `mball top` runs."""

    def __init__(self, nvml: Path, settings: str, interval: str) -> None:
        self._screen, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
        self.before = termios.tcgetattr(inside)
        self._inside = inside
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mball.cli", "top", "--interval", interval],
            env=environment(nvml, settings),
            stdin=inside, stdout=inside, stderr=inside,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.set_blocking(self._screen, False)
        self.output = b""

    def read(self) -> None:
        try:
            self.output += os.read(self._screen, 1 << 16)
        except BlockingIOError:
            time.sleep(0.01)

    def read_until(self, *expected: bytes) -> None:
        deadline_s = time.monotonic() + 60
        while not all(each in self.output for each in expected):
            assert time.monotonic() < deadline_s, self.output
            assert self.process.poll() is None, self.output
            self.read()

    def type(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def end(self) -> int:
        """Returns the exit status; all output is read then."""
        deadline_s = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline_s, self.output
            self.read()
        for _ in range(3):
            self.read()
        return self.process.returncode

    def is_clean(self) -> bool:
        """Whether the terminal is as it was: its first screen, its cursor, its settings."""
        return (
            self.output.count(SHOW) == self.output.count(LEAVE) == 1
            and self.output.rindex(LEAVE) > self.output.rindex(SHOW)
            and self.output.rfind(SHOW_CURSOR) > self.output.rfind(HIDE_CURSOR)
            and termios.tcgetattr(self._inside) == self.before
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)
        os.close(self._inside)


@pytest.fixture
def terminal(nvml: Path) -> Iterator[Any]:
    opened: list[Terminal] = []

    def open_terminal(settings: str = TWO_GPUS, interval: str = "0.1") -> Terminal:
        opened.append(Terminal(nvml, settings, interval))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_ctrl_c_ends_the_live_view_with_a_clean_terminal(terminal: Any) -> None:
    """After the second look, which knows rates that the first cannot."""
    view = terminal()
    view.read_until(SHOW, b"stand-in", b"? / ?", b"? / 0.00")
    view.type(b"\x03")
    assert view.end() == 130
    assert view.is_clean(), view.output
    assert b"Traceback" not in view.output


@pytest.mark.alone
def test_ctrl_c_at_any_moment_of_the_view_leaves_a_clean_terminal(terminal: Any) -> None:
    """Also twice, and while the driver is being asked."""
    for number in range(6):
        view = terminal(TWO_GPUS + ";set pcie_wait_ms 0 20")
        view.read_until(SHOW)
        time.sleep(number * 0.037)
        view.type(b"\x03\x03")
        assert view.end() == 130
        assert view.is_clean(), view.output
        assert b"Traceback" not in view.output


def test_termination_leaves_a_clean_terminal(terminal: Any) -> None:
    view = terminal(NO_DRIVER)
    view.read_until(SHOW, b"no GPU")
    view.process.send_signal(signal.SIGTERM)
    assert view.end() == 143
    assert view.is_clean(), view.output


INTERRUPT = """
import io, os, signal, sys, threading
from rich.console import Console
from mball.cli import top

class Still:
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def look(self):
        global looked
        looked = True

top.Looker, top.draw = Still, lambda look: "a look"
top.Console = lambda: Console(file=io.StringIO(), force_terminal=True)
WAITING = {top.__file__, threading.__file__}

def interrupt(frame, event, argument):
    global line
    if frame.f_code.co_filename not in WAITING:
        return None
    if looked and event == "line":
        line += 1
        if line == chosen:
            os.kill(os.getpid(), signal.SIGTERM)
    return interrupt

for chosen in range(1, 60):
    line, looked = 0, False
    sys.settrace(interrupt)
    status = top.run_top(top.View.LIVE, interval_s=0.001)
    sys.settrace(None)
    assert status == 143, (chosen, status)
print("ended", flush=True)
"""


def test_termination_at_any_line_of_the_wait_ends_the_view() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", INTERRUPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert (finished.returncode, finished.stdout) == (0, "ended\n"), finished.stderr


def test_termination_is_not_waited_with_until_the_next_look(terminal: Any) -> None:
    view = terminal(NO_DRIVER, interval="3600")
    view.read_until(SHOW, b"no GPU")
    time.sleep(0.1)
    view.process.send_signal(signal.SIGTERM)
    assert view.end() == 143
