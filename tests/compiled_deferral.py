"""Defers compiled steps, each as one entry of the compute queue: its kernels write by addresses, which no mode sees.

[Note: what that covers] The engine's waits and events stand between steps. So a copy that may run beside some kernel of
a step may also run before or after all of it, and a step that does not wait for a copy may also run before it begins.
What happens within a step (that Inductor's kernels come in the right order) is not the engine's, and is not tried.
Steps that draw random numbers, decide by values, or write to memory of the caller's are not deferred; `synced` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mball.torch_private.inductor import compile_piece
from mball.torch_private.nodes import writes_argument
from mball.trace.stage import CompiledPiece
from tests.deferral import DeferringMode, decides_or_draws


def compile_deferred(module: torch.fx.GraphModule, num_weights: int, settings: Mapping[str, Any]) -> CompiledPiece:
    """Compiles a piece as mball does; put it in the place of `mball.trace.inductor.compile_piece`."""
    placeholders = module.graph.find_nodes(op="placeholder")
    writes = [placeholders.index(node.args[0]) for node in module.graph.nodes if writes_argument(node)]
    runs_once = any(map(decides_or_draws, module.graph.nodes))
    compiled: Callable[[list[Any]], Any] = compile_piece(module, num_weights, settings)

    def piece(values: list[Any]) -> Any:
        modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, DeferringMode)]
        if not modes:
            return compiled(values)
        arguments = list(values)
        values.clear()
        return modes[0].call_step(compiled, arguments, writes, runs_once=runs_once)

    return piece
