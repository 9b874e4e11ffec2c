"""A call while it is being captured: what it was called with, and what its graph is guarded by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def captured_frame(context: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Returns the locals and the globals of the call that Dynamo captures, as it began.

    `context` is the `torch._dynamo.comptime.ComptimeContext` of it, or of a call inside it.
    """
    output = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output
    return output.local_scope, output.global_scope


def items_of(value: Any) -> list[Any]:
    """Returns the items of a tuple that is a `torch._dynamo.comptime.ComptimeVar`, each as one."""
    tracked = value._i_will_not_complain_if_bc_breaks_VariableTracker()
    return [type(value)(item.realize()) for item in tracked.items]


def guard_capture(holds: Callable[[Mapping[str, Any]], bool], text: str) -> None:
    """Has the graph that is being captured run in those calls only whose locals `holds` returns True for.

    It is asked last, when all other guards hold; an error counts as no. `text` is what logs call the guard.
    """
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource

    def create(builder: Any, guard: Any) -> None:
        builder.guard_manager.root.add_epilogue_lambda_guard(holds, [text], guard.user_stack)

    install_guard(GlobalStateSource().make_guard(create))
