"""Binds weights that operators read outside captured graphs.

User code always sees homes. Only inside an operator is a home exchanged for the slot that holds
its bytes; views stay views of homes, and writes go to homes.

[Note: autocast on another device] Autocast comes before the dispatch mode, and casts what lies on its device: not
homes, which lie in host memory. So an operator that was called under it is called so again, with slots: what it cast
already it leaves as it is, and weights are cast as if they had been there from the start. Where a function is more than
one operator that is too late, so `CastWeights` is asked before. A matrix product within a `tensordot`, which casts to
the widest type and never to a narrow one, stays as it is; the weights of a group norm are cast as its input was.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from mball.errors import WrapError
from mball.lookups import gathered_bytes, is_index, is_table, lookup_of
from mball.run.segments import OperatorReads
from mball.torch_private.dispatch import CastWeights, TorchDispatchMode, autocast_again, casts_here
from mball.torch_private.operators import can_run_again, writes_and_aliases
from mball.torch_private.tensors import storage_key

if TYPE_CHECKING:
    from mball.run.engine import Engine


class BindingMode(TorchDispatchMode):
    """Active throughout a pass; captured graphs are traced without it and run without it."""

    supports_higher_order_operators = True

    def __init__(self, engine: Engine, casting: CastWeights) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type its modes
        self.engine = engine
        self.paused = False
        self.watched = 0  # operators so far
        self._entered: tuple[int, int] | None = None  # where the engine was when the last operator entered
        self._casting = casting
        self._device_type = engine.place.type

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Runs for every operator of a pass: what it takes here is what watching operators costs.
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        self.watched += 1
        engine = self.engine
        live, weight_of_storage = engine.live, engine.homes.weight_of_storage
        weights: list[int] = []
        for tensor in _tensors_among((*args, *kwargs.values()) if kwargs else args):
            key = storage_key(tensor)
            weight = weight_of_storage.get(key)
            if weight is None:
                live.read(tensor, key)
            elif weight not in weights:
                weights.append(weight)
        try:
            result = self._run(func, args, kwargs, tuple(weights))
        except torch.OutOfMemoryError:
            result = self._run_again(func, args, kwargs, tuple(weights))
        for tensor in _tensors_among((result,)):
            key = storage_key(tensor)
            if key not in weight_of_storage:
                live.born(tensor, key)
        return result

    def _run_again(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], weights: tuple[int, ...]) -> Any:
        """Returns the result of an operator that found no memory, once residents have made room.

        Raises the error that is being handled where they cannot, or where the first attempt may have changed something.
        """
        entered = self._entered
        while can_run_again(func, args, kwargs) and self.engine.make_room(entered):
            try:
                return self._run(func, args, kwargs, weights)
            except torch.OutOfMemoryError:
                continue
        raise

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], weights: tuple[int, ...]) -> Any:
        self._entered = None
        if not weights or not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        writes, returns_alias = _facts(func)
        if returns_alias and not writes:
            return func(*args, **kwargs)
        homes = self.engine.homes
        if writes:
            kept = [a for i, a in enumerate(args) if i in writes] + [a for n, a in kwargs.items() if n in writes]
            self.engine.note_written(_weights_among(homes.weight_of_storage, kept))
        if self.engine.written_now:
            weights = tuple(weight for weight in weights if weight not in self.engine.written_now)
            if not weights:
                return func(*args, **kwargs)
        lookup = self._lookup(func, args, kwargs, weights)
        reads = OperatorReads(tuple(sorted(weights)), None if lookup is None else lookup[1])
        self._entered = self.engine.here
        views = self.engine.enter_operator(reads, str(func))
        try:
            if lookup is not None:
                self.engine.execution.rows.expect(weights[0], lookup[0])

            def bind(value: Any) -> Any:
                if isinstance(value, torch.Tensor):
                    weight = homes.weight_of_storage.get(storage_key(value))
                    return value if weight is None or weight not in views else _same_view(value, views[weight])
                return tree_map(bind, value) if isinstance(value, (list, tuple, dict)) else value

            bound, named = tuple(map(bind, args)), {name: bind(value) for name, value in kwargs.items()}
            if self._device_type != "cpu" and casts_here(self._device_type):
                return self._cast(func, args, bound, named)
            return func(*bound, **named)
        finally:
            self.engine.leave_operator()

    def _cast(self, func: Any, args: tuple[Any, ...], bound: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Returns what an operator that was called under autocast makes of `bound`, for which it was given `args`.

        Raises:
            WrapError: nobody knows whether it is a part of a linear layer.
        """
        fast = torch.get_autocast_dtype(self._device_type)
        cast = {value.dtype for value, given in zip(bound, args, strict=True) if value is given and _is_float(value)}
        if func is _GROUP_NORM:
            (dtype,) = cast
            return func(bound[0], *(_as(value, dtype) for value in bound[1:3]), *bound[3:], **named)
        if func is _MATRIX_PRODUCT and cast - {fast}:
            return func(*bound, **named)
        if func is _ADDITION and cast == {fast} != {bound[1].dtype} and not self._casting.num_open:
            raise WrapError(
                f"a weight of {bound[1].dtype} is added to {fast} under torch.autocast({self._device_type!r}), between "
                "captured graphs or where autocast began within the model, and it may be the bias of a linear layer: "
                "have autocast begin around the call of the model, and wrap it with capture='operators'"
            )
        with autocast_again(self._device_type):
            return func(*bound, **named)

    def _lookup(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], weights: tuple[int, ...]
    ) -> tuple[torch.Tensor, int] | None:
        """Returns the numbers of the rows that an operator looks up, and about how many bytes that reads.

        None if it reads more than rows of one weight, or so many that all of it is better read.
        """
        lookup = lookup_of(func, args, kwargs)
        if lookup is None or len(weights) > 1 or not self.engine.execution.rows.are_possible:
            return None
        home = self.engine.homes.homes[weights[0]]
        table, indices = lookup
        if not isinstance(indices, torch.Tensor) or not is_index(indices) or not is_table(table):
            return None
        key = storage_key(table)
        if table.shape != home.tensor.shape or key != storage_key(home.tensor) or key == storage_key(indices):
            return None
        size_bytes = gathered_bytes(indices.numel(), home.span_bytes // table.shape[0], home.span_bytes)
        return None if size_bytes is None else (indices, size_bytes)


_STRIDED = torch.strided
_GROUP_NORM = torch.ops.aten.native_group_norm.default
_MATRIX_PRODUCT = torch.ops.aten.mm.default
_ADDITION = torch.ops.aten.add.Tensor
_facts = cache(writes_and_aliases)


def _weights_among(weight_of_storage: dict[int, int], values: Sequence[Any]) -> list[int]:
    keys = map(storage_key, _tensors_among(values))
    return [weight for key in dict.fromkeys(keys) if (weight := weight_of_storage.get(key)) is not None]


def _tensors_among(values: Sequence[Any]) -> list[torch.Tensor]:
    """Returns the tensors with memory of their own kind among `values`, and in containers among them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.layout is _STRIDED and not value.is_meta:
                found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors_among(value)
        elif isinstance(value, dict):
            found += _tensors_among(tuple(value.values()))
    return found


def _same_view(home: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Returns the view of `slot` that `home` (the home itself or any view of it) is of its storage."""
    facts = [(t.dtype, t.shape, t.stride(), t.storage_offset()) for t in (home, slot)]
    if facts[0] == facts[1]:
        return slot
    flat = slot if home.dtype == slot.dtype else _flat(slot).view(home.dtype)
    view = flat.as_strided(home.shape, home.stride(), home.storage_offset())
    if home.is_conj():
        view = view.conj()
    return torch._neg_view(view) if home.is_neg() else view


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def _flat(slot: torch.Tensor) -> torch.Tensor:
    return slot.as_strided((slot.untyped_storage().nbytes() // slot.element_size(),), (1,), 0)
