"""Notices parameters and modules that come to a wrapped model, or leave it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch


class Household:
    """The modules under some roots, and what each of them holds.

    Keeps weak references only: a model that is dropped is freed, its buffers with it.
    """

    def __init__(self, roots: Sequence[torch.nn.Module]) -> None:
        self._roots = [weakref.ref(root) for root in roots]
        self._seen: list[tuple[weakref.ref[torch.nn.Module], _Refs, _Refs]] = []
        self.accept()

    def accept(self) -> None:
        """Takes what is there now as known."""
        found = {id(module): module for _, module in self._walk()}
        self._seen = [
            (weakref.ref(module), _refs(module._parameters.values()), _refs(module._modules.values()))
            for module in found.values()
        ]

    def changed(self) -> bool:
        """Returns whether any module holds another parameter or module than when it was accepted; 1 µs a module."""
        for ref, parameters, modules in self._seen:
            module = ref()
            if module is None:
                return True
            if not (_same(module._parameters.values(), parameters) and _same(module._modules.values(), modules)):
                return True
        return False

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


# What a module holds; None where it holds None.
_Refs = list["weakref.ref[Any] | None"]


def _refs(held: Iterable[Any]) -> _Refs:
    return [None if value is None else weakref.ref(value) for value in held]


def _same(held: Any, known: _Refs) -> bool:
    return len(held) == len(known) and all(
        value is None if ref is None else ref() is value for value, ref in zip(held, known, strict=True)
    )


def _below(path: str, module: torch.nn.Module, above: frozenset[int]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields the module and all below it, a shared one under each of its paths."""
    yield path, module
    above |= {id(module)}
    for name, child in module._modules.items():
        if child is not None and id(child) not in above:
            yield from _below(f"{path}{name}.", child, above)
