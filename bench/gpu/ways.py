"""Ways to run a checkpoint on a GPU, each loaded in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import mball
from bench.gpu.group_offload import NUM_PLACES, GroupOffload
from mball.api import _states
from mball.integrations.transformers import from_pretrained
from mball.memory import facts
from mball.memory.cuda_device import CudaDevice


class Way(Enum):
    """Who runs the model."""

    MBALL = "mball"
    PLAIN = "plain"  # transformers, all weights on the device
    COMPILED = "compiled"  # the same by torch.compile
    GRAPHS = "graphs"  # and by torch.compile's mode="reduce-overhead"
    ACCELERATE = "accelerate"  # accelerate's CPU offload: what does not fit lies in host memory
    BLOCKS = "blocks"  # diffusers' group offloading, as a schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What a contender loads.

    Attributes:
        way: who runs it.
        checkpoint: a directory of transformers.
        device: where steps run, as torch names it.
        budget_bytes: for mball.
        resident_bytes: for accelerate, the weights that it may keep on the device.
        capture: for mball.
        steps: for mball, how they run: as `way` PLAIN, COMPILED or GRAPHS runs the model.
    """

    way: Way
    checkpoint: Path
    device: str = "cuda:0"
    budget_bytes: int = 0
    resident_bytes: int = 0
    capture: str = "graphs"
    steps: Way = Way.PLAIN

    def order(self) -> dict[str, Any]:
        """Returns it as the values of an order to a child."""
        return {
            "way": self.way.value,
            "checkpoint": str(self.checkpoint),
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "resident_bytes": self.resident_bytes,
            "capture": self.capture,
            "steps": self.steps.value,
        }

    @classmethod
    def of(cls, order: dict[str, Any]) -> Loading:
        """Returns what an order says."""
        ways = {name: Way(order[name]) for name in ("way", "steps")}
        return cls(**{**order, **ways, "checkpoint": Path(order["checkpoint"])})


# torch.compile's mode, for ways that compile.
_MODES = {Way.COMPILED: None, Way.GRAPHS: "reduce-overhead"}


def load(loading: Loading) -> Any:
    """Returns the model, in eval mode. Raises what mball, transformers or accelerate raise."""
    if loading.way is Way.MBALL:
        # The link is measured and not the disk: the file was just written and is in the page cache.
        settings: dict[str, Any] = {"device": loading.device, "capture": loading.capture, "io": "buffered"}
        if loading.steps in _MODES:
            settings |= {"compile": "inductor", "mode": _MODES[loading.steps]}
        return from_pretrained(loading.checkpoint, budget=loading.budget_bytes, **settings)
    settings = {"dtype": torch.bfloat16, "local_files_only": True}
    if loading.way is Way.ACCELERATE:
        places = device_map(loading.checkpoint, loading.resident_bytes, loading.device)
        return AutoModelForCausalLM.from_pretrained(loading.checkpoint, device_map=places, **settings).eval()
    model = LlamaForCausalLM.from_pretrained(loading.checkpoint, **settings).eval()
    if loading.way is Way.BLOCKS:
        GroupOffload(model, model.model.layers, torch.device(loading.device))  # lives in the model's hooks
        return model
    model.to(loading.device)
    if loading.way in _MODES:
        model.compile(mode=_MODES[loading.way])
    return model


def device_map(checkpoint: Path, resident_bytes: int, device: str) -> dict[str, str]:
    """Returns what accelerate keeps on the device, in the order of use, until `resident_bytes` are full."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint, local_files_only=True))
    modules = ["model.embed_tokens", *(f"model.layers.{number}" for number in range(len(model.model.layers)))]
    modules += ["model.norm", "lm_head"]
    left, places = resident_bytes, {"model.rotary_emb": device}
    for name in modules:
        size_bytes = sum(2 * parameter.numel() for parameter in model.get_submodule(name).parameters())
        places[name] = device if size_bytes <= left else "cpu"
        left -= size_bytes if size_bytes <= left else 0
    return places


def offloaded_bytes(checkpoint: Path) -> tuple[int, int]:
    """Returns what group offloading has on the device at one time, and what it copies in a pass."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint, local_files_only=True))
    blocks = [2 * sum(parameter.numel() for parameter in layer.parameters()) for layer in model.model.layers]
    weight_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    return weight_bytes - sum(blocks) + NUM_PLACES * max(blocks), sum(blocks)


def settle(model: Any) -> None:
    """Waits until all that mball's plan streams lies in pinned memory; nothing for other ways."""
    device = _device_of(model)
    if isinstance(device, CudaDevice):
        device._tier.finish()


def pinned_bytes(model: Any) -> int:
    """Returns what lies in pinned memory for mball's copies; 0 for other ways."""
    device = _device_of(model)
    return sum(home.slab.pinned_bytes for home in device._homes.all()) if isinstance(device, CudaDevice) else 0


def _device_of(model: Any) -> Any:
    return _states[model].engine.execution.device if model in _states else None


def report(model: Any) -> dict[str, Any]:
    """Returns what the model and its process hold: mball's report if it is wrapped, and memory of host and GPU."""
    process = facts.process_memory(shares=False)
    found: dict[str, Any] = {
        "host_peak_bytes": process.peak_rss_bytes,
        "host_anonymous_bytes": process.anonymous_bytes,
        "pinned_bytes": pinned_bytes(model),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }
    if model in _states:
        said = mball.report(model)
        names = ("budget_bytes", "arena_bytes", "activation_bytes", "peak_bytes", "weight_bytes", "resident_bytes")
        names += ("streamed_bytes_per_pass", "bytes_read_last_pass", "pass_s", "compute_s", "stall_s", "predicted_s")
        names += ("steps", "graphs", "unplanned_fetches", "link_bytes_per_s", "step_graphs")
        found |= {name: getattr(said, name) for name in names}
    return found
