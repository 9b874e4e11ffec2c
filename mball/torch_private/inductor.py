"""How Inductor is had to compile: a graph as torch.compile would, or piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mball.torch_private.nodes import example_value


def inductor_settings(mode: str | None, options: Mapping[str, Any], dynamic: bool | None) -> dict[str, Any]:
    """Returns the settings of Inductor that torch.compile makes of its arguments of these names.

    Raises:
        RuntimeError: the mode or an option is unknown, or an option has another type.
    """
    return dict(torch._TorchCompileInductorWrapper(mode, dict(options), dynamic).config)


def inductor_failure() -> type[Exception]:
    """Returns what Inductor raises when it cannot compile, a missing compiler included."""
    from torch._inductor.exc import InductorError

    failure: type[Exception] = InductorError
    return failure


def compile_graph(
    module: torch.fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Returns Dynamo's graph as `torch.compile` itself compiles it.

    Raises:
        torch._inductor.exc.InductorError: it cannot be compiled.
    """
    from torch._inductor.compile_fx import compile_fx

    call: Any = compile_fx(module, list(inputs), config_patches=dict(options))
    compiled: Callable[..., Any] = call
    return compiled


def compile_through_inductor(
    module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    compile_graph: Callable[[torch.fx.GraphModule, Mapping[str, Any]], Callable[[list[Any]], Any]],
    options: Mapping[str, Any],
) -> Callable[..., Any]:
    """Returns what Inductor makes of Dynamo's graph, but with `compile_graph` instead of its own compilation.

    `compile_graph` is given the graph of basic operators and settings for `compile_piece`, and returns a function
    of a list of all arguments. `module` is copied, since it is changed meanwhile.
    """
    import torch._functorch.config
    from torch._guards import TracingContext
    from torch._inductor.compile_fx import compile_fx

    def inner(graph: torch.fx.GraphModule, _: Sequence[Any], **settings: Any) -> Any:
        call = compile_graph(graph, settings)
        context = TracingContext.try_get()
        if context is not None and context.output_strides is not None:
            # What AOTAutograd would read; each piece left its own there.
            context.output_strides.clear()
            results: Any = graph.graph.output_node().args[0]
            context.output_strides.extend(None for _ in results)
        call._boxed_call = True  # type: ignore[attr-defined]  # how AOTAutograd knows that it takes a list
        return call

    copy = torch.fx.Graph()
    copy.output(copy.graph_copy(module.graph, {}))
    copy.output_node().meta = dict(module.graph.output_node().meta)
    copied = torch.fx.GraphModule(module, copy)
    copied.meta = dict(module.meta)
    # That cache does not know that graphs are compiled in another way here.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        call: Any = compile_fx(copied, inputs, inner_compile=inner, config_patches=dict(options))
    compiled: Callable[..., Any] = call
    return compiled


def compile_piece(
    module: torch.fx.GraphModule, num_weights: int, settings: Mapping[str, Any]
) -> Callable[[list[Any]], Any]:
    """Returns the compiled form of a part of a graph of basic operators: a function of a list, which it empties.

    Its results have the strides that were traced. The first `num_weights` arguments are weights.

    Raises:
        torch._inductor.exc.InductorError: it cannot be compiled.
    """
    from torch._guards import TracingContext
    from torch._inductor.compile_fx import compile_fx_inner

    output = module.graph.output_node()
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # type: ignore[arg-type]
    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides.clear()
    inputs = [example_value(node) for node in module.graph.find_nodes(op="placeholder")]
    # Kernels of a GPU count on operands that begin on 16 bytes, as fakes do. Weights begin where they begin in their
    # file, so there Inductor asks each time, and copies those that do not.
    on_cpu = all(value.device.type == "cpu" for value in inputs if isinstance(value, torch.Tensor))
    static = list(range(num_weights)) if on_cpu else []
    compiled: Callable[[list[Any]], Any] = compile_fx_inner(module, inputs, **{**settings, "static_input_idxs": static})
    return compiled
