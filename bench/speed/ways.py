"""Ways to run a checkpoint, each loaded in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mball
from bench.speed.preadv import Span
from mball.api import _states, trace_and_plan
from mball.integrations.transformers import from_pretrained


class Mode(Enum):
    """Whether steps are compiled, by mball or by torch.compile."""

    EAGER = "eager"
    INDUCTOR = "inductor"


class Way(Enum):
    """Who runs the model."""

    MBALL = "mball"
    PLAIN = "plain"  # transformers, all weights in anonymous memory
    MAPPED = "mapped"  # transformers as it loads by default: weights are the mapped checkpoint
    ACCELERATE = "accelerate"  # accelerate's disk offload


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What a contender loads.

    Attributes:
        budget_bytes: for mball.
        capture: for mball. Steady state is measured on graphs from the first pass on; what captures only once that
            pays would get there in the middle of the rounds.
        step_bytes: for mball's compiled steps; 0 for its default.
        offload: for accelerate, the folder that `write_offload` wrote.
        resident_bytes: for accelerate, the weights that it may keep in memory.
    """

    way: Way
    mode: Mode
    checkpoint: Path
    budget_bytes: int = 0
    capture: str = "graphs"
    step_bytes: int = 0
    offload: Path | None = None
    resident_bytes: int = 0


def load(loading: Loading) -> Any:
    """Returns the model, in eval mode. Raises what mball, transformers or accelerate raise."""
    if loading.way is Way.MBALL:
        settings: dict[str, Any] = {"compile": loading.mode.value, "capture": loading.capture}
        if loading.step_bytes:
            settings["step_bytes"] = loading.step_bytes
        return from_pretrained(loading.checkpoint, budget=loading.budget_bytes, **settings)
    if loading.way is Way.ACCELERATE:
        return _offloaded(loading)
    model = LlamaForCausalLM.from_pretrained(
        loading.checkpoint, dtype=torch.bfloat16, local_files_only=True, disable_mmap=loading.way is Way.PLAIN
    ).eval()
    if loading.mode is Mode.INDUCTOR and loading.way is Way.PLAIN:
        model.compile()
    return model


def write_offload(checkpoint: Path, folder: Path) -> Path:
    """Writes the folder that accelerate offloads to, a file for each weight, unless it is there; returns it."""
    from accelerate.utils import offload_state_dict
    from safetensors.torch import load_file

    if not (folder / "index.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        offload_state_dict(folder, load_file(checkpoint / "model.safetensors"))
    return folder


def _offloaded(loading: Loading) -> Any:
    from accelerate import dispatch_model, init_empty_weights
    from accelerate.utils import set_module_tensor_to_device
    from safetensors import safe_open

    assert loading.offload is not None
    with init_empty_weights():
        # Not `.to(dtype)` afterwards: it would round the rotary frequencies too.
        config = LlamaConfig.from_pretrained(loading.checkpoint)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    device_map = _device_map(model, loading.resident_bytes)
    with safe_open(loading.checkpoint / "model.safetensors", framework="pt") as file:
        for name, _ in model.named_parameters():
            home = next(place for module, place in device_map.items() if f"{name}.".startswith(f"{module}."))
            if home == "cpu":
                set_module_tensor_to_device(model, name, "cpu", file.get_tensor(name).clone())
    model.eval()
    return dispatch_model(model, device_map=device_map, offload_dir=loading.offload)


def _device_map(model: Any, resident_bytes: int) -> dict[str, str]:
    """Returns what accelerate keeps in memory, in the order in which it is used, until `resident_bytes` are full."""
    modules = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(len(model.model.layers)))]
    modules += ["model.norm", "lm_head"]
    left, places = resident_bytes, {"model.rotary_emb": "cpu"}
    for name in modules:
        size_bytes = sum(2 * parameter.numel() for parameter in model.get_submodule(name).parameters())
        places[name] = "cpu" if size_bytes <= left else "disk"
        left -= size_bytes if size_bytes <= left else 0
    return places


def settle(model: Any) -> None:
    """Waits for what mball reads ahead; nothing for other ways."""
    if model in _states:
        _states[model].machinery.compute.reader.drain()


def facts(model: Any) -> dict[str, Any]:
    """Returns mball's report on the model; empty for other ways."""
    return mball.report(model).as_dict() if model in _states else {}


def streamed_spans(model: Any) -> list[Span]:
    """Returns what mball's plan of the last pass reads in each such pass, a span for each extent."""
    _, plan = trace_and_plan(model)
    read = [extent for transfer in plan.transfers for extent in plan.bundles[transfer.bundle].extents]
    return [Span(path=extent.file, offset_bytes=extent.offset_bytes, size_bytes=extent.size_bytes) for extent in read]
