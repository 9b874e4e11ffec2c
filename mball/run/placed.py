"""Modules that say where they are: on the compute device, though their weights lie at home.

Libraries put inputs, caches and positions where a model says that it is (`model.device`), which many models take from
their first Parameter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class Placed:
    """Mixed into the class of a module that has a property `device`."""

    _mball_place: torch.device

    @property
    def device(self) -> torch.device:
        """Where its inputs belong."""
        return self._mball_place


def place(modules: Iterable[torch.nn.Module], where: torch.device) -> None:
    """Has those modules that say where they are say `where`."""
    made: dict[type[Any], type[Any]] = {}
    for module in modules:
        original: type[Any] = type(module)
        if isinstance(getattr(original, "device", None), property) and not issubclass(original, Placed):
            if original not in made:
                try:
                    made[original] = type(original.__name__, (Placed, original), names_of(original))
                except Exception as error:  # a class may refuse to be derived from as it likes
                    logger.warning("%s goes on saying where its weights are: %s", original.__name__, error)
                    continue
            module.__dict__["_mball_place"] = where
            module.__class__ = made[original]


def displace(modules: Iterable[torch.nn.Module]) -> None:
    """Undoes `place`."""
    for module in modules:
        if isinstance(module, Placed):
            module.__class__ = type(module).__mro__[2]
            del module.__dict__["_mball_place"]


def names_of(original: type[Any]) -> dict[str, Any]:
    """Returns the names that a class which is made of `original` goes by."""
    return {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
