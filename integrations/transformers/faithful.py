"""Makes transformers compute the same whether or not mball captures it.

While a model is compiled, transformers spares itself decisions that depend on values: it passes an explicit mask where
the uncompiled model knows that none is needed, and another attention follows from that. The results differ in their
last bits. Here the functions that decide so decide as ever: those that look at values are asked while a graph is
captured, which is then guarded by the answer (`mball.guarded`); the others are told that nothing is compiled. Code
that is compiled by anyone else is not affected. Checked with transformers 5.23; a name that another version lacks is
left alone.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

from mball import capturing, guarded

_log = logging.getLogger(__name__)

_MASKS = "transformers.masking_utils"
# Functions that read the values of a mask, or would if nothing were compiled.
_DECIDE = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
# Modules that ask whether they are compiled, and choose a kernel by it. Not the experts' (`moe`): compiled, they
# replace a grouped product by single ones where it is not bfloat16; that can be captured, the other cannot.
_ASK = ("transformers.integrations.sdpa_attention",)

_Adapt = Callable[[Callable[..., Any]], Callable[..., Any]]


@functools.cache
def install() -> None:
    """Puts the decisions in place, once a process."""
    for name in _DECIDE:
        _replace(_MASKS, name, _by_value)
    _replace(_MASKS, "find_packed_sequence_indices", _unless_none)
    _replace(_MASKS, "is_tracing", _not_while_asked)
    for path in _ASK:
        _replace(path, "is_torchdynamo_compiling", _not_for_mball)


def _replace(path: str, name: str, adapt: _Adapt) -> None:
    try:
        module = importlib.import_module(path)
        original = getattr(module, name)
    except (ImportError, AttributeError):
        _log.info("transformers has no %s.%s: what it decided may differ while a graph is captured", path, name)
        return
    setattr(module, name, adapt(original))


class _Asking(threading.local):
    now = False


_asking = _Asking()


def _plainly(decide: Callable[..., Any], summary: Callable[[Any], bool]) -> Callable[..., bool]:
    """Returns the question what `summary` says of `decide`'s result where nothing is compiled."""

    @functools.wraps(decide)
    def question(*args: Any, **kwargs: Any) -> bool:
        before = _asking.now
        _asking.now = True
        try:
            return summary(decide(*args, **kwargs))
        finally:
            _asking.now = before

    return question


def _by_value(decide: Callable[..., Any]) -> Callable[..., Any]:
    question = _plainly(decide, bool)

    @functools.wraps(decide)
    def faithful(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and capturing():
            return guarded(question, *args, **kwargs)
        return decide(*args, **kwargs)

    return faithful


def _unless_none(find: Callable[..., Any]) -> Callable[..., Any]:
    is_none = _plainly(find, lambda found: found is None)

    @functools.wraps(find)
    def faithful(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and capturing() and guarded(is_none, *args, **kwargs):
            return None
        return find(*args, **kwargs)

    return faithful


def _not_while_asked(is_tracing: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(is_tracing)
    def faithful(tensor: Any = None) -> bool:
        return not _is_asked() and is_tracing(tensor)

    return faithful


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's decorator has no types
def _is_asked() -> bool:
    return _asking.now


def _not_for_mball(is_compiling: Callable[[], bool]) -> Callable[[], bool]:
    @functools.wraps(is_compiling)
    def faithful() -> bool:
        return is_compiling() and not capturing()

    return faithful
