"""Rows of tables that steps look up where the tables lie at home, outside the arena."""

from __future__ import annotations

import torch

from mball.memory import Device
from mball.run.file_read import FileRead
from mball.run.homes import Homes


class RowsAtHome:
    """The tables that the step in use looks up rows of at their homes.

    Their pages come as they are read, and are outside the budget: they are given back when the step is left.

    Args:
        device: what compute reads in the place of a home.
        homes: where the tables lie.

    Attributes:
        are_possible: whether rows were found at home so far. Where they were not once, plans bring whole tables.
    """

    def __init__(self, device: Device, homes: Homes) -> None:
        self._device = device
        self._homes = homes
        self._asked_bytes: dict[int, int] = {}  # of each table, what the step said that it would read
        self.are_possible = True

    def view(self, weight: int) -> torch.Tensor:
        """Returns a weight as it lies at home, for a step that looks up rows of it; call `leave` when that is over.

        Where compute cannot read it there that is a copy of all of it, beside what is planned, for this once.
        """
        self._asked_bytes[weight] = 0
        reads = [FileRead.of(piece, 0) for piece in self._homes.pieces(weight)]
        mapped = self._homes.look_up(weight)
        home = self._device.rows_of(mapped, reads) if self.are_possible else None
        if home is None:
            self.are_possible = False
            home = mapped.to(self._device.place)
        with torch.inference_mode(False):
            return home.data.requires_grad_(self._homes.requires_grad[weight])

    def expect(self, weight: int, indices: torch.Tensor) -> None:
        """Says which rows the step in use looks up, before it does, so that they come all at one time and are checked.

        Args:
            weight: bound in this step; one that is bound in the arena needs no hint.
            indices: the numbers of the rows, of any shape.

        Raises:
            StorageError: the swap file has something else of them than was written there.
        """
        # The host reads the numbers, so the compute that makes them has to be over: on a CPU it is. Nobody waits.
        if weight in self._asked_bytes and self._device.reads_mappings and self._device.record().done():
            self._asked_bytes[weight] += self._homes.prefetch_rows(weight, indices)

    def leave(self) -> int:
        """Gives the pages back that were read, and returns their bytes.

        Where nobody said which rows, what the kernel mapped is counted: that may be more, neighbours in its cache.
        """
        read_bytes = 0
        for weight, asked_bytes in self._asked_bytes.items():
            held_bytes = self._homes.give_back(weight)
            read_bytes += asked_bytes or held_bytes
        self._asked_bytes = {}
        return read_bytes
