"""Binds weights that operators read outside captured graphs.

User code always sees homes. Only inside an operator is a home exchanged for the slot that holds
its bytes; views stay views of homes, and writes go to homes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from mball import torch_private

if TYPE_CHECKING:
    from mball.run.engine import Engine


class BindingMode(torch_private.TorchDispatchMode):
    """Active throughout a pass; captured graphs are traced without it and run without it."""

    supports_higher_order_operators = True

    def __init__(self, engine: Engine) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type its modes
        self.engine = engine
        self.paused = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        live = self.engine.live
        if live.counts_inputs:
            for leaf in tree_leaves((args, kwargs)):
                if self._is_counted(leaf):
                    live.read(leaf)
        weights = _weights_among(self.engine.homes.weight_of_storage, args, kwargs)
        if not weights or not isinstance(func, torch._ops.OpOverload):
            result = func(*args, **kwargs)
        else:
            result = self._run(func, args, kwargs, weights)
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if self._is_counted(leaf):
                live.born(leaf)
        return result

    def _is_counted(self, leaf: Any) -> bool:
        return (
            isinstance(leaf, torch.Tensor)
            and leaf.layout is torch.strided
            and not leaf.is_meta
            and torch_private.storage_key(leaf) not in self.engine.homes.weight_of_storage
        )

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], weights: tuple[int, ...]) -> Any:
        writes, returns_alias = _facts(func)
        if returns_alias and not writes:
            return func(*args, **kwargs)
        homes = self.engine.homes
        if writes:
            kept = [a for i, a in enumerate(args) if i in writes] + [a for n, a in kwargs.items() if n in writes]
            self.engine.note_written(_weights_among(homes.weight_of_storage, tuple(kept), {}))
        if self.engine.written_now:
            weights = tuple(weight for weight in weights if weight not in self.engine.written_now)
            if not weights:
                return func(*args, **kwargs)
        views = self.engine.enter_operator(weights, str(func))
        try:

            def bind(value: Any) -> Any:
                if not isinstance(value, torch.Tensor):
                    return value
                weight = homes.weight_of_storage.get(torch_private.storage_key(value))
                return value if weight is None or weight not in views else _same_view(value, views[weight])

            return func(*tree_map(bind, args), **tree_map(bind, kwargs))
        finally:
            self.engine.leave_operator()


_facts = cache(torch_private.writes_and_aliases)


def _weights_among(weight_of_storage: dict[int, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for leaf in (*args, *kwargs.values()):
        for value in tree_leaves(leaf) if isinstance(leaf, (list, tuple, dict)) else (leaf,):
            if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta:
                weight = weight_of_storage.get(torch_private.storage_key(value))
                if weight is not None:
                    found[weight] = None
    return tuple(found)


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


def _flat(slot: torch.Tensor) -> torch.Tensor:
    return slot.as_strided((slot.untyped_storage().nbytes() // slot.element_size(),), (1,), 0)
