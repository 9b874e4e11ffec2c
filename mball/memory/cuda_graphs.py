"""A GPU's recorder: work as CUDA graphs of torch, in one pool of its allocator.

[Note: what a replay reads] A graph holds addresses, whoever they belong to. What its work allocated lies in the pool,
which all graphs share, since they run one after the other; the rest is in the caller's hands. Waits for copies, and the
copies themselves, are issued between replays, on streams that are not recorded.

[Note: what cannot be recorded] Where a recording is broken off, torch (2.11) leaves its capturing stream the current
one, and its allocator believing that a capture is under way for good: it would give nothing back any more before it
runs out of memory. So both are put right here. The allocator of pinned memory goes on asking the graph whether a stream
is its own, so that is kept.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from mball.torch_private.graph_pools import end_recording, missing_for_recording
from mball.units import MIB

# What torch's allocator takes at a time for blocks up to 1 MiB, and for some larger ones.
_SMALL_BYTES, _LARGE_BYTES = 2 * MIB, 20 * MIB

# Of all GPUs and threads: so torch wants it.
_one_at_a_time = threading.Lock()
_broken_off: list[torch.cuda.CUDAGraph] = []


class CudaGraphs:
    """Graphs of one GPU; those that are open share a pool. Used by one thread at a time."""

    def __init__(self, ordinal: int) -> None:
        self._ordinal = ordinal
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._graphs: weakref.WeakSet[CudaGraph] = weakref.WeakSet()

    @property
    def pool_bytes(self) -> int:
        """What torch's allocator has reserved for the pool."""
        if not self._is_in_use():
            return 0
        return sum(int(segment["total_size"]) for segment in torch.cuda.memory_snapshot(self._pool))

    def pool_bytes_for(self, num_bytes: int) -> int:
        """As the allocator rounds up; only recording tells how its blocks really lie."""
        if num_bytes <= MIB:
            return -(-num_bytes // _SMALL_BYTES) * _SMALL_BYTES
        return _SMALL_BYTES + -(-num_bytes // _LARGE_BYTES) * _LARGE_BYTES

    def record(self, work: Callable[[], None]) -> CudaGraph:
        """Blocks until the GPU has done all it has to, as torch does. Raises RuntimeError, see `Graphs`."""
        if missing := missing_for_recording():
            raise RuntimeError(f"this torch lacks {' and '.join(missing)}, which put right what fails midway")
        with torch.cuda.device(self._ordinal):
            if self._stream is None:
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    few = torch.ones(16, 16, device="cuda")
                    few @ few  # what cuBLAS keeps for a stream would be taken of the pool, and stay there
                self._stream = stream
            if not self._is_in_use():
                self._pool = torch.cuda.graph_pool_handle()  # torch takes up none that no graph uses any more
            graph = torch.cuda.CUDAGraph()
            # Threads of ours pin memory and copy meanwhile, which is not forbidden them.
            recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            with _one_at_a_time, torch.cuda.stream(torch.cuda.current_stream()):
                try:
                    with recording:
                        work()
                except BaseException:
                    if end_recording(self._ordinal, self._pool):
                        _broken_off.append(graph)
                    raise
        recorded = CudaGraph(graph)
        self._graphs.add(recorded)
        return recorded

    def _is_in_use(self) -> bool:
        return any(graph.is_open for graph in self._graphs)


class CudaGraph:
    """One recorded piece of work."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph: torch.cuda.CUDAGraph | None = graph

    @property
    def is_open(self) -> bool:
        """Whether it can be replayed."""
        return self._graph is not None

    def replay(self) -> None:
        """Launches it on the current stream. Raises RuntimeError when the driver refuses."""
        assert self._graph is not None, "the graph is closed"
        self._graph.replay()

    def close(self) -> None:
        """Gives its part of the pool back to torch's allocator. Idempotent."""
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.reset()
