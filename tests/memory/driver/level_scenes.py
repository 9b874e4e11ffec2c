"""Host memory below a GPU of the stand-in, and what must be waited for there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mball.memory import Arena
from mball.memory.cuda_device import CudaDevice
from mball.memory.device import Event
from mball.memory.host_level import HostLevel
from mball.storage import ThreadedReader
from tests.memory.devices import PAGE, Bench, Look, cuda_on_the_stand_in, expect
from tests.memory.driver.standin import Order

HOST_PAGES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """A GPU and the host memory below it."""

    bench: Bench
    level: HostLevel
    host: Arena

    def stage(self, page: int, count: int, place: int) -> Event:
        """Reads pages of the file to a place of host memory."""
        self.level.discard(place * PAGE, count * PAGE)
        return self.level.copy([self.bench.read(page * PAGE, count * PAGE, place)], None)

    def copy(self, page: int, count: int, to: int) -> Event:
        """Copies pages to the GPU."""
        return self.bench.device.copy([self.bench.read(page * PAGE, count * PAGE, to)], self.bench.device.record())

    def see(self, event: Event, to: int, count: int) -> Look:
        """What compute sees that waits for a copy."""
        self.bench.device.wait(event)
        return self.bench.look(to, to + count)

    def pages(self, page: int, count: int) -> bytes:
        """What is in the file."""
        return self.bench.content[page * PAGE : (page + count) * PAGE]


@contextmanager
def levels(folder: Path, order: Order, seed: int = 0) -> Iterator[Levels]:
    with ExitStack() as stack:
        bench = stack.enter_context(cuda_on_the_stand_in(folder, order=order, seed=seed, has_level=True))
        assert isinstance(bench.device, CudaDevice)
        level = bench.device.below
        assert level is not None
        host = level.arena(HOST_PAGES * PAGE)
        stack.callback(host.close)
        host.resize(HOST_PAGES * PAGE)
        host.populate()  # waits until it is pinned: from other memory the driver copies at once, so no copy is late
        host.poison(0, HOST_PAGES * PAGE)
        yield Levels(bench=bench, level=level, host=host)
        bench.device.close()


Submit = Callable[[ThreadedReader, Any], Any]


@contextmanager
def reading(submit: Callable[[Submit, ThreadedReader, Any], Any]) -> Iterator[None]:
    """Has files read by `submit`, which is given what reads them in fact."""
    real = ThreadedReader.submit
    ThreadedReader.submit = lambda reader, reads: submit(real, reader, reads)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ThreadedReader.submit = real  # type: ignore[method-assign]


@contextmanager
def held_up() -> Iterator[threading.Event]:
    """The thread that stages waits for what comes of this, before what it asks for is read."""
    opened = threading.Event()

    def late(real: Submit, reader: ThreadedReader, reads: Any) -> Any:
        if threading.current_thread().name.startswith("mball-stage"):
            assert opened.wait(60)
        return real(reader, reads)

    with reading(late):
        try:
            yield opened
        finally:
            opened.set()


class Unhurried:
    """Reads that begin when they are waited for."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read
        self._is_over = False

    def done(self) -> bool:
        return self._is_over

    def wait(self) -> None:
        if not self._is_over:
            self._read().wait()
            self._is_over = True


def a_copy_waits_for_what_it_copies(both: Levels) -> None:
    with held_up() as opened:
        both.stage(5, 3, 2)
        event = both.copy(5, 3, 0)
        assert not event.done()
        opened.set()
        look = both.see(event, 0, 3)
        both.bench.finish()
    expect(look(), both.pages(5, 3))


def a_copy_waits_for_reads_that_take_long(both: Levels) -> None:
    with reading(lambda real, reader, reads: Unhurried(lambda: real(reader, reads))):
        both.stage(5, 3, 2)
        look = both.see(both.copy(5, 3, 0), 0, 3)
        both.bench.finish()
    expect(look(), both.pages(5, 3))


def a_place_is_taken_when_its_last_copy_is_over(both: Levels) -> None:
    """The second read waits for the copy of what the first one brought, however late that is."""
    both.stage(5, 3, 2).wait()
    first = both.copy(5, 3, 0)
    both.stage(20, 3, 2)
    second = both.copy(20, 3, 3)
    looks = [both.see(first, 0, 3), both.see(second, 3, 3)]
    both.bench.finish()
    expect(looks[0](), both.pages(5, 3))
    expect(looks[1](), both.pages(20, 3))


def a_place_on_the_gpu_is_taken_after_its_last_use(both: Levels) -> None:
    """What compute still reads is not copied over."""
    for page, place in ((5, 2), (20, 6)):
        both.stage(page, 3, place).wait()
    looks = [(both.see(both.copy(page, 3, 0), 0, 3), page) for page in (5, 20) * 6]
    both.bench.finish()
    for look, page in looks:
        expect(look(), both.pages(page, 3))


def what_came_late_for_nobody_does_not_fall_on_what_came_after(both: Levels) -> None:
    """The first read ends after the second one was asked for, at the same place."""

    def late(real: Submit, reader: ThreadedReader, reads: Any) -> Any:
        if reads[0].offset_bytes == 5 * PAGE:
            return Unhurried(lambda: real(reader, reads))
        return real(reader, reads)

    with reading(late):
        first = both.stage(5, 3, 2)
        both.stage(20, 3, 2).wait()
        assert first.done()
        look = both.see(both.copy(20, 3, 0), 0, 3)
        both.bench.finish()
    expect(look(), both.pages(20, 3))


def all_is_over_once_it_was_waited_for(both: Levels) -> None:
    with held_up() as opened:
        threading.Timer(0.05, opened.set).start()
        unread = both.stage(5, 3, 2)
        both.bench.device.synchronize()
        assert unread.done()
        opened.clear()
        threading.Timer(0.05, opened.set).start()
        both.stage(9, 3, 2)
        copied = both.copy(9, 3, 0)
        both.bench.device.synchronize()
        assert copied.done()
    # A reader that is slow, too.
    slow = threading.Event()

    def late(real: Submit, reader: ThreadedReader, reads: Any) -> Any:
        handle = real(reader, reads)
        slow.set()
        return handle

    with reading(late):
        unread = both.stage(13, 3, 2)
        both.bench.device.synchronize()
        assert slow.is_set()
        assert unread.done()


LEVEL_SCENES: tuple[Callable[[Levels], None], ...] = (
    a_copy_waits_for_what_it_copies,
    a_copy_waits_for_reads_that_take_long,
    a_place_is_taken_when_its_last_copy_is_over,
    a_place_on_the_gpu_is_taken_after_its_last_use,
    what_came_late_for_nobody_does_not_fall_on_what_came_after,
    all_is_over_once_it_was_waited_for,
)
