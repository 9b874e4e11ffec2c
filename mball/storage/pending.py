"""The handle of one submit: of reads and writes, by threads of Python or of C."""

from __future__ import annotations

import os
import threading
import time

from mball.errors import DeviceError, StorageError
from mball.storage.watchdog import watched
from mball.units import format_bytes


class Pending:
    """What is under way for one submit; see `ReadHandle`. A subclass says when it is over, and how to wait for that.

    Args:
        doing: what is done to which file, such as ``reading model.safetensors``.
        size_bytes: that it moves.
    """

    __slots__ = ("_doing", "_pid", "failure", "size_bytes")

    def __init__(self, doing: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.failure: tuple[str, BaseException] | None = None  # what to say, and the cause
        self._doing = doing
        self._pid = os.getpid()

    def done(self) -> bool:
        """See `ReadHandle`."""
        raise NotImplementedError

    def wait(self) -> None:
        """See `ReadHandle`. A wait that takes very long is logged."""
        if not self.done():
            if os.getpid() != self._pid:
                raise DeviceError(
                    f"{self._doing}, {format_bytes(self.size_bytes)}, was under way when the process forked; its "
                    f"threads live in process {self._pid} only. Wrap the model in the child, or start the child with "
                    "'spawn'"
                )
            watched(self, self._block, lambda: self._doing)
        if self.failure is not None:
            message, cause = self.failure
            raise StorageError(message) from cause

    def _block(self) -> None:
        """Blocks until it is over; may be interrupted and called again."""
        raise NotImplementedError


class PendingChunks(Pending):
    """Chunks that threads finish one after another, which tell of it inside one lock, that of their queue.

    Attributes:
        urgent: whether somebody waits.
    """

    __slots__ = ("_gate", "_remaining", "began_s", "ended_s", "urgent")

    def __init__(self, doing: str, num_chunks: int, size_bytes: int) -> None:
        super().__init__(doing, size_bytes)
        self.began_s: float | None = None
        self.ended_s: float | None = None
        self.urgent = False
        self._remaining = num_chunks
        # Held until the last chunk is over. A bare lock: waiting on it can be interrupted and begun again safely.
        self._gate = threading.Lock()
        if num_chunks:
            self._gate.acquire()

    def done(self) -> bool:
        return self._remaining == 0

    def begin(self, now_s: float) -> None:
        """Says that a chunk of it is begun."""
        if self.began_s is None:
            self.began_s = now_s

    def finish(self, failure: tuple[str, BaseException] | None) -> None:
        """Counts one chunk as over; the first failure is what `wait` tells."""
        self.failure = self.failure or failure
        self._remaining -= 1
        if not self._remaining:
            self.ended_s = time.perf_counter()
            self._gate.release()

    def _block(self) -> None:
        self.urgent = True
        with self._gate:
            pass
