"""The recorder of a GPU: what it asks of torch is there, and on a GPU its graphs compute with what they find."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch

from mball.memory.cuda_graphs import CudaGraphs
from mball.torch_private.graph_pools import missing_for_recording
from mball.units import KIB, MIB


def test_this_torch_has_what_is_asked_of_it() -> None:
    inspect.signature(torch.cuda.graph).bind(None, pool=(0, 1), stream=None, capture_error_mode="thread_local")
    inspect.signature(torch.cuda.memory_snapshot).bind((0, 1))
    assert all(hasattr(torch.cuda.CUDAGraph, name) for name in ("replay", "reset"))
    assert callable(torch.cuda.graph_pool_handle)
    assert missing_for_recording() == ()


@pytest.mark.parametrize("name", ["_cuda_endAllocateToPool", "_cuda_releasePool"])
def test_nothing_is_recorded_that_could_not_be_put_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is launched kernel by kernel where it cannot be recorded, as RuntimeError says."""
    monkeypatch.delattr(torch._C, name)

    def work() -> None:
        raise AssertionError("it was recorded")

    with pytest.raises(RuntimeError, match=rf"lacks torch._C.{name}, which"):
        CudaGraphs(0).record(work)


def test_the_pool_is_expected_in_what_the_allocator_takes() -> None:
    graphs = CudaGraphs(0)
    assert graphs.pool_bytes == 0
    sizes = (0, 1, 600 * KIB, MIB, MIB + 1, 20 * MIB, 30 * MIB)
    assert [graphs.pool_bytes_for(size) // MIB for size in sizes] == [0, 2, 2, 2, 22, 22, 42]


@pytest.mark.gpu
def test_a_replay_computes_with_what_is_there() -> None:
    graphs = CudaGraphs(0)
    x, y = torch.ones(64, 64, device="cuda:0"), torch.zeros(64, 64, device="cuda:0")

    def work() -> None:
        y.copy_((x @ x).relu() + 1)

    work()
    y.zero_()
    graph = graphs.record(work)
    torch.cuda.synchronize()
    assert not y.any(), "recording computed"
    for value in (1.0, -2.0, 0.5):
        x.fill_(value)
        graph.replay()
        assert torch.equal(y.cpu(), torch.full((64, 64), 64 * value**2 + 1))
    assert graphs.pool_bytes > 0
    graph.close()
    graph.close()
    assert graphs.pool_bytes == 0


@pytest.mark.gpu
def test_graphs_share_a_pool_and_are_followed_by_another() -> None:
    graphs = CudaGraphs(0)
    x = torch.arange(1 << 20, device="cuda:0", dtype=torch.float32)
    results = [torch.zeros_like(x) for _ in range(3)]

    def work(number: int) -> None:
        results[number].copy_((x * (number + 1)).sin() + x)

    for _ in range(2):  # the second time after all of the first are closed
        work(0)
        recorded = [graphs.record(partial(work, 0))]
        alone_bytes = graphs.pool_bytes
        recorded += [graphs.record(partial(work, number)) for number in (1, 2)]
        assert graphs.pool_bytes == alone_bytes, "they do not share it"
        for result in results:
            result.zero_()
        for graph in reversed(recorded):
            graph.replay()
        for number, result in enumerate(results):
            assert torch.equal(result, (x * (number + 1)).sin() + x)
        torch.cuda.synchronize()
        for graph in recorded:
            graph.close()


@pytest.mark.gpu
def test_what_waits_for_the_gpu_is_refused_and_the_next_recording_works() -> None:
    graphs = CudaGraphs(0)
    x = torch.ones(8, device="cuda:0")

    def waits() -> None:
        x.mul_(x.sum().item())

    def adds() -> None:
        x.add_(1)

    def fails() -> None:
        x.add_(1)
        raise ValueError("a mistake of the step's own")

    stream = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            graphs.record(waits)
        with pytest.raises(ValueError, match="of the step's own"):
            graphs.record(fails)
        assert torch.cuda.current_stream() == stream
        kept = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda:0")
        held_bytes = torch.cuda.memory_reserved(0)
        del kept
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved(0) <= held_bytes - 64 * MIB, "the allocator gives nothing back any more"
        before = x.clone()
        graph = graphs.record(adds)
        graph.replay()
        assert torch.equal(x, before + 1)
