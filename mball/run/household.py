"""Notices parameters and modules that come to a wrapped model, or leave it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch


class Household:
    """The modules under some roots, and what each of them holds.

    Keeps weak references only: a model that is dropped is freed, its buffers with it.
    """

    def __init__(self, roots: Sequence[torch.nn.Module]) -> None:
        self._roots = [weakref.ref(root) for root in roots]
        self._modules: list[weakref.ref[torch.nn.Module]] = []
        self._held: list[int] = []
        self._alive: list[weakref.ref[Any]] = []
        self._died: list[weakref.ref[Any]] = []
        self.accept()

    def accept(self) -> None:
        """Takes what is there now as known."""
        modules = list({id(module): module for _, module in self._walk()}.values())
        held = _held(modules)
        # An identity is one object's only while that lives: its death is noted where it happens.
        died: list[weakref.ref[Any]] = []
        self._died = died
        self._alive = [weakref.ref(value, died.append) for value in (*modules, *held) if value is not None]
        self._modules = [weakref.ref(module) for module in modules]
        self._held = list(map(id, held))

    def changed(self) -> bool:
        """Returns whether the modules hold other parameters or modules than when they were accepted.

        Every pass asks, so this does not loop in Python: 1 us a module, on a slow core.
        """
        modules = [ref() for ref in self._modules]
        if self._died:
            return True
        return list(map(id, _held(modules))) != self._held

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yields every parameter that holds bytes, under each of its names."""
        for path, module in self._walk():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and parameter.numel():
                    yield f"{path}{attribute}", parameter

    def _walk(self) -> Iterator[tuple[str, torch.nn.Module]]:
        for number, ref in enumerate(self._roots):
            root = ref()
            if root is not None:
                yield from _below(f"{number}." if len(self._roots) > 1 else "", root, frozenset())


def _held(modules: Iterable[torch.nn.Module | None]) -> list[Any]:
    """Returns all that the modules hold, None where they hold None."""
    found: list[Any] = []
    for kind in ("_parameters", "_modules"):
        found.extend(chain.from_iterable(map(dict.values, map(attrgetter(kind), modules))))
    return found


def _below(path: str, module: torch.nn.Module, above: frozenset[int]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields the module and all below it, a shared one under each of its paths."""
    yield path, module
    above |= {id(module)}
    for name, child in module._modules.items():
        if child is not None and id(child) not in above:
            yield from _below(f"{path}{name}.", child, above)
