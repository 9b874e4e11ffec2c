"""Recorded work of the foreign device: operators with the very memory they read and wrote, as a CUDA graph holds it.

[Note: what it punishes] While work is recorded nothing of it is computed: what it returns is NaN, and what it would
write stays as it is. A replay reads and writes the addresses of the recording, whatever is there by then. What the work
allocated is NaN again after each replay, since on a GPU all graphs share that memory. What makes the host wait, or
moves memory between host and device, cannot be recorded.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from mball.torch_private.dispatch import TorchDispatchMode, without_dispatch
from mball.torch_private.tensors import storage_key

_PYTHON = torch._C.DispatchKeySet(torch._C.DispatchKey.Python) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.PythonTLSSnapshot
)
_NEEDS_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class ForeignGraphs:
    """Records operators.

    Attributes:
        num_recorded: so far.
        num_replayed: replays so far, of all that was recorded.
        refused: the numbers of the recordings that fail in the middle, as a driver may have them fail.
    """

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replayed = 0
        self.refused: Container[int] = ()
        self._open: weakref.WeakSet[ForeignGraph] = weakref.WeakSet()

    @property
    def pool_bytes(self) -> int:
        return max((graph.scratch_bytes for graph in self._open), default=0)

    @property
    def unshared_bytes(self) -> int:
        """What is allocated beyond `pool_bytes`: on a GPU graphs lie over each other."""
        return sum(graph.scratch_bytes for graph in self._open) - self.pool_bytes

    def pool_bytes_for(self, num_bytes: int) -> int:
        return num_bytes

    def record(self, work: Callable[[], None]) -> ForeignGraph:
        graph = ForeignGraph(self)
        self.num_recorded += 1
        with _modes_allowed(), _Recording(graph):
            work()
            if self.num_recorded in self.refused:
                raise RuntimeError("operation failed due to a previous error during capture")
        graph.poison()
        self._open.add(graph)
        return graph


class ForeignGraph:
    """Operators in order, each with its arguments and the memory that its results take."""

    def __init__(self, graphs: ForeignGraphs) -> None:
        self._graphs = graphs
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._scratch: dict[int, torch.Tensor] = {}
        self._is_open = True

    @property
    def scratch_bytes(self) -> int:
        """Of all that the work allocated."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._scratch.values())

    def add(self, func: Any, args: Any, kwargs: Any, made: list[torch.Tensor]) -> None:
        """Notes a call, and what it allocated."""
        self._calls.append((func, args, kwargs, made))
        self._scratch |= {storage_key(tensor): tensor for tensor in made}

    def replay(self) -> None:
        assert self._is_open, "the graph is closed"
        self._graphs.num_replayed += 1
        with without_dispatch(), torch.no_grad():
            for func, args, kwargs, made in self._calls:
                results = [each for each in tree_leaves(func(*args, **kwargs)) if isinstance(each, torch.Tensor)]
                for there, result in zip(made, results, strict=False):
                    _write(there, result)
        self.poison()

    def poison(self) -> None:
        """Destroys what the work allocated."""
        for tensor in self._scratch.values():
            if tensor.is_floating_point():
                _whole(tensor).fill_(torch.nan)

    def close(self) -> None:
        self._is_open = False
        self._calls.clear()
        self._scratch.clear()
        self._graphs._open.discard(self)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: ForeignGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type its modes
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sources = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if _NEEDS_HOST.intersection(func.tags) or not _are_given(sources):
            raise RuntimeError(f"{func} is not permitted while work of the foreign device is recorded")
        if func._schema.is_mutable:
            assert len(func._schema.returns) == 1, f"{func} returns more than what it wrote"
            self._graph.add(func, args, kwargs, [])
            return args[0]
        result = func(*args, **kwargs)
        known = {storage_key(tensor) for tensor in sources}
        made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        if any(tensor.device.type != "foreign" for tensor in made):
            if sources:
                raise RuntimeError(f"{func} has the host wait, which is not permitted while work is recorded")
            return result  # a number for kernels, the same each time
        if not any(storage_key(tensor) in known for tensor in made):  # else it is a view, and says where it is
            self._graph.add(func, args, kwargs, made)
            self._graph.poison()
        return result


@contextmanager
def _modes_allowed() -> Iterator[None]:
    """No mode of others sees what is recorded, and ours does where all were switched off."""
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set() - _PYTHON
    with torch._C._ForceDispatchKeyGuard(include, exclude), _disable_current_modes():
        yield


def _are_given(sources: Sequence[torch.Tensor]) -> bool:
    """Whether a kernel may be given them: numbers of the host's go with the launch, beside tensors of the device's."""
    ours = [tensor.device.type == "foreign" for tensor in sources]
    return not ours or (any(ours) and all(map(operator.or_, ours, (tensor.dim() == 0 for tensor in sources))))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns all memory of a tensor as one of the same type."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def _write(there: torch.Tensor, result: torch.Tensor) -> None:
    assert (there.shape, there.stride(), there.dtype) == (result.shape, result.stride(), result.dtype)
    _whole(there).copy_(_whole(result))
