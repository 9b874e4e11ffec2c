"""Every error that mball raises on purpose.

A message says what happened, the numbers with their units, and what to change.
"""

from __future__ import annotations


class MballError(Exception):
    """Base of all errors that mball raises on purpose."""


class ConfigError(MballError, ValueError):
    """A setting cannot be read or does not make sense."""


class BudgetError(MballError):
    """A budget is too small.

    Attributes:
        budget_bytes: the budget that was asked for.
        smallest_bytes: the smallest budget that works; it works exactly, one page less does not.
        limited_by: what sets that number.
    """

    def __init__(self, message: str, *, budget_bytes: int, smallest_bytes: int, limited_by: str) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self.limited_by = limited_by


class SchemaError(MballError, ValueError):
    """A trace, plan or machine file contradicts itself or comes from another version."""


class PlanError(MballError):
    """A plan breaks an invariant: a read before its transfer, an overlap, too many bytes."""


class CheckpointError(MballError):
    """A checkpoint is missing, damaged, does not fit the model, or changed while in use."""


class StorageError(MballError, OSError):
    """A read or write failed; the message names file, offset, length and cause."""


class DeviceError(MballError):
    """The device cannot give what was asked: address space, pages, an engine in a forked child."""


class AutogradError(MballError, RuntimeError):
    """A forward pass would record autograd through a streamed weight."""


class WrapError(MballError, RuntimeError):
    """A model cannot be wrapped, or a wrapped model is asked for what it cannot do."""
