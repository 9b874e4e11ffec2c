"""A value that could be seen, or why not. What nobody told is never a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, TypeVar


@dataclass(frozen=True, slots=True, kw_only=True)
class NotTold:
    """Stands where a value cannot be seen. `why` is for people."""

    why: str


_T = TypeVar("_T")
Told: TypeAlias = _T | NotTold


def or_none(value: Told[_T]) -> _T | None:
    """Returns the value, None where there is none."""
    return None if isinstance(value, NotTold) else value
