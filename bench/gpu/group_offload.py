"""diffusers' group offloading of blocks with a stream, as a schedule: room for two blocks, the next one on its way.

It is the schedule and not the package, which wants a model of its own kinds: each block's weights are copied out of
pinned memory while the block before it computes, and all that is in no block stays on the device. Nothing is allocated
in a pass and no host waits, which the package does, so it is a little faster than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

NUM_PLACES = 2


class GroupOffload:
    """The blocks of a model on a device that has room for two of them. They are called in turn, again and again.

    Args:
        model: its parameters outside `blocks` are moved to the device.
        blocks: all of one kind; their parameters are in host memory from now on, pinned where the device is a GPU.
        device: which computes.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
        self._parameters = [list(block.parameters()) for block in blocks]
        self._is_gpu = device.type == "cuda"
        self._homes = [[self._home(parameter) for parameter in block] for block in self._parameters]
        model.to(device)
        shapes = [home.shape for home in self._homes[0]]
        if any([home.shape for home in homes] != shapes for homes in self._homes):
            raise ValueError("blocks differ in the shapes of their weights; group offloading wants equal ones here")
        self._places = [[torch.empty_like(home, device=device) for home in self._homes[0]] for _ in range(NUM_PLACES)]
        self._stream = torch.cuda.Stream(device) if self._is_gpu else None
        self._came: list[Any] = [None] * NUM_PLACES  # events: a block is in its place
        self._left: list[Any] = [None] * NUM_PLACES  # events: the block in it has computed
        self._turn = 0  # blocks begun so far
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda module, args, number=number: self._begin(number))
            block.register_forward_hook(lambda module, args, output: self._end())
        self._bring(0, 0)

    def _home(self, parameter: nn.Parameter) -> torch.Tensor:
        """Takes a parameter's values; it is left empty, so that none is there twice, nor goes along by `to`."""
        host = parameter.detach().cpu()
        parameter.data = torch.empty(0, dtype=parameter.dtype)
        return host.pin_memory() if self._is_gpu else host

    def _begin(self, number: int) -> None:
        place = self._turn % NUM_PLACES
        if self._came[place] is not None:
            torch.cuda.current_stream().wait_event(self._came[place])
        for parameter, at in zip(self._parameters[number], self._places[place], strict=True):
            parameter.data = at
        self._turn += 1
        self._bring((number + 1) % len(self._parameters), self._turn % NUM_PLACES)

    def _bring(self, number: int, place: int) -> None:
        pairs = zip(self._places[place], self._homes[number], strict=True)
        if self._stream is None:
            self._copy(pairs)
            return
        with torch.cuda.stream(self._stream):
            if self._left[place] is not None:
                self._stream.wait_event(self._left[place])
            self._copy(pairs)
            self._came[place] = self._stream.record_event()

    def _copy(self, pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for at, home in pairs:
            at.copy_(home, non_blocking=True)

    def _end(self) -> None:
        if self._is_gpu:
            self._left[(self._turn - 1) % NUM_PLACES] = torch.cuda.current_stream().record_event()
