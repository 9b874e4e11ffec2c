"""Progress of a load: to a function, or as a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from mball.load.source import Advance

# Told the bytes that are there and those that will be.
Report = Callable[[int, int], None]


@contextmanager
def shown(progress: bool | Report, total_bytes: int, what: str) -> Iterator[Advance]:
    """Yields what is told of bytes as they come; with ``True`` a bar is drawn on stderr meanwhile."""
    if progress is False:
        yield lambda _: None
    elif progress is True:
        from rich.console import Console

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total_bytes)
            yield lambda size_bytes: bar.advance(task, size_bytes)
    else:
        done_bytes = 0

        def advance(size_bytes: int) -> None:
            nonlocal done_bytes
            # What was read besides, up to whole pages, does not count.
            done_bytes = min(done_bytes + size_bytes, total_bytes)
            progress(done_bytes, total_bytes)

        yield advance
