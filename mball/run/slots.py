"""What lies where in the arena, and tensors on it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from mball.memory import Arena, Event
from mball.run.homes import Homes
from mball.run.recorder import ReadRecord
from mball.run.slot_leaks import SlotView
from mball.schema import Bundle


@dataclass(slots=True, eq=False)
class Occupant:
    """A bundle at its place in the arena, and the event that makes it valid (None: it is valid).

    `planned` is False where the place was not chosen by the plan, but for an operator that came unannounced.
    """

    bundle: Bundle
    offset_bytes: int
    event: Event | None
    planned: bool = True
    views: dict[int, torch.Tensor] = field(default_factory=dict)
    record: ReadRecord | None = None

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.bundle.size_bytes

    def settle(self) -> None:
        """Says that its copy is over."""
        if self.record is not None:
            self.record.settle()
        self.event = None


class SlotViews:
    """Tensors over slots, as operators are handed them; kept by weight and place, since both come again."""

    def __init__(self, arena: Arena, homes: Homes) -> None:
        self._arena = arena
        self._homes = homes
        self._views: dict[tuple[int, int], torch.Tensor] = {}

    def of(self, weight: int, occupant: Occupant) -> torch.Tensor:
        """Returns a weight as it lies in its bundle's slot: as its home looks, and as the user's Parameter does."""
        view = occupant.views.get(weight)
        if view is None:
            place = occupant.bundle.tensors.index(weight)
            offset = occupant.offset_bytes + occupant.bundle.offsets_bytes[place]
            view = self._views.get((weight, offset))
            if view is None:
                like = self._homes.homes[weight]
                with torch.inference_mode(False):
                    length = like.span_bytes // like.tensor.element_size()
                    flat = self._arena.tensor(offset, like.tensor.dtype, (length,))
                    # No view in autograd's eyes, as a Parameter is none: ATen asks the base whether it requires grad.
                    view = flat.as_strided(like.tensor.shape, like.tensor.stride()).data
                    view.requires_grad_(self._homes.requires_grad[weight])
                self._views[(weight, offset)] = view
            occupant.views[weight] = view
        return view

    def values(self) -> Iterable[torch.Tensor]:
        """Returns all that are kept."""
        return self._views.values()

    def trim(self) -> None:
        """Keeps none if there are many: plans have come and gone."""
        if len(self._views) > 8 * len(self._homes):
            self.clear()

    def clear(self) -> None:
        """Keeps none."""
        self._views.clear()

    def handed_out(self) -> list[SlotView]:
        """Returns what tells later who still holds one."""
        names, taken_bytes = [home.name for home in self._homes.homes], self._arena.taken_bytes
        return [
            SlotView(names[weight], weakref.ref(view.untyped_storage()), taken_bytes)
            for (weight, _), view in self._views.items()
        ]
