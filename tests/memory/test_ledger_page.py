"""Ledgers that other processes can read, while they are kept and no longer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mball
from mball.errors import DeviceError
from mball.memory.ledger import Kind, Ledger
from mball.memory.ledger_page import LedgerPage, PublishedLedger, find_publishers
from mball.units import MIB

_KEEP_ONE = """
import sys
from mball.memory.ledger_page import LedgerPage, PublishedLedger
page = LedgerPage()
page.write(PublishedLedger(budget_bytes=7, peak_bytes=5, kinds={"arena": 3, "buffers": 2}))
print("written", flush=True)
sys.stdin.read()
"""
_ROOT = Path(__file__).parents[2]


@pytest.fixture
def page() -> Iterator[LedgerPage]:
    page = LedgerPage()
    yield page
    page.close()


Own = Callable[[], tuple[PublishedLedger, ...]]


@pytest.fixture
def own() -> Own:
    """What this process publishes beside what other tests left wrapped."""

    def published() -> list[PublishedLedger]:
        return list(find_publishers().ledgers.get(os.getpid(), ()))

    before = published()

    def since() -> tuple[PublishedLedger, ...]:
        now = published()
        for left in before:
            if left in now:
                now.remove(left)
        return tuple(now)

    return since


def test_another_process_is_seen_until_it_ends() -> None:
    command = [sys.executable, "-c", _KEEP_ONE]
    with subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        expected = PublishedLedger(budget_bytes=7, peak_bytes=5, kinds={"arena": 3, "buffers": 2})
        assert find_publishers().ledgers[process.pid] == (expected,)
        process.kill()
        process.wait()
        assert process.pid not in find_publishers().ledgers


def test_a_ledger_publishes_each_change(page: LedgerPage, own: Own) -> None:
    ledger = Ledger(100, publish=page.write)
    assert own() == (), "nothing was said yet"
    ledger.set(Kind.ARENA, 60)
    before = ledger.state()
    ledger.set(Kind.BUFFERS, 30)
    (published,) = own()
    assert (published.budget_bytes, published.peak_bytes) == (100, 90)
    assert {kind: num_bytes for kind, num_bytes in published.kinds.items() if num_bytes} == {"arena": 60, "buffers": 30}
    with pytest.raises(DeviceError):
        ledger.set(Kind.ACTIVATIONS, 11)
    assert own() == (published,)
    ledger.restore(before)
    ledger.set_budget(70)
    (published,) = own()
    assert (published.budget_bytes, published.peak_bytes, published.kinds["buffers"]) == (70, 60, 0)
    page.close()
    page.close()
    assert own() == ()
    ledger.set(Kind.ARENA, 0)


def test_a_wrapped_model_is_seen_until_it_is_unwrapped(tmp_path: Path, own: Own) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    mball.wrap(model, budget="1MiB", weights=tmp_path / "model.safetensors", capture="operators")
    with torch.no_grad():
        model(torch.zeros(1, 256))
    (published,) = own()
    report = mball.report(model)
    assert published.budget_bytes == MIB
    assert published.peak_bytes == report.peak_bytes
    assert published.kinds["arena"] == report.arena_bytes > 0
    mball.unwrap(model)
    assert own() == ()


@contextmanager
def forked(run: Callable[[], int]) -> Iterator[int]:
    """A forked child, by number: it runs this, says so by ending with its result, and is never a second pytest."""
    child = os.fork()
    if not child:
        code = 255
        try:
            code = run()
        finally:
            os._exit(code)
    try:
        yield child
    finally:
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_does_not_show_its_parents_ledger(page: LedgerPage) -> None:
    page.write(PublishedLedger(budget_bytes=1, peak_bytes=1, kinds={}))
    stop, go = os.pipe()

    def wait() -> int:
        os.close(go)
        os.read(stop, 1)
        return 0

    with forked(wait) as child:
        try:
            ledgers = find_publishers().ledgers
        finally:
            os.close(go)
            os.close(stop)
        assert os.getpid() in ledgers
        assert child not in ledgers
        assert code_of(child) == 0


def test_a_forked_child_that_writes_has_a_page_of_its_own(page: LedgerPage, own: Own) -> None:
    of_parent = PublishedLedger(budget_bytes=1, peak_bytes=1, kinds={})
    of_child = PublishedLedger(budget_bytes=2, peak_bytes=2, kinds={})
    page.write(of_parent)

    def write() -> int:
        num_open = len(os.listdir("/proc/self/fd"))
        page.write(of_child)
        page.write(of_child)
        if len(os.listdir("/proc/self/fd")) != num_open:
            return 1
        return 0 if find_publishers().ledgers[os.getpid()] == (of_child,) else 2

    with forked(write) as child:
        assert code_of(child) == 0
        assert own() == (of_parent,)


def test_without_memory_for_the_page_nothing_is_published_and_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, own: Own
) -> None:
    def refused(name: str) -> int:
        raise PermissionError(1, "Operation not permitted")

    for unusable in (
        lambda: monkeypatch.setattr(os, "memfd_create", refused),
        lambda: monkeypatch.delattr(os, "memfd_create"),
    ):
        unusable()
        page = LedgerPage()
        ledger = Ledger(100, publish=page.write)
        ledger.set(Kind.ARENA, 60)
        assert ledger.current_bytes == 60
        assert own() == ()
        page.close()


def test_what_is_no_page_of_ours_is_passed_by(own: Own) -> None:
    good = {"version": 1, "pid": os.getpid(), "budget_bytes": 1, "peak_bytes": 1, "kinds": {}}
    bad = [b"", b"{", b"[]", b'"text"', b"\xff", json.dumps(good | {"version": 2}).encode()]
    bad += [json.dumps({**good, "peak_bytes": what}).encode() for what in (-1, 2**63, 1.5, True, "1", None)]
    bad += [json.dumps(good).encode().replace(b'"peak_bytes": 1', b'"peak_bytes": 1e999'), b"[" * 100_000]
    bad += [
        json.dumps(good).encode().replace(b"{}", b"{" + b" " * 4096 + b"}"),
        json.dumps(good | {"kinds": {"a": -1}}).encode(),
    ]
    bad += [json.dumps(good | {"kinds": 3}).encode(), json.dumps({**good, "budget_bytes": "much"}).encode()]
    for content in [*bad, json.dumps(good).encode()]:
        descriptor = os.memfd_create("mball-ledger")
        try:
            os.write(descriptor, content)
            assert bool(own()) is (content not in bad), content
        finally:
            os.close(descriptor)


def test_pages_are_read_whole_while_they_are_written(page: LedgerPage, own: Own) -> None:
    """What adds up in each ledger adds up in what is read."""
    stop = threading.Event()
    num_seen = 0

    def write() -> None:
        number = 0
        while not stop.is_set():
            number = (number * 7 + 1) % 10**9
            page.write(PublishedLedger(budget_bytes=number, peak_bytes=number, kinds={"arena": number}))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            for published in own():
                num_seen += 1
                assert published.budget_bytes == published.peak_bytes == published.kinds["arena"]
    finally:
        stop.set()
        writer.join()
    assert num_seen, "the page was never read"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_processes_that_cannot_be_looked_into_are_counted(page: LedgerPage) -> None:
    page.write(PublishedLedger(budget_bytes=1, peak_bytes=1, kinds={}))

    def look() -> int:
        os.setuid(65534)
        publishers = find_publishers()
        return min(publishers.num_hidden, 100) if os.getppid() not in publishers.ledgers else 101

    with forked(look) as child:
        assert 1 <= code_of(child) <= 100


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
def test_threads_of_the_kernel_are_not_counted_as_hidden(tmp_path: Path) -> None:
    for number, command in (("2", b""), ("3", b"python\0")):
        (tmp_path / number / "fd").mkdir(parents=True)
        (tmp_path / number / "fd").chmod(0o700)
        (tmp_path / number / "cmdline").write_bytes(command)
    tmp_path.chmod(0o755)

    def look() -> int:
        os.chdir(tmp_path)  # what is above it is closed to the other user
        os.setuid(65534)
        return find_publishers(Path()).num_hidden

    with forked(look) as child:
        assert code_of(child) == 1
