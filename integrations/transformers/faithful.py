"""Makes transformers compute the same whether or not mball captures it.

While a model is compiled, transformers spares itself decisions that depend on values: it passes an explicit mask where
the uncompiled model knows that none is needed, and another attention follows from that. The results differ in their
last bits. Here the functions that decide so decide as ever: those that look at values run outside the captured graph,
the others are told that nothing is compiled. Code that is compiled by anyone else is not affected. Checked with
transformers 5.23; a name that another version lacks is left alone.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from mball import capturing

_log = logging.getLogger(__name__)

# Functions that read the values of a mask, or would if nothing were compiled.
_LOOK_AT_VALUES = (
    ("transformers.masking_utils", "_ignore_causal_mask_sdpa"),
    ("transformers.masking_utils", "_ignore_bidirectional_mask_sdpa"),
    ("transformers.masking_utils", "find_packed_sequence_indices"),
)
# Modules that ask whether they are compiled, and choose a kernel by it. Not the experts' (`moe`): compiled, they
# replace a grouped product by single ones where it is not bfloat16; that can be captured, the other cannot.
_ASK = ("transformers.integrations.sdpa_attention",)


@functools.cache
def install() -> None:
    """Puts the decisions in place, once a process."""
    for path, name in _LOOK_AT_VALUES:
        _replace(path, name, _outside_the_graph)
    for path in _ASK:
        _replace(path, "is_torchdynamo_compiling", _not_for_mball)


def _replace(path: str, name: str, adapt: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    try:
        module = importlib.import_module(path)
        original = getattr(module, name)
    except (ImportError, AttributeError):
        _log.info("transformers has no %s.%s: what it decided may differ while a graph is captured", path, name)
        return
    setattr(module, name, adapt(original))


def _outside_the_graph(decide: Callable[..., Any]) -> Callable[..., Any]:
    untraced = torch.compiler.disable(decide)

    @functools.wraps(decide)
    def faithful(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and capturing():
            return untraced(*args, **kwargs)
        return decide(*args, **kwargs)

    return faithful


def _not_for_mball(is_compiling: Callable[[], bool]) -> Callable[[], bool]:
    @functools.wraps(is_compiling)
    def faithful() -> bool:
        return is_compiling() and not capturing()

    return faithful
