"""Defers operators: what is called gets its results' memory at once, and the numbers when the compute queue gets there.

[Note: the same bits] An operator runs twice. The first run only says what memory its results take (sizes, strides,
dtypes, what is a view of what), whatever its arguments hold by then; its numbers are destroyed. The second one is that
of the queue, with the same arguments and the same kernels, and its bytes go to the memory that was promised. What
cannot be run twice, or decides by values, empties the queue first and runs at once: `synced` counts those by name.

[Note: backward] Autograd is above the mode, and a backward pass calls operators like any other. On a device it has a
thread of its own, to which autograd takes the modes of whoever waits for it: one of the two goes on at a time.

[Note: memory that is freed] Whoever counts memory sees a tensor die when the caller lets it go, as with an allocator
that knows streams: the queue holds on to the bytes by tensors of its own, over storages of their own.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from mball.torch_private.dispatch import TorchDispatchMode, without_dispatch
from mball.torch_private.operators import writes_and_aliases
from mball.torch_private.tensors import is_subclass, storage_key
from tests.adversarial import AdversarialDevice
from tests.foreign import device as foreign
from tests.streams import Entry, Kind, StreamError

_PYTHON = torch._C.DispatchKeySet(torch._C.DispatchKey.Python) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.PythonTLSSnapshot
)
_Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
_ALIGNMENT_BYTES = 64  # of torch's own allocator: libraries choose kernels by it
_DECIDES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_RUNS_ONCE = {torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What an operator writes, whether it can run twice, and whether it decides by values.

    That it may return a view says little: `reshape` copies where it has to.
    """

    writes: frozenset[str | int]
    runs_once: bool
    decides: bool


@cache
def _facts(func: Any) -> _Facts:
    writes, _ = writes_and_aliases(func)
    tags = set(func.tags)
    return _Facts(
        writes=writes,
        runs_once=bool(tags & _RUNS_ONCE) or not func._schema.returns,
        decides=bool(tags & _DECIDES) and func is not torch.ops.aten.index.Tensor,
    )


