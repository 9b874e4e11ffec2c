"""Which of the private APIs of torch that mball stands on this torch has."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateApi:
    """One private API: where it lives, what mball does with it, and whether this torch has it."""

    name: str
    purpose: str
    found: bool


_USED = (
    ("torch.utils._python_dispatch.TorchDispatchMode", "binds weights that operators outside graphs read"),
    (
        "torch.utils._python_dispatch.TorchDispatchMode.ignore_compile_internals",
        "lets graphs be captured while the dispatch mode is active",
    ),
    ("torch.nn.Module._call_impl", "opens a pass at every module call"),
    ("torch.nn.Module._compiled_call_impl", "opens a pass at every module call"),
    (
        "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
        "keeps the dispatch mode away from captured graphs",
    ),
    ("torch._C._DisableTorchDispatch", "keeps the dispatch mode away from captured graphs"),
    ("torch._C._RestorePythonTLSSnapshot", "tells whether an operator was called under autocast"),
    ("torch.overrides._pop_mode_temporarily", "keeps casts of weights under autocast out of captured graphs"),
    ("torch.overrides._get_current_function_mode", "keeps casts of weights under autocast out of captured graphs"),
    ("torch._C._is_any_autocast_enabled", "leaves room for what autocast makes of weights"),
    ("torch.amp.autocast_mode._enter_autocast", "leaves room for what autocast makes of weights"),
    ("torch._dynamo.config.skip_nnmodule_hook_guards", "notices hooks that come after capture"),
    ("torch._subclasses.fake_tensor.FakeTensorMode.from_tensor", "shows weights to captures where steps read them"),
    (
        "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx",
        "tells captures of graphs that open a pass from those of others",
    ),
    ("torch._dynamo.callback.callback_handler", "says when a capture begins, so that its memory is known"),
    (
        "torch._dynamo.comptime.ComptimeContext",
        "finds out what a decision by values follows from",
    ),
    ("torch._dynamo.source.GlobalStateSource", "guards graphs by such decisions"),
    ("torch._dynamo.guards.install_guard", "guards graphs by such decisions"),
    ("torch._C._dynamo.guards.RootGuardManager.add_epilogue_lambda_guard", "guards graphs by such decisions"),
    ("torch.utils._sympy.printers.PythonPrinter", "guards graphs by decisions that follow from sizes"),
    ("torch._inductor.compile_fx.compile_fx_inner", "compiles one step (compile='inductor')"),
    (
        "torch._functorch._aot_autograd.descriptors.PlainAOTInput",
        "finds weights in the graph of basic operators (compile='inductor')",
    ),
    (
        "torch._inductor.utils.get_first_incompatible_cudagraph_node",
        "finds steps that cannot be CUDA graphs (mode='reduce-overhead')",
    ),
    (
        "torch._C._cuda_endAllocateToPool",
        "puts right what a CUDA graph leaves that fails midway (mode='reduce-overhead')",
    ),
    ("torch._C._cuda_releasePool", "puts right what a CUDA graph leaves that fails midway (mode='reduce-overhead')"),
    ("torch._TorchCompileInductorWrapper", "checks mode and options (compile='inductor')"),
    ("torch._guards.Source.name", "names the weights of graphs that come without their module"),
    ("torch._ops.OpOverload", "tells views and writes from reads"),
    ("torch.utils.flop_counter.flop_registry", "counts floating point operations"),
    ("torch.autograd.graph.increment_version", "makes autograd notice that a slot was reused"),
)


CAPTURE_NEEDS = frozenset(
    {
        "torch.utils._python_dispatch.TorchDispatchMode.ignore_compile_internals",
    }
)


# Without these a graph breaks where the model decides by values.
DECISIONS_NEED = frozenset(
    {
        "torch._dynamo.comptime.ComptimeContext",
        "torch._dynamo.source.GlobalStateSource",
        "torch._dynamo.guards.install_guard",
        "torch._C._dynamo.guards.RootGuardManager.add_epilogue_lambda_guard",
        "torch.utils._sympy.printers.PythonPrinter",
    }
)


def probe() -> list[PrivateApi]:
    """Returns all private APIs that mball uses, found or not."""
    return [PrivateApi(name=name, purpose=purpose, found=_exists(name)) for name, purpose in _USED]


def _exists(name: str) -> bool:
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for attribute in parts[split:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def missing_for_capture() -> list[str]:
    """Returns the names without which graphs cannot be captured beside the dispatch mode."""
    # Only these are looked for: looking for Inductor's imports it, which takes seconds.
    return [name for name in CAPTURE_NEEDS if not _exists(name)]


@functools.cache
def missing_for_decisions() -> tuple[str, ...]:
    """Returns the names without which a captured graph cannot be guarded by a decision."""
    return tuple(name for name in sorted(DECISIONS_NEED) if not _exists(name))
