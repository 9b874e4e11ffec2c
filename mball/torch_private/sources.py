"""Where Dynamo reads things from, as expressions over the locals and globals of the call that it captures."""

from __future__ import annotations

from typing import Any

import torch


def source_name(placeholder: torch.fx.Node) -> str | None:
    """Returns the expression that Dynamo reads an argument of a graph from, None if it says none.

    Such as ``L['self']._modules['layers']._modules['0']._parameters['weight']``.
    """
    return name_of(getattr(placeholder, "_dynamo_source", None))


def name_of(source: object) -> str | None:
    """Returns the expression that Dynamo reads something from, None if there is none."""
    name = getattr(source, "name", None)
    found = name() if callable(name) else name  # a method up to torch 2.11
    return found if isinstance(found, str) else None


def expression_of(size: torch.SymInt) -> str:
    """Returns how a symbolic int follows from the locals `L` and globals `G` of the captured call, as Python.

    Raises:
        LookupError: it depends on values.
    """
    from torch.utils._sympy.printers import PythonPrinter

    sources = size.node.shape_env.var_to_sources
    expression = size.node.expr
    names = {symbol: name_of(sources[symbol][0]) for symbol in expression.free_symbols}

    class Named(PythonPrinter):
        def _print_Symbol(self, symbol: Any) -> str:  # noqa: N802  # sympy finds it by this name
            return f"({names[symbol]})"

    text: str = Named().doprint(expression)
    return text