class DeferringMode(TorchDispatchMode):
    """Puts every operator on the compute queue of a device. Enter it outside all others, by `deferred`.

    Attributes:
        num_deferred: operators that were queued.
        num_steps: compiled steps that were; see `tests/compiled_deferral.py`.
        synced: how often each operator could not be.
    """

    supports_higher_order_operators = True

    def __init__(self, device: AdversarialDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type its modes
        self.num_deferred = self.num_steps = 0
        self.synced: Counter[str] = Counter()
        self._streams = device.streams
        self._own: dict[int, _Owned] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors_of((args, kwargs))
        if any(is_subclass(tensor) or tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)  # nothing is computed: a graph is being captured
        if not isinstance(func, torch._ops.OpOverload):
            return self._now(func, args, kwargs)
        facts = _facts(func)
        if not tensors:
            return self._owned(func(*args, **kwargs), tensors)
        if (facts.runs_once and not _draws_nothing(func, args)) or facts.decides or _chooses_by_mask(func, args):
            return self._now(func, args, kwargs)
        if facts.writes:
            written = [args[i] for i in sorted(each for each in facts.writes if isinstance(each, int))]
            if len(written) == 1 and len(func._schema.returns) == 1 and self._owns(written[0]):
                self._defer(func, args, kwargs, [])
                return written[0]
            return self._now(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, IndexError, ValueError, NotImplementedError):
            # Either an error of the caller's, or one of the numbers that are not there yet.
            return self._now(func, args, kwargs)
        if all(storage_key(each) in map(storage_key, tensors) for each in _tensors_of(result)):
            return self._owned(result, tensors)
        return self._promise(func, args, kwargs, result, tensors)

    def _promise(self, func: Any, args: Any, kwargs: Any, result: Any, tensors: Sequence[torch.Tensor]) -> Any:
        """Returns the results of a first run without their numbers, which a second one brings."""
        result = self._owned(result, tensors)
        sources = {storage_key(tensor) for tensor in tensors}
        promised = [None if storage_key(each) in sources else each for each in _tensors_of(result)]
        for each in promised:
            if each is not None:
                _destroy(each, self._own[storage_key(each)].memory)
        self._defer(func, args, kwargs, [None if each is None else self._held(each) for each in promised])
        return result

    def call_step(
        self, step: Callable[[list[Any]], Any], args: Sequence[Any], writes: Sequence[int], *, runs_once: bool
    ) -> Any:
        """Returns what a compiled step returns for `args`, of which it writes those at `writes`."""

        def call(*values: Any) -> Any:
            with without_dispatch():
                return step(list(values))

        call.__qualname__ = "a compiled step"
        if runs_once or not all(self._owns(args[position]) for position in writes):
            return self._now(call, args, {})
        # The first run may write to copies only.
        written = [args[position] for position in writes]
        copies = {storage_key(each): _storage_over(_copied(each), each.device) for each in written}
        originals = {storage._cdata: key for key, storage in copies.items()}
        tensors = _tensors_of(args)
        there = {storage_key(tensor): tensor.untyped_storage() for tensor in tensors}

        def on_copy(tensor: torch.Tensor) -> torch.Tensor:
            copy = copies.get(storage_key(tensor))
            return tensor if copy is None else _over(copy, tensor)

        def on_original(tensor: torch.Tensor) -> torch.Tensor:
            key = originals.get(storage_key(tensor))
            return tensor if key is None else _over(there[key], tensor)

        try:
            result = call(*tree_map_only(torch.Tensor, on_copy, list(args)))
        except (RuntimeError, IndexError):  # of the numbers that are not there yet
            return self._now(call, args, {})
        self.num_steps += 1
        return self._promise(call, args, {}, tree_map_only(torch.Tensor, on_original, result), tensors)

    def _now(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.synced[str(func) if isinstance(func, torch._ops.OpOverload) else func.__qualname__] += 1
        self._streams.finish_compute()
        return self._owned(func(*args, **kwargs), _tensors_of((args, kwargs)))

    def _defer(self, func: Any, args: Any, kwargs: Any, promised: Sequence[torch.Tensor | None]) -> None:
        self.num_deferred += 1
        as_called = _same_dispatch()
        args, kwargs = tree_map_only(torch.Tensor, self._held, (args, kwargs))

        def compute() -> None:
            with as_called():
                result = func(*args, **kwargs)
            if promised:
                _keep_promises(func, promised, _tensors_of(result))

        self._streams.compute.append(Entry(kind=Kind.COMPUTE, run=compute))
        self._streams.let_time_pass()

    def _owned(self, result: Any, sources: Sequence[torch.Tensor]) -> Any:
        """Returns the results with the new ones among them in memory of ours."""
        known = {storage_key(tensor) for tensor in sources}
        moved: dict[int, torch.UntypedStorage] = {}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if (key := storage_key(tensor)) in known:
                return tensor
            if key not in moved:
                moved[key] = self._own_storage(_copied(tensor), tensor.device)
            return _over(moved[key], tensor)

        return tree_map_only(torch.Tensor, move, result)

    def _own_storage(self, memory: _Bytes, place: torch.device) -> torch.UntypedStorage:
        storage = _storage_over(memory, place)
        key = storage._cdata
        forget = weakref.ref(storage, lambda _: self._own.pop(key, None))
        self._own[key] = _Owned(memory=memory, alive=forget)
        return storage

    def _held(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the same tensor for the queue to keep, over a storage that nobody counts."""
        owned = self._own.get(storage_key(tensor))
        return tensor if owned is None else _over(_storage_over(owned.memory, tensor.device), tensor)

    def _owns(self, tensor: Any) -> bool:
        """Whether the memory came of an operator that was called under the mode: nobody else looks at it meanwhile."""
        return isinstance(tensor, torch.Tensor) and storage_key(tensor) in self._own


@dataclass(frozen=True, slots=True, kw_only=True)
class _Owned:
    """Memory of a result, and the storage that callers see it by."""

    memory: _Bytes
    alive: weakref.ref[torch.UntypedStorage]


@contextmanager
def deferred(device: AdversarialDevice) -> Iterator[DeferringMode]:
    """Defers all operators meanwhile; their results are there afterwards."""
    mode = DeferringMode(device)
    with device.deferral(), mode:
        yield mode


def decides_or_draws(node: torch.fx.Node) -> bool:
    """Returns whether what a node of a graph returns, or how large that is, is another in another run."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    draws = torch.Tag.nondeterministic_seeded in node.target.tags and not _draws_nothing(node.target, node.args)
    return draws or _facts(node.target).decides


def _tensors_of(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _chooses_by_mask(func: Any, args: Sequence[Any]) -> bool:
    """Whether the operator takes those elements of a tensor that a mask names: as many as it has ones."""
    return func is torch.ops.aten.index.Tensor and any(
        isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )


def _draws_nothing(func: Any, args: Sequence[Any]) -> bool:
    """Whether the operator draws random numbers for dropout only, and drops nothing."""
    return func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default and (
        len(args) < 4 or args[3] == 0
    )


def _aligned(num_bytes: int) -> _Bytes:
    memory = np.empty(num_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT_BYTES
    return memory[start : start + num_bytes]


def _storage_over(memory: _Bytes, place: torch.device) -> torch.UntypedStorage:
    with without_dispatch():
        if place.type == "cpu":
            return torch.from_numpy(memory).untyped_storage()
        return foreign.foreign_tensor(memory.ctypes.data, memory.nbytes, memory).untyped_storage()


def _copied(tensor: torch.Tensor) -> _Bytes:
    """Returns a copy of all memory of a tensor."""
    storage = tensor.untyped_storage()
    memory = _aligned(storage.nbytes())
    ctypes.memmove(memory.ctypes.data, storage.data_ptr(), storage.nbytes())
    return memory


def _over(storage: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    """Returns a tensor that looks like another one, over another storage."""
    with without_dispatch(), torch.inference_mode(like.is_inference()):
        tensor = torch.empty(0, dtype=like.dtype, device=like.device)
        tensor.set_(storage, like.storage_offset(), like.shape, like.stride())
        if like.is_conj():
            tensor = torch._conj(tensor)
        if like.is_neg():
            tensor = torch._neg_view(tensor)
        return tensor.requires_grad_(like.requires_grad)


def _destroy(tensor: torch.Tensor, memory: _Bytes) -> None:
    """Makes numbers NaN; whole numbers become 0, which is a row of any table, so that dry runs go on."""
    memory[:] = 0xFF if tensor.is_floating_point() or tensor.is_complex() else 0


def _keep_promises(func: Any, promised: Sequence[torch.Tensor | None], results: Sequence[torch.Tensor]) -> None:
    for there, result in zip(promised, results, strict=True):
        if there is None:
            continue
        if (there.shape, there.stride(), there.dtype) != (result.shape, result.stride(), result.dtype):
            raise StreamError(f"{func} was deferred, and returns {tuple(result.shape)}, not {tuple(there.shape)}")
        target, source = there.untyped_storage(), result.untyped_storage()
        ctypes.memmove(target.data_ptr(), source.data_ptr(), min(target.nbytes(), source.nbytes()))


def _same_dispatch() -> Callable[[], Any]:
    """Returns a context in which operators find the kernels that they find here, and no mode."""
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set() | _PYTHON
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    @contextmanager
    def context() -> Iterator[None]:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch._C._ForceDispatchKeyGuard(include, exclude),
        ):
            yield

    return context
